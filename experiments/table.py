"""
What RESULTS.md is made of: a table of runs, a table of measurements, and which of both are done.

The log of a run is experiments/logs/NAME.jsonl, and what a measurement printed is in NAME.txt.
Both begin with the command, the hardware, and a digest of the models' code. A run or a
measurement is done if its log has today's command. Today's code may be another.
"""

import itertools
import json
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

import train_char
from beyond import decoders, speculative
from plumbing import checkpoint

RUNS = Path("runs")
LOGS = Path("experiments/logs")
SAME = Path("experiments/same.txt")
PICTURES = "experiments/pictures"

# ---- the runs ------------------------------------------------------------------------------------
A3 = "--model a3 --shares 0,0,1"  # random orders from the start
FROM_ARM = "--init_from runs/arm_s{seed}"
MODELS = {
    "arm": "--model arm",
    "mdm": "--model mdm",
    "mdm_by_time": "--model mdm-by-time",
    "block16": "--model block",
    "lomdm": "--model lomdm",
    "lomdm_exp": "--model lomdm --weights exp",
    "lomdm_frozen": "--model lomdm --c2 0",
    "lomdm_by_time": "--model lomdm-by-time",
    "a3": A3,
    "a3_groups": f"{A3} --group_size 8",
    "stages": f"--model a3 {FROM_ARM}",
    "stage3": f"{A3} {FROM_ARM}",
    "loa3": "--model loa3",
    "planned": "--model planned",
    "share01": "--model loa3 --random_share 0.1",
    "adapted": "",  # a LLaMA, for the papers' tasks
    "shared": "--left_neighbour False",  # and with one vector for all queries, as in the paper
    "mixed": "--left_share 0.5",  # and half of the texts from left to right
}

WIKITEXT = "--data data/wikitext2/valid.txt --val_data data/wikitext2/test.txt"  # yours to fetch
QUIET = "--log_interval 100 --num_samples 0"
CPU = f"--device cpu --dtype bfloat16 --compile {QUIET}"
SMALL = f"{CPU} --max_iters 3000 --eval_interval 500"
PLAIN = "--local_heads 0 --optimizer adamw"

# LoMDM reads one text in three in two orders, so it gets three quarters as many texts.
FEWER = "--batch_size 12"
HALF = "--batch_size 8"  # and with random times it reads each in two orders

# Films are trained in float32, which at this width is faster and better: see TRIED.md.
FILM = f"--device cpu --dtype float32 --compile {QUIET} --n_layer 3 --n_embd 64 --batch_size"
LONG_FILM = "--data automaton --max_iters 3000 --eval_interval 1000"
BOTH_WAYS = "--data automaton-both --max_iters 3000 --eval_interval 1000"

SMOL = "data/SmolLM2-135M-Instruct"
# What experiments/puzzles.py writes. "told": every text stands in a good order.
PUZZLE = "--max_iters 3000 --eval_interval 1000 --data data/puzzles/"
SCRAMBLED = f"{PUZZLE}scrambled.txt --text_len 68"
TOLD = f"{PUZZLE}scrambled_in_order.txt --text_len 68"

# What experiments/tasks.py asks, at the length of its longest items. Its data is made by
# python -m experiments.tasks prepare.
TASKS = (
    f"{A3} --init_from {SMOL} --data data/tasks/text.jsonl {CPU} "
    "--batch_size 2 --seq_len 128 --max_iters 2000 --learning_rate 2e-4 --weight_decay 0.01 "
    "--optimizer adamw --eval_interval 500 --eval_windows 64"
)
# Trained for the whole of TASKS; and in our form, from few steps to all, and half left to right.
LONG_ADAPTED = "tasks_adapted tasks_shared tasks_mixed"
ADAPTED = "tasks_125_adapted tasks_500_adapted tasks_adapted tasks_mixed"
BASE = f"--preset base --device cuda {QUIET}"
GPT2 = (
    f"--preset gpt2 --device cuda {WIKITEXT} --tokenizer gpt2 --batch_size 8 "
    f"--gradient_accumulation_steps 4 --max_iters 300 --eval_interval 100 {QUIET}"
)

