"""
The folder of a run: ckpt.pt (the best), last.pt (the latest), log.jsonl, and who may write
to it.

Checkpoints appear whole or not at all; log.jsonl may end in half a line. Loading never runs code
that is in a file. Of several processes the first one writes; the others pass by.
"""

import ast
import contextlib
import errno
import hashlib
import itertools
import json
import os
from dataclasses import fields
from pathlib import Path

import torch

from plumbing.cli import UserError, need
from plumbing.processes import RANK

FORMAT = "lomdm checkpoint 4"
RUN_FILES = ("ckpt.pt", "last.pt", "log.jsonl")


# ---- files ---------------------------------------------------------------------------------
def write_file(path, write):
    """Call write(temporary path), then rename: path is the old file or the new one, never
    half. UserError if it cannot be written."""
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)

        # Without fsync, a machine that stops now may have renamed an empty file.
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        # torch.save reports a full disk as a RuntimeError of its zip writer.
        is_writer = "PytorchStreamWriter" in str(e) or "inline_container" in str(e)
        if isinstance(e, RuntimeError) and not is_writer:
            raise
        reason = getattr(e, "strerror", None) or f"is the disk full? ({str(e)[:60]})"
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    """write_file() of a text."""
    write_file(path, lambda temporary: temporary.write_text(text, "utf-8"))


def lock(path, wait):
    """The open file that holds the lock, or None if another process has it. The lock ends
    with its process, whatever ends that, or when the file is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path, "w")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        f.close()
        return None
    except (ImportError, OSError):  # Windows and some network drives have no such locks
        pass
    return f


def code_digest(files):
    """Which version of the code this is: 12 hex digits over these files, but for comments and
    docstrings, which change no figure."""
    digest = hashlib.sha256()
    for path in sorted(map(Path, files), key=lambda path: path.name):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(None)
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


# ---- checkpoints ---------------------------------------------------------------------------
def save(path, state):
    if RANK == 0:
        write_file(path, lambda temporary: torch.save(dict(format=FORMAT, **state), temporary))


def load(path, make, device="cpu"):
    """A checkpoint, {name: value}, and its model, which make(model_name, config) builds.
    UserError if the file is missing, cut off, or of another version of the code."""
    path = Path(path)
    if not path.is_file():
        how = f"train one: python train_char.py --out_dir {path.parent}"
        if path.with_name("last.pt").is_file():
            how = "not validated yet, --resume goes on"
        if path.with_name("ckpt.pt").is_file():
            how = f"a ckpt.pt does not go on, but --init_from {path.parent} begins with its weights"
        raise UserError(f"no checkpoint at {path}; {how}")

    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load fails in many ways on a file that is something else
        # One of them: in a file that was cut off it may look for a place before the beginning.
        is_cut = getattr(e, "errno", None) == errno.EINVAL
        if isinstance(e, (OSError, MemoryError)) and not is_cut:
            raise
        raise UserError(f"{path} is damaged, cut off or not a checkpoint; train again") from None

    ours = isinstance(ckpt, dict) and ckpt.get("format") == FORMAT
    need(ours, f"{path} was not written by this version of train_char.py; train again")
    model = make(ckpt["model_name"], ckpt["config"])
    model.load_state_dict(ckpt["model"])
    return ckpt, model.to(device)


# ---- who writes to the folder --------------------------------------------------------------
def only_run(out):
    """Make the folder and keep other runs out of it, for as long as the object returned lives.
    UserError if another run has it, or it cannot be written to."""
    if RANK:
        return None
    try:
        held = lock(Path(out) / ".lock", wait=False)
    except OSError as e:
        raise UserError(f"cannot write to --out_dir {out}: {e.strerror}") from None
    need(held, f"another run is writing to {out}; take another --out_dir, or wait")
    return held


def set_aside(out):
    """Move the files of an earlier run, and nothing else, to a new folder: out.1, out.2, .."""
    out = Path(out)
    files = [out / name for name in RUN_FILES if (out / name).exists()]
    if not files:
        return

    # A link is followed, so that both are on the same disk.
    beside = os.path.realpath(out)
    names = (Path(f"{beside}.{n}") for n in itertools.count(1))
    kept = next(path for path in names if not path.exists())
    kept.mkdir()
    for path in files:
        os.rename(path, kept / path.name)
    print(f"{out} held an earlier run; it is now in {kept} (--resume would have gone on with it)")


# ---- the log -------------------------------------------------------------------------------
def begin(out, ckpt, about):
    """A run begins: move the files of an earlier one aside, and write the header of a new log.
    Or, if it goes on from ckpt, drop from its log what is younger."""
    if RANK:
        return
    if ckpt:
        return trim_log(out, ckpt["step"])
    set_aside(out)
    large_or_private = "tokenizer", "cwd"
    header = {k: v for k, v in about.items() if k not in large_or_private}
    log(out, **header, torch=torch.__version__)


def log(out, **values):
    """Append one line to log.jsonl."""
    if RANK:
        return
    path = Path(out) / "log.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(values) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; then go on with --resume") from None


def read_log(out):
    """[header, row, ..], without half a line of a run that was killed. UserError if there is no
    log."""
    path = Path(out) / "log.jsonl"
    need(path.is_file(), f"cannot read {path}: no such file")
    rows = []
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def trim_log(out, step):
    """Drop what is younger than the checkpoint, as it will come again."""
    rows = [row for row in read_log(out) if row.get("step", 0) <= step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(Path(out) / "log.jsonl", text)


# ---- going on ------------------------------------------------------------------------------
def resumable(saved, given, Settings):
    """The settings with which a run goes on: the saved ones, but for what may change.
    UserError for a flag that may not."""
    out = given.get("out_dir", Settings.out_dir)  # the folder may have been moved
    same = saved.keys() == {f.name for f in fields(Settings)}
    need(same, f"the run in {out} has other settings than this version; train again")

    settings = dict(saved, out_dir=out)
    for f in fields(Settings):
        had = settings[f.name]
        kept = f.name not in given or f.metadata["resume"] or given[f.name] == had
        need(kept, f"--{f.name} is {had} in {out}; leave it out, or start without --resume")
    return settings | given
