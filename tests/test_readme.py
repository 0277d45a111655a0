"""What the README says can be run: its commands parse, its files and tests exist, and the code it
shows does what it says."""

import re
import shlex
from pathlib import Path

import pytest

import bench
import evidence
import prepare
import sample
import train_char

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PARSE = {
    "train_char.py": train_char.parse,
    "sample.py": sample.parse,
    "bench.py": bench.parse,
    "prepare.py": prepare.parse,
    "evidence.py": lambda argv: (
        train_char.parse(argv[1:]) if argv[0] == "times" else evidence.parse(argv)
    ),
}


def commands():
    """[(script, its arguments)]: from every line of a code block and every `span` that calls one of
    our scripts, in the README and in the docstrings of the scripts."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", README)]
    for script in PARSE:
        doc = (ROOT / script).read_text("utf-8").split('"""')[1]
        lines += [line.split("  ")[0] for line in map(str.strip, doc.splitlines())]
    for line in lines:
        for part in line.split("&&"):
            words = (
                shlex.split(part.split("#")[0])
                if re.match(r"\s*\S*(python|torchrun)", part)
                else []
            )
            for i, word in enumerate(words):
                if word in PARSE and "--help" not in words:
                    yield word, [w for w in words[i + 1 :] if w != ".."]


COMMANDS = sorted({(script, tuple(argv)) for script, argv in commands()})


def test_there_are_commands():
    assert {script for script, _ in COMMANDS} == set(PARSE) and len(COMMANDS) > 30


@pytest.mark.parametrize(
    "script,argv", COMMANDS, ids=lambda v: v if isinstance(v, str) else " ".join(v)
)
def test_command_parses(script, argv):
    PARSE[script](list(argv))


def test_flags_exist():
    """Flags that are named on their own, in `--flag value`."""
    help_texts = {name: Path(ROOT / name).read_text("utf-8") for name in PARSE}
    known = {f"--{name}" for name in train_char.Settings.__dataclass_fields__}
    known |= set(re.findall(r'"(--\w+)"', "".join(help_texts.values())))
    known |= {"--batch_size", "--seq_len", "--n_layer", "--n_head", "--n_embd"}
    known |= {"--help", "--standalone", "--nproc_per_node"}  # torchrun's
    used = set(re.findall(r"(?<![\w-])--\w+", README))
    assert used <= known, used - known


def test_files_and_tests_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r'src(?:set)?="([^"]+)"', README
    ):
        assert link.startswith("https://") or (ROOT / link).is_file(), link
    ignored = subprocess_ignored()
    for name in re.findall(r"`((?:tests/)?[\w/]+\.(?:py|html|md|txt|svg))`", README):
        assert (ROOT / name).is_file() or name in ignored, name
    tests = "".join(p.read_text("utf-8") for p in (ROOT / "tests").glob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", README)):
        assert f"def {name}(" in tests, name


def subprocess_ignored():
    """Files that commands of the README write."""
    return {
        argv[i + 1] for _, argv in COMMANDS for i, w in enumerate(argv) if w in ("--html", "--svg")
    }


def test_functions_exist():
    """`name()` and `Class.name()` are functions of lomdm.py or a3.py."""
    code = (ROOT / "lomdm.py").read_text() + (ROOT / "a3.py").read_text()
    code += "".join((ROOT / name).read_text("utf-8") for name in PARSE)
    for name in set(re.findall(r"`(?:\w+\.)*(\w+)\(\)`", README)):
        assert f"def {name}(" in code or f"class {name}" in code, name


def test_the_python_example_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) == 1
    scope = {}
    code = blocks[0].replace("256", "32").replace("n_layer=6", "n_layer=1").replace("384", "48")
    exec(code, scope)  # smaller, to be quick
    assert scope["nats"].shape == (8,) and (scope["nats"] > 0).all()
    assert scope["x"].max() < 65 and scope["revealed_at"].min() == 0
