"""
The command line: flags from a dataclass, and one line for whatever the user can mend.

A Settings class is a dataclass with one flag() a field. parse() reads the flags that were given,
check() refuses what is out of range, run() calls a script's main().
"""

import argparse
import contextlib
import importlib.util
import math
import os
import signal
import sys
import textwrap
from dataclasses import field, fields
from typing import get_args, get_type_hints

import torch

# ---- mistakes ------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. Its message is all that is printed; the exit code is 1."""


def refuse(wrong, message):
    if wrong:
        raise UserError(message)


@contextlib.contextmanager
def one_line(*kinds):
    """Within this, errors of these kinds come from what the user asked for: one line each."""
    try:
        yield
    except kinds as e:
        raise UserError(str(e)) from None


def refuse_nan(numbers, step, saved_at):
    """numbers: of this step and those after it, in order. saved_at: the step of the last
    checkpoint, 0 for none."""
    for at, number in enumerate(numbers, step):
        last = f"out_dir's last.pt (step {saved_at})" if saved_at else "none yet"
        refuse(
            not math.isfinite(number),
            f"the loss or its gradient is not finite at step {at}; last good checkpoint: {last}; "
            f"{'--resume with' if saved_at else 'try'} a lower --learning_rate or --grad_clip",
        )


class Stopped(BaseException):
    """A clean end because a signal asked for it: Stopped(message, signal number), or without the
    number if it came to another process. Like Python's own
    KeyboardInterrupt it is no Exception: it may come anywhere, and nothing shall swallow it."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line instead of the whole usage."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def run(main):
    """Call main() as a script, without a traceback for what is not a defect of the script."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: python script.py >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # Jupyter's
            getattr(sys, name).reconfigure(errors="replace")  # a console may lack a character
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        leave("interrupted", 128 + signal.SIGINT)
    except Stopped as e:
        message, *number = e.args
        leave(message, 128 + (number or [0])[0])
    except Exception as e:
        line = explain(e)
        if line is None:
            raise
        leave(line, 1)


def explain(e):
    """The line to print for an exception; None if it is a defect, which deserves its traceback."""
    if isinstance(e, UserError):
        # of several processes on a machine, one speaks
        silent = "RANK" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
        return "" if silent else f"error: {e}"
    if isinstance(e, BrokenPipeError):  # python script.py | head: nobody reads on
        return ""
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        first = next(iter(str(e).splitlines()), type(e).__name__)
        return f"error: torch.compile failed ({first}); --compile=False goes without it"
    if isinstance(e, RecursionError):
        return "error: a text or a file is nested too deeply"
    if isinstance(e, OSError | MemoryError | OverflowError):
        return f"error: {str(e) or 'not enough memory'}"
    full = any(word in str(e).lower() for word in ("alloc", "out of memory", "overflow"))
    if isinstance(e, RuntimeError) and full:
        return "error: not enough memory; take a smaller model, batch or number of samples"
    return None


def leave(line, code):
    """Print a last line and exit, also if stdout takes no more: not even Python's last flush."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr)
    sys.exit(code)


# ---- flags ---------------------------------------------------------------------------------------


def flag(
    default, help, choices=None, least=None, below=None, only=None, resume=False, follows=None
):
    """A field that is a flag. least <= value < below; only: the models that it is for, "a b";
    resume: whether it may change when a run goes on; follows: the flag that it is settled by anew
    when that one changes."""
    rules = dict(least=least, below=below, only=only, resume=resume, follows=follows)
    return field(default=default, metadata=dict(help=help, choices=choices, **rules))


def kinds(Settings):
    """{name: int, float, str, bool or tuple}, from annotations such as int or str | None."""
    return {
        name: next((t for t in get_args(hint) if t is not type(None)), hint)
        for name, hint in get_type_hints(Settings).items()
    }


def truth(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def floats(text):
    """A tuple: numbers with commas between."""
    return tuple(float(number) for number in text.split(","))


def parse(Settings, argv, description, presets=None):
    """The flags given, {name: value}: only those, so that --resume knows what was asked for.
    presets: {name: {flag: value}}, for --help."""
    lines = [
        f"--preset {name}:  " + "  ".join(f"{flag} {value}" for flag, value in settings.items())
        for name, settings in (presets or {}).items()
    ]
    p = Parser(
        description=description,
        epilog="\n".join(textwrap.fill(line, 78, subsequent_indent="    ") for line in lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    types = kinds(Settings)
    for f in fields(Settings):
        kind = types[f.name]
        how = dict(type=kind, choices=f.metadata["choices"])
        if kind is bool:  # --compile, --compile=True, --compile=False
            how = dict(type=truth, nargs="?", const=True, metavar="BOOL")
        if kind is tuple:
            how = dict(type=floats, metavar="A,B,..")
        default = f.default if kind is not tuple else ",".join(map(str, f.default))
        default = "" if f.default is None else f"[{default}]"
        only = f"{f.metadata['only'].replace(' ', ', ')}: " if f.metadata["only"] else ""
        text = f"{only}{f.metadata['help']} {default}".strip().replace("%", "%%")
        p.add_argument(f"--{f.name}", help=text, **how)
    given = vars(p.parse_args(argv))
    for name, value in given.items():
        if value == "":  # a shell variable that is not set, as a rule
            raise UserError(f"--{name} is empty")
    return given


def check(s):
    """Refuse what is out of range, of the wrong type, or not for this model."""
    types = kinds(type(s))
    for f in fields(s):
        value, kind = getattr(s, f.name), types[f.name]
        if value is None:
            continue
        if not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"--{f.name} {value!r} is not of type {kind.__name__}")
        if f.metadata["choices"] and value not in f.metadata["choices"]:
            raise UserError(f"--{f.name} {value} is none of {', '.join(f.metadata['choices'])}")
        check_range(f.name, value, f.metadata["least"], f.metadata["below"])
        only = (f.metadata["only"] or "").split()
        if only and value != f.default and s.model not in only:
            raise UserError(f"--{f.name} is for --model {' or '.join(only)}, not {s.model}")


def check_range(name, value, least, below):
    if least is not None and not value >= least:  # NaN is caught as well
        raise UserError(f"--{name} must be at least {least}")
    if below is not None and not value < below:
        raise UserError(f"--{name} must be below {below}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} must be a finite number")
    if type(value) is int and name != "seed" and value >= 2**31:
        raise UserError(f"--{name} {value} is too large")


# ---- the device ----------------------------------------------------------------------------------


def pick_device(name):
    """The torch device called `name`; None takes the best there is."""
    mps = torch.backends.mps.is_available()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is none that torch knows; try cpu or cuda") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": mps}
    n = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there.get(device.type, False) or (device.index or 0) >= n:
        raise UserError(f"--device {name} asked for, but there is none here; try --device cpu")
    return device


def is_modern(device):
    """Whether it computes in bfloat16, and torch.compile has what it needs (Windows does not)."""
    return (
        device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
        and importlib.util.find_spec("triton") is not None
    )
