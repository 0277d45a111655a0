"""plumbing/cli.py: flags from a dataclass, and one line for every mistake."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from plumbing import cli
from plumbing.cli import UserError, flag


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


def given(*argv):
    return cli.parse(Settings, argv, "A script.\n\n    as it is", {"tiny": {"steps": 3}})


# ---- flags ---------------------------------------------------------------------------------


def test_only_what_was_given():
    assert given() == {}
    got = given("--model", "block", "--lr", "1", "--n_layer=2", "--data", "7")
    assert got == {"model": "block", "lr": 1.0, "n_layer": 2, "data": "7"}
    assert [type(value) for value in got.values()] == [str, float, int, str]
    assert given("--shares", "0,.5,1") == {"shares": (0, 0.5, 1)}
    assert given("--compile") == given("--compile", "True") == {"compile": True}
    assert given("--compile=False", "--lr", "1") == {"compile": False, "lr": 1}


@pytest.mark.parametrize("text,number", [("1e4", 10000), ("2.5E1", 25), ("007", 7), ("-3", -3)])
def test_numbers_as_people_write_them(text, number):
    got = given(f"--n_layer={text}")["n_layer"]
    assert got == number and type(got) is int
    assert given("--n_layer", str(2**63 - 1)) == {"n_layer": 2**63 - 1}  # not by way of a float


@pytest.mark.parametrize("argv", ["--n_layer 15e-1", "--n_layer 1e999", "--n_layer ten"])
def test_numbers_that_are_not_whole(capsys, argv):
    with pytest.raises(SystemExit):
        given(*argv.split())
    assert capsys.readouterr().err.startswith("error: argument --n_layer: invalid integer value")


@pytest.mark.parametrize(
    "argv,hint",
    [
        ("--n_layers 2", "; did you mean --n_layer?"),
        ("--block-len=3", "; did you mean --block_len?"),
        ("--dataset x", "; did you mean --data?"),
        ("--n_layer 2 --learning_rate 1 --Model=arm", "; did you mean --model?"),
        ("--compil --mode x", "; did you mean --compile --model?"),
        ("--wandb_log=True config/x.py", " config/x.py"),
    ],
)
def test_a_flag_that_there_is_not(capsys, argv, hint):
    with pytest.raises(SystemExit) as e:
        given(*argv.split())
    assert e.value.code == 2
    assert capsys.readouterr().err.endswith(f"{hint} (--help lists the flags)\n")


def test_a_path_from_home(monkeypatch, tmp_path):
    """A shell expands --data ~/x, and leaves --data=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert given("--data=~/x y.txt") == {"data": str(tmp_path / "x y.txt")}
    assert given("--data", "a~/~b") == {"data": "a~/~b"}

    @dataclass
    class Texts:
        prompt: str | None = flag(None, "a text")
        svg: str | None = flag(None, "a path")

    # So it is for scripts with commands, each of which has its flags.
    parser = cli.Parser()
    parser.add_subparsers().add_parser("order").add_argument("--svg")
    assert parser.parse_args(["order", "--svg=~/a.svg"]).svg == str(tmp_path / "a.svg")

    argv = ["--prompt", "~/x is a path", "--svg", "~"]
    assert cli.parse(Texts, argv, "") == {"prompt": "~/x is a path", "svg": str(tmp_path)}


def test_a_notebook_has_no_flags(monkeypatch):
    """Its sys.argv is that of the kernel, and its streams have no encoding. In a script, and
    in a script that a notebook runs, sys.argv counts."""
    got = []
    monkeypatch.setattr(sys, "stdout", type("Stream", (), {"flush": lambda self: None})())
    for name in "train_char.py", "/usr/lib/ipykernel_launcher.py", "colab_kernel_launcher.py":
        monkeypatch.setattr(sys, "argv", [name, "--n_layer", "3"])
        cli.run(lambda: got.append(cli.parse(Settings, None, "")))
    assert got == [{"n_layer": 3}, {}, {}]


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        given("--help")
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert "A script.\n\n    as it is\n" in out and out.endswith("--preset tiny:  steps 3\n")
    assert "of a step [0.001]" in out and "a text, 100% of it\n" in out  # no default, no brackets


@pytest.mark.parametrize(
    "change,message",
    [
        ({"n_layer": 0}, "--n_layer must be at least 1$"),
        ({"lr": float("nan")}, "--lr must be at least 1e-12"),
        ({"lr": float("inf")}, "--lr must be a finite number"),
        ({"beta": 1.0}, "--beta must be below 1$"),
        ({"block_len": 4}, "--block_len is for --model block or lomdm, not arm"),
    ],
)
def test_ranges(change, message):
    cli.check(Settings())
    cli.check(Settings("block", block_len=1, n_layer=1, beta=0, lr=1, compile=False))
    with pytest.raises(UserError, match=message):
        cli.check(Settings(**change))


# ---- the way out ---------------------------------------------------------------------------


def script(error):
    """A script whose main() ends with this error."""

    def main():
        raise error

    cli.run(main)


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
        (RuntimeError("can't allocate memory\n.."), 1, "error: not enough memory; take a smaller"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: not enough memory; take a"),
        (NoCompiler("no g++\nmany\nlines"), 1, "error: torch.compile failed (no g++); --compile=F"),
    ],
)
def test_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as e:
        script(error)
    assert e.value.code == code
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == bool(line)


def test_a_file_is_utf_8_whatever_the_console(tmp_path):
    """Also what a script says on stderr."""
    out, err = tmp_path / "out", tmp_path / "err"
    code = "import sys; from plumbing import cli; "
    code += "cli.run(lambda: (print('σ ↵ 日本'), print('±', file=sys.stderr)))"
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    with open(out, "wb") as o, open(err, "wb") as e:
        subprocess.run([sys.executable, "-c", code], stdout=o, stderr=e, env=env, check=True)
    assert out.read_text("utf-8") == "σ ↵ 日本\n" and err.read_text("utf-8") == "±\n"


def test_a_defect_has_its_traceback():
    with pytest.raises(ValueError, match="a defect"):
        script(ValueError("a defect"))


def test_losses_that_are_not_finite():
    cli.refuse_nan([1.0, 2.0], 7, 5)
    with pytest.raises(UserError, match="not finite at step 8; go on from step 5 with --resume"):
        cli.refuse_nan([1.0, float("inf"), float("nan")], 7, 5)
    with pytest.raises(UserError, match="not finite at step 1; begin again with a lower"):
        cli.refuse_nan([float("nan")], 1, 0)
