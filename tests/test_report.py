"""experiments/table.py, run_all.py and report.py: RESULTS.md is what the logs say, to the byte;
README.md has no number that is not in it; figures by hand; and runs that are skipped, stopped, gone
on with, and marked if older code has made them."""

import json
import math
import os
import re
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest

import sample
import train_char
from experiments import bench, evidence, ideas, report, run_all, speed, table, tasks
from plumbing import cli
from plumbing.cli import Stopped, UserError

ROOT = Path(__file__).parents[1]
RESULTS = (ROOT / "experiments/RESULTS.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# ---- what is committed ---------------------------------------------------------------------------
def test_results_are_what_the_logs_say(tmp_path, monkeypatch):
    """The page, and the pictures that are drawn from logs. If this fails, as after any change of
    the code that † speaks of: python -m experiments.report"""
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "page.md").write_bytes((ROOT / "experiments/page.md").read_bytes())
    assert report.page() == RESULTS
    drawn = list((tmp_path / "pictures").glob("*.svg"))
    assert drawn
    for picture in drawn:
        assert picture.read_bytes() == (ROOT / "experiments/pictures" / picture.name).read_bytes()


def test_what_is_missing_is_named_at_the_end():
    """A section of page.md is on the page, or its heading is in the last line."""
    template = (ROOT / "experiments/page.md").read_text("utf-8")
    headings = re.findall(r"^#+ (.*)", template, re.M)
    there = re.findall(r"^#+ (.*)", RESULTS, re.M)
    _, _, last = RESULTS.partition("\nNot made yet: ")
    missing = last.rstrip(".\n").split("; ") if last else []
    assert sorted(there + missing) == sorted(headings)
    assert report.NOT_YET not in RESULTS and "{{" not in RESULTS


def test_every_log_is_in_the_table():
    """And each section with a table says where it was made."""
    logs = {item.log.name for item in table.items() if table.is_done(item)}
    assert {path.name for path in table.LOGS.iterdir()} == logs
    for part in re.split(r"^#+ ", RESULTS, flags=re.M):
        assert "\n|---" not in part or re.search(r"[Mm]ade\son\s.*,\storch\s2\.", part, re.S), part


FIGURE = r"\d[\d,]*\.\d+(?: ± \d+\.\d+)?|\d{1,3},\d{3}"  # 1.8635 ± 0.0024, 1.8635 or 1,029


