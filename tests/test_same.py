"""experiments/same.py: which changes of the code change a training."""

import shutil
from pathlib import Path

import pytest

from experiments import same, table

ROOT = Path(__file__).parents[1]


def test_a_change_of_the_code_is_the_same_or_not(tmp_path, monkeypatch, capsys):
    """A new name of a local variable is, another warmup is not. Models that have one digest are the
    same only if all of them are."""
    monkeypatch.chdir(ROOT)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 200)
    flags = same.SMALL | {"model": "arm", "device": "cpu", "data": str(text), "max_iters": "12"}
    flags = flags | {"eval_interval": "6", "num_samples": "0", "data_dir": str(tmp_path)}
    without = flags | {"warmup_iters": "0"}
    monkeypatch.setattr(same, "kinds", lambda: [flags, without])

    changes = {
        "renamed": ("cosine", "half_wave", (True, True)),
        "changed": ("(step + 1) / s.warmup_iters", "(step + 2) / s.warmup_iters", (False, True)),
    }
    for name, (before, after, equal) in changes.items():
        code = tmp_path / name
        shutil.copytree(ROOT, code, ignore=shutil.ignore_patterns(".*", "data", "runs*", "ready"))
        script = code / "train_char.py"
        assert before in script.read_text("utf-8")
        script.write_text(script.read_text("utf-8").replace(before, after), "utf-8")

        (pair,) = pairs = same.compare(code, ROOT, tmp_path / f"{name}.runs")
        assert pairs[pair] == all(equal) and len(set(pair)) == 2
        said = [line.startswith("the same") for line in capsys.readouterr().out.splitlines()]
        assert said == list(equal)


def test_what_has_not_changed_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(same, "train", None)
    assert same.compare(ROOT, ROOT, tmp_path) == {}


@pytest.mark.slow
def test_what_begins_with_a_run_is_trained_behind_it(tmp_path, monkeypatch):
    """Unless the code for a LLaMA has changed, which has the same digest and is not trained."""
    monkeypatch.chdir(ROOT)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 200)
    quick = same.SMALL | {"data": str(text), "max_iters": "4", "eval_interval": "2"}
    monkeypatch.setattr(same, "SMALL", quick | {"data_dir": str(tmp_path)})
    stages = [flags for flags in same.kinds() if "init_from" in flags]
    monkeypatch.setattr(same, "kinds", lambda: stages[:1])

    code = tmp_path / "code"
    shutil.copytree(ROOT, code, ignore=shutil.ignore_patterns(".*", "data", "runs*", "ready"))
    for path, equal in (("train_char.py", [True]), ("beyond/llama.py", [])):
        with open(code / path, "a", encoding="utf-8") as f:
            f.write("\nNEW = 1\n")
        pairs = same.compare(code, ROOT, tmp_path / path.replace("/", "_"))
        assert list(pairs.values()) == equal
        assert (tmp_path / path.replace("/", "_") / "now0_start/ckpt.pt").is_file() == bool(equal)


def test_all_runs_of_the_table_are_compared():
    """But for a LLaMA. What makes them differ is still there."""
    kinds = same.kinds()
    assert {"lomdm", "arm", "mdm", "block", "a3", "loa3"} <= {flags["model"] for flags in kinds}
    assert not any(flags["device"] == "cuda" for flags in kinds)
    starts = [flags["init_from"] for flags in kinds if "init_from" in flags]
    assert set(starts) == {"runs/arm_s1"} and len(starts) == 2  # in stages, and without
    assert any(flags.get("weights") == "exp" for flags in kinds)
    assert any(flags.get("optimizer") == "adamw" for flags in kinds)
    films = [flags for flags in kinds if flags["data"] == "automaton"]
    assert films and not any("seq_len" in flags for flags in films)
    trained = [item for item in table.items() if item.is_run]
    assert 20 < len(kinds) < len(trained)


def test_flags_as_a_dict():
    words = ["--model", "arm", "--compile", "--seed", "1", "--middle_steps", "False"]
    want = {"model": "arm", "compile": "True", "seed": "1", "middle_steps": "False"}
    assert same.as_dict(words) == {"data": "shakespeare"} | want


def test_no_such_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(same.cli.UserError, match="^nothing: "):
        same.unpack("nothing", tmp_path)
