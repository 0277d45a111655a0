"""
The folder of a run: ckpt.pt (the best), last.pt (the latest), log.jsonl, and who may write to it.

Files appear whole or not at all. Loading one never runs code that is in it. Of several processes
the first one writes; the others pass by.
"""

import contextlib
import json
import os
import shlex
import zipfile
from dataclasses import fields
from pathlib import Path

import torch

from plumbing.cli import UserError
from plumbing.processes import RANK

FORMAT = "lomdm checkpoint 3"
RUN_FILES = ("ckpt.pt", "last.pt", "log.jsonl")
PARTS = dict(
    model_name=str, config=dict, tokenizer=dict, settings=dict, data_sha256=str, step=int,
    best=(int, float), seconds=(int, float), model=dict,
)  # fmt: skip
LARGEST = 1e30  # no weight that was trained is larger, but for a bit that flipped


# ---- files ---------------------------------------------------------------------------------------


def write_file(path, write):
    """Call write(temporary path), then rename: path is the old file or the new one, never half."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())  # or a machine that stops now may have renamed an empty file
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
    except ImportError:  # Windows
        return f
    try:
        fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        f.close()
        return None
    except OSError:  # some network drives have no locks
        pass
    return f


# ---- checkpoints ---------------------------------------------------------------------------------


def save(path, state):
    if RANK == 0:
        write_file(path, lambda temporary: torch.save(dict(format=FORMAT, **state), temporary))


def load(path, make, device="cpu"):
    """A checkpoint, {name: value}, and its model, which make(model_name, config) builds."""
    path = Path(path)
    ckpt = read(path)
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this version of train_char.py; train again")
    wrong = UserError(f"{path} does not hold the model that it says; train again")
    if not all(isinstance(ckpt.get(name), kind) for name, kind in PARTS.items()):
        raise wrong
    try:
        model = make(ckpt["model_name"], ckpt["config"])
        model.load_state_dict(ckpt["model"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as e:
        if "alloc" in str(e):  # too little memory, which the file cannot help
            raise
        raise wrong from None
    kind, vocab = ckpt["tokenizer"].get("kind"), ckpt["tokenizer"].get("vocab")
    fits = kind != "char" or len(vocab or ()) == model.config.vocab_size
    if not fits or not all((p.abs() <= LARGEST).all() for p in model.parameters()):  # nor NaN
        raise wrong
    return ckpt, model.to(device)


def read(path):
    """What torch.save wrote, on the CPU."""
    last = path.with_name("last.pt")
    if not path.is_file() and last != path and last.is_file():
        raise UserError(
            f"no {path.name} in {path.parent}, only last.pt: no validation yet: --resume goes on"
        )
    if not path.is_file():
        out = shlex.quote(str(path.parent))
        raise UserError(f"no checkpoint at {path}; train one: python train_char.py --out_dir {out}")
    try:
        with zipfile.ZipFile(path) as z:  # torch.load does not look at the checksums
            if z.testzip():
                raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except MemoryError:
        raise
    except Exception as e:  # torch.load fails in many ways on a file that is something else
        if "alloc" in str(e):
            raise
        raise UserError(f"{path} is damaged, cut off or not a checkpoint; train again") from None


# ---- who writes to the folder --------------------------------------------------------------------


def only_run(out):
    """Make the folder and keep other runs out of it, for as long as the object returned lives."""
    if RANK:
        return None
    out = Path(out)
    here = Path.cwd()
    if Path(os.path.realpath(out)) in (here, *here.parents):
        raise UserError("--out_dir must be a folder of its own, not the one you are in")
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write to --out_dir {out}: it is a file; take another name")
    try:
        held = lock(out / ".lock", wait=False)
    except OSError as e:
        raise UserError(f"cannot write to --out_dir {out}: {e.strerror}") from None
    if held is None:
        raise UserError(f"another run is writing to {out}; take another --out_dir, or wait")
    return held


def set_aside(out):
    """Move the files of an earlier run, and nothing else, to a new folder: out.1, out.2, .."""
    out = Path(out)
    files = [out / name for name in RUN_FILES if (out / name).exists()]
    if not files:
        return
    beside = os.path.realpath(out) if out.is_symlink() else out  # on the same disk
    kept = next(p for n in range(1, 10**6) if not (p := Path(f"{beside}.{n}")).exists())
    try:
        kept.mkdir()
        for path in files:
            os.rename(path, kept / path.name)
    except OSError as e:
        raise UserError(f"cannot move the earlier run in {out} aside: {e.strerror}") from None
    print(f"{out} held an earlier run; it is now in {kept}")


# ---- the log -------------------------------------------------------------------------------------


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
    """The header and the lines of log.jsonl, as dicts. What was cut off, or is not ours, is left
    out: a run that was killed may end in half a line."""
    path, rows = Path(out) / "log.jsonl", []
    try:
        text = path.read_text("utf-8", "replace")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step", 0), int):
                rows.append(row)
    return rows


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


def trim_log(out, step):
    """Drop what is younger than the checkpoint, as it will come again."""
    if (Path(out) / "log.jsonl").exists():
        lines = [json.dumps(row) + "\n" for row in rows_of(out) if row.get("step", 0) <= step]
        write_file(Path(out) / "log.jsonl", lambda path: path.write_text("".join(lines), "utf-8"))


def read_log(out):
    """[header, row, ..]."""
    rows = rows_of(out)
    header = next((row for row in rows if isinstance(row.get("settings"), dict)), None)
    if header is None:
        raise UserError(f"{Path(out) / 'log.jsonl'} does not begin with the settings of a run")
    return [header, *(row for row in rows if "step" in row)]


# ---- going on ------------------------------------------------------------------------------------


def resumable(saved, given, Settings):
    """The settings with which a run goes on: the saved ones, but for what may change."""
    out = given.get("out_dir", Settings.out_dir)
    if saved.keys() != {f.name for f in fields(Settings)}:
        raise UserError(f"the run in {out} has other settings than this version; train again")
    before, saved = saved, dict(saved, out_dir=out)  # it may have been moved
    for f in fields(Settings):
        above = f.metadata["follows"]
        # cuda:1 is no other device than cuda:0
        if above in given and str(given[above]).split(":")[0] != str(before[above]).split(":")[0]:
            saved[f.name] = None
        if f.name not in given or f.metadata["resume"]:
            continue
        had = saved.get(f.name)
        if given[f.name] != had:
            raise UserError(
                f"--{f.name} {given[f.name]} is not what the run in {out} has "
                f"({'none' if had is None else had}); leave it out, or start a new run "
                "without --resume"
            )
    return saved | given