def figures(text):
    """Those of prose and tables, not of commands, code and links."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|\[arXiv:[^\]]*\]", " ", text, flags=re.S)
    return {figure.replace(",", "") for figure in re.findall(FIGURE, text)}


def rounds_to(known, figure):
    """1.8635 ± 0.0024 rounds to 1.864 ± 0.002 and, without what follows, to 1.86."""
    known, figure = known.split(" ± "), figure.split(" ± ")
    return len(known) >= len(figure) and all(  # .6: of a number that was rounded itself
        abs(float(k) - float(f)) < 0.6 * 10.0 ** -len(f.partition(".")[2])
        for k, f in zip(known, figure, strict=False)
    )


def test_readme_has_no_number_of_its_own():
    """All are in RESULTS.md, perhaps with more digits."""
    known = {figure.replace(",", "") for figure in re.findall(FIGURE, RESULTS)}
    readme = (ROOT / "README.md").read_text("utf-8")
    used = figures(readme[readme.index("## Results") : readme.index("## Use it as a library")])
    assert len(used) > 12
    assert [figure for figure in used if not any(rounds_to(k, figure) for k in known)] == []
    assert rounds_to("1.8635 ± 0.0024", "1.86") and rounds_to("1.8635 ± 0.0024", "1.864 ± 0.002")
    assert not rounds_to("1.8635", "1.8635 ± 0.0024") and not rounds_to("1.8635", "1.865")


def test_what_readme_shows_was_drawn():
    """Its film: every line has been printed by a measurement."""
    readme = (ROOT / "README.md").read_text("utf-8")
    printed = (table.LOGS / "films_long.txt").read_text("utf-8").splitlines()
    printed = {line[:16] for line in printed}  # the digit of a line end is left out

    (film,) = (block for block in readme.split("```\n")[1::2] if block.startswith("film "))
    _, *rows = film.splitlines()
    assert len(rows) == 4 and {word for row in rows for word in row.split()} <= printed


def test_every_command_parses_and_no_name_is_there_twice():
    """And what an item starts from comes before it."""
    found = list(table.items())
    assert len({item.name for item in found}) == len(found)
    before = set()
    for item in found:
        assert item.needs <= before
        before.add(item.name)
        script, *argv = item.argv
        if item.is_run:
            cli.check(train_char.Settings(**cli.parse(train_char.Settings, argv, "")))
        elif script == "sample.py":
            cli.check(sample.Settings(**cli.parse(sample.Settings, argv, "")))
        elif argv[0] == "experiments.bench":
            cli.check(bench.Settings(**cli.parse(bench.Settings, argv[1:], "")))
        else:
            modules = {"evidence": evidence, "speed": speed, "ideas": ideas, "tasks": tasks}
            modules[argv[0][12:]].parse(argv[1:])


# ---- figures, by hand ----------------------------------------------------------------------------
def write_log(name, values, seed=1, machine="a machine", code=None, **settings):
    """values: {kind: [validation at step 10, 20, ..]}."""
    (item,) = (item for item in table.items() if item.name == f"{name}_s{seed}")
    known = dict(model="arm", max_iters=20, batch_size=4, seed=seed, dtype="float32", compile=False,
                 n_layer=1, n_embd=2, seq_len=3)  # fmt: skip
    header = dict(settings=known | settings, hardware=machine, command=item.command)
    header["code"] = code or table.todays_code(item)
    rows = [
        dict(step=10 * (i + 1), val=value, val_error=0.1, kind=kind)
        for kind, found in values.items()
        for i, value in enumerate(found)
    ]
    rows.append(dict(step=20, seconds=10.0 * seed))
    item.log.write_text("\n".join(json.dumps(row) for row in (header, *rows)) + "\n")


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Three seeds of the ARM and of the MDM, one of three of a longer ARM."""
    monkeypatch.setattr(table, "LOGS", tmp_path)
    models = {name: "--model arm" for name in ("arm", "mdm", "vector", "time_arm")}
    monkeypatch.setattr(table, "MODELS", models)
    train = [("", "arm mdm time_arm", (1, 2, 3), "--max_iters 20"), ("", "vector", (1,), "")]
    monkeypatch.setattr(table, "TRAIN", train)
    monkeypatch.setattr(table, "MEASURE", {"speed": "speed runs/arm_s2 runs/mdm_s1"})
    monkeypatch.setattr(report, "HERE", tmp_path)
    for seed, add in ((1, 0.0), (2, 0.3), (3, 0.6)):
        write_log("arm", {"exact": [3 + add, 2 + add]}, seed)
        other = {"bound": [2.5 - add, 4], "exact, left": [7, 1]}  # best at step 10
        write_log("mdm", other, seed, model="lomdm")
    write_log("time_arm", {"exact": [9]})
    return tmp_path


def test_figures(logs):
    error = statistics.stdev([2, 2.3, 2.6]) / math.sqrt(3)
    assert report.nats("arm") == f"2.3000 ± {error:.4f}" == "2.3000 ± 0.1732"
    assert report.nats("arm", "exact", "x10") == "23.0000 ± 1.7321"
    assert report.nats("mdm") == "2.2000 ± 0.1732"
    assert report.nats("mdm", "left") == "7.0000 ± 0.0000" and report.nats("time_arm") == "9.0000"
    lines = report.losses("arm", "mdm", "x2").splitlines()
    assert lines[2] == "| ARM | 20 x 4 | 10 | 4.6000 ± 0.3464 | 3 | exact |"
    assert lines[3] == "| MDM | 20 x 4, a third of them twice | 10 | 4.4000 ± 0.3464 | 3 | bound |"
    assert lines[4].endswith("| exact, left |") and lines[5] == "" and len(lines) == 7
    one = "| ARM | 20 x 4 | 10 | 18.0000 (± 0.2000 over windows) | 1 | exact |"
    assert report.losses("time_arm", "x2").splitlines()[2] == one
    size = "1 layers, 2 wide, 3 tokens of context, float32"
    assert lines[6] == f"*{size}. Made on a machine. Logs: arm, mdm.*"


