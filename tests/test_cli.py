"""plumbing/cli.py: flags from a dataclass, and one line for every mistake."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from plumbing import cli
from plumbing.cli import UserError, flag

ROOT = Path(__file__).parents[1]


@dataclass
class Settings:
    model: str = flag("arm", "what to train", ("arm", "block", "lomdm"))
    data: str | None = flag(None, "a text, 100% of it")
    n_layer: int | None = flag(None, "blocks", least=1)
    lr: float = flag(1e-3, "of a step", least=1e-12)
    beta: float = flag(0.9, "decay", least=0, below=1)
    block_len: int | None = flag(None, "tokens", only="block lomdm")
    shares: tuple = flag((0.5, 0.5), "of stages")
    compile: bool | None = flag(None, "or not")
    point: float | None = flag(None, "no int")


def given(*argv):
    return cli.parse(Settings, argv, "A script.\n\n    as it is", {"tiny": {"steps": 3}})


# ---- flags ---------------------------------------------------------------------------------------
def test_only_what_was_given():
    assert given() == {}
    got = given("--model", "block", "--lr", "1", "--n_layer=2", "--data", "7", "--point", "3")
    assert got == dict(model="block", lr=1.0, n_layer=2, data="7", point=3.0)
    assert {name: type(value) for name, value in got.items()} == dict(
        model=str, lr=float, n_layer=int, data=str, point=float
    )
    assert given("--shares", "0,.5,1") == dict(shares=(0, 0.5, 1))
    for argv, value in [("--compile", True), ("--compile=True", True), ("--compile=False", False)]:
        assert given(argv) == dict(compile=value)
    assert given("--compile", "False", "--lr", "1") == dict(compile=False, lr=1)


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        given("--help")
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert "A script.\n\n    as it is\n" in out and out.endswith("--preset tiny:  steps 3\n")
    assert "of a step [0.001]" in out and "a text, 100% of it\n" in out  # no default, no brackets
    assert "{arm,block,lomdm}" in out and "of stages [0.5,0.5]" in out


@pytest.mark.parametrize(
    "argv", ["--n_laye 1", "--model gpt", "--n_layer ten", "--compile=2", "--lr", "stray"]
)
def test_mistakes_cost_one_line(argv, capsys):
    with pytest.raises(SystemExit) as e:
        given(*argv.split())
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_an_empty_value_is_a_mistake():
    """Such as that of a shell variable that is not set: it must not mean the current folder."""
    with pytest.raises(UserError, match="--data is empty"):
        given("--data", "")


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(n_layer=0), "--n_layer must be at least 1$"),
        (dict(lr=float("nan")), "--lr must be at least 1e-12"),
        (dict(lr=float("inf")), "--lr must be a finite number"),
        (dict(beta=1.0), "--beta must be below 1$"),
        (dict(model="gpt"), "--model gpt is none of arm, block, lomdm"),
        (dict(block_len=4), "--block_len is for --model block or lomdm, not arm"),
    ],
)
def test_ranges(change, message):
    cli.check(Settings())
    cli.check(Settings("block", block_len=1, n_layer=1, beta=0, lr=1, compile=False))
    with pytest.raises(UserError, match=message):
        cli.check(Settings(**change))


# ---- the whole way out ---------------------------------------------------------------------------
def ends(monkeypatch, error, **env):
    """The exit code of a script whose main() ends with this error."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    def main():
        raise error

    with pytest.raises(SystemExit) as e:
        cli.run(main)
    return e.value.code


BackendFailed = type("BackendFailed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})
NoCompiler = type("NoCompiler", (Exception,), {"__module__": "torch._inductor.exc"})


@pytest.mark.parametrize(
    "error,code,line",
    [
        (UserError("take another"), 1, "error: take another\n"),
        (cli.Stopped("all saved", signal.SIGTERM), 143, "all saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 1, ""),
        (OSError(28, "No space left"), 1, "error: [Errno 28] No space left\n"),
        (MemoryError(), 1, "error: not enough memory; take a smaller"),
        (RuntimeError("cannot allocate 8 GB\n.."), 1, "error: not enough memory; take a smaller"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: not enough memory; take a"),
        (NoCompiler("no g++\nmany\nlines"), 1, "error: torch.compile failed (no g++); --compile=F"),
        (BackendFailed(), 1, "error: torch.compile failed (BackendFailed); --compile=False goes"),
    ],
)
def test_one_line(monkeypatch, capsys, error, code, line):
    assert ends(monkeypatch, error) == code
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == bool(line)


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("a defect")])
def test_defects_have_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error), match="a defect"):
        cli.run(main)


def test_one_of_several_processes_speaks(monkeypatch, capsys):
    assert ends(monkeypatch, UserError("no"), RANK="3", LOCAL_RANK="1") == 1
    assert capsys.readouterr().err == ""
    ends(monkeypatch, UserError("no"), RANK="2", LOCAL_RANK="0")
    assert capsys.readouterr().err == "error: no\n"
    ends(monkeypatch, UserError("no"), LOCAL_RANK="1")  # left behind by something else
    assert capsys.readouterr().err == "error: no\n"


def test_stdout_that_takes_nothing():
    """Full, or read by nobody: no traceback, also not from Python's last flush."""
    argv = f"{sys.executable} -c 'from plumbing import cli; cli.run(lambda: print(9 * \"a\"))'"
    ends = {"| true": ""}
    if Path("/dev/full").exists():
        ends[">/dev/full"] = "error: [Errno 28] No space left on device\n"
    env = os.environ | {"LC_ALL": "C", "PYTHONUNBUFFERED": ""}
    for end, error in ends.items():
        shell = ["bash", "-o", "pipefail", "-c", f"{argv} {end}"]
        run = subprocess.run(shell, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
        assert (run.returncode, run.stderr) == (1, error)


def test_losses_that_are_not_finite():
    cli.refuse_nan([1.0, 2.0], 7, 5)
    with pytest.raises(UserError, match=r"not finite at step 8; .*last.pt \(step 5\); --resume"):
        cli.refuse_nan([1.0, float("inf"), float("nan")], 7, 5)
    with pytest.raises(UserError, match="not finite at step 1; last good checkpoint: none yet"):
        cli.refuse_nan([float("nan")], 1, 0)


def test_devices():
    assert cli.pick_device("cpu") == torch.device("cpu")
    assert not cli.is_modern(torch.device("cpu"))
    for name, message in [
        ("tpu9", "--device tpu9 is none that torch knows"),
        ("cuda:99", "there is none here"),
        ("meta", "there is none here"),
    ]:
        with pytest.raises(UserError, match=message):
            cli.pick_device(name)
