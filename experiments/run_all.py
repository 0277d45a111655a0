"""
Makes every figure of RESULTS.md: trains and measures what table.py lists, and writes the page.

    python -m experiments.run_all                       one after another, as long as it takes
    python -m experiments.run_all --list                what is left, and what older code has made
    python -m experiments.run_all --minutes 9           stop then; the next call goes on
    python -m experiments.run_all --only "film_*,rows"  those only
    python -m experiments.run_all --device cuda         the part for a GPU
    python -m experiments.run_all --again               also make anew what older code has made

Runs are in runs/. Their logs, and what measurements print, go to experiments/logs/, which is
committed. A measurement whose runs are not there makes them again. Ctrl-C stops it: a run is saved
and goes on next time, a measurement begins anew. Where there are many cores, or a large GPU, start
the same command twice: both take from the same list.
"""

import json
import os
import platform
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from fnmatch import fnmatch
from pathlib import Path

import torch

from experiments import report, table
from experiments.table import RUNS
from plumbing import checkpoint, cli, processes
from plumbing.cli import need


# ---- what is left --------------------------------------------------------------------------------
def choose(device, only):
    """The items for this device whose names fit one of the patterns in only, "a,b*"."""
    here = [item for item in table.items() if ("cuda" in item.argv) == (device == "cuda")]
    chosen = []
    for pattern in only.split(","):
        found = [item for item in here if fnmatch(item.name, pattern.strip())]
        need(found, f"--only {pattern}: there is none of that name; --list shows them")
        chosen += found
    return chosen


def is_due(item, again):
    return not table.is_done(item) or (again and table.is_old(item))


def to_do(chosen, again):
    """What of these is due, and the runs that it starts from, if due or not here."""
    wanted = {item for item in chosen if is_due(item, again)}
    while True:
        names = set().union(*(item.needs for item in wanted))
        needed = {item for item in table.items() if item.name in names}
        more = {item for item in needed if is_due(item, again) or not is_here(item.name)} - wanted
        if not more:
            return [item for item in table.items() if item in wanted]
        wanted |= more


def marker(name):
    """A file that is there while a run has begun and not finished. It holds table.stamp()."""
    return RUNS / f"{name}.begun"


def is_begun(item):
    """Whether runs/ holds a part of this run, by the same command and code."""
    path = marker(item.name)
    same = path.is_file() and path.read_text("utf-8") == table.stamp(item)
    return same and (RUNS / item.name / "last.pt").is_file()


def is_here(name):
    """Whether runs/ holds this run, finished."""
    return (RUNS / name / "ckpt.pt").is_file() and not marker(name).is_file()


# ---- making it -----------------------------------------------------------------------------------
def make(item, deadline, stop):
    """Run it until it ends, or has to stop. Its exit code, or None if it was stopped. It prints to
    runs/NAME.out and runs/NAME.err."""
    argv = item.argv
    if is_begun(item):
        argv = ("train_char.py", "--resume", "--out_dir", f"runs/{item.name}")
    elif item.is_run:
        # First aside: if this one dies at once, nobody goes on with the earlier one.
        checkpoint.set_aside(RUNS / item.name)
        marker(item.name).write_text(table.stamp(item), "utf-8")

    # A session of its own, so that Ctrl-C comes from us alone.
    argv = [sys.executable, *argv]
    how = {"env": os.environ | {"PYTHONUTF8": "1"}, "start_new_session": True}
    out = RUNS / f"{item.name}.out"
    with open(out, "w") as stdout, open(out.with_suffix(".err"), "w") as stderr:
        process = subprocess.Popen(argv, stdout=stdout, stderr=stderr, **how)
    try:
        while process.poll() is None and not stop and time.time() < deadline:
            time.sleep(0.1)
        return process.poll()
    finally:
        process.terminate()  # a run saves, if it has not ended
        process.wait()


def hardware(device):
    version = f"torch {torch.__version__.split('+')[0]}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {version}"

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    return f"{os.cpu_count()} CPU cores ({cpu}), {version}"


def log_of(item, machine):
    """The lines of the log that is to be committed."""
    if not item.is_run:
        printed = (RUNS / f"{item.name}.out").read_text("utf-8").splitlines()
        return [table.stamp(item), machine, *printed]

    header, *rows = checkpoint.read_log(RUNS / item.name)
    ours = header["settings"]["data"] != "python-docs"  # to which train_char.py falls back
    how = f"with network, remove {RUNS / item.name} and start again"
    need(ours, f"{item.name} has read Python's documentation in place of Shakespeare; {how}")
    header |= {"hardware": machine, "command": item.command}
    return [json.dumps(row) for row in (header, *rows)]


def keep(item, machine):
    """Put the log where it is committed. Where a run was made again for its checkpoint, and by the
    same code, the first log stands."""
    if is_due(item, again=True):
        text = "\n".join(log_of(item, machine)) + "\n"
        checkpoint.write_text(item.log, text)
    marker(item.name).unlink(missing_ok=True)


def do(left, device, deadline, again):
    """All of `left`, one after another, but for what another process is making. Returns the names
    of those that failed, and the signal that stopped it, if one did."""
    failed = []
    machine = hardware(device)
    with processes.stop_signals() as stop:
        for number, item in enumerate(left, 1):
            if stop or time.time() >= deadline:
                break
            held = checkpoint.lock(RUNS / f"{item.name}.lock", wait=False)
            here = all(is_here(name) for name in item.needs)
            still = is_due(item, again) or (item.is_run and not is_here(item.name))
            if not (held and here and still):
                continue  # another process makes it or has made it, or what it needs has failed

            code = make(item, deadline, stop)
            if code == 0:
                keep(item, machine)
            elif code is not None:
                failed.append(item.name)
            result = {0: "done", None: "stopped"}.get(code, f"failed, see runs/{item.name}.err")
            print(f"{number} of {len(left)}: {item.name} {result}", flush=True)
            held.close()
    return failed, stop


# ---- start ---------------------------------------------------------------------------------------
def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--list", action="store_true", help="say what is left, and do nothing")
    p.add_argument("--only", default="*", help='names with commas between, "film_*" for several')
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="[cpu]")
    p.add_argument("--minutes", type=float, default=1e6, help="to stop after")
    p.add_argument("--again", action="store_true", help="also what older code has made")
    a = p.parse_args(argv)
    cli.check_range("minutes", a.minutes, 0, None)
    return a


def main(argv=None):
    a = parse(argv)
    need(Path("train_char.py").is_file(), "start it where train_char.py is")
    chosen = choose(a.device, a.only)
    left = to_do(chosen, a.again)
    old = [item for item in chosen if table.is_old(item) and item not in left]
    if a.list:
        for item in left + old:
            state = "older code" if item in old else "begun" if is_begun(item) else "new"
            print(f"{item.name:26}{state:12}{item.command}")
    print(f"{len(left)} left, and {len(old)} made by older code, which --again makes anew")
    if a.list:
        return

    cli.pick_device(a.device)
    RUNS.mkdir(exist_ok=True)
    failed, stop = do(left, a.device, time.time() + 60 * a.minutes, a.again)
    report.main([])
    need(not failed, f"failed: {', '.join(failed)}")
    if more := to_do(chosen, a.again):
        print(f"{len(more)} left; the same command goes on")
    if stop:
        raise cli.Stopped("stopped", *stop)


if __name__ == "__main__":
    cli.run(main)