ONE = (1,)
TWO = (1, 2)
THREE = (1, 2, 3)
TRAIN = [  # what their names begin with, models, seeds, flags
    ("", "arm mdm block16 a3 loa3", THREE, SMALL),
    ("", "lomdm lomdm_exp lomdm_frozen", THREE, f"{SMALL} {FEWER}"),
    ("early_", "mdm", THREE, f"{CPU} --max_iters 600 --eval_interval 300"),
    ("early_", "lomdm", THREE, f"{CPU} --max_iters 800 --eval_interval 400"),
    ("laptop_", "arm", ONE, f"{CPU} --batch_size 12 --max_iters 2000 --eval_interval 500"),
    ("film_long_", "arm mdm loa3", THREE, f"{FILM} 64 {LONG_FILM}"),
    ("film_long_", "lomdm lomdm_exp lomdm_frozen", THREE, f"{FILM} 48 {LONG_FILM}"),
    ("", "planned", THREE, SMALL),
    ("film_long_", "planned", THREE, f"{FILM} 64 {LONG_FILM}"),
    ("scrambled_", "planned arm", THREE, f"{FILM} 64 {SCRAMBLED}"),
    ("told_", "arm", THREE, f"{FILM} 64 {TOLD}"),
    ("scrambled_", "loa3 a3", THREE, f"{FILM} 64 {SCRAMBLED}"),
    ("scrambled_", "lomdm lomdm_exp", THREE, f"{FILM} 48 {SCRAMBLED}"),
    ("plain_", "arm a3 loa3", TWO, f"{SMALL} {PLAIN}"),
    ("plain_", "mdm block16", TWO, f"{SMALL} {PLAIN} --middle_steps False"),
    ("plain_", "lomdm", TWO, f"{SMALL} {FEWER} {PLAIN} --middle_steps False"),
    ("adamw_", "arm mdm a3", ONE, f"{SMALL} --optimizer adamw"),
    ("uniform_", "mdm", ONE, f"{SMALL} --middle_steps False"),
    ("free_", "mdm", ONE, f"{SMALL} --local_heads 0"),
    ("time_", "lomdm", THREE, f"{CPU} {FEWER} --max_iters 2700 --eval_interval 250"),
    ("both_", "arm loa3", ONE, f"{FILM} 64 {BOTH_WAYS}"),
    ("", "stages stage3 a3_groups mdm_by_time", ONE, SMALL),
    ("", "lomdm_by_time", ONE, f"{SMALL} {HALF}"),
    ("", "share01", ONE, SMALL),
    ("tasks_", "adapted shared mixed", ONE, TASKS),
    ("tasks_500_", "adapted", ONE, f"{TASKS} --max_iters 500"),  # the last --max_iters counts
    ("tasks_125_", "adapted", ONE, f"{TASKS} --max_iters 125"),
    ("base_", "arm mdm lomdm a3 loa3", THREE, BASE),
    ("gpt2_", "arm mdm lomdm a3 loa3", ONE, GPT2),
]  # fmt: skip


# ---- the measurements ----------------------------------------------------------------------------
def of(names, seeds=ONE):
    """The folders of these runs."""
    return " ".join(f"runs/{name}_s{seed}" for name in names.split() for seed in seeds)


MEASURE = {
    "rows": f"evidence rows {of('both_loa3')}",
    "rows_long": f"evidence rows {of('film_long_lomdm_exp')}",
    "films": f"evidence films {of('both_loa3')}",
    "films_long": f"evidence films {of('film_long_lomdm_exp film_long_loa3')}",
    "found": f"evidence found {of('film_long_planned', THREE)} --svg {PICTURES}/found.svg",
    "scrambled": f"evidence found {of('scrambled_planned', THREE)} --svg {PICTURES}/scrambled.svg",
    "bounds": f"evidence bounds {of('lomdm lomdm_exp lomdm_frozen mdm')}",
    "order": f"evidence order {of('lomdm lomdm_exp loa3')} --svg {PICTURES}/order.svg",
    "passage": f"evidence passage {of('lomdm_exp')} --svg {PICTURES}/passage.svg",
    "orders": f"evidence passage {of('loa3 film_long_loa3')} --windows 4 "
    f"--svg {PICTURES}/orders.svg",
    "strips": f"evidence strips {of('arm block16 mdm lomdm_exp')}",
    "hero": f"evidence strips {of('arm block16 mdm lomdm_exp loa3')} --svg {PICTURES}/hero.svg",
    "masks": f"ideas masks --svg {PICTURES}/masks.svg",
    "heads": f"ideas heads {of('mdm')} --svg {PICTURES}/heads.svg",
    "fraction": f"evidence fraction {of('mdm lomdm a3 loa3')} --svg {PICTURES}/fraction.svg",
    "variance": f"evidence variance {of('mdm lomdm')}",
    "samples": f"evidence samples {of('lomdm lomdm_exp')} --judge {of('arm', (2,))}",
    "groups": f"evidence groups {of('a3 a3_groups')} --judge {of('arm', (2,))}",
    "infill": "evidence infill " + of("arm block16 mdm lomdm lomdm_exp loa3 share01 a3"),
    "decoders": f"evidence decoders {of('mdm lomdm lomdm_exp a3 loa3')} --windows 200",
    "page": "sample.py --device cpu --out_dir ready/loa3 --prompt ROMEO: --length 500 "
    f"--top_p 0.9 --html {PICTURES}/sample.html",
    "count": "bench --device cpu --preset gpt2 --what count --dtype bfloat16",
    "tasks_ask": f"tasks ask {SMOL} {of(LONG_ADAPTED)} --items 48",
    "tasks_piqa": f"tasks ask {SMOL} {of(ADAPTED)} --tasks piqa --by left --items 250",
    "tasks_losses": f"tasks losses {SMOL} {of(ADAPTED + ' tasks_shared')} --items 48",
    "tasks_infill": f"tasks infill {SMOL} {of(LONG_ADAPTED)} --items 16",
    # times, for which nothing else should run
    "steps": "bench --device cpu --what train --threads 1 --repeats 7",
    "steps_compiled": "bench --device cpu --what train --threads 1 --repeats 7 --compile "
    "--dtype bfloat16",
    "speed": f"speed {of('arm block16 mdm lomdm a3 loa3')} --judge {of('arm', (2,))}",
    "cuda_steps": "bench --device cuda --what train",
    "cuda_steps_compiled": "bench --device cuda --what train --compile",
    "cuda_steps_gpt2": "bench --device cuda --preset gpt2 --batch_size 8 --what train",
    "cuda_speed": f"speed --device cuda {of('base_arm base_mdm base_lomdm base_a3 base_loa3')} "
    f"--judge {of('base_arm', (2,))}",
}


