"""What README.md, experiments/RESULTS.md, experiments/TRIED.md and the docstrings of the scripts
say can be run: the commands parse, files, tests and functions exist, and the code shown does what
it says."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch

import lomdm
import sample
import train_char
from experiments import bench, evidence, harness, report, run_all, speed
from plumbing import cli, data

ROOT = Path(__file__).parents[1]
ROOMS = "beyond", "plumbing", "experiments"
FILES = "README.md", "experiments/RESULTS.md", "experiments/TRIED.md"
PAGES = {path: (ROOT / path).read_text("utf-8") for path in FILES}
PROSE = "\n".join(PAGES.values())


def parser_of(Settings):
    """A check of arguments: that they parse, and are what their flags allow."""
    return lambda argv: cli.check(Settings(**cli.parse(Settings, argv, "", train_char.PRESETS)))


PARSE = {  # as a command calls it: file, parser
    "train_char.py": ("train_char.py", parser_of(train_char.Settings)),
    "sample.py": ("sample.py", parser_of(sample.Settings)),
    "plumbing.data": ("plumbing/data.py", parser_of(data.Flags)),
    "experiments.bench": ("experiments/bench.py", parser_of(bench.Settings)),
    "experiments.evidence": ("experiments/evidence.py", evidence.parse),
    "experiments.harness": ("experiments/harness.py", harness.parse),
    "experiments.report": ("experiments/report.py", report.parse),
    "experiments.run_all": ("experiments/run_all.py", run_all.parse),
    "experiments.speed": ("experiments/speed.py", speed.parse),
}
DOCSTRINGS = [
    (ROOT / path).read_text("utf-8").split('"""')[1]
    for path in (*(path for path, _ in PARSE.values()), "beyond/decoders.py")
]


def lines():
    """Every line of a code block and every `span` of the pages, and all of the docstrings."""
    for block in re.findall(r"^```\w*\n(.*?)^```", PROSE, re.M | re.S):
        yield from block.replace("\\\n", " ").splitlines()
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", PROSE):
        yield span.replace("\n", " ")
    for docstring in DOCSTRINGS:
        yield from (line.strip().split("  ")[0] for line in docstring.splitlines())


def calls():
    """Every part of a line that calls python or torchrun, in words."""
    for line in lines():
        for part in line.split("&&"):
            part = re.sub(r"^\s*(\w+=\S* )*", "", part.split(" #")[0])  # KILLS=20 python ..
            if re.match(r"\S*(python3?|torchrun) ", part):
                yield shlex.split(part)


def ours(words):
    """(script, its arguments) if a call is of one of our scripts."""
    for i, word in enumerate(words):
        if word in PARSE and (words[i - 1] == "-m") == (not word.endswith(".py")):
            return word, tuple(w for w in words[i + 1 :] if w != "..")


COMMANDS = {found for words in calls() if (found := ours(words)) and "--help" not in found[1]}
COMMANDS = sorted(COMMANDS)


def test_there_are_commands():
    assert {script for script, _ in COMMANDS} == set(PARSE) and len(COMMANDS) > 30


def test_every_call_is_known():
    """None is of a script that is gone, or of a module without -m."""
    for words in calls():
        assert ours(words) or words[1:3] in (["-m", "venv"], ["-m", "pytest"]), words


@pytest.mark.parametrize(
    "script,argv", COMMANDS, ids=lambda v: v if isinstance(v, str) else " ".join(v)
)
def test_command_parses(script, argv):
    PARSE[script][1](list(argv))


def test_flags_exist():
    """Flags that are named on their own, in `--flag value`."""
    settings = (train_char.Settings, sample.Settings, data.Flags, bench.Settings)
    known = {f"--{name}" for S in settings for name in S.__dataclass_fields__}
    known |= {f"--{name}" for name in (*evidence.FLAGS, *harness.FLAGS)}
    known |= {"--only", "--minutes", "--list"}  # of run_all
    known |= {"--help", "--standalone", "--nproc_per_node"}  # torchrun's
    used = set(re.findall(r"(?<![\w-])--\w+", PROSE))
    assert used <= known, used - known


def written():
    """Files that commands of the pages write."""
    both = [pair for _, argv in COMMANDS for pair in itertools.pairwise(argv)]
    return {path for flag, path in both if flag in ("--html", "--svg")}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_exist(page):
    """Links start from the page, file names from the root."""
    text = PAGES[page]
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src(?:set)?|href)="([^"]+)"', text)
    for link in links:
        path, _, heading = link.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert link.startswith("https://") or there.exists(), link
        if heading and not link.startswith("https://"):
            found = re.findall(r"^#+ (.*)", there.read_text("utf-8"), re.M)
            assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in found}
    for name in re.findall(r"`([\w/]+\.(?:py|html|md|txt|svg|yml))`", text):
        assert (ROOT / name).is_file() or name in written(), name
    for name in re.findall(r"`((?:plumbing|experiments|tests)/\w*)/?`", text):
        assert (ROOT / name).is_dir(), name
    tests = "".join(p.read_text("utf-8") for p in (ROOT / "tests").glob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in tests, name


def test_functions_exist():
    """`name()` and `Class.name()` are functions of ours."""
    files = (*ROOT.glob("*.py"), *(p for room in ROOMS for p in ROOT.glob(f"{room}/*.py")))
    code = "".join(path.read_text("utf-8") for path in files)
    for name in set(re.findall(r"`(?:\w+\.)*(\w+)\(\)`", PROSE)):
        assert f"def {name}(" in code or f"class {name}" in code, name


def test_the_python_examples_run():
    """The six lines of an MDM, which are those of lomdm.py's docstring, and the library."""
    six, library = re.findall(r"^```python\n(.*?)^```", PAGES["README.md"], re.M | re.S)
    lesson = [line.strip() for line in lomdm.__doc__.splitlines()]
    assert set(six.splitlines()) <= set(lesson) and len(six.splitlines()) == 6

    B, L, V = 3, 8, 5
    x = torch.randint(V, (B, L))
    model = lomdm.LoMDM(lomdm.Config(V, L, n_layer=1, n_head=2, n_embd=8))
    logits = lambda z: model.log_probs(z)  # noqa: E731
    scope = dict(torch=torch, F=torch.nn.functional, x=x, B=B, L=L, model=logits, mask_id=V)
    exec(six, scope)
    assert scope["loss"].isfinite() and scope["hidden"].any(1).all()

    scope = {}
    smaller = library.replace("256", "32").replace("n_layer=6", "n_layer=1").replace("384", "48")
    exec(smaller, scope)
    assert scope["nats"].shape == (8,) and (scope["nats"] > 0).all()
    assert scope["x"].max() < 65 and scope["revealed_at"].min() == 0
