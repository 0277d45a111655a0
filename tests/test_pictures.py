"""plumbing/pictures.py: samples as text, page and picture. experiments/charts.py: charts."""

import json
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from experiments import charts
from plumbing import pictures
from plumbing.tokenizers import Characters

SAMPLES = [(["a", "</script>", "\n", "é&"], [2, -1, 0, 1]), (["b"], [0])]


def test_render():
    """0 is the first call, 9 the last. A line end shows and breaks the line, what was given
    has a dot, and what is not printable never reaches the terminal."""
    assert pictures.render("ab\nc", [-1, 0, 9, 5], colour=False) == "ab↵\n.09\nc\n4"
    assert pictures.render("\x1b[", [1, 1], colour=False) == "·[\n00"
    coloured = pictures.render("abc", [-1, 0, 99], colour=True)
    assert coloured == "a\033[38;5;196mb\033[0m\033[38;5;63mc\033[0m"


@pytest.mark.parametrize(
    "text,digits",
    [
        ("日本x", "0 4 9"),  # two columns each
        ("e\u0301xy\u0308", "046"),  # an accent counts with its letter, which has the say
        ("\u0915\u094d\u0937x", "069"),  # a sign for the lack of a vowel
        ("\u1112\u1161\u11abx", "0 9"),  # a Korean syllable of three
        ("a\tbc", "03      69"),  # up to the eighth column
        ("👩\u200d🔬!", "0 9"),  # a joined emoji
        ("\u0301ab", "49"),  # an accent without a letter takes no column
    ],
)
def test_digits_stand_below_their_characters(text, digits):
    at = list(range(len(text)))
    assert pictures.render(text, at, False) == f"{text.expandtabs()}\n{digits}"


def test_what_may_leave_its_digits_is_said(capsys):
    for text, said in ("שלום", True), ("❤\ufe0f", True), ("👍🏽", True), ("日本 é", False):
        pictures.show([([*text], [0] * len(text))], order=True)
        assert ("may leave their digits" in capsys.readouterr().out) == said


ALL_KEPT = "10\u00a0h\u202f; می\u200cرود 👩\u200d🔬 \u3000\ta\u00adb\u200f\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_only_commands_are_guarded_and_only_on_a_terminal(capsys, monkeypatch, is_terminal):
    """Spaces, joiners, marks and tabs are text. Escapes, C1, and overrides of the direction
    are text in a file."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    commands = "\x00\x07\r\x1b\x7f\x9b\u202e\u2066"
    pictures.show([([ALL_KEPT, commands], [0, 1])], order=False)
    shown = "·" * len(commands) if is_terminal else commands
    assert capsys.readouterr().out == f"--- sample 1\n{ALL_KEPT}{shown}\n"


def test_samples_of_tokens(capsys):
    x = torch.tensor([[2, 0, 3, 1], [3, 3, 2, 2]])
    at = torch.tensor([[0, 1, -1, 2], [0, 0, 1, 1]])
    samples = pictures.pieces(Characters(["\n", "\x1b", "a", "b"]), x, at)
    assert samples[0] == (["a", "\n", "b", "\x1b"], [0, 1, -1, 2])
    pictures.show(samples, order=False)
    assert capsys.readouterr().out == "--- sample 1\na\nb\x1b\n--- sample 2\nbbaa\n"
    pictures.show(samples, order=True)
    legend, *rest = capsys.readouterr().out.splitlines()
    assert legend.startswith("order: the digit below")
    assert rest == ["--- sample 1", "a↵", "04", "b·", ".9", "--- sample 2", "bbaa", "0099"]


def test_a_page(tmp_path):
    """It holds the samples, and nothing from outside."""
    page = pictures.page(SAMPLES, "about <b>")
    assert page.count("</script>") == 1 and "http" not in page
    data = json.loads(page.split("const data = ")[1].split(";\n")[0])
    assert data["about"] == "about <b>"
    assert data["samples"][0] == {"pieces": SAMPLES[0][0], "at": SAMPLES[0][1]}
    pictures.write(tmp_path / "new/page.html", page)
    assert (tmp_path / "new/page.html").read_text("utf-8") == page


def lines_of(picture):
    """The lines of a picture: [(place, [(class, text of a run), ..])]."""
    found = []
    for line in list(ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text"))[2:]:
        runs = [(None, line.text), *((e.get("class"), e.text) for e in line)]
        runs += [(None, e.tail) for e in line if e.tail]
        assert all(e.get("x") is None for e in line)  # what has no place of its own can join
        found.append(((int(line.get("x")), int(line.get("y"))), [r for r in runs if r[1]]))
    return found


def test_a_picture():
    """It holds every character once, in lines of its width; runs of one colour are one."""
    picture = pictures.svg(SAMPLES, width=5)
    lines = lines_of(picture)
    runs = [[("c9", "a"), (None, "</sc")], [(None, "ript>")], [("c0", "↵")], [("c4", "é&")]]
    assert [runs for _, runs in lines] == [*runs, [("c0", "b")]]
    assert [y for (_, y), _ in lines] == [42, 60, 78, 96, 132]
    _, _, width, height = map(int, ET.fromstring(picture).get("viewBox").split())
    assert width == 5 * 9 + 20 and height > 132


@pytest.mark.parametrize(
    "text,before,after",
    [
        ("سلام 42 ok", "\u2067", "\u2069"),
        ("12: שלום!", "\u2067", "\u2069"),
        ("ok, שלום", "", ""),
    ],
)
def test_a_picture_from_right_to_left(text, before, after):
    """A line is one element, so that a viewer joins and orders its letters. Its first letter
    says in which direction it runs."""
    whole = pictures.svg([([*text], [0] * len(text))])
    [(_, runs)] = lines_of(whole)
    assert "".join(run for _, run in runs) == before + text + after

    # Also where letters of a word have colours of their own.
    [(_, runs)] = lines_of(pictures.svg([([*text], list(range(len(text))))]))
    assert "".join(run for _, run in runs) == before + text + after


def test_wide_characters_in_a_picture():
    """A line of 6 columns has room for three of two columns, and an accent stays with its
    letter. What XML lacks has a dot."""
    text = "漢字かな交じ" + "e\u0301e\u0301e\u0301e\u0301e\u0301e\u0301" + "\x0c\x1b\uffff"
    lines = lines_of(pictures.svg([([*text], [0] * len(text))], width=6))
    shown = ["".join(run for _, run in runs) for _, runs in lines]
    assert shown == ["漢字か", "な交じ", "e\u0301" * 6, "···"]


def test_a_chart():
    """Points in their places, between axes that have their labels; one line for each
    series."""
    assert charts.ticks(0, 800) == [0, 200, 400, 600, 800]
    series = {"a<b": [(0, 1.0, 0.0), (100, 3.0, 0.5)], "c": [(50, 2.0, 0.0)]}
    root = ET.fromstring(charts.chart(series, "steps & more", "nats"))
    texts = {e.text for e in root if e.tag.endswith("text")}
    assert {"a<b", "c", "steps & more", "nats", "0", "100"} <= texts
    lines = [e.get("d") for e in root if e.get("stroke-width") == "2"]
    assert [line.count("L") for line in lines] == [1, 0]

    points = [e for e in root if e.tag.endswith("circle")]
    (x0, y0), (x1, y1), (x2, y2) = ((float(e.get("cx")), float(e.get("cy"))) for e in points)
    assert x0 < x2 < x1 and x0 + x1 == pytest.approx(2 * x2)
    assert y1 < y2 < y0 and y0 + y1 == pytest.approx(2 * y2)
