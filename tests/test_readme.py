"""
What README.md, experiments/RESULTS.md, experiments/TRIED.md and the docstrings of the scripts
say can be run: the commands parse, files, tests and functions exist, and the code shown runs.
"""

import itertools
import re
import shlex
from pathlib import Path

import pytest

import lomdm
import sample
import train_char
from beyond import playground
from experiments import bench, evidence, harness, puzzles, report, run_all, speed, tasks
from plumbing import cli

ROOT = Path(__file__).parents[1]
FILES = "README.md", "experiments/RESULTS.md", "experiments/TRIED.md"
PAGES = {path: (ROOT / path).read_text("utf-8") for path in FILES}
PROSE = "\n".join(PAGES.values())


def parser_of(Settings):
    """A check of arguments: that they parse, and are what their flags allow."""
    return lambda argv: cli.check(
        Settings(**cli.parse(Settings, argv, "", train_char.PRESETS))
    )


PARSE = {  # as a command calls it: file, parser
    "train_char.py": ("train_char.py", parser_of(train_char.Settings)),
    "sample.py": ("sample.py", parser_of(sample.Settings)),
    "beyond.playground": ("beyond/playground.py", playground.parse),
    "experiments.bench": ("experiments/bench.py", parser_of(bench.Settings)),
    "experiments.evidence": ("experiments/evidence.py", evidence.parse),
    "experiments.harness": ("experiments/harness.py", harness.parse),
    "experiments.puzzles": ("experiments/puzzles.py", puzzles.parse),
    "experiments.report": ("experiments/report.py", report.parse),
    "experiments.run_all": ("experiments/run_all.py", run_all.parse),
    "experiments.speed": ("experiments/speed.py", speed.parse),
    "experiments.tasks": ("experiments/tasks.py", tasks.parse),
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


def test_every_call_is_known():
    """None is of a script that is gone, or of a module without -m; and all are there."""
    for words in calls():
        assert ours(words) or words[1:3] in (["-m", "venv"], ["-m", "pytest"]), words
    assert {script for script, _ in COMMANDS} == set(PARSE) and len(COMMANDS) > 30


@pytest.mark.parametrize("script,argv", sorted(COMMANDS))
def test_command_parses(script, argv):
    PARSE[script][1](list(argv))


def test_flags_exist():
    """Flags that are named on their own, in `--flag value`."""
    settings = (train_char.Settings, sample.Settings, bench.Settings)
    known = {f"--{name}" for S in settings for name in S.__dataclass_fields__}
    known |= {f"--{name}" for name in (*evidence.FLAGS, *harness.FLAGS)}
    known |= {"--only", "--minutes", "--list", "--again"}  # of run_all
    known |= {"--download"}  # of tasks
    known |= {"--help", "--standalone", "--nproc_per_node"}  # torchrun's
    assert set(re.findall(r"(?<![\w-])--\w+", PROSE)) <= known


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """They start from the page. Headings are those that GitHub makes of them."""
    text = PAGES[page]
    links = re.findall(r"\]\(([^)]+)\)", text)
    links += re.findall(r'(?:src(?:set)?|href)="([^"]+)"', text)
    for link in links:
        path, _, heading = link.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        if link.startswith("https://"):
            continue
        assert there.exists(), link
        if heading:
            found = re.findall(r"^#+ (.*)", there.read_text("utf-8"), re.M)
            found = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in found]
            assert heading in found, link


def test_what_is_named_exists():
    """Files and folders from the root, tests, and functions: `name()` and `Class.name()`."""
    pairs = (pair for _, argv in COMMANDS for pair in itertools.pairwise(argv))
    written = {path for flag, path in pairs if flag in ("--html", "--svg")}
    for name in re.findall(r"`([\w/]+\.(?:py|html|md|txt|svg|yml))`", PROSE):
        assert (ROOT / name).is_file() or name in written, name
    for name in re.findall(r"`((?:plumbing|experiments|tests)/\w*)/?`", PROSE):
        assert (ROOT / name).is_dir(), name

    rooms = ".", "beyond", "plumbing", "experiments", "tests"
    code = "".join(p.read_text("utf-8") for room in rooms for p in (ROOT / room).glob("*.py"))
    names = re.findall(r"`(test_\w+)`", PROSE) + re.findall(r"`(?:\w+\.)*(\w+)\(\)`", PROSE)
    for name in names:
        assert f"def {name}(" in code or f"class {name}" in code, name


def test_the_python_examples_run():
    """The six lines of an MDM are those of lomdm.py's docstring, which test_equivalences.py
    runs. The library at a smaller size."""
    six, library = re.findall(r"^```python\n(.*?)^```", PAGES["README.md"], re.M | re.S)
    lesson = [line.strip() for line in lomdm.__doc__.splitlines()]
    assert set(six.splitlines()) <= set(lesson) and len(six.splitlines()) == 6

    smaller = (
        library.replace("256", "32").replace("n_layer=6", "n_layer=1").replace("384", "48")
    )
    scope = {}
    exec(smaller, scope)
    assert scope["nats"].shape == (8,) and (scope["nats"] > 0).all()
    assert scope["x"].max() < 65 and scope["revealed_at"].min() == 0
