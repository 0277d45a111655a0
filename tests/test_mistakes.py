"""
What users of train_char.py and sample.py do wrong, or what goes wrong around them, and the one
line that answers.

TABLE reads like a terminal: the command, the mistake behind #, and below what is printed, with
.. for whatever may stand there. The exit code is 1, or 2 where argparse cannot read the flags.
Whatever the mistake was, all files that were there are there, byte for byte.
"""

import contextlib
import gc
import io
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import tiktoken
import torch
from test_train import (
    BASE,
    QUIET,
    ROOT,
    SEVEN,
    TINY,
    checkpoint,
    figures,
    rows,
    same_runs,
    signals_in,
    stopped,
    train,
)

import lomdm
import sample
import train_char
from plumbing import cli, processes
from plumbing.cli import UserError

TABLE = r"""
-- flags --
$ train --modle arm                                     # two letters in each other's place
error: unrecognized arguments: --modle arm; did you mean --model? (--help lists the flags)
$ train --learning_rat 1                                # a flag that does not exist
error: unrecognized arguments: --learning_rat 1; did you mean --learning_rate? (--help ..
$ train --block_size 64                                 # a flag as nanoGPT has it
error: unrecognized arguments: --block_size 64; did you mean --seq_len? (--help lists the flags)
$ train --n_embed 64 --lr=1e-3                          # two flags as others have them
error: unrecognized arguments: ..; did you mean --n_embd --learning_rate? (--help lists the flags)
$ train --eval_iters=20                                 # one that counts otherwise here
error: unrecognized arguments: --eval_iters=20; did you mean --eval_windows? (--help ..
$ train config/train_shakespeare_char.py                # a file of flags
error: unrecognized arguments: config/train_shakespeare_char.py (--help lists the flags)
$ train --dtype float16                                 # a dtype that would need a scaler
error: argument --dtype: invalid choice: 'float16' (choose from ..float32..bfloat16..(--help ..
$ sample --start=ROMEO --max_new_tokens=9               # how nanoGPT samples
error: unrecognized arguments: ..; did you mean --prompt --length? (--help lists the flags)
$ sample --init_from=resume                             # and from where
error: unrecognized arguments: --init_from=resume; did you mean --out_dir? (--help ..
$ train --model gpt                                     # a model that does not exist
error: argument --model: invalid choice: 'gpt' (choose from .. (--help lists the flags)
$ train --max_iters ten                                 # a number in letters
error: argument --max_iters: invalid integer value: 'ten' (--help lists the flags)
$ train --compile=2                                     # neither true nor false
error: argument --compile: invalid choice: '2' (choose from True, False) (--help lists the flags)
$ train --data= --val_data good                         # a shell variable that is not set
error: --data is empty
$ train --warmup_iters 900 --max_iters 800              # a warmup without an end
error: a warmup of 900 steps in 800: see --warmup_iters, --max_iters
$ train --warmup_iters 601                              # the same, by nobody's --max_iters
error: a warmup of 601 steps in 600: see --warmup_iters, --max_iters
$ sample --top_p 1.5                                    # a probability above 1
error: --top_p must be at most 1

-- models --
$ train --n_head 3                                      # heads that do not divide the width
error: n_embd (16) must be divisible by n_head (3)..
$ train --model block --block_len 16                    # one block: that is another model
error: blocks of 16 in a window of 16: --block_len is above 1 (--model arm) and below the ..
$ train --model block                                   # the same, by nobody's --block_len
error: blocks of 16 in a window of 16: --block_len is above 1 (--model arm) and below the ..
$ train --model arm --block_len 4                       # a flag for another model
error: --block_len is for --model block or lomdm or lomdm-by-time, not arm
$ train --model loa3 --batch_size 1                     # a text has none to be compared with
error: loa3 compares texts: --batch_size 2 at least
$ train --model a3 --init_from nowhere                  # a folder that is not there
error: --init_from nowhere: no such folder; one from the hub: hf download NAME --local-dir ..
$ train --init_from=resume                              # how nanoGPT goes on
error: --init_from resume: no such folder; ..; to go on with a run: --resume
$ train --model a3 --init_from org/Some-1B              # a name on the hub
error: --init_from org/Some-1B: no such folder; one from the hub: hf download NAME --local-dir ..
$ train --model a3 --init_from lora                     # what was learned on top of a model
error: --init_from lora: a LoRA; the package peft makes it one with its model: ..
$ train --model a3 --init_from gguf                     # a model for other programs
error: --init_from gguf: GGUF is for llama.cpp; take the folder that it was made from
$ train --model a3 --init_from gguf/m-Q4_0.gguf         # a file of that kind
error: --init_from gguf/m-Q4_0.gguf: GGUF is for llama.cpp; ..
$ train --model a3 --init_from pickled                  # weights as they once were
error: --init_from pickled: weights in an older format; the package transformers writes ..
$ train --model a3 --init_from words                    # only the tokenizer of a model
error: --init_from words: a tokenizer without its model; take the whole folder
$ train --model a3 --init_from sentences                # a tokenizer of another format
error: --init_from sentences: no tokenizer.json; transformers and sentencepiece make it: ..
$ train --model a3 --init_from good                     # a run of another model
error: --init_from good: go on with it as --model lomdm
$ train --model a3 --init_from bert                     # another kind of pretrained model
error: --init_from bert: model_type bert is not supported; llama, mistral, qwen2, qwen3 are
$ train --model a3 --init_from half                     # a download that broke off
error: --init_from half: a .json file is damaged (..)
$ train --model a3 --init_from llama --tokenizer gpt2   # a LLaMA has its own tokenizer
error: --tokenizer is that of llama; leave it out

-- texts --
$ train --data missing.txt                              # a file that is not there
error: --data missing.txt: no such file or folder in ..
$ train --data itself                                   # a link to itself
error: --data itself: no such file or folder in ..
$ train --data no_text                                  # a folder without texts
error: --data no_text has no .txt or .jsonl files ..
$ train --data good                                     # a folder with the logs of a run
error: good/log.jsonl, line 1: not a JSON object with a string "text"
$ train --data empty.txt                                # an empty file
error: --data empty.txt has 0 + 0 tokens to train and validate on, too few for a window of ..
$ train --data short.txt                                # a file that is too short
error: --data short.txt has 27 + 3 tokens to train and validate on, too few for a window of ..
$ train --data latin1.txt                               # another encoding
error: latin1.txt, line 1, character 4: no UTF-8 text; perhaps iconv -f cp1252 ..
$ train --data bad.jsonl                                # another format
error: bad.jsonl, line 2: not a JSON object with a string "text"
$ train --tokenizer no_text                             # a folder without a tokenizer
error: --tokenizer no_text: neither char, gpt2 nor a folder with tokenizer.json; the package ..
$ train --tokenizer words                               # a folder with a tokenizer.model
error: --tokenizer words: neither ..; the package transformers writes one: AutoTokenizer.save_pr..

-- devices and folders --
$ train --device cuda:99                                # a device that is not there
error: --device cuda:99: there is none here; try --device cpu
$ train --out_dir text.txt                              # a file as a folder
error: cannot write to --out_dir text.txt: File exists
$ train --out_dir /proc/run                             # a place that takes no files
error: cannot write to --out_dir /proc/run: ..
$ sample --html text.txt/a.html                         # a folder that is a file
error: cannot write text.txt/a.html: ..

-- going on --
$ train --resume                                        # no run is there
error: no checkpoint at out/last.pt; train one: python train_char.py --out_dir out
$ train --resume --out_dir good --n_layer 2             # a flag that the run has otherwise
error: --n_layer is 1 in good; leave it out, or start without --resume
$ train --resume --out_dir good --data other.txt        # another text
error: --data other.txt is not the text that this run began with
$ train --resume --out_dir ready                        # the best model of a run, and no last one
error: no checkpoint at ready/last.pt; a ckpt.pt does not go on, but --init_from ready begins ..
$ train --resume --out_dir young --max_iters 1          # no step is left, and none was validated
error: already at step 1; a larger --max_iters goes on, as nothing was validated yet
$ train --resume --out_dir cut                          # half a checkpoint
error: cut/last.pt is damaged, cut off or not a checkpoint; train again
$ train --resume --out_dir old                          # one of an earlier version
error: old/last.pt was not written by this version of train_char.py; train again

-- samples --
$ sample --out_dir nowhere                              # no run is there
error: no checkpoint at nowhere/ckpt.pt; train one: python train_char.py --out_dir nowhere
$ sample --out_dir young                                # a run without a validation so far
error: no checkpoint at young/ckpt.pt; not validated yet, --resume goes on
$ sample --prompt 'to Be'                               # a character that was not in the text
error: 'B' (first in line 1, character 4) does not occur in the text that this model was trained on
$ sample --prompt 'to be, or not to be'                 # a prompt longer than the window
error: the prompt's 19 tokens fill the window of 16: --length 35 writes 16 more
$ sample --prompt 'to be' --length 5                    # nothing is left to write
error: --length 5: the prompt has 5 tokens already
$ sample --infill 'to be'                               # no gap
error: --infill needs a gap: one _ for each token to fill in
$ sample --infill 'to be, or not to _'                  # a text longer than the window
error: the text has 18 tokens, the model's window 16
$ sample --drafts 2                                     # a flag for another model
error: --drafts is for models on two streams, such as a3, not lomdm
$ sample --out_dir a3 --by order                        # an order that was never learned
error: --by order: a3 has not learned one
$ sample --per_step 17                                  # more than there is to fill
error: --per_step: lomdm fills in a block of 16 at most in one call
$ sample --html good/ckpt.pt                            # a name that a checkpoint has
error: ckpt.pt: --html and --svg take two names, and none of a run's files
"""


