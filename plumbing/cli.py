"""
The command line: flags from a dataclass, and one line for whatever the user can mend.

A Settings class is a dataclass with one flag() a field. parse() reads the flags that were
given, check() tells what is out of range, and run() calls a script's main().
"""

import argparse
import contextlib
import difflib
import importlib.util
import math
import os
import signal
import sys
from dataclasses import field, fields
from typing import get_args

import torch


# ---- mistakes ------------------------------------------------------------------------------
class UserError(Exception):
    """Something the user can mend. Its message is all that is printed; the exit code is 1."""


class Stopped(BaseException):
    """A clean end because a signal asked for it: Stopped(message, signal number), or
    without the number if it came to another process. Like KeyboardInterrupt it is no
    Exception: it may come anywhere, and nothing shall swallow it."""


def need(condition, message):
    """UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def one_line(*kinds):
    """Within this, errors of these kinds come from what the user asked for: one line each."""
    try:
        yield
    except kinds as e:
        raise UserError(str(e)) from None


def refuse_nan(numbers, step, saved_at):
    """UserError unless the numbers, of this step and those after it, are finite. saved_at
    is the step of the last checkpoint, or 0."""
    how = f"go on from step {saved_at} with --resume and" if saved_at else "begin again with"
    for at, number in enumerate(numbers, step):
        finite = math.isfinite(number)
        what = f"the loss or its gradient is not finite at step {at}"
        need(finite, f"{what}; {how} a lower --learning_rate")


# ---- the way out ---------------------------------------------------------------------------
def run(main):
    """Call main() as a script, without a traceback for what is not a defect of the script."""
    # A console may lack a character. A file is UTF-8, whatever the console.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have no encoding
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")

    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        leave("interrupted", 128 + signal.SIGINT)
    except Stopped as e:
        leave(e.args[0], 128 + sum(e.args[1:]))
    except Exception as e:
        line = explain(e)
        if line is None:
            raise
        leave(line, 1)


def explain(e):
    """The line to print for an exception; None if it is a defect, which deserves its
    traceback."""
    if isinstance(e, UserError):
        # Of several processes on a machine, one speaks.
        return f"error: {e}" if os.environ.get("LOCAL_RANK", "0") == "0" else ""

    # With `python script.py | head`, nobody reads on, and that is fine.
    if isinstance(e, BrokenPipeError):
        return ""
    if isinstance(e, OSError):
        return f"error: {e}"

    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        first = str(e).partition("\n")[0]
        return f"error: torch.compile failed ({first}); --compile=False goes without it"

    # torch says so in many ways, of which few have a class of their own.
    full = isinstance(e, RuntimeError) and ("alloc" in str(e) or "out of memory" in str(e))
    if full or isinstance(e, MemoryError):
        return "error: not enough memory; take a smaller model, batch or number of samples"
    return None


def leave(line, code):
    """Print a last line and exit, also if stdout takes no more, such as a closed pipe."""
    try:
        sys.stdout.flush()
    except OSError:  # Python flushes once more at its end, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


# ---- flags ---------------------------------------------------------------------------------
TEXTS = "prompt", "infill", "text"  # flags that are no paths, whatever they begin with
HABITS = dict(  # our flags, as nanoGPT and others call them
    seq_len="block_size context_length max_length", length="max_new_tokens max_length",
    max_iters="steps max_steps", learning_rate="lr", eval_windows="eval_iters",
    data="dataset", out_dir="init_from checkpoint", prompt="start",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line instead of the whole usage; the exit code is
    2."""

    def error(self, message):
        if "expected one argument" in message:  # that, or one that looks like a flag
            message += "; one that begins with a dash is given as --flag=-text"
        self.exit(2, f"error: {message} (--help lists the flags)\n")

    def parse_args(self, argv=None):
        """As in argparse, but ~ is the home folder, and the message names flags of ours."""
        is_notebook = sys.argv[0].endswith("kernel_launcher.py")  # whose flags are not ours
        given, unknown = self.parse_known_args([] if argv is None and is_notebook else argv)
        hints = [hint for word in unknown for hint in self.meant_by(word)]
        hint = f"; did you mean {' '.join(hints)}?" if hints else ""
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

        for name, value in vars(given).items():  # a shell leaves the ~ of --data=~/x
            if isinstance(value, str) and name not in TEXTS:
                setattr(given, name, os.path.expanduser(value))
        return given

    def meant_by(self, word):
        """[the flag that someone means who types this word], or []."""
        ours = [option.removeprefix("--") for option in self._option_string_actions]
        names = {name: flag for flag in ours for name in (flag, *HABITS.get(flag, "").split())}
        typed = word.partition("=")[0].replace("-", "_").removeprefix("__").lower()
        close = difflib.get_close_matches(typed, names, 1, 0.8)
        return [f"--{names[name]}" for name in close if word.startswith("--")]


