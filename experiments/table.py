"""
What RESULTS.md is made of: a table of runs, a table of measurements, and which of both are done.

The log of a run is experiments/logs/NAME.jsonl, and what a measurement printed is in NAME.txt.
Both begin with the command, the hardware, and a digest of the code that made them. A run or a
measurement is done if its log has today's command. Today's code may be another.
"""

import json
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

from plumbing import checkpoint
from train_char import OUR_CODE

RUNS = Path("runs")
LOGS = Path("experiments/logs")
PICTURES = "experiments/pictures"

# ---- flags that several runs share ---------------------------------------------------------------
WIKITEXT = "--data data/wikitext2/valid.txt --val_data data/wikitext2/test.txt"  # put it there
A3 = "--model a3 --shares 0,0,1"  # random orders from the start
FROM_ARM = "--init_from runs/arm_s{seed}"

QUIET = "--log_interval 100 --num_samples 0"
CPU = f"--device cpu --dtype bfloat16 --compile {QUIET}"
SMALL = f"{CPU} --max_iters 3000 --eval_interval 500"
TIME = f"{CPU} --eval_interval 250"  # as long as the ARM and the MDM take for 3,000 steps
LONG = (
    f"{CPU} --n_layer 6 --n_head 6 --n_embd 192 --seq_len 128 --max_iters 3000 "
    "--eval_interval 1000"
)

# Films are trained in float32, which is faster at this width.
FILM = f"--device cpu --dtype float32 --compile {QUIET} --n_layer 3 --n_embd 64"
SHORT_FILM = "--data automaton --max_iters 1000 --eval_interval 250"
LONG_FILM = "--data automaton --max_iters 3000 --eval_interval 1000"
FILM_1 = f"{FILM} --batch_size 64 {SHORT_FILM}"
FILM_2 = f"{FILM} --batch_size 32 {SHORT_FILM}"  # for LoMDM, which reads each film twice
LONG_1 = f"{FILM} --batch_size 64 {LONG_FILM}"
LONG_2 = f"{FILM} --batch_size 32 {LONG_FILM}"
BOTH = f"{FILM} --batch_size 64 {LONG_FILM.replace('automaton', 'automaton-both')}"

SMOL = (
    f"{A3} --init_from data/SmolLM2-135M-Instruct --device cpu --dtype bfloat16 --log_interval 20 "
    f"--num_samples 0 {WIKITEXT} --batch_size 8 --seq_len 64 --weight_decay 0.01 "
    "--eval_interval 40 --eval_windows 48"
)
BASE = f"--preset base --device cuda {QUIET}"
GPT2 = (
    f"--preset gpt2 --device cuda {WIKITEXT} --tokenizer gpt2 --batch_size 8 "
    f"--gradient_accumulation_steps 4 --max_iters 300 --eval_interval 100 {QUIET}"
)

# ---- the runs ------------------------------------------------------------------------------------
ONE = (1,)
TWO = (1, 2)
THREE = (1, 2, 3)
FRESH = (11, 12, 13)  # seeds that LoA3's rules were not chosen with