CONFIG = '{"model_type": "llama"}'
OTHERS = {  # folders of models that are not what --init_from takes
    "lora": {"adapter_config.json": "{}", "adapter_model.safetensors": "", "config.json": CONFIG},
    "gguf": {"m-Q4_0.gguf": "GGUF", "config.json": CONFIG},
    "pickled": {"config.json": CONFIG, "pytorch_model-00001-of-00002.bin": ""},
    "words": {"tokenizer.model": ""},
    "sentences": {"config.json": CONFIG, "model.safetensors": "", "tokenizer.model": ""},
    "llama": {"config.json": CONFIG, "model.safetensors": "", "tokenizer.json": "{}"},
}


def cases(table):
    """(command, line) of a table, each with the mistake as its name."""
    found = re.findall(r"^\$ (.*?) *# (.*)\n(.*)$", table, re.MULTILINE)
    return [pytest.param(command, line, id=what) for command, what, line in found]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything that the table names."""
    where = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(where)
        Path("text.txt").write_text("to be, or not to be\n_" * 100)
        Path("empty.txt").touch()
        Path("itself").symlink_to("itself")
        Path("short.txt").write_text("x" * 30)
        Path("latin1.txt").write_bytes(b"caf\xe9 " * 100)
        Path("other.txt").write_text("something else " * 100)
        Path("bad.jsonl").write_text('{"text": "good"}\n{"words": "bad"}\n')
        for name in ("no_text", "bert", "half", "cut", "old", "young", "ready", *OTHERS):
            Path(name).mkdir()
        for name, content in OTHERS.items():
            for path, text in content.items():
                Path(name, path).write_text(text)
        Path("no_text/README.md").write_text("no text")
        Path("bert/config.json").write_text('{"model_type": "bert", "vocab_size": 9}')
        Path("half/config.json").write_text('{"model_type": "llama", "vocab')

        train("--max_iters 1 --out_dir good")
        train("--max_iters 1 --out_dir a3 --model a3")
        whole = Path("good/last.pt").read_bytes()
        Path("cut/last.pt").write_bytes(whole[: len(whole) // 2])
        Path("young/last.pt").write_bytes(whole)
        Path("young/log.jsonl").write_bytes(Path("good/log.jsonl").read_bytes())
        Path("ready/ckpt.pt").write_bytes(whole)
        torch.save(checkpoint("good/last.pt") | {"format": "lomdm checkpoint 2"}, "old/last.pt")
    return where


def files():
    """{path: its bytes} of all below this folder, but for tokens and locks."""
    found = (p for p in Path().rglob("*") if p.is_file() and not p.name.endswith(".lock"))
    return {p: p.read_bytes() for p in found if p.parts[0] != "tokens"}


def outcome(command, capfd):
    """The exit code of a command, here and now, and what it wrote to stderr."""
    script, *argv = shlex.split(command)
    if script == "train":
        base = QUIET if "--resume" in argv else BASE
        call = lambda: train_char.main([*base.split(), *argv])  # noqa: E731
    else:
        out = [] if "--out_dir" in argv else ["--out_dir", "good"]
        call = lambda: sample.main(["--device", "cpu", *out, *argv])  # noqa: E731
    try:
        cli.run(call)
        code = 0
    except SystemExit as e:
        code = e.code
    if "--resume" in argv or code > 2:
        gc.collect()  # the lock of a folder lives as long as the traceback
    return code, capfd.readouterr().err


@pytest.mark.parametrize("command,line", cases(TABLE))
def test_a_mistake_costs_one_line(world, monkeypatch, capfd, command, line):
    monkeypatch.chdir(world)
    before = files()
    code, err = outcome(command, capfd)
    assert re.fullmatch(re.escape(line).replace(r"\.\.", ".*") + "\n", err), err
    assert code == (2 if "--help" in line else 1)
    assert files() == before


# ---- what goes wrong around them -----------------------------------------------------------


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be, or not to be\n_" * 100)
    return tmp_path


def fails(*_, **__):
    raise OSError("no network")


def last_line(err):
    """The last line of stderr, where a bar of progress may have been before."""
    assert "Traceback" not in err
    return re.split(r"[\r\n]", err.rstrip())[-1]


def test_no_network_for_shakespeare(work, monkeypatch, capsys):
    """Python's own text is trained on, which is said, and the run goes on with that."""
    monkeypatch.setattr(urllib.request, "urlopen", fails)
    train("--max_iters 1", base=TINY)
    note = "no tinyshakespeare (no network); training on Python's own documentation instead\n"
    assert capsys.readouterr().out.startswith(note)
    assert rows()[0]["settings"]["data"] == "python-docs"
    train("--resume --max_iters 2", base="")