def flag(default, help, choices=None, least=None, below=None, only=None, resume=False):
    """A field that is a flag. least <= value < below; only: the models that it is for, "a
    b"; resume: it may change when a run goes on."""
    rules = dict(least=least, below=below, only=only, resume=resume)
    return field(default=default, metadata=dict(help=help, choices=choices, **rules))


def truth(text):
    return {"true": True, "false": False}.get(text.lower(), text)


def integer(text):
    """Also written as 1e4."""
    number = float(text) if "e" in text.lower() else int(text)
    if number % 1:
        raise ValueError
    return int(number)


def floats(text):
    return tuple(float(number) for number in text.split(","))


def parse(Settings, argv, description, presets=None):
    """The flags given, {name: value}: only those, so that --resume knows what was asked for.
    presets, {name: {flag: value}}, are listed by --help."""
    epilog = [
        f"--preset {name}:  " + "  ".join(f"{flag} {value}" for flag, value in preset.items())
        for name, preset in (presets or {}).items()
    ]
    parser = Parser(
        description=description,
        epilog="\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )

    for f in fields(Settings):
        kind = (get_args(f.type) or [f.type])[0]  # of int | None, it is int
        how = dict(type=integer if kind is int else kind, choices=f.metadata["choices"])
        if kind is bool:  # --compile, --compile=False
            how = dict(type=truth, nargs="?", const=True, choices=(True, False))
        if kind is tuple:
            how = dict(type=floats, metavar="A,B,..")

        default = "" if f.default is None else f" [{f.default}]"
        only = f"{f.metadata['only']}: " if f.metadata["only"] else ""
        text = f"{only}{f.metadata['help']}{default}".replace("%", "%%")
        parser.add_argument(f"--{f.name}", help=text, **how)
    given = vars(parser.parse_args(argv))

    # An empty value comes from a shell variable that is not set, as a rule.
    for name, value in given.items():
        need(value != "", f"--{name} is empty")
    return given


def check(s):
    """UserError if a setting is out of range, or not for this model."""
    for f in fields(s):
        value = getattr(s, f.name)
        if value is None:
            continue
        check_range(f.name, value, f.metadata["least"], f.metadata["below"])

        only = (f.metadata["only"] or "").split()
        fits = not only or value == f.default or s.model in only
        models = " or ".join(only)
        need(fits, f"--{f.name} is for --model {models}, not {getattr(s, 'model', '')}")


def check_range(name, value, least, below):
    """UserError unless least <= value < below. NaN is in no range."""
    need(least is None or value >= least, f"--{name} must be at least {least}")
    need(below is None or value < below, f"--{name} must be below {below}")
    finite = not isinstance(value, float) or math.isfinite(value)
    need(finite, f"--{name} must be a finite number")


# ---- the device ----------------------------------------------------------------------------
def pick_device(name):
    """The torch device called `name`; None takes the best there is. UserError if it is not
    here."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: there is none here; try --device cpu") from None


def is_modern(device):
    """Whether it computes in bfloat16, and torch.compile has what it needs (Windows does
    not)."""
    return (
        device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
        and importlib.util.find_spec("triton") is not None
    )