TRAIN = [  # name, seeds, flags
    ("arm", THREE, f"--model arm {SMALL}"),
    ("mdm", THREE, f"--model mdm {SMALL}"),
    ("mdm_32", THREE, f"--model mdm --batch_size 32 {SMALL}"),
    ("block4", THREE, f"--model block --block_len 4 {SMALL}"),
    ("block16", THREE, f"--model block {SMALL}"),
    ("lomdm", THREE, f"--model lomdm {SMALL}"),
    ("lomdm_exp", THREE, f"--model lomdm --weights exp {SMALL}"),
    ("lomdm_frozen", THREE, f"--model lomdm --c2 0 {SMALL}"),
    ("a3", THREE, f"{A3} {SMALL}"),
    ("loa3", THREE, f"--model loa3 {SMALL}"),
    ("fresh_loa3", FRESH, f"--model loa3 {SMALL}"),
    ("share01", TWO, f"--model loa3 --random_share 0.1 {SMALL}"),
    ("share03", TWO, f"--model loa3 --random_share 0.3 {SMALL}"),
    ("stages", TWO, f"--model a3 {FROM_ARM} {SMALL}"),
    ("stage3", TWO, f"{A3} {FROM_ARM} {SMALL}"),
    ("vector", TWO, f"{A3} --left_neighbour False {SMALL}"),
    ("vector_stage3", TWO, f"{A3} {FROM_ARM} --left_neighbour False {SMALL}"),
    ("mdm_by_time", TWO, f"--model mdm-by-time {SMALL}"),
    ("lomdm_by_time", TWO, f"--model lomdm-by-time {SMALL}"),
    ("block4_time", THREE, f"--model block --block_len 4 --max_iters 1400 {TIME}"),
    ("block16_time", THREE, f"--model block --max_iters 1400 {TIME}"),
    ("lomdm_time", THREE, f"--model lomdm --max_iters 950 {TIME}"),
    ("a3_time", THREE, f"{A3} --max_iters 1500 {TIME}"),
    ("loa3_time", THREE, f"--model loa3 --max_iters 1500 {TIME}"),
    ("long_loa3", ONE, f"--model loa3 --random_share 0.2 {LONG}"),
    ("long_arm", ONE, f"--model arm {LONG}"),
    # films
    ("film_arm", THREE, f"--model arm {FILM_1}"),
    ("film_mdm", THREE, f"--model mdm {FILM_1}"),
    ("film_block17", THREE, f"--model block --block_len 17 {FILM_1}"),
    ("film_a3", THREE, f"{A3} {FILM_1}"),
    ("film_loa3", THREE, f"--model loa3 {FILM_1}"),
    ("fresh_film_loa3", FRESH, f"--model loa3 {FILM_1}"),
    ("film_lomdm", THREE, f"--model lomdm {FILM_2}"),
    ("film_lomdm_exp", THREE, f"--model lomdm --weights exp {FILM_2}"),
    ("film_lomdm_frozen", THREE, f"--model lomdm --c2 0 {FILM_2}"),
    ("film_long_arm", THREE, f"--model arm {LONG_1}"),
    ("film_long_mdm", THREE, f"--model mdm {LONG_1}"),
    ("film_long_loa3", THREE, f"--model loa3 {LONG_1}"),
    ("film_long_lomdm", THREE, f"--model lomdm {LONG_2}"),
    ("film_long_lomdm_exp", THREE, f"--model lomdm --weights exp {LONG_2}"),
    ("film_long_lomdm_frozen", THREE, f"--model lomdm --c2 0 {LONG_2}"),
    ("both_arm", THREE, f"--model arm {BOTH}"),
    ("both_loa3", THREE, f"--model loa3 {BOTH}"),
    # a pretrained LLaMA, first as it was: one step that changes nothing
    ("smol0", ONE, f"--max_iters 1 --learning_rate 1e-12 {SMOL}"),
    ("smol", ONE, f"--max_iters 240 --learning_rate 2e-4 --warmup_iters 10 {SMOL}"),
    # on a GPU
    ("base_arm", THREE, f"--model arm {BASE}"),
    ("base_mdm", THREE, f"--model mdm {BASE}"),
    ("base_lomdm", THREE, f"--model lomdm {BASE}"),
    ("base_a3", THREE, f"{A3} {BASE}"),
    ("base_loa3", THREE, f"--model loa3 {BASE}"),
    ("gpt2_arm", ONE, f"--model arm {GPT2}"),
    ("gpt2_mdm", ONE, f"--model mdm {GPT2}"),
    ("gpt2_lomdm", ONE, f"--model lomdm {GPT2}"),
    ("gpt2_a3", ONE, f"{A3} {GPT2}"),
    ("gpt2_loa3", ONE, f"--model loa3 {GPT2}"),
]


# ---- the measurements ----------------------------------------------------------------------------
def of(names, seeds=ONE):
    """The folders of these runs."""
    return " ".join(f"runs/{name}_s{seed}" for name in names.split() for seed in seeds)