ELSEWHERE = [  # what is amiss, the command, and what the line says
    ("a download that is cut off", "--data shakespeare", "has a wrong checksum; try again"),
    ("no network for openwebtext", "--data openwebtext", "not be downloaded: no network"),
    ("no package for openwebtext", "--data openwebtext", "needs .*package.*datasets"),
    ("no network for GPT-2's tokens", "--tokenizer gpt2", "no GPT-2 vocabulary .OSError.: "),
]


@pytest.mark.parametrize("what,flags,line", ELSEWHERE, ids=[what for what, *_ in ELSEWHERE])
def test_what_is_missing_elsewhere(work, monkeypatch, capfd, what, flags, line):
    hub = None if "package" in what else types.SimpleNamespace(load_dataset=fails)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(tiktoken, "get_encoding", fails)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"ROMEO:"))
    before = files()
    code, err = outcome(f"train {flags}", capfd)
    assert code == 1 and re.fullmatch(f"error: .*{line}.*\n", err)
    assert files() == before


@pytest.mark.slow
def test_no_compiler(work, monkeypatch, capfd):
    """--compile without a C++ compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(work / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nonexistent",))
    code, err = outcome("train --max_iters 1 --compile", capfd)
    assert code == 1 and last_line(err).startswith("error: torch.compile failed (")
    assert "--compile=False" in err


@pytest.mark.parametrize("resume", ["", "--resume"])
def test_two_runs_in_one_folder(work, monkeypatch, resume):
    """A run keeps others out, new or resumed ones, as long as it trains."""
    train("--max_iters 1")
    seen = []
    train_step = train_char.train_step

    def step(*a):
        before = files()
        for flags in ("--max_iters 2", "--resume"):
            with pytest.raises(UserError, match="another run is writing to out; take another"):
                train(flags, base="" if "resume" in flags else BASE)
        assert files() == before
        seen.append(before)
        return train_step(*a)

    monkeypatch.setattr(train_char, "train_step", step)
    train(f"{resume} --max_iters 2", base="" if resume else BASE)
    assert len(seen) == (1 if resume else 2)


@pytest.mark.parametrize("flags", ["--resume --max_iters 2", "--data new.txt --out_dir new"])
def test_a_full_disk(work, capfd, flags):
    """Here no file may grow beyond some size. What was there stays, and nothing half-written
    is left."""
    resource = pytest.importorskip("resource")
    train("--max_iters 1")
    Path("new.txt").write_text("to be" * 50_000)
    before = files()
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        code, err = outcome(f"train {flags}", capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    line = last_line(err)
    assert code == 1 and line.startswith("error: ")
    assert "cannot write out/" in line if "resume" in flags else "File too large" in line
    after = files()
    assert {p for p in before if after[p] != before[p]} <= {Path("out/log.jsonl")}
    assert after.keys() == before.keys()
    assert not [p for p in Path().rglob("*") if p.suffix == ".tmp" or p.match("new*/*.bin")]


def test_numbers_that_are_not_finite(work, monkeypatch):
    """The line names the step, and the last good checkpoint, which is kept."""
    loss = lomdm.LoMDM.loss
    calls = []

    def spoilt(self, x):
        calls.append(x)
        value, metrics = loss(self, x)
        bad = torch.nan if len(calls) == 7 else 1.0
        return value * bad, {name: number * bad for name, number in metrics.items()}

    monkeypatch.setattr(lomdm.LoMDM, "loss", spoilt)
    with pytest.raises(UserError, match="not finite at step 7; .*step 5"):
        train("--max_iters 20 --eval_interval 5")
    assert checkpoint("out/last.pt")["step"] == 5


ENDS = {  # where stdout goes: the command, and what stderr gets
    "| true": ("sample.py --out_dir good", ""),
    "> /dev/full": ("sample.py --out_dir good", "error: .*No space left on device\n"),
}


@pytest.mark.parametrize("where", ENDS)
def test_stdout_that_takes_no_more(world, where):
    """Exit code 1, and no traceback, also not from Python's last flush."""
    command, line = ENDS[where]
    shell = f"{sys.executable} {ROOT}/{command} {where}"
    run = ["bash", "-o", "pipefail", "-c", shell]
    got = subprocess.run(run, stderr=subprocess.PIPE, text=True, cwd=world)
    assert got.returncode == 1 and re.fullmatch(line, got.stderr), got.stderr


