"""
Does today's code train as an older commit's does: the same losses, bit for bit?

    python -m experiments.same COMMIT

Each log holds a digest of the code that made it, and RESULTS.md puts a dagger on figures that are
not by today's code. But most changes of code change no figure: a function becomes two, or a message
says more. So this takes the code of COMMIT and today's, trains each kind of model of table.py with
both, at a small size, and compares all that the two logs say, but for times. Where all is equal,
experiments/same.txt gets the two digests. Then a log of the older code counts as one of today's.

A whole training of 40 steps is compared, from warmup to the end of the cosine, with two
validations. It is no proof for the 3,000 steps of a run, but all that makes such a run is in it.
Models whose code is that of COMMIT are left out. No LLaMA is trained here, as it is large. It has
one digest with what begins with a model of ours, so if the code that only a LLaMA needs has
changed, neither is compared.
"""

import json
import shlex
import subprocess
import sys
import tarfile
import tempfile
from argparse import RawDescriptionHelpFormatter
from io import BytesIO
from pathlib import Path

from experiments import table
from plumbing import checkpoint, cli
from plumbing.cli import need

SMALL = {
    "n_layer": "2", "n_embd": "48", "seq_len": "32", "batch_size": "6", "max_iters": "40",
    "eval_interval": "20", "eval_windows": "50", "log_interval": "1", "compile": "False",
}  # fmt: skip
TIMES = "seconds", "tokens_per_second"


def kinds():
    """The flags of all runs in table.py, but smaller, once each, without those for a GPU, those
    that start from a LLaMA, and those on puzzles, which differ from others only in the text."""
    found = {}
    for item in table.items():
        if item.is_run and not {"cuda", table.SMOL, "--text_len"} & set(item.argv):
            found[tuple(sorted(small(item).items()))] = None
    return [dict(flags) for flags in found]


def small(item):
    """The flags of a run, but smaller."""
    flags = as_dict(item.argv[1:]) | SMALL | {"seed": "1"}
    if flags["data"].startswith("automaton"):
        del flags["seq_len"]  # a film's length
    del flags["out_dir"]
    return flags


def as_dict(words):
    """["--a", "1", "--b", "--c", "2"] -> {"a": "1", "b": "True", "c": "2"}"""
    flags = {"data": "shakespeare"}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            flags[word[2:]] = "True" if after.startswith("--") else after
    return flags


def unpack(commit, folder):
    """The files of a commit."""
    git = subprocess.run(["git", "archive", commit], capture_output=True)
    need(not git.returncode, f"{commit}: {git.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(git.stdout)) as archive:
        archive.extractall(folder, filter="data")


DIGESTS = """
import json, train_char
from beyond import llama
from plumbing import checkpoint
of = lambda *how: checkpoint.code_digest(train_char.code_of(*how))
found = {name: of(name) for name in train_char.MODELS}
found |= {f"{name} adapted": of(name, True) for name in train_char.MODELS}
print(json.dumps(found | {"llama": checkpoint.code_digest({llama.__file__})}))
"""


def digests(code):
    """{model: the digest of its code} for the code in a folder; that of "MODEL adapted", which
    --init_from has; and that of "llama", what only a LLaMA has. The folder is asked itself, as it
    may have other models and other files than today's."""
    done = subprocess.run([sys.executable, "-c", DIGESTS], cwd=code, capture_output=True, text=True)
    need(not done.returncode, f"{code} is too old to be compared: {done.stderr[-300:]}")
    return json.loads(done.stdout)


def train(code, flags, out):
    """Train with the code in a folder: the rows of the log, without times. What --init_from names
    is trained before it."""
    if "init_from" in flags:
        [start] = (item for item in table.items() if f"runs/{item.name}" == flags["init_from"])
        begun = out.with_name(f"{out.name}_start")
        train(code, small(start), begun)
        flags = flags | {"init_from": str(begun)}

    flags = {"data_dir": str(Path("data").resolve())} | flags | {"out_dir": str(out)}
    argv = [sys.executable, "train_char.py", *(f"--{name}={flags[name]}" for name in flags)]
    done = subprocess.run(argv, cwd=code, capture_output=True, text=True)
    need(not done.returncode, f"{shlex.join(argv)}, in {code}: {done.stderr[-300:]}")

    _, *rows = checkpoint.read_log(out)
    for row in rows:
        for name in TIMES:
            row.pop(name, None)
    return rows


def compare(old, now, out):
    """{(digest of the older code, of today's): whether all runs with them were equal}. old, now:
    folders of code. out: a folder for the runs."""
    digest, digest_now = digests(old), digests(now)
    same_llama = digest["llama"] == digest_now["llama"]
    pairs = {}
    for number, flags in enumerate(kinds()):
        model = flags["model"] + (" adapted" if "init_from" in flags else "")
        pair = digest.get(model), digest_now[model]
        untold = "init_from" in flags and not same_llama  # no training here would tell of that
        if untold or pair[0] in (None, pair[1]):  # or it is a new model, or the same code
            continue

        rows = train(old, flags, out / f"old{number}")
        same = rows == train(now, flags, out / f"now{number}")
        said = " ".join(f"--{name} {flags[name]}" for name in flags if name not in SMALL)
        print(f"{'the same' if same else 'not the same':15}{said}", flush=True)
        pairs[pair] = pairs.get(pair, True) and same
    return pairs


def main(argv=None):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("commit", help="whose code is compared with today's")
    a = p.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "code"
        unpack(a.commit, old)
        pairs = compare(old, Path.cwd(), Path(folder))

    # Each model has a digest of its own.
    found = {pair for pair, same in pairs.items() if same}
    lines = {" ".join(pair) for pair in found.union(table.same_code())}
    checkpoint.write_text(table.SAME, "".join(f"{line}\n" for line in sorted(lines)))
    print(f"{len(found)} of {len(pairs)} changed digests train as they did; see {table.SAME}")


if __name__ == "__main__":
    cli.run(main)
