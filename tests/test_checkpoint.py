"""plumbing/checkpoint.py: files that are whole or not there, and one run in a folder."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from plumbing import checkpoint
from plumbing.cli import UserError, flag

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(name, config):
    return {"linear": torch.nn.Linear}[name](**config)


def state(**more):
    config = {"in_features": 2, "out_features": 3}
    model = make("linear", config).state_dict()
    return {"model_name": "linear", "config": config, "step": 7, "model": model} | more


# ---- files ---------------------------------------------------------------------------------


def test_what_is_no_checkpoint():
    """Missing, cut off, something else, or from an earlier version: one line each."""

    def fails(path, message):
        with pytest.raises(UserError, match=message) as e:
            checkpoint.load(path, make)
        assert "\n" not in str(e.value)

    fails("out/ckpt.pt", "no checkpoint at out.ckpt.pt; train one: python")
    path = Path("out/last.pt")
    checkpoint.save(path, state())
    fails("out/ckpt.pt", "no checkpoint at out.ckpt.pt; not validated yet, --resume goes on")

    raw = path.read_bytes()
    for bad in (b"", raw[: len(raw) // 3], raw[:-1], b"text"):
        path.write_bytes(bad)
        fails(path, "last.pt is damaged, cut off or not a checkpoint")
    for other in (state(format="lomdm checkpoint 2"), [1]):
        torch.save(other, path)
        fails(path, "was not written by this version of train_char.py; train again")


def test_loading_runs_no_code():
    class Evil:
        def __reduce__(self):
            return (Path.touch, (Path("ran"),))

    checkpoint.save(Path("ckpt.pt"), state(best=Evil()))
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load("ckpt.pt", make)
    assert not Path("ran").exists()


FAILURES = [
    (OSError(28, "No space left on device"), UserError, "cannot write out.a: No space left"),
    (RuntimeError("PytorchStreamWriter failed"), UserError, "is the disk full"),
    (RuntimeError("CUDA error: out of memory"), RuntimeError, "CUDA error"),  # not the disk
    (KeyboardInterrupt(), KeyboardInterrupt, None),
]


@pytest.mark.parametrize("error,kind,message", FAILURES)
def test_files_are_whole(error, kind, message):
    """What fails halfway leaves the old file, and nothing besides it."""
    checkpoint.write_file("out/a", lambda path: path.write_text("old"))

    def write(path):
        path.write_text("half")
        raise error

    with pytest.raises(kind, match=message):
        checkpoint.write_file("out/a", write)
    assert Path("out/a").read_text() == "old" and os.listdir("out") == ["a"]
    with pytest.raises(UserError, match="cannot write out.a.b: "):
        checkpoint.write_file("out/a/b", lambda path: path.write_text("below a file"))


# ---- one run in a folder -------------------------------------------------------------------


def test_one_run_at_a_time():
    """The lock holds as long as its process, and ends with it, kill -9 included."""
    code = "import fcntl, sys; f = open('out/.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    argv = [sys.executable, "-c", f"{code}; print(1, flush=True); sys.stdin.read()"]
    Path("out").mkdir()
    Path("link").symlink_to("out")
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, **how) as other:
        assert other.stdout.readline() == b"1\n"
        for name in ("out", "link"):
            with pytest.raises(UserError, match=f"another run is writing to {name}; take another"):
                checkpoint.only_run(name)
        assert checkpoint.only_run("other")
        other.kill()
        other.wait()

    held = checkpoint.only_run("out")
    with pytest.raises(UserError, match="another run"):  # of two in one process as well
        checkpoint.only_run("out")
    held.close()
    assert checkpoint.only_run("out")


def test_an_earlier_run_is_moved_and_nothing_else(work, capsys):
    """Beside the folder itself, where a link leads to one. A name that is taken is left
    alone."""
    Path("real").mkdir()
    Path("real.1").mkdir()
    Path("out").symlink_to("real")
    for name in ("last.pt", "log.jsonl", "notes.txt"):
        Path("out", name).write_text(name)
    held = checkpoint.only_run("out")
    checkpoint.set_aside("out")
    with pytest.raises(UserError, match="another run"):  # the lock has not moved away
        checkpoint.only_run("out")
    held.close()

    printed = capsys.readouterr().out
    assert printed.startswith(f"out held an earlier run; it is now in {work}/real.2 (--resume")
    assert sorted(os.listdir("out")) == [".lock", "notes.txt"] and os.listdir("real.1") == []
    assert {p.name: p.read_text() for p in Path("real.2").iterdir()} == {
        "last.pt": "last.pt",
        "log.jsonl": "log.jsonl",
    }


# ---- the log -------------------------------------------------------------------------------


def test_the_log():
    """A run that goes on drops what is younger than its checkpoint, and half a line, the
    end of a run that was killed. A new run moves the log away."""
    with pytest.raises(UserError, match="cannot read out.log.jsonl"):
        checkpoint.read_log("out")
    Path("out").mkdir()
    about = {"settings": {"seed": 1}, "tokenizer": {"kind": "char"}, "code": "c0de"}
    checkpoint.begin("out", None, about)
    header = {"settings": {"seed": 1}, "code": "c0de", "torch": torch.__version__}
    rows = [{"step": 2, "loss": 1.0}, {"step": 2, "val": 3.0}, {"step": 4, "loss": 0.5}]
    for row in rows:
        checkpoint.log("out", **row)
    with open("out/log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    assert checkpoint.read_log("out") == [header, *rows]

    checkpoint.begin("out", {"step": 2}, about)
    lines = Path("out/log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [header, *rows[:2]]
    checkpoint.begin("out", None, about)
    assert checkpoint.read_log("out") == [header]
    assert checkpoint.read_log("out.1") == [header, *rows[:2]]
    with pytest.raises(UserError, match="cannot write gone/log.jsonl: No such file .*--resume"):
        checkpoint.log("gone", step=1)


# ---- going on ------------------------------------------------------------------------------


@dataclass
class Settings:
    out_dir: str = flag("out", "", resume=True)
    max_iters: int | None = flag(None, "", resume=True)
    n_layer: int = flag(1, "")
    device: str | None = flag(None, "", resume=True)


def test_what_may_change():
    """What a flag may not change is named."""
    saved = dict(out_dir="old", max_iters=5, n_layer=1, device="cuda")
    assert checkpoint.resumable(saved, {}, Settings) == saved | {"out_dir": "out"}  # it was moved
    given = saved | {"out_dir": "good", "max_iters": 9}
    assert checkpoint.resumable(saved, given, Settings) == given

    with pytest.raises(UserError, match="the run in out has other settings than this version"):
        checkpoint.resumable(saved | {"more": 1}, {}, Settings)
    with pytest.raises(UserError, match="--n_layer is 1 in out; leave it out, or start without"):
        checkpoint.resumable(saved, {"n_layer": 2}, Settings)


# ---- which code ----------------------------------------------------------------------------


def test_a_digest_of_code_is_of_what_it_does(work):
    """Comments, docstrings and the order of the files do not count. Any other change does, also
    in a string that is no docstring."""

    def digest(text, *names):
        (work / "b.py").write_text(text)
        return checkpoint.code_digest([work / name for name in names])

    (work / "a.py").write_text("x = 1\n")
    code = 'def f():\n    """Why."""\n    return "1"  # one\n'
    same = digest(code, "a.py", "b.py")
    assert len(same) == 12 and same == digest(code, "b.py", "a.py")
    assert same == digest(code.replace("Why.", "Because."), "a.py", "b.py")
    assert same == digest(code.replace("# one", "# two"), "a.py", "b.py")
    assert same != digest(code.replace('"1"', '"2"'), "a.py", "b.py")
    assert same != digest(code.replace("def f()", "def f(x)"), "a.py", "b.py")
    assert same != digest(code, "b.py")