def test_differences_are_those_of_seeds(logs):
    """2 - 2.5, 2.3 - 2.2 and 2.6 - 1.9."""
    lines = report.pairs("arm-mdm", "arm-time_arm").splitlines()
    error = statistics.stdev([-0.5, 0.1, 0.7]) / math.sqrt(3)
    assert lines[2] == f"| ARM − MDM | +0.1000 ± {error:.4f} | 3 | exact − bound |"
    assert lines[3] == "| ARM − ARM | -7.0000 | 1 | exact |"
    per_text = report.pairs("arm-mdm", "x10").splitlines()
    assert "nats per token ±" in lines[0] and "nats a text ±" in per_text[0]
    assert per_text[2] == f"| ARM − MDM | +1.0000 ± {10 * error:.4f} | 3 | exact − bound |"

    # A pair that has not been made is no row.
    assert report.pairs("arm-mdm", "vector-mdm") == report.pairs("arm-mdm")
    assert report.pairs("vector-mdm") == report.NOT_YET

    # The word chooses a kind: 1 - 7 at step 20, where this one is best, less 7 at step 10.
    write_log("vector", {"exact, left": [8, 1], "bound": [5, 4]})
    lines = report.pairs("left:vector-mdm", "vector-mdm").splitlines()
    assert lines[2].endswith("| -6.0000 | 1 | exact, left |")
    assert lines[3].endswith("| -1.5000 | 1 | exact, left − bound |")


def test_older_code_and_other_machines_are_marked(logs):
    """A run is old if its own code is not today's, a measurement also if a run of it is old."""
    write_log("arm", {"exact": [3]}, 3, code="older")
    write_log("arm", {"exact": [3]}, 2, machine="another")
    made = "Made on a machine, arm_s2 on another, arm_s3 on a machine †. Logs: arm, mdm."
    assert made in report.losses("arm", "mdm")
    assert "†" not in report.losses("mdm")

    *_, item = table.items()
    item.log.write_text(f"{table.stamp(item)}\na machine\narm 1.5\n")
    assert report.log("speed") == "*[speed.txt](logs/speed.txt): made on a machine.*"
    write_log("mdm", {"bound": [3]}, 1, code="older")
    assert report.log("speed").endswith("a machine †.*")
    write_log("mdm", {"bound": [3]}, 1)
    item.log.write_text(f"{item.command}  # older\na machine\narm 1.5\n")
    assert report.log("speed").endswith("a machine †.*")


def test_older_code_that_trains_the_same_is_todays(logs, monkeypatch):
    """Also over several changes, and where one was taken back."""
    *_, item = (item for item in table.items() if item.name == "arm_s3")
    today = table.todays_code(item)
    monkeypatch.setattr(table, "SAME", logs / "same.txt")
    table.SAME.write_text(f"first second\nsecond first\nsecond {today}\nthird fourth\n")
    for code, mark in (("first", ""), ("second", ""), ("third", "†"), ("fourth", "†")):
        write_log("arm", {"exact": [3]}, 3, code=code)
        assert ("†" in report.losses("arm")) == bool(mark), code


def test_what_measurements_say(logs):
    """Each match is a row, runs have their labels, and numbers may have errors."""
    *_, item = table.items()
    printed = "arm_s1   left  1.25 ± 0.01\nmdm_s1         -2,345\nother 7\n"
    item.log.write_text(f"{table.stamp(item)}\na machine\n{printed}")
    rows = report.rows("speed", r"^(\w+_s1)", "(?:(left)", ")?NUM").splitlines()
    assert rows[:2] == ["| ARM | left | 1.25 ± 0.01 |", "| MDM |  | -2,345 |"]
    assert rows[2] == "" and rows[3].startswith("*[speed.txt]") and len(rows) == 4
    assert report.find("speed", r"^\w+_s1", "(?:left", ")?NUM") == "1.25 ± 0.01, -2,345"
    with pytest.raises(UserError, match="what speed printed has no .gone"):
        report.find("speed", "(gone)")