# ---- impatience ----------------------------------------------------------------------------

GO_ON = "all saved; go on with: python train_char.py --resume --out_dir out"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_at_once(work, capfd, number):
    """It ends after this step, not only after the next line of the log, with exit code 128 +
    signal. Before the first validation there is no best checkpoint, which is said."""
    with signals_in(7, number):
        code, err = outcome("train --max_iters 9 --eval_interval 9", capfd)
    assert code == 128 + number and last_line(err) == f"stopped at step 7, {GO_ON}"
    assert "stopping after this step; saving ... (again: without saving)\n" in err
    assert checkpoint("out/last.pt")["step"] == 7 and not Path("out/ckpt.pt").exists()


def test_ctrl_c_twice(work, capfd, monkeypatch):
    """Whoever asks again, some time later, gets an end without saving. What was saved before
    is there, and the run goes on from it as if nothing had happened."""
    flags = "--max_iters 12 --eval_interval 4 --log_interval 1"
    train(f"{flags} --out_dir whole")
    monkeypatch.setattr(processes, "PATIENCE", -1)
    with signals_in(7, signal.SIGINT, signal.SIGINT):
        code, err = outcome(f"train {flags}", capfd)
    assert code == 130 and last_line(err) == "stopped without saving"
    assert checkpoint("out/last.pt")["step"] == checkpoint("out/ckpt.pt")["step"] == 4
    train("--resume", base="")
    same_runs("whole", "out")


