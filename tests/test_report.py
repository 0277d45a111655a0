"""experiments/run_all.py and report.py: RESULTS.md is what the logs say, to the byte; README.md has
no number that is not in it; figures by hand; and runs that are skipped, stopped, gone on with."""

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
from experiments import bench, evidence, report, run_all, speed
from plumbing import cli
from plumbing.cli import Stopped, UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# ---- what is committed ---------------------------------------------------------------------------
def test_results_are_what_the_logs_say(tmp_path, monkeypatch):
    """The page, and the pictures that are drawn from logs."""
    pictures = ROOT / "experiments" / "pictures"
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "page.md").write_bytes((ROOT / "experiments/page.md").read_bytes())
    assert report.page() == (ROOT / "experiments" / "RESULTS.md").read_text("utf-8")
    drawn = sorted((tmp_path / "pictures").glob("*.svg"))
    assert {picture.name for picture in drawn} == drawings()
    for picture in drawn:
        assert picture.read_bytes() == (pictures / picture.name).read_bytes()


def drawings():
    """The pictures that words of page.md draw, in sections that are there."""
    template = (ROOT / "experiments" / "page.md").read_text("utf-8")
    words = " ".join(re.findall(r"\{\{((?:curves|scaling) .*?)\}\}", template))
    results = (ROOT / "experiments" / "RESULTS.md").read_text("utf-8")
    return {name for name in re.findall(r"\w+\.svg", words) if f"/{name})" in results}


def test_pictures_exist():
    for path in ("README.md", "experiments/RESULTS.md", "experiments/TRIED.md"):
        text = (ROOT / path).read_text("utf-8")
        for picture in re.findall(r"\((\S*pictures/\S+)\)", text):
            assert (ROOT / path).parent.joinpath(picture).is_file()


def test_tables_say_where_they_were_made():
    """Hardware, steps, seeds, errors, and what a figure is, in every section with a table."""
    text = (ROOT / "experiments" / "RESULTS.md").read_text("utf-8")
    with_tables = [part for part in re.split(r"^#+ ", text, flags=re.M) if "\n|---" in part]
    assert len(with_tables) >= 9
    for part in with_tables:
        assert re.search(r"CPU cores .*torch \d", part), part
        assert re.search(r"[\d,]+ steps of", part), part
        assert " ± seeds" in part or "seed 1" in part or "one seed" in part, part
        assert re.search("exact|bound", part) and " ± " in part, part


def test_what_is_missing_is_named():
    """A CPU cannot make the part on the GPU; all else is there."""
    text = (ROOT / "experiments" / "RESULTS.md").read_text("utf-8")
    assert report.NOT_YET not in text
    missing = re.findall(r"\*([^*]+)\*", text.partition("# Not there yet")[2])
    assert set(missing) == {
        "On a GPU: Tinyshakespeare, nanoGPT's size",
        "On a GPU: WikiText-2 in GPT-2's tokens, GPT-2's size",
        "On a GPU: time and memory",
    }


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
    results = (ROOT / "experiments" / "RESULTS.md").read_text("utf-8")
    known = {figure.replace(",", "") for figure in re.findall(FIGURE, results)}
    readme = (ROOT / "README.md").read_text("utf-8")
    used = figures(readme[readme.index("## Results") : readme.index("## Use it as a library")])
    assert len(used) > 12
    assert [figure for figure in used if not any(rounds_to(k, figure) for k in known)] == []
    assert rounds_to("1.8635 ± 0.0024", "1.86") and rounds_to("1.8635 ± 0.0024", "1.864 ± 0.002")
    assert not rounds_to("1.8635", "1.8635 ± 0.0024") and not rounds_to("1.8635", "1.865")


def test_what_readme_shows_was_drawn():
    """Its strips and its film: every line has been printed by a measurement."""
    readme = (ROOT / "README.md").read_text("utf-8")
    measured = [run_all.LOGS / f"{name}.txt" for name in ("strips", "films")]
    printed = {
        word.rstrip("↵")
        for path in measured
        for line in path.read_text("utf-8").splitlines()
        for word in (line, line[14:])  # behind the name of a run
    }

    strips, *others = readme.split("```\n")[1::2]
    strips = [line[8:] for line in strips.splitlines()]
    assert len(strips) == 4 and set(strips) <= printed
    (film,) = (block for block in others if block.startswith("film "))
    _, *rows = film.splitlines()
    assert len(rows) == 4 and {word for row in rows for word in row.split()} <= printed


