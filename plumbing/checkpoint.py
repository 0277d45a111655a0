"""
The folder of a run: ckpt.pt (the best), last.pt (the latest), log.jsonl, and who may write to it.

Files appear whole or not at all. Loading one never runs code that is in it. Of several processes
the first one writes; the others pass by.
"""

import contextlib
import hashlib
import json
import os
import shlex
from dataclasses import fields
from pathlib import Path

import torch

from plumbing.cli import UserError, need
from plumbing.processes import RANK

FORMAT = "lomdm checkpoint 3"
RUN_FILES = ("ckpt.pt", "last.pt", "log.jsonl")


# ---- files ---------------------------------------------------------------------------------------
def write_file(path, write):
    """Call write(temporary path), then rename: path is the old file or the new one, never half.
    UserError if it cannot be written."""
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)

        # Without fsync, a machine that stops now may have renamed an empty file.
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError):
            raise UserError(f"cannot write {path}: {e.strerror or e}") from None
        if isinstance(e, RuntimeError):  # how torch.save reports it
            raise UserError(f"cannot write {path}: is the disk full? ({str(e)[:60]})") from None
        raise


def lock(path, wait):
    """The open file that holds the lock, or None if another process has it. The lock ends with its
    process, whatever ends that, or when the file is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path, "w")  # noqa: SIM115
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return f

    try:
        fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        f.close()
        return None
    except OSError:  # some network drives have no locks
        pass
    return f


def code_digest(files):
    """Which version of the code this is: 12 hex digits over the bytes of those files that exist."""
    digest = hashlib.sha256()
    for path in map(Path, files):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# ---- checkpoints ---------------------------------------------------------------------------------
def save(path, state):
    if RANK == 0:
        write_file(path, lambda temporary: torch.save(dict(format=FORMAT, **state), temporary))


def load(path, make, device="cpu"):
    """A checkpoint, {name: value}, and its model, which make(model_name, config) builds. UserError
    if the file is missing, cut off, or of another version of the code."""
    path = Path(path)
    if not path.is_file():
        last = path.with_name("last.pt")
        only_last = f"no {path.name} in {path.parent}, only last.pt: no validation yet: "
        need(path == last or not last.is_file(), f"{only_last}--resume goes on")
        out = shlex.quote(str(path.parent))
        how = f"python train_char.py --out_dir {out}"
        raise UserError(f"no checkpoint at {path}; train one: {how}")

    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # torch.load fails in many ways on a file that is something else
        raise UserError(f"{path} is damaged, cut off or not a checkpoint; train again") from None

    ours = isinstance(ckpt, dict) and ckpt.get("format") == FORMAT
    need(ours, f"{path} was not written by this version of train_char.py; train again")
    try:
        model = make(ckpt["model_name"], ckpt["config"])
        model.load_state_dict(ckpt["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        if "alloc" in str(e):  # there is too little memory, which is no fault of the file
            raise
        raise UserError(f"{path} does not hold the model that it says; train again") from None
    return ckpt, model.to(device)


# ---- who writes to the folder --------------------------------------------------------------------
def only_run(out):
    """Make the folder and keep other runs out of it, for as long as the object returned lives.
    UserError if another run has it, or it can be no run's."""
    if RANK:
        return None
    out = Path(out)
    inside = Path.cwd().is_relative_to(out.resolve())
    need(not inside, "--out_dir must be a folder of its own, not the one you are in")
    is_file = out.exists() and not out.is_dir()
    need(not is_file, f"cannot write to --out_dir {out}: it is a file; take another name")

    try:
        held = lock(out / ".lock", wait=False)
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
    beside = out.resolve() if out.is_symlink() else out
    n = 1
    while Path(f"{beside}.{n}").exists():
        n += 1
    kept = Path(f"{beside}.{n}")
    kept.mkdir()
    for path in files:
        os.rename(path, kept / path.name)
    print(f"{out} held an earlier run; it is now in {kept}")


# ---- the log -------------------------------------------------------------------------------------
def begin(out, ckpt, about):
    """A new log whose header says what the run is about, beside which earlier ones are kept; or,
    when a run goes on from ckpt, its old log."""
    if RANK:
        return
    if ckpt:
        return trim_log(out, ckpt["step"])
    set_aside(out)
    header = {k: v for k, v in about.items() if k != "tokenizer"}  # which may be large
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
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def rows_of(out):
    """The header and the lines of log.jsonl, as dicts, without half a line of a killed run."""
    path = Path(out) / "log.jsonl"
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None

    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def read_log(out):
    """[header, row, ..]."""
    header, *rows = rows_of(out) or [{}]
    settings = "settings" in header
    need(settings, f"{Path(out) / 'log.jsonl'} does not begin with the settings of a run")
    return [header, *rows]


def trim_log(out, step):
    """Drop what is younger than the checkpoint, as it will come again."""
    path = Path(out) / "log.jsonl"
    if path.exists():
        lines = [json.dumps(row) + "\n" for row in rows_of(out) if row.get("step", 0) <= step]
        write_file(path, lambda temporary: temporary.write_text("".join(lines), "utf-8"))


# ---- going on ------------------------------------------------------------------------------------
def resumable(saved, given, Settings):
    """The settings with which a run goes on: the saved ones, but for what may change. UserError
    for a flag that may not."""
    out = given.get("out_dir", Settings.out_dir)  # the folder may have been moved
    same = saved.keys() == {f.name for f in fields(Settings)}
    need(same, f"the run in {out} has other settings than this version; train again")

    settings = dict(saved, out_dir=out)
    for f in fields(Settings):
        # What follows another flag is settled anew, but cuda:1 is no other device than cuda:0.
        above = f.metadata["follows"]
        if above in given and str(given[above]).split(":")[0] != str(saved[above]).split(":")[0]:
            settings[f.name] = None

        had = "none" if settings[f.name] is None else settings[f.name]
        need(
            f.name not in given or f.metadata["resume"] or given[f.name] == settings[f.name],
            f"--{f.name} {given.get(f.name)} is not what the run in {out} has ({had}); leave it "
            "out, or start a new run without --resume",
        )
    return settings | given