# ---- both as one list ----------------------------------------------------------------------------
class Item(NamedTuple):
    """A run, or a measurement."""

    name: str
    argv: tuple[str, ...]  # what python is called with

    @property
    def is_run(self):
        return self.argv[0] == "train_char.py"

    @property
    def needs(self):
        """The names of the runs that it starts from."""
        return {Path(word).name for word in self.argv if word.startswith("runs/")} - {self.name}

    @property
    def command(self):
        return "$ python " + shlex.join(self.argv)

    @property
    def log(self):
        return LOGS / f"{self.name}.{'jsonl' if self.is_run else 'txt'}"


def items():
    """All there is to do, what others start from first."""
    for prefix, names, seeds, flags in TRAIN:
        for name, seed in itertools.product(names.split(), seeds):
            run = f"{prefix}{name}_s{seed}"
            words = f"train_char.py {MODELS[name]} {flags} --seed {seed} --out_dir runs/{run}"
            yield Item(run, tuple(words.format(seed=seed).split()))

    for name, command in MEASURE.items():
        first, *words = command.split()
        script = [first] if first == "sample.py" else ["-m", f"experiments.{first}"]
        yield Item(name, (*script, *words))


# ---- what is done --------------------------------------------------------------------------------
@cache
def todays_code(item):
    """The digest of the code that makes it today. For a run that is the model's and train_char.py.
    For a measurement it is that of the models in its runs, or of all models if it names no run.
    What its runs were trained by is in their own logs. The script that measures does not count."""
    if item.is_run:
        return checkpoint.code_digest(code_of(item))

    runs = [other for other in items() if other.name in item.needs]
    files = [code_of(run) for run in runs] or map(train_char.code_of, train_char.MODELS)
    files = {decoders.__file__, speculative.__file__}.union(*files) - {train_char.__file__}
    return checkpoint.code_digest(files)


def code_of(run):
    model = run.argv[run.argv.index("--model") + 1]
    return train_char.code_of(model, "--init_from" in run.argv)


def stamp(item):
    """The first line of what a measurement printed."""
    return f"{item.command}  # {todays_code(item)}"


def read_log(item):
    """The header of a log, {command, code, hardware, ..}, and what follows: the rows of a run, as
    dicts, or what a measurement printed, as text. ({}, ..) if there is none of today's command."""
    if not item.log.is_file():
        return {}, []

    first, *rest = item.log.read_text("utf-8").split("\n")
    if item.is_run:
        header = json.loads(first)
        found = [json.loads(line) for line in rest if line]
    else:
        command, _, code = first.partition("  # ")
        header = {"command": command, "code": code, "hardware": rest[0]}
        found = "\n".join(rest[1:])

    same = header.get("command") == item.command
    return (header if same else {}), found


def is_done(item):
    return bool(read_log(item)[0])


def same_code():
    """[(older, newer)]: digests of code that trains the same, as experiments/same.py found."""
    lines = SAME.read_text("utf-8").splitlines() if SAME.is_file() else []
    return [tuple(line.split()) for line in lines]


def is_todays(code, today):
    """Whether the code with this digest is today's, or trains as that does."""
    reached = {code}
    while more := {newer for older, newer in same_code() if older in reached} - reached:
        reached |= more
    return today in reached


def is_old(item):
    """Whether it is done, but was made by other code than today's, or from a run that was."""
    header, _ = read_log(item)
    if not header:
        return False
    needed = [other for other in items() if other.name in item.needs]
    todays = is_todays(header.get("code"), todays_code(item))
    return not todays or any(is_old(other) for other in needed)
