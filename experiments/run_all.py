"""
Makes every number of RESULTS.md: trains what is not there yet, measures, and writes the page.

    python -m experiments.run_all                       a run for each core, as long as it takes
    python -m experiments.run_all --list                what is left, and how long it may take
    python -m experiments.run_all --minutes 9           stops then; the next call goes on
    python -m experiments.run_all --only "film_*,rows"  those only
    python -m experiments.run_all --device cuda         the list for a GPU

Runs are in runs/; their logs, and what measurements print, in experiments/logs/, which is
committed. What is there, made by the same command from the same runs, is not made again; only a
run whose checkpoint a measurement needs and does not find is, and its first log stands. Ctrl-C
stops it: runs are saved and go on next time, measurements begin anew.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections import namedtuple
from fnmatch import fnmatch
from pathlib import Path

import torch

from plumbing import checkpoint, cli, processes
from plumbing.cli import refuse

RUNS, LOGS = Path("runs"), Path("experiments/logs")

# ---- what there is to do, on a CPU ---------------------------------------------------------------
WIKITEXT, LLAMA = "data/wikitext2", "data/SmolLM2-135M-Instruct"  # to be put there
CPU = "--device cpu --dtype bfloat16 --compile --log_interval 100 --num_samples 0"
SMALL = f"{CPU} --max_iters 3000 --eval_interval 500"
A3, FROM = "--model a3 --shares 0,0,1", "--init_from runs/arm_s{seed}"
FILM = CPU.replace("bfloat16", "float32") + " --n_layer 3 --n_embd 64"  # where that is faster
FILMS = "--data automaton --max_iters 1000 --eval_interval 250"
SEEDS = range(1, 4)
SMOL = (
    f"--device cpu --dtype bfloat16 --log_interval 20 --num_samples 0 --data {WIKITEXT}/valid.txt "
    f"--val_data {WIKITEXT}/test.txt --batch_size 8 --seq_len 64 --weight_decay 0.01 "
    "--eval_interval 40 --eval_windows 48"
)
LONG = f"{CPU} --n_layer 6 --n_head 6 --n_embd 192 --seq_len 128 --max_iters 3000"
SIZES = ((2, 96), (3, 128), (4, 160), (5, 208), (6, 256))  # n_layer, n_embd
FIVE = {"arm": ("--model arm", 35), "mdm": ("--model mdm", 35), "lomdm": ("--model lomdm", 90),
        "a3": (A3, 54), "loa3": ("--model loa3", 54)}  # fmt: skip
GROUPS = [  # flags of all, seeds, {name: (its flags, about how many seconds it takes)}
    (SMALL, SEEDS, {
        "arm": ("--model arm", 200), "mdm": ("--model mdm", 200),
        "block4": ("--model block --block_len 4", 330), "block16": ("--model block", 330),
        "lomdm": ("--model lomdm", 500), "lomdm_exp": ("--model lomdm --weights exp", 500),
        "a3": (A3, 300), "loa3": ("--model loa3", 300),
        "lomdm_frozen": ("--model lomdm --c2 0", 500),
        "mdm_32": ("--model mdm --batch_size 32", 350),
    }),
    (f"{FILM} --batch_size 64 {FILMS}", SEEDS, {
        "film_arm": ("--model arm", 100), "film_mdm": ("--model mdm", 100),
        "film_block17": ("--model block --block_len 17", 160), "film_a3": (A3, 160),
        "film_loa3": ("--model loa3", 160),
    }),
    (f"{FILM} --batch_size 32 {FILMS}", SEEDS, {
        "film_lomdm": ("--model lomdm", 130),
        "film_lomdm_exp": ("--model lomdm --weights exp", 130),
        "film_lomdm_frozen": ("--model lomdm --c2 0", 130),
    }),
    (f"{FILM} --batch_size 32 --data automaton --max_iters 3000 --eval_interval 1000", SEEDS, {
        "film_long_lomdm": ("--model lomdm", 390),
        "film_long_lomdm_exp": ("--model lomdm --weights exp", 390),
        "film_long_lomdm_frozen": ("--model lomdm --c2 0", 390),
    }),
    (f"{FILM} --batch_size 64 --data automaton --max_iters 3000 --eval_interval 1000", SEEDS, {
        "film_long_arm": ("--model arm", 300), "film_long_mdm": ("--model mdm", 300),
        "film_long_loa3": ("--model loa3", 450),
    }),
    (f"{FILM} --batch_size 64 --data automaton-both --max_iters 3000 --eval_interval 1000", SEEDS, {
        "both_arm": ("--model arm", 300), "both_loa3": ("--model loa3", 500),
    }),
    (f"{LONG} --eval_interval 1000", SEEDS[:1], {
        "long_loa3": ("--model loa3 --random_share 0.2", 1600), "long_arm": ("--model arm", 900),
    }),
    (SMALL, range(11, 14), {  # seeds that the rules of LoA3's order were not chosen with
        "fresh_loa3": ("--model loa3", 300),
    }),
    (f"{FILM} --batch_size 64 {FILMS}", range(11, 14), {
        "fresh_film_loa3": ("--model loa3", 160),
    }),
    (f"{CPU} --eval_interval 250", SEEDS, {  # as long as the ARM and MDM take for 3,000 steps
        "block4_time": ("--model block --block_len 4 --max_iters 1400", 175),
        "block16_time": ("--model block --max_iters 1400", 175),
        "lomdm_time": ("--model lomdm --max_iters 950", 175),
        "a3_time": (f"{A3} --max_iters 1500", 175),
        "loa3_time": ("--model loa3 --max_iters 1500", 175),
    }),
    (SMALL, SEEDS[:2], {
        "share01": ("--model loa3 --random_share 0.1", 300),
        "share03": ("--model loa3 --random_share 0.3", 300),
        "stages": (f"--model a3 {FROM}", 300), "stage3": (f"{A3} {FROM}", 300),
        "vector": (f"{A3} --left_neighbour False", 300),
        "vector_stage3": (f"{A3} {FROM} --left_neighbour False", 300),
        "mdm_by_time": ("--model mdm-by-time", 200),
        "lomdm_by_time": ("--model lomdm-by-time", 500),
    }),
    (f"{CPU} --max_iters 600 --eval_interval 300", SEEDS[:1], {
        f"{name}_{n_layer}x{n_embd}": (f"{flags} --n_layer {n_layer} --n_embd {n_embd}",
                                       seconds * n_layer * n_embd**2 / 65536)
        for n_layer, n_embd in SIZES for name, (flags, seconds) in FIVE.items()
    }),
    (f"{A3} --init_from {LLAMA} {SMOL}", SEEDS[:1], {
        "smol0": ("--max_iters 1 --learning_rate 1e-12", 90),  # as it was
        "smol": ("--max_iters 240 --learning_rate 2e-4 --warmup_iters 10", 1500),
    }),
]  # fmt: skip
PICTURES = "experiments/pictures"


def of(names, seeds=(1,)):
    """The folders of these runs."""
    return " ".join(f"runs/{name}_s{seed}" for name in names.split() for seed in seeds)


MEASURES = {  # name: (command, about how many seconds)
    "rows": (f"evidence rows {of('film_loa3 both_loa3', SEEDS)}", 60),
    "rows_long": (f"evidence rows {of('film_long_lomdm_exp film_long_lomdm', SEEDS)}", 60),
    "films": (f"evidence films {of('film_loa3 both_loa3', SEEDS)}", 60),
    "films_long": (f"evidence films {of('film_long_lomdm_exp film_long_loa3', SEEDS)}", 60),
    "bounds": (f"evidence bounds {of('lomdm lomdm_exp lomdm_frozen mdm')}", 120),
    "order": (f"evidence order {of('lomdm lomdm_exp loa3')} --svg {PICTURES}/order.svg", 60),
    "passage": (f"evidence passage {of('lomdm_exp')} --svg {PICTURES}/passage.svg", 9),
    "orders": (f"evidence passage {of('loa3 film_loa3')} --windows 4 --svg {PICTURES}/orders.svg",
               9),
    "strips": (f"evidence strips {of('arm block16 mdm lomdm_exp')}", 9),
    "fraction": (f"evidence fraction {of('mdm lomdm a3 loa3')} --svg {PICTURES}/fraction.svg", 300),
    "variance": (f"evidence variance {of('mdm lomdm')}", 120),
    "samples": (f"evidence samples {of('lomdm lomdm_exp')} --judge {of('arm', (2,))}", 200),
    "infill": (f"evidence infill {of('arm block16 mdm lomdm lomdm_exp loa3 share01 share03 a3')}",
               100),
    "decoders": (f"evidence decoders {of('mdm lomdm lomdm_exp a3 loa3')} --windows 200", 600),
    "page": (f"sample.py --device cpu --out_dir {of('long_loa3')} --prompt ROMEO: --length 500 "
             f"--top_p 0.9 --html {PICTURES}/sample.html", 30),
    "count": ("bench --device cpu --preset gpt2 --what count --dtype bfloat16", 60),
} | {
    f"count_{n_layer}x{n_embd}": (
        "bench --device cpu --what count --dtype bfloat16 --models arm,mdm,lomdm,loa3 "
        f"--n_layer {n_layer} --n_embd {n_embd}", 20)
    for n_layer, n_embd in SIZES
}  # fmt: skip
ALONE = {  # the same, while nothing else runs
    "steps": ("bench --device cpu --what train --threads 1 --repeats 7", 200),
    "steps_compiled": (
        "bench --device cpu --what train --threads 1 --repeats 7 --compile --dtype bfloat16",
        300,
    ),
    "sampling": (
        "bench --device cpu --preset base --batch_size 1 --what sample --per_step 1 "
        "--models 'arm,block 16,a3 random order' --repeats 3",
        150,
    ),
    "speed": (f"speed {of('arm block4 mdm lomdm a3 loa3')} --judge {of('arm', (2,))}", 900),
}

# ---- the same, on a GPU --------------------------------------------------------------------------
BASE = "--preset base --device cuda --log_interval 100 --num_samples 0"
CUDA_GROUPS = [
    (BASE, SEEDS, {f"base_{name}": (flags, 240) for name, (flags, _) in FIVE.items()}),
    (f"--preset gpt2 --device cuda --data {WIKITEXT}/valid.txt --val_data {WIKITEXT}/test.txt "
     "--tokenizer gpt2 --batch_size 8 --gradient_accumulation_steps 4 --max_iters 300 "
     "--eval_interval 100 --log_interval 100 --num_samples 0", SEEDS[:1],
     {f"gpt2_{name}": (flags, 120) for name, (flags, _) in FIVE.items()}),
]  # fmt: skip
CUDA_ALONE = {
    "cuda_tests": ("pytest -q --ignore tests/test_report.py", 300),
    "cuda_steps": ("bench --device cuda --what train", 60),
    "cuda_steps_compiled": ("bench --device cuda --what train --compile", 180),
    "cuda_sampling": ("bench --device cuda --what sample --batch_size 16 --repeats 3", 120),
    "cuda_memory": ("bench --device cuda --preset gpt2 --batch_size 8 --what memory", 120),
}

# ---- what is done, and what is not ---------------------------------------------------------------
Item = namedtuple("Item", "name argv seconds alone")


def items(cuda):
    """All there is to do, in this order: runs, measurements, measurements that must be alone."""
    for flags, seeds, runs in CUDA_GROUPS if cuda else GROUPS:
        for seed in seeds:
            for name, (own, seconds) in runs.items():
                words = f"train_char.py {own} {flags} --seed {seed}".format(seed=seed)
                name = f"{name}_s{seed}"
                yield Item(name, (*words.split(), "--out_dir", f"runs/{name}"), seconds, False)
    some, alone = ({}, CUDA_ALONE) if cuda else (MEASURES, ALONE)
    for name, (command, seconds) in (some | alone).items():
        first, *words = shlex.split(command)
        module = ("-m", first if first == "pytest" else f"experiments.{first}")
        script = (first,) if first.endswith(".py") else module
        yield Item(name, (*script, *words), seconds, name in alone)


def is_run(item):
    return item.argv[0] == "train_char.py"


def needs(item):
    """Runs that it starts from."""
    return {Path(w).name for w in item.argv if w.startswith("runs/")} - {item.name}


def shown(argv):
    return "$ python " + shlex.join(argv)


def heading(item):
    """What a measurement is known by: its command, and a digest of the logs that it is made of."""
    logs = [LOGS / name / "log.jsonl" for name in sorted(needs(item))]
    data = b"".join(path.read_bytes() for path in logs if path.is_file())
    return shown(item.argv) + (f"  # {hashlib.sha256(data).hexdigest()[:8]}" if logs else "")


def state(item):
    """ "done"; "begun", if a run can go on; or "new", also if what is there was made otherwise."""
    if not is_run(item):
        path = LOGS / f"{item.name}.txt"
        same = path.is_file() and path.read_text("utf-8").startswith(heading(item) + "\n")
        return "done" if same else "new"
    log, begun = LOGS / item.name, RUNS / f"{item.name}.command"
    header, *_ = ((log / "log.jsonl").is_file() and checkpoint.rows_of(log)) or [{}]
    if header.get("command") == shown(item.argv):
        return "done"
    same = begun.is_file() and begun.read_text("utf-8") == shown(item.argv)
    return "begun" if same and (RUNS / item.name / "last.pt").is_file() else "new"


def to_do(chosen, everything):
    """What of these is not done, and the runs that it starts from but whose checkpoints are not
    here, in their order."""
    wanted = {item.name for item in chosen if state(item) != "done"}
    while True:
        more = {name for item in everything if item.name in wanted for name in needs(item)}
        more = {name for name in more if not (RUNS / name / "ckpt.pt").is_file()}
        if more <= wanted:
            return [item for item in everything if item.name in wanted]
        wanted |= more


def hardware(cuda):
    version = f"torch {torch.__version__.split('+')[0]}"
    if cuda:
        return f"{torch.cuda.get_device_name()}, {version}"
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((t.split(": ")[1] for t in lines if t.startswith("model name")), cpu)
    return f"{os.cpu_count()} CPU cores ({cpu}), {version}"


def keep(item, machine):
    """Put the log of a run, or what a measurement printed, where it is committed."""
    if is_run(item):
        if state(item) == "done":  # it was made again, for its checkpoint: the first log stands
            return
        header, *rows = checkpoint.rows_of(RUNS / item.name)
        other = header["settings"]["data"] == "python-docs"  # train_char.py falls back to it
        what = "read Python's documentation, as Shakespeare was not to be had: with network, remove"
        refuse(other, f"{item.name} has {what} {RUNS / item.name} and start again")
        header |= dict(hardware=machine, command=shown(item.argv))
        lines, path = [json.dumps(row) for row in (header, *rows)], LOGS / item.name / "log.jsonl"
    else:
        printed = (RUNS / f"{item.name}.out").read_text("utf-8").splitlines()
        lines, path = [heading(item), machine, *printed], LOGS / f"{item.name}.txt"
    checkpoint.write_file(path, lambda p: p.write_text("\n".join(lines) + "\n", "utf-8"))


# ---- doing it ------------------------------------------------------------------------------------
def start(item, threads):
    """A process, which prints to runs/<name>.out and .err."""
    argv = item.argv
    if state(item) == "begun":
        argv = ("train_char.py", "--resume", "--out_dir", f"runs/{item.name}")
    elif is_run(item):  # first aside: whatever stops this one, nobody goes on with another run
        checkpoint.set_aside(RUNS / item.name)
        (RUNS / f"{item.name}.command").write_text(shown(item.argv), "utf-8")
    env = {"PYTHONUTF8": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    out, err = (RUNS / f"{item.name}.{kind}" for kind in ("out", "err"))
    with open(out, "w") as out, open(err, "w") as err:  # a session: Ctrl-C comes from us alone
        return subprocess.Popen(
            [sys.executable, *argv], stdout=out, stderr=err, env=os.environ | env,
            start_new_session=True,
        )  # fmt: skip


def ready(item, left, running):
    """Whether what it starts from is there, and nothing runs beside what must be alone."""
    waits = needs(item) & {other.name for other in (*left, *running)}
    busy = running and (item.alone or any(other.alone for other in running))
    return not waits and not busy and not (item.alone and any(not o.alone for o in left))


def do(left, workers, deadline, cuda):
    """All of `left`, so many at a time. Returns the names of those that failed, or need them, and
    the signal that stopped it, if one did."""
    running, failed, machine = {}, [], hardware(cuda)
    threads = None if cuda else max(1, os.cpu_count() // workers)
    with processes.stop_signals() as stop:
        try:
            while not stop and time.time() < deadline:
                for item in list(left):
                    if len(running) < workers and ready(item, left, running):
                        left.remove(item)
                        running[item] = start(item, None if item.alone else threads)
                if not running:
                    break
                for item, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[item]
                    if process.returncode:
                        failed.append(item.name)
                        print(f"{item.name} failed, see {RUNS / item.name}.err", flush=True)
                    else:
                        keep(item, machine)
                        rest = sum(other.seconds for other in (*left, *running)) / workers / 60
                        n = len(left) + len(running)
                        print(f"{item.name} is done, {n} left, about {rest:.0f} min", flush=True)
                while lost := next((o for o in left if needs(o) & {*failed}), None):
                    left.remove(lost)
                    failed.append(lost.name)
                    print(f"{lost.name} is left out, as it needs that", flush=True)
                time.sleep(0.2)
        finally:  # they save, and go on next time
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return failed, stop


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--list", action="store_true", help="say what is left, and do nothing")
    p.add_argument("--only", help='names with commas between, "film_*" for all that begin so')
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="[cpu]")
    p.add_argument("--workers", type=int, help="runs at a time [one for each core; cuda: 3]")
    p.add_argument("--minutes", type=float, default=1e6, help="to stop after")
    a = p.parse_args(argv)
    if a.workers is None:
        a.workers = 3 if a.device == "cuda" else os.cpu_count()
    cli.check_range("workers", a.workers, 1, 2**10)
    cli.check_range("minutes", a.minutes, 0, None)
    refuse(a.only == "", "--only is empty")
    return a


def main(argv=None):
    from experiments import report  # which reads the lists above

    a = parse(argv)
    refuse(not Path("train_char.py").is_file(), "start it where train_char.py is")
    cli.pick_device(a.device)
    everything, chosen = list(items(a.device == "cuda")), []
    for wanted in (a.only or "*").split(","):
        found = [item for item in everything if fnmatch(item.name, wanted.strip())]
        refuse(not found, f"--only {wanted}: there is none of that name; --list shows them")
        chosen += found
    left = to_do(chosen, everything)
    for item in left if a.list else ():
        minutes, how = f"{item.seconds / 60:6.1f} min", state(item)
        print(f"{item.name:22}{minutes}  {how:5}  {shown(item.argv)}")
    rest = sum(item.seconds for item in left) / a.workers / 60
    print(f"{len(left)} left, about {rest:.0f} minutes, {a.workers} at a time", flush=True)
    if a.list:
        return
    for item in [i for i in left if not is_run(i) and i.seconds > 60 * a.minutes]:
        left.remove(item)
        print(f"{item.name} is not begun: it needs --minutes {math.ceil(item.seconds / 60)}")
    RUNS.mkdir(exist_ok=True)
    held = checkpoint.lock(RUNS / ".lock", wait=False)
    refuse(held is None, "another run_all is at work here")
    failed, stop = do(left, a.workers, time.time() + 60 * a.minutes, a.device == "cuda")
    report.main([])
    refuse(failed, f"failed: {', '.join(failed)}")
    if more := to_do(chosen, everything):
        print(f"{len(more)} left; the same command goes on")
    if stop:
        raise cli.Stopped("stopped", *stop)


if __name__ == "__main__":
    cli.run(main)