def test_a_wrong_name_makes_no_folder(work, capfd):
    code, err = outcome("train --resume --out_dir tpyo", capfd)
    assert code == 1 and err.startswith("error: no checkpoint at tpyo/last.pt")
    assert not Path("tpyo").exists()


def test_a_notebook_can_try_again(work, monkeypatch):
    """It keeps the traceback of what failed. The folder of the run is free all the same."""

    def full(*_):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError) as kept:
        patch.setattr(train_char, "train", full)
        train("--max_iters 1")
    train("--max_iters 1")
    assert kept.value.__traceback__ and Path("out/ckpt.pt").is_file()


PLACES = {"train": "train_char.data.load", "sample": "sample.write"}


@pytest.mark.parametrize("script,place", PLACES.items())
def test_ctrl_c_while_nothing_is_to_be_saved(world, monkeypatch, capfd, script, place):
    """While text is prepared or samples are drawn, it costs one line."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(place, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    before = files()
    assert outcome(script, capfd) == (130, "interrupted\n")
    assert files() == before


def wait_for(condition, run):
    """Until there is a log that fulfils the condition."""
    while run.poll() is None:
        with contextlib.suppress(OSError, ValueError):  # no log so far, or half a line
            if condition():
                return
        time.sleep(0.01)
    raise AssertionError(run.stderr.read())


QUICK = {("lomdm", signal.SIGTERM), ("loa3", signal.SIGKILL)}
FROM_OUTSIDE = [
    pytest.param(model, number, marks=[] if (model, number) in QUICK else pytest.mark.slow)
    for model in SEVEN
    for number in (signal.SIGTERM, signal.SIGKILL)
]


@pytest.mark.slow
def test_two_processes_stop_together(work):
    """A signal to one of them stops both, at one step. Both wait until the first has validated and
    saved, and one of them says so."""
    flags = f"{BASE} --max_iters 3000 --warmup_iters 10 --gradient_accumulation_steps 2 "
    flags += "--eval_windows 200 --eval_interval 20 --log_interval 5"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv = [*torchrun, "--nproc_per_node=2", str(ROOT / "train_char.py"), *flags.split()]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(argv, **pipes) as run:
        wait_for(lambda: max(figures("out", "nelbo")) >= 6, run)
        children = f"/proc/{run.pid}/task/{run.pid}/children"
        *_, second = map(int, Path(children).read_text().split())
        os.kill(second, signal.SIGINT)
        err = run.communicate(timeout=120)[1]

    said = re.findall("^stopped at step .*$", err, re.M)
    step = checkpoint("out/last.pt")["step"]
    how = "all saved; go on with: the same torchrun command and --resume --out_dir out"
    assert said == [f"stopped at step {step}, {how}"]
    assert max(figures("out", "nelbo")) == step


@pytest.mark.parametrize("model,number", FROM_OUTSIDE)
def test_a_signal_from_outside(work, model, number):
    """SIGTERM saves, and kill -9 may come while the run trains, validates or writes. Both
    checkpoints always load, the folder is free, and with --resume it is the unbroken run,
    bit for bit, with its log."""
    flags = f"{BASE} --model {model} --max_iters 3000 --warmup_iters 10 "
    flags += "--eval_windows 2 --eval_interval 1 --log_interval 1"
    argv = [sys.executable, str(ROOT / "train_char.py"), *flags.split()]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(argv, **pipes) as run:
        wait_for(lambda: max(figures("out", "nelbo")) >= 3, run)
        time.sleep(random.uniform(0, 0.1))
        run.send_signal(number)
        err = run.communicate(timeout=60)[1]
    if number == signal.SIGTERM:
        assert run.returncode == 128 + number and last_line(err).endswith(GO_ON)

    at = checkpoint("out/last.pt")["step"]
    assert at >= 2 and checkpoint("out/ckpt.pt")["step"] <= at + 1  # it is written first
    stopped(at + 3, "--resume", base="")
    stopped(at + 3, f"{flags} --out_dir whole", base="")
    same_runs("whole", "out")