# ---- figures, by hand ----------------------------------------------------------------------------
RUNS = {"arm": ("--model arm", 1), "mdm": ("--model mdm", 1), "arm_time": ("--model arm", 1)}


def write_log(name, values, seed=1, error=0.1, **settings):
    """values: {kind: [validation at step 10, 20, ..]}."""
    (item,) = (i for i in run_all.items(cuda=False) if i.name == f"{name}_s{seed}")
    known = dict(model="arm", max_iters=20, batch_size=4, seed=seed, dtype="float32", compile=False,
                 n_layer=1, n_embd=2, seq_len=3)  # fmt: skip
    header = dict(settings=known | settings, hardware="a machine", command=run_all.shown(item.argv))
    rows = [
        dict(step=10 * (i + 1), val=value, val_error=error, kind=kind)
        for kind, found in values.items()
        for i, value in enumerate(found)
    ]
    rows.append(dict(step=20, seconds=10.0 * seed))
    out = run_all.LOGS / item.name
    out.mkdir(parents=True)
    (out / "log.jsonl").write_text("\n".join(json.dumps(row) for row in (header, *rows)) + "\n")


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Three seeds of the ARM and of the MDM, one of three of a longer ARM."""
    monkeypatch.setattr(run_all, "LOGS", tmp_path)
    monkeypatch.setattr(run_all, "GROUPS", [("--max_iters 20", range(1, 4), RUNS)])
    monkeypatch.setattr(report, "HERE", tmp_path)
    for seed, add in ((1, 0.0), (2, 0.3), (3, 0.6)):
        write_log("arm", {"exact": [3 + add, 2 + add]}, seed)
        other = {"bound": [2.5 - add, 4], "exact, left": [7, 1]}  # best at step 10
        write_log("mdm", other, seed, model="lomdm")
    write_log("arm_time", {"exact": [9]})
    return tmp_path


def test_figures(logs):
    error = statistics.stdev([2, 2.3, 2.6]) / math.sqrt(3)
    assert report.nats("arm") == f"2.3000 ± {error:.4f}" == "2.3000 ± 0.1732"
    assert report.nats("arm", "exact", "10") == "23.0000 ± 1.7321"
    assert report.nats("mdm") == "2.2000 ± 0.1732"
    assert report.nats("mdm", "left") == "7.0000 ± 0.0000" and report.nats("arm_time") == "9.0000"
    assert report.each("mdm", "10") == "25.0000, 22.0000, 19.0000"
    table = report.losses("arm", "mdm", "x2").splitlines()
    assert table[2] == "| ARM | 20 x 4 | 10 | 4.6000 ± 0.3464 | 3 | 0.2000 | exact |"
    assert table[3] == "| MDM | 20 x 4, twice | 10 | 4.4000 ± 0.3464 | 3 | 0.2000 | bound |"
    assert table[4].endswith("| exact, left |") and len(table) == 5


def test_differences_are_those_of_seeds(logs, monkeypatch):
    """2 - 2.5, 2.3 - 2.2 and 2.6 - 1.9."""
    table = report.pairs("arm-mdm", "arm-arm_time").splitlines()
    error = statistics.stdev([-0.5, 0.1, 0.7]) / math.sqrt(3)
    assert table[2] == f"| ARM − MDM | +0.1000 ± {error:.4f} | 3 | exact − bound |"
    assert table[3] == "| ARM − ARM, equal time | -7.0000 | 1 | exact |" and len(table) == 4
    per_text = report.pairs("arm-mdm", "x10").splitlines()
    assert "nats per token ±" in table[0] and "nats a text ±" in per_text[0] and len(per_text) == 3
    assert per_text[2] == f"| ARM − MDM | +1.0000 ± {10 * error:.4f} | 3 | exact − bound |"
    monkeypatch.setitem(RUNS, "mdm_2", ("--model mdm", 1))  # 1 - 7 at step 20, 7 at step 10
    write_log("mdm_2", {"exact, left": [8, 1], "bound": [5, 4]})
    table = report.pairs("left:mdm_2-mdm", "mdm_2-mdm").splitlines()
    assert table[2] == "| mdm_2 − MDM | -6.0000 | 1 | exact, left |"
    assert table[3] == "| mdm_2 − MDM | -1.5000 | 1 | exact, left − bound |"


def test_what_is_missing_or_made_otherwise_is_said(logs, monkeypatch):
    for word, names in (
        (report.losses, ["amr"]),
        (report.pairs, ["arm-mmd"]),
        (report.nats, ["x"]),
    ):
        with pytest.raises(UserError, match="has no run of the name"):
            word(*names)
    with pytest.raises(UserError, match="mdm has no figure right, but bound, exact, left"):
        report.nats("mdm", "right")
    with pytest.raises(UserError, match="two curves are ARM"):
        report.curves("c.svg", "arm", "arm")
    changed = [("--max_iters 30", range(1, 4), RUNS)]  # all logs are old now
    monkeypatch.setattr(run_all, "GROUPS", changed)
    assert report.nats("arm") == report.made("arm") == report.NOT_YET
    assert report.NOT_YET in report.losses("arm") and report.NOT_YET in report.steps("arm")
    assert report.NOT_YET in report.pairs("arm-mdm")
    assert report.curves("c.svg", "arm") == report.NOT_YET


def test_a_power_law_is_found():
    slope, error, at_0 = report.power_law([(x, 3 - 0.25 * x) for x in (1, 2, 4, 8)])
    assert (slope, error, at_0) == pytest.approx((-0.25, 0, 3), abs=1e-12)
    slope, error, at_0 = report.power_law([(0, 0), (1, 0), (2, 3)])  # by hand
    assert (slope, error, at_0) == pytest.approx((1.5, math.sqrt(1.5 / 2), -0.5))


def test_loss_against_compute(logs, monkeypatch):
    """Models whose loss falls with the power -1/2 and -1/4 of 2 and 4 MFLOP a token and more."""
    monkeypatch.setattr(report, "SIZES", [(1, 2), (1, 4), (1, 8)])
    monkeypatch.setattr(report, "FIVE", {"arm": 0, "a3": 0, "mdm": 0})
    names = [f"{name}_1x{width}" for name in ("arm", "a3", "mdm") for width in (2, 4, 8)]
    sizes = {name: ("--model arm", 1) for name in names}
    monkeypatch.setattr(run_all, "GROUPS", [("", [1], sizes)])
    monkeypatch.setattr(run_all, "MEASURES", {f"count_1x{w}": ("bench", 1) for w in (2, 4, 8)})
    for width in (2, 4, 8):
        (logs / f"count_1x{width}.txt").write_text(
            f"$ python -m experiments.bench\narm       0.1M   {width}.0   1\n"
            f"mdm       0.1M   {width}.0   1\n"
            f"loa3     0.1M  {1000 * width:,}.0  1\n"
        )
        write_log(f"arm_1x{width}", {"exact": [10 * (width * 240) ** -0.5]})
        write_log(f"a3_1x{width}", {"exact": [10 * (width * 240_000) ** -0.25]})
        off = 1.3 if width == 4 else 1  # from its law, so that a steeper slope says little
        write_log(f"mdm_1x{width}", {"bound": [20 * off * (width * 240) ** -0.55]})
    text = report.scaling("s.svg")
    assert "| ARM | -0.5000 ± 0.0000 |  | exact |" in text
    assert "| A3 | -0.2500 ± 0.0000 | never | exact |" in text
    assert " FLOP, but see the errors | bound |" in text
    assert f"| 1x2 | {10 * 480**-0.5:.4f} ± 0.1000, 0.0 |" in text  # 2 MFLOP, 20 x 4 x 3 tokens
    assert f"{10 * 1_920_000**-0.25:.4f} ± 0.1000, 1.9 |" in text


def test_what_measurements_say(logs, monkeypatch):
    """As long as they are of today's runs, by today's command."""
    measures = {"speed": ("speed runs/arm_s2 runs/mdm_s1", 1), "gone": ("speed runs/arm_s1", 1)}
    monkeypatch.setattr(run_all, "MEASURES", measures)
    monkeypatch.setattr(run_all, "ALONE", {"alone": ("bench", 1)})
    of = {item.name: run_all.heading(item) for item in run_all.items(cuda=False)}
    (logs / "speed.txt").write_text(f"{of['speed']}\na machine\narm   3.5 (1.0)\n")
    assert report.find("speed", r"^arm\s+([\d.]+)") == "3.5"
    with pytest.raises(UserError, match="has no mdm"):
        report.find("speed", "mdm (.)")
    assert report.find("gone", "(.)") == report.NOT_YET and report.NOT_YET in report.output("gone")
    with pytest.raises(UserError, match="has no measurement of the name sped"):
        report.output("sped")
    size = "1 layers, 2 wide, 3 tokens of context, 20 steps of 4 windows"
    text = f"```\n{of['speed']}\na machine\narm   3.5 (1.0)\n```"
    assert report.output("speed") == f"{text}\n\n*arm_s2, mdm_s1: {size}.*"
    (logs / "alone.txt").write_text("$ python -m experiments.bench\n")
    assert report.output("alone") == "```\n$ python -m experiments.bench\n```"  # needs no runs
    assert report.made("arm") == f"{size}; a machine, float32"
    with (logs / "mdm_s1" / "log.jsonl").open("a") as log:  # another run, of the same name
        log.write("{}\n")
    assert report.find("speed", "3") == report.NOT_YET
    measures["gone"] = "speed runs/arm_s1 runs/arm_time_s2", 1  # and more runs, not there yet
    (logs / "gone.txt").write_text(f"{of['gone']}\na machine\n")
    assert report.NOT_YET in report.output("gone")


def test_seeds_made_elsewhere_are_named(logs):
    log = logs / "mdm_s2" / "log.jsonl"
    log.write_text(log.read_text().replace("a machine", "another"))
    note = "*On another: MDM (seed 2); all others on a machine.*"
    assert report.losses("arm", "mdm").splitlines()[-2:] == ["", note]
    assert "another" not in report.losses("arm", "arm_time")


def test_a_run_as_it_goes_on(logs):
    table = report.steps("mdm").splitlines()
    assert table[0] == "| step | bound ± windows | exact, left ± windows |"
    assert table[2] == "| 10 | 2.5000 ± 0.1000 | 7.0000 ± 0.1000 |"
    assert table[3] == "| 20 | 4.0000 ± 0.1000 | 1.0000 ± 0.1000 |" and len(table) == 4


def test_the_page_is_filled_in(logs):
    (logs / "page.md").write_text("ARM {{nats arm}}.\n{{losses arm}}\n{{curves c.svg arm mdm}}\n")
    report.main([])
    text = (logs / "RESULTS.md").read_text("utf-8")
    assert text.startswith("ARM 2.3000 ± 0.1732.\n| model |") and text.endswith(
        "](pictures/c.svg)\n"
    )
    assert "MDM" in (logs / "pictures" / "c.svg").read_text()
    (logs / "page.md").write_text("{{nets arm}}")
    with pytest.raises(UserError, match="nets is none of losses, pairs"):
        report.page()


def test_a_section_without_its_figures_is_left_out(logs):
    (logs / "page.md").write_text("A\n# B\n{{nats arm}}\n## C\nsee {{find rows (x)}}\n#. D\n# E\n")
    assert report.page() == (
        "A\n# B\n2.3000 ± 0.1732\n# E\n# Not there yet\n\n"
        "`python -m experiments.run_all --list`, with `--device cuda` for a GPU, says what is left "
        "to be made for: *C*\n"
    )


# ---- what is left to do --------------------------------------------------------------------------
@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "runs").mkdir()
    return tmp_path


def measure(name, code, *more, seconds=1, alone=False):
    return run_all.Item(name, ("-c", code, *more), seconds, alone)


def do(*items, minutes=1.0, workers=2):
    return run_all.do(list(items), workers, time.time() + 60 * minutes, cuda=False)[0]


@pytest.mark.parametrize("cuda", [False, True])
def test_every_command_parses_and_no_name_is_there_twice(cuda):
    found = list(run_all.items(cuda))
    names = [item.name for item in found]
    assert len(set(names)) == len(names)
    folders = {f"runs/{name}" for name in names}
    for item in found:
        assert {w for w in item.argv if w.startswith("runs/")} <= folders
        if run_all.is_run(item):
            cli.check(train_char.Settings(**cli.parse(train_char.Settings, item.argv[1:], "")))
        elif item.argv[0] == "sample.py":
            cli.check(sample.Settings(**cli.parse(sample.Settings, item.argv[1:], "")))
        elif item.argv[1] == "experiments.bench":
            cli.check(bench.Settings(**cli.parse(bench.Settings, item.argv[2:], "")))
        elif item.argv[1] != "pytest":
            {"evidence": evidence, "speed": speed}[item.argv[1][12:]].parse(item.argv[2:])


def test_a_measurement_is_made_once(work):
    item = measure("one", "print(1); print(3)")
    assert run_all.state(item) == "new" and do(item) == []
    text = (work / "experiments/logs/one.txt").read_text().splitlines()
    assert text[0] == "$ python -c 'print(1); print(3)'"
    assert "CPU" in text[1] and text[2:] == ["1", "3"]
    assert run_all.state(item) == "done"
    assert run_all.state(measure("one", "print(4)")) == "new"  # another command


def test_a_measurement_is_made_anew_after_its_runs(work):
    item, log = measure("one", "print(1)", "runs/a"), work / "experiments/logs/a/log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("{}")
    assert do(item) == [] and run_all.state(item) == "done"
    log.write_text('{"step": 1}')
    assert run_all.state(item) == "new"


def test_what_fails_takes_along_what_needs_it(work, capsys):
    bad = measure("bad", "import sys; print('so'); print('why', file=sys.stderr); exit(3)")
    needs, too = measure("needs", "print(1)", "runs/bad"), measure("too", "print(1)", "runs/needs")
    good = measure("good", "print(1)", alone=True)
    assert do(bad, needs, too, good) == ["bad", "needs", "too"]
    said = capsys.readouterr().out
    assert "bad failed, see runs/bad.err" in said and "too is left out" in said
    assert (work / "runs/bad.err").read_text() == "why\n"
    assert [p.name for p in (work / "experiments/logs").iterdir()] == ["good.txt"]


def test_alone_means_alone(work):
    """Each writes when it began and ended. d and a are alone, though b is longer than c."""
    code = "import time; print(time.time()); time.sleep({}); print(time.time())"
    of = {name: code.format(seconds) for name, seconds in dict(a=0.2, b=0.8, c=0.2, d=0.2).items()}
    alone = dict(a=True, b=False, c=False, d=True)
    do(*(measure(name, of[name], alone=alone[name]) for name in "abcd"), workers=4)
    spans = {
        name: [float(t) for t in (work / f"experiments/logs/{name}.txt").read_text().split()[-2:]]
        for name in "abcd"
    }

    def overlap(one, other):
        return spans[one][0] < spans[other][1] and spans[other][0] < spans[one][1]

    assert overlap("b", "c")
    for name in "ad":
        assert not any(overlap(name, other) for other in set("abcd") - {name})


def test_it_stops_in_time(work):
    began = time.time()
    do(measure("slow", "import time; time.sleep(60)"), minutes=0.01)
    assert time.time() - began < 10 and not (work / "experiments").exists()


@pytest.fixture
def run(work):
    """A training run as an item."""
    (work / "train_char.py").symlink_to(ROOT / "train_char.py")
    (work / "text.txt").write_text("to be or not to be " * 60)
    words = (
        "train_char.py --model arm --device cpu --n_layer 1 --n_embd 8 --n_head 2 --seq_len 8 "
        "--data text.txt --max_iters 2000 --eval_interval 1000 --num_samples 0 --seed 1 "
        "--data_dir tokens --out_dir runs/r"
    )
    return run_all.Item("r", tuple(words.split()), 60, False)


def test_a_run_is_stopped_gone_on_with_and_kept(run, work):
    def stop():  # as soon as it is under way
        while (
            not (work / "runs/r/log.jsonl").is_file()
            or '"step": 100,' not in (work / "runs/r/log.jsonl").read_text()
        ):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert run_all.state(run) == "new" and do(run) == []
    assert run_all.state(run) == "begun" and not (work / "experiments").exists()
    assert do(run) == [] and run_all.state(run) == "done"
    assert not (work / "runs/r.1").exists()  # the same run, not another one
    log = (work / "experiments/logs/r/log.jsonl").read_text().splitlines()
    header, *rows = (json.loads(line) for line in log)
    assert "CPU" in header["hardware"] and rows[-1]["step"] == 2000
    steps = [row["step"] for row in rows if "val" not in row]
    assert len(steps) == len(set(steps)) >= 200  # none was made twice
    other = run._replace(argv=(*run.argv, "--dropout", "0.1"))
    assert run_all.state(other) == "new"
    assert run_all.state(run._replace(argv=run.argv[:-2])) == "new"  # a flag less


def test_runs_that_a_measurement_needs_are_made_again(run, work):
    """In a fresh clone there are logs, but no checkpoints."""
    log = work / "experiments/logs/r/log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps(dict(command=run_all.shown(run.argv))) + "\n")
    item = measure("one", "print(1)", "runs/r")
    assert run_all.to_do([run], [run, item]) == []
    assert run_all.to_do([item], [run, item]) == [run, item]
    first = log.read_text()
    run_all.keep(run, "another machine")  # done again: what is measured of the first stays true
    assert log.read_text() == first
    (work / "runs/r").mkdir()
    (work / "runs/r/ckpt.pt").touch()
    assert run_all.to_do([item], [run, item]) == [item]


def test_nobody_goes_on_with_another_run(run, work):
    """A run with other flags that dies before it has moved the earlier one aside."""
    (work / "runs/r").mkdir()
    (work / "runs/r/last.pt").write_text("of the earlier run")
    (work / "runs/r.command").write_text(run_all.shown(run.argv))
    log = work / "experiments/logs/r/log.jsonl"
    log.parent.mkdir(parents=True)
    log.touch()  # cut off at its very beginning
    assert run_all.state(run) == "begun"
    other = run._replace(argv=(*run.argv, "--beta1", "7"))
    assert run_all.state(other) == "new" and do(other) == ["r"]
    assert run_all.state(other) == run_all.state(run) == "new"
    assert (work / "runs/r.1/last.pt").read_text() == "of the earlier run"


def test_errors(work, monkeypatch, capsys):
    with pytest.raises(UserError, match="start it where train_char.py is"):
        run_all.main(["--list"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="--only nothing: there is none of that name"):
        run_all.main(["--only", "rows,nothing", "--list"])
    for flag in ("--workers", "--minutes"):
        with pytest.raises(UserError, match=f"{flag} must be at least"):
            run_all.main([flag, "-1", "--list"])
    with pytest.raises(UserError, match="--workers must be at least 1"):
        run_all.main(["--workers", "0", "--list"])
    with pytest.raises(UserError, match="--only is empty"):
        run_all.main(["--only", "", "--list"])
    run_all.main(["--list", "--only", "count*, rows"])
    assert " left, about" in capsys.readouterr().out


def test_a_stop_is_no_success(work, monkeypatch):
    """The code that a shell sees is that of the signal."""
    (work / "train_char.py").symlink_to(ROOT / "train_char.py")
    monkeypatch.setattr(run_all, "do", lambda *_: ([], [signal.SIGTERM]))
    monkeypatch.setattr(report, "main", lambda _: None)
    with pytest.raises(Stopped) as e:
        run_all.main([])
    assert e.value.args == ("stopped", signal.SIGTERM)
