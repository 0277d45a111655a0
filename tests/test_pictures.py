"""plumbing/pictures.py: samples as text, page and picture. experiments/charts.py: charts."""

import json
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


def test_samples_of_tokens(capsys):
    x = torch.tensor([[2, 0, 3, 1], [3, 3, 2, 2]])
    at = torch.tensor([[0, 1, -1, 2], [0, 0, 1, 1]])
    samples = pictures.pieces(Characters(["\n", "\x1b", "a", "b"]), x, at)
    assert samples[0] == (["a", "\n", "b", "\x1b"], [0, 1, -1, 2])
    pictures.show(samples, order=False)
    assert capsys.readouterr().out == "--- sample 1\na\nb·\n--- sample 2\nbbaa\n"
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


def test_a_picture():
    """It holds every character once, at a place of its own within the picture."""
    picture = ET.fromstring(pictures.svg(SAMPLES, width=5))
    cells = [e for e in picture if e.tag.endswith("text")][2:]
    assert "".join(e.text for e in cells) == "a</script>↵é&b"
    assert [e.get("class") for e in cells] == ["c9", *[None] * 9, "c0", "c4", "c4", "c0"]
    places = [(int(e.get("x")), int(e.get("y"))) for e in cells]
    assert len(set(places)) == len(places) and places[5][0] == places[0][0]  # wrapped
    _, _, width, height = map(int, picture.get("viewBox").split())
    assert all(x + 9 <= width and y < height for x, y in places)


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