def test_what_is_missing_or_made_otherwise_is_said(logs, monkeypatch):
    """Names that the table does not have are mistakes. What has not been made by today's command
    is not there yet."""
    for word, name in ((report.losses, "amr"), (report.pairs, "arm-mmd"), (report.nats, "x")):
        with pytest.raises(UserError, match=r"table\.py has no run of the name"):
            word(name)
    with pytest.raises(UserError, match="no measurement of the name sped"):
        report.log("sped")
    with pytest.raises(UserError, match="mdm has no figure right, but bound, exact, left"):
        report.nats("mdm", "right")

    monkeypatch.setattr(table, "TRAIN", [("", "arm mdm", (1, 2, 3), "--max_iters 30")])
    missing = [report.nats("arm"), report.losses("arm"), report.pairs("arm-mdm")]
    missing += [report.curves("c.svg", "arm"), report.rows("speed", "x"), report.log("speed")]
    assert missing == [report.NOT_YET] * 6


def test_the_page_is_filled_in(logs):
    page = "ARM {{nats\narm}}.\n\n{{losses arm}}\n\n{{curves c.svg arm mdm}}\n"
    (logs / "page.md").write_text(page)
    report.main([])
    text = (logs / "RESULTS.md").read_text("utf-8")
    assert text.startswith("ARM 2.3000 ± 0.1732.\n\n| model |")
    assert text.endswith("](pictures/c.svg)\n")
    assert "MDM" in (logs / "pictures" / "c.svg").read_text()
    (logs / "page.md").write_text("{{nets arm}}")
    with pytest.raises(UserError, match="nets is none of losses, pairs"):
        report.page()


def test_a_section_without_its_figures_is_left_out(logs):
    page = "A\n\n# B\n\n{{nats arm}}\n\n## C\n\nsee {{find speed (x)}}\n\n# E\n\n" + "word " * 30
    (logs / "page.md").write_text(page)
    kept, _, last = report.page().partition("---\n\n")
    assert kept.startswith("A\n\n# B\n\n2.3000 ± 0.1732\n\n# E\n\nword word")
    assert max(map(len, kept.splitlines())) <= 99 and last == "Not made yet: C.\n"


# ---- what is left to do --------------------------------------------------------------------------
@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a table of its own: a list that tests fill."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "runs").mkdir()
    for name in ("train_char.py", "lomdm.py", "a3.py", "beyond"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "text.txt").write_text("to be or not to be " * 60)
    (tmp_path / "experiments").mkdir()
    everything = []
    monkeypatch.setattr(table, "items", lambda: iter(everything))
    monkeypatch.setattr(report, "main", lambda _: None)
    return everything


def training(name, steps=3, *more):
    words = (
        "train_char.py --model arm --device cpu --n_layer 1 --n_embd 8 --n_head 2 --seq_len 8 "
        f"--data text.txt --max_iters {steps} --eval_interval {steps} --log_interval 20 "
        f"--num_samples 0 --data_dir tokens --out_dir runs/{name}"
    )
    return table.Item(name, (*words.split(), *more))


def measuring(name, code, *more):
    return table.Item(name, ("-c", code, *more))