MEASURE = [  # name, command
    ("rows", f"evidence rows {of('film_loa3 both_loa3', THREE)}"),
    ("rows_long", f"evidence rows {of('film_long_lomdm_exp film_long_lomdm', THREE)}"),
    ("films", f"evidence films {of('film_loa3 both_loa3', THREE)}"),
    ("films_long", f"evidence films {of('film_long_lomdm_exp film_long_loa3', THREE)}"),
    ("bounds", f"evidence bounds {of('lomdm lomdm_exp lomdm_frozen mdm')}"),
    ("order", f"evidence order {of('lomdm lomdm_exp loa3')} --svg {PICTURES}/order.svg"),
    ("passage", f"evidence passage {of('lomdm_exp')} --svg {PICTURES}/passage.svg"),
    (
        "orders",
        f"evidence passage {of('loa3 film_loa3')} --windows 4 --svg {PICTURES}/orders.svg",
    ),
    ("strips", f"evidence strips {of('arm block16 mdm lomdm_exp')}"),
    ("fraction", f"evidence fraction {of('mdm lomdm a3 loa3')} --svg {PICTURES}/fraction.svg"),
    ("variance", f"evidence variance {of('mdm lomdm')}"),
    ("samples", f"evidence samples {of('lomdm lomdm_exp')} --judge {of('arm', (2,))}"),
    (
        "infill",
        f"evidence infill {of('arm block16 mdm lomdm lomdm_exp loa3 share01 share03 a3')}",
    ),
    ("decoders", f"evidence decoders {of('mdm lomdm lomdm_exp a3 loa3')} --windows 200"),
    (
        "page",
        f"sample.py --device cpu --out_dir {of('long_loa3')} --prompt ROMEO: --length 500 "
        f"--top_p 0.9 --html {PICTURES}/sample.html",
    ),
    ("count", "bench --device cpu --preset gpt2 --what count --dtype bfloat16"),
]
TIMES = [  # the same, for which nothing else may run
    ("steps", "bench --device cpu --what train --threads 1 --repeats 7"),
    (
        "steps_compiled",
        "bench --device cpu --what train --threads 1 --repeats 7 --compile --dtype bfloat16",
    ),
    ("speed", f"speed {of('arm block4 mdm lomdm a3 loa3')} --judge {of('arm', (2,))}"),
    ("cuda_steps", "bench --device cuda --what train"),
    ("cuda_steps_compiled", "bench --device cuda --what train --compile"),
    ("cuda_steps_gpt2", "bench --device cuda --preset gpt2 --batch_size 8 --what train"),
    (
        "cuda_speed",
        f"speed --device cuda {of('base_arm base_mdm base_lomdm base_a3 base_loa3')} "
        f"--judge {of('base_arm', (2,))}",
    ),
]


# ---- both as one list ----------------------------------------------------------------------------
class Item(NamedTuple):
    """A run, or a measurement."""

    name: str
    argv: tuple[str, ...]  # what python is called with
    alone: bool = False  # it runs while nothing else does

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
    for name, seeds, flags in TRAIN:
        for seed in seeds:
            run = f"{name}_s{seed}"
            words = f"train_char.py {flags} --seed {seed} --out_dir runs/{run}"
            yield Item(run, tuple(words.format(seed=seed).split()))

    for name, command in MEASURE + TIMES:
        first, *words = command.split()
        script = [first] if first == "sample.py" else ["-m", f"experiments.{first}"]
        yield Item(name, (*script, *words), alone=(name, command) in TIMES)


# ---- what is done --------------------------------------------------------------------------------
@cache
def todays_code():
    return checkpoint.code_digest(OUR_CODE)


def stamp(item):
    """The first line of what a measurement printed."""
    return f"{item.command}  # {todays_code()}"


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


def is_old(item):
    """Whether it is done, but was made by other code than today's, or from a run that was."""
    header, _ = read_log(item)
    if not header:
        return False
    needed = [other for other in items() if other.name in item.needs]
    return header.get("code") != todays_code() or any(is_old(other) for other in needed)
