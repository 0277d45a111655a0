"""
Makes every figure of RESULTS.md: trains and measures what table.py lists, and writes the page.

    python -m experiments.run_all                       a run for each core, as long as it takes
    python -m experiments.run_all --list                what is left, and what older code has made
    python -m experiments.run_all --minutes 9           stop then; the next call goes on
    python -m experiments.run_all --only "film_*,rows"  those only
    python -m experiments.run_all --device cuda         the part for a GPU
    python -m experiments.run_all --again               also make anew what older code has made

Runs are in runs/. Their logs, and what measurements print, go to experiments/logs/, which is
committed. A measurement whose runs are not there makes them again. Ctrl-C stops it: runs are saved
and go on next time, measurements begin anew.
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


def to_do(chosen, again):
    """What of these is not done, and the runs that it starts from whose checkpoints are not
    here."""

    def is_due(item):
        return not table.is_done(item) or (again and table.is_old(item))

    wanted = {item for item in chosen if is_due(item)}
    while True:
        names = set().union(*(item.needs for item in wanted))
        needed = {item for item in table.items() if item.name in names}
        more = {item for item in needed if is_due(item) or not is_here(item)} - wanted
        if not more:
            return [item for item in table.items() if item in wanted]
        wanted |= more


def marker(item):
    """A file that is there while a run has begun and not finished. It holds table.stamp()."""
    return RUNS / f"{item.name}.begun"


def is_begun(item):
    """Whether runs/ holds a part of this run, by the same command and code."""
    path = marker(item)
    same = path.is_file() and path.read_text("utf-8") == table.stamp(item)
    return same and (RUNS / item.name / "last.pt").is_file()


def is_here(item):
    """Whether runs/ holds this run, finished."""
    return (RUNS / item.name / "ckpt.pt").is_file() and not marker(item).is_file()


def show(chosen, left):
    """Print what is left, and what is done, but by older code."""
    old = [item for item in chosen if table.is_old(item) and item not in left]
    for item in left + old:
        state = "older code" if item in old else "begun" if is_begun(item) else "new"
        print(f"{item.name:26}{state:12}{item.command}")
    made = f"{len(old)} were made by older code (--again makes them anew)" if old else ""
    print(f"{len(left)} left; {made}".rstrip("; "), flush=True)


# ---- doing it ------------------------------------------------------------------------------------
def start(item, threads):
    """A process that prints to runs/NAME.out and runs/NAME.err."""
    argv = item.argv
    if is_begun(item):
        argv = ("train_char.py", "--resume", "--out_dir", f"runs/{item.name}")
    elif item.is_run:
        # First aside: if this one dies at once, nobody goes on with the earlier one.
        checkpoint.set_aside(RUNS / item.name)
        marker(item).write_text(table.stamp(item), "utf-8")

    # A session of its own, so that Ctrl-C comes from us alone.
    env = os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": str(threads)}
    out = RUNS / f"{item.name}.out"
    with open(out, "w") as stdout, open(out.with_suffix(".err"), "w") as stderr:
        return subprocess.Popen(
            [sys.executable, *argv],
            stdout=stdout,
            stderr=stderr,
            env=env,
            start_new_session=True,
        )


def hardware(device):
    version = f"torch {torch.__version__.split('+')[0]}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {version}"

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    return f"{os.cpu_count()} CPU cores ({cpu}), {version}"


def keep(item, machine):
    """Put the log of a run, or what a measurement printed, where it is committed. Where a run was
    made again for its checkpoint, and by the same code, the first log stands."""
    if not table.is_done(item) or table.is_old(item):
        text = "\n".join(log_of(item, machine)) + "\n"
        checkpoint.write_file(item.log, lambda path: path.write_text(text, "utf-8"))
    marker(item).unlink(missing_ok=True)


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


def is_ready(item, waiting, running, failed):
    """Whether all that it starts from is there, and it disturbs no measurement of times."""
    unfinished = {other.name for other in (*waiting, *running, *failed)}
    if item.needs & unfinished:
        return False
    if item.alone:
        return not running and all(other.alone for other in waiting)
    return True


def do(left, workers, deadline, device):
    """All of `left`, so many at a time. Returns what failed, and the signal that stopped it, if
    one did."""
    waiting = list(left)
    running = {}  # item: its process
    failed = []
    machine = hardware(device)
    threads = max(1, os.cpu_count() // workers)

    with processes.stop_signals() as stop:
        try:
            while not stop and time.time() < deadline:
                # Start what can be started.
                for item in list(waiting):
                    if len(running) < workers and is_ready(item, waiting, running, failed):
                        waiting.remove(item)
                        running[item] = start(item, os.cpu_count() if item.alone else threads)
                if not running:
                    break

                # See what has ended.
                for item, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[item]
                    if process.returncode:
                        failed.append(item)
                        print(f"{item.name} failed, see {RUNS / item.name}.err", flush=True)
                    else:
                        keep(item, machine)
                        n = len(waiting) + len(running)
                        print(f"{item.name} is done, {n} left", flush=True)
                time.sleep(0.2)
        finally:
            # Runs save, and go on next time.
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return failed, stop


# ---- start ---------------------------------------------------------------------------------------
def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--list", action="store_true", help="say what is left, and do nothing")
    p.add_argument("--only", default="*", help='names with commas between, "film_*" for several')
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="[cpu]")
    p.add_argument("--workers", type=int, help="runs at a time [one for each core; cuda: 3]")
    p.add_argument("--minutes", type=float, default=1e6, help="to stop after")
    p.add_argument("--again", action="store_true", help="also what older code has made")
    a = p.parse_args(argv)
    if a.workers is None:
        a.workers = 3 if a.device == "cuda" else os.cpu_count()
    cli.check_range("workers", a.workers, 1, 2**10)
    cli.check_range("minutes", a.minutes, 0, None)
    return a


def main(argv=None):
    a = parse(argv)
    need(Path("train_char.py").is_file(), "start it where train_char.py is")
    chosen = choose(a.device, a.only)
    left = to_do(chosen, a.again)
    show(chosen, left)
    if a.list:
        return

    cli.pick_device(a.device)
    RUNS.mkdir(exist_ok=True)
    held = checkpoint.lock(RUNS / ".lock", wait=False)
    need(held, "another run_all is at work here")
    failed, stop = do(left, a.workers, time.time() + 60 * a.minutes, a.device)

    report.main([])
    need(not failed, f"failed: {', '.join(item.name for item in failed)}")
    if more := to_do(chosen, a.again):
        print(f"{len(more)} left; the same command goes on")
    if stop:
        raise cli.Stopped("stopped", *stop)


if __name__ == "__main__":
    cli.run(main)