@pytest.mark.slow
def test_all_is_made_once(work, capsys):
    """A run, and a measurement of it. Then nothing is left, until a command changes."""
    work += [training("r"), measuring("m", "print(1); print(3)", "runs/r")]
    run_all.main([])
    assert "2 of 2: m done" in capsys.readouterr().out
    command, machine, *printed = Path("experiments/logs/m.txt").read_text().splitlines()
    assert command == f"$ python -c 'print(1); print(3)' runs/r  # {table.todays_code(work[1])}"
    assert "CPU" in machine and printed == ["1", "3"]
    header, rows = table.read_log(work[0])
    assert "CPU" in header["hardware"] and rows[-1]["step"] == 3

    run_all.main(["--list"])
    assert capsys.readouterr().out.startswith("0 left, and 0 made by older code")
    work[1] = measuring("m", "print(4)", "runs/r")
    run_all.main(["--list"])
    assert "m                         new         $ python -c 'print(4)' runs/r\n1 left" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_older_code_is_kept_and_made_again_if_asked_for(work, monkeypatch, capsys):
    work += [training("r"), measuring("m", "print(1)", "runs/r"), measuring("n", "print(2)")]
    run_all.main([])
    code = table.todays_code(work[2])
    monkeypatch.setattr(table, "todays_code", lambda item: "newer")
    capsys.readouterr()
    run_all.main(["--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in listed[:3]] == [[n, "older", "code"] for n in "rmn"]
    assert listed[3].startswith("0 left, and 3 made by older code")

    run_all.main(["--again", "--only", "m"])  # the measurement, and the run that it needs
    assert "# newer" in Path("experiments/logs/m.txt").read_text()
    assert f"# {code}" in Path("experiments/logs/n.txt").read_text()
    assert Path("runs/r.1/ckpt.pt").is_file()  # of the older code


@pytest.mark.slow
def test_what_fails_is_named_and_what_needs_it_is_left(work, capsys):
    bad = training("bad", 3, "--beta2", "7")
    work += [bad, measuring("needs", "print(1)", "runs/bad"), measuring("good", "print(1)")]
    with pytest.raises(UserError, match="failed: bad$"):
        run_all.main([])
    assert "bad failed, see runs/bad.err" in capsys.readouterr().out
    assert "beta2" in Path("runs/bad.err").read_text()
    assert [path.name for path in Path("experiments/logs").iterdir()] == ["good.txt"]


@pytest.mark.slow
def test_a_run_is_stopped_gone_on_with_and_kept(work, capsys):
    """By a signal here, and by --minutes. Nothing is measured of a run that has not ended."""
    work += [training("r", 3000), measuring("m", "print(1)", "runs/r")]

    def stop():  # as soon as it is under way
        log = Path("runs/r/log.jsonl")
        while not log.is_file() or '"step": 100,' not in log.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Stopped) as e:
        run_all.main([])
    assert e.value.args == ("stopped", signal.SIGTERM)
    assert not Path("experiments/logs").exists()
    run_all.main(["--list"])
    assert "r                         begun" in capsys.readouterr().out
    run_all.main(["--minutes", "0"])
    assert "2 left; the same command goes on" in capsys.readouterr().out

    run_all.main([])
    assert not Path("runs/r.1").exists()  # the same run, not another one
    _, rows = table.read_log(work[0])
    steps = [row["step"] for row in rows if "val" not in row]
    assert rows[-1]["step"] == 3000 and len(steps) == len(set(steps)) >= 150


@pytest.mark.slow
@pytest.mark.parametrize("steps,code", [(5, None), (3, "older")])
def test_nobody_goes_on_with_another_run(work, steps, code):
    """A run by other flags, or that was begun by other code, is set aside."""
    Path("runs/r").mkdir()
    Path("runs/r/last.pt").write_text("the other")
    work += [training("r")]
    begun = training("r", steps).command
    Path("runs/r.begun").write_text(f"{begun}  # {code or table.todays_code(work[0])}")
    run_all.main([])
    assert table.is_done(work[0]) and Path("runs/r.1/last.pt").read_text() == "the other"


@pytest.mark.slow
def test_a_run_is_made_again_for_its_checkpoint(work):
    """In a fresh clone there are logs, but no checkpoints. The first log stands."""
    work += [training("r"), measuring("m", "print(1)", "runs/r")]
    run_all.main(["--only", "r"])
    first = Path("experiments/logs/r.jsonl").read_text()
    Path("runs/r/ckpt.pt").unlink()
    assert run_all.to_do([work[0]], again=False) == []
    assert run_all.to_do([work[1]], again=False) == work
    run_all.main([])
    assert table.is_done(work[1]) and Path("experiments/logs/r.jsonl").read_text() == first


def test_two_share_the_list(work):
    """What another process makes is left to it."""
    work += [measuring("one", "print(1)"), measuring("two", "print(2)")]
    held = run_all.checkpoint.lock(Path("runs/one.lock"), wait=False)
    run_all.main([])
    held.close()
    assert not table.is_done(work[0]) and table.is_done(work[1])


def test_mistakes(monkeypatch, tmp_path, capsys):
    for flags, message in (
        ("--only rows,nothing --list", "--only nothing: there is none of that name"),
        ("--minutes -1 --list", "--minutes must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            run_all.main(flags.split())
    run_all.main(["--list", "--only", "count*, rows", "--device", "cpu"])
    assert "left, and" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="start it where train_char.py is"):
        run_all.main(["--list"])


def test_where_a_curve_first_reaches_a_level():
    points = [(500, 3.0), (1000, 2.0), (1500, 2.2), (2000, 1.0)]
    assert report.reached(points, 2.5) == 750 and report.reached(points, 1.6) == 1750
    assert report.reached(points, 3.5) == 500  # at the latest
    assert math.isnan(report.reached(points, 0.5))
