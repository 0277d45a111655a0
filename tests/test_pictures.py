"""plumbing/pictures.py: samples as text, page and picture. experiments/charts.py: charts."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from experiments import charts
from plumbing import pictures
from plumbing.cli import UserError
from plumbing.tokenizers import Characters

SAMPLES = [(["a", "</script>", "\n", "é&"], [2, -1, 0, 1]), (["b"], [0])]


def test_render():
    """0 is the first call, 9 the last; line ends show and break; given characters are dots or
    plain, and what is not printable never reaches the terminal."""
    assert pictures.render("ab\nc", [-1, 0, 9, 5], colour=False) == "ab↵\n.09\nc\n4"
    assert pictures.render("ab", [3, 7], colour=False) == "ab\n09"
    assert pictures.render("\x1b[", [1, 1], colour=False) == "·[\n00"
    coloured = pictures.render("abc", [-1, 0, 99], colour=True)
    assert coloured == "a\033[38;5;196mb\033[0m\033[38;5;63mc\033[0m"
    assert pictures.render("a\nb", [0, 1, 2], colour=True).count("\n") == 1


def test_samples_of_tokens(capsys):
    tokenizer = Characters(["\n", "\x1b", "a", "b"])
    x, at = torch.tensor([[2, 0, 3, 1], [3, 3, 2, 2]]), torch.tensor([[0, 1, -1, 2], [0, 0, 1, 1]])
    samples = pictures.pieces(tokenizer, x, at, 3)
    assert samples == [(["a", "\n", "b"], [0, 1, -1]), (["b", "b", "a"], [0, 0, 1])]
    pictures.show(samples, order=False)
    assert capsys.readouterr().out == "--- sample 1\na\nb\n--- sample 2\nbba\n"
    pictures.show(samples, order=True)
    legend, *rest = capsys.readouterr().out.splitlines()
    assert legend.startswith("order: the digit below")
    assert rest == ["--- sample 1", "a↵", "09", "b", ".", "--- sample 2", "bba", "009"]
    pictures.show(pictures.pieces(tokenizer, x, at), order=False)
    assert "\x1b" not in capsys.readouterr().out


def test_page_and_picture(tmp_path, monkeypatch, capsys):
    """The page holds the samples and nothing from outside; the picture every character once."""
    page = pictures.page(SAMPLES, "about <b>")
    assert page.count("</script>") == 1 and "http" not in page and len(page) < 20_000
    data = json.loads(page.split("const data = ")[1].split(";\n")[0])
    assert data["about"] == "about <b>"
    assert data["samples"][0] == {"pieces": SAMPLES[0][0], "at": SAMPLES[0][1]}

    picture = ET.fromstring(pictures.svg(SAMPLES, width=5))
    cells = [e for e in picture if e.tag.endswith("text")][2:]
    assert "".join(e.text for e in cells) == "a</script>↵é&b"
    assert [e.get("class") for e in cells] == ["c9", *[None] * 9, "c0", "c4", "c4", "c0"]
    places = [(e.get("x"), e.get("y")) for e in cells]
    assert len(set(places)) == len(places) and places[5][0] == places[0][0]  # wrapped
    _, _, width, height = map(int, picture.get("viewBox").split())
    assert all(int(x) + 9 <= width and int(y) < height for x, y in places)

    pictures.write(tmp_path / "new/page.html", "é")
    assert Path(tmp_path, "new/page.html").read_text("utf-8") == "é"
    assert capsys.readouterr().out == f"wrote {tmp_path}/new/page.html\n"
    for path in ("new/page.html/x.html", "new"):
        with pytest.raises(UserError, match=f"cannot write .*{path}: "):
            pictures.write(tmp_path / path, "")

    monkeypatch.setattr(pictures, "PAGE", tmp_path / "new/page.html")
    Path(tmp_path, "link").symlink_to(tmp_path / "new/page.html")
    for path in ("new/page.html", "new/../new/page.html", "link"):
        with pytest.raises(UserError, match="is the template of the page; take another name"):
            pictures.write(tmp_path / path, "<svg/>")
    assert Path(tmp_path, "new/page.html").read_text("utf-8") == "é"


# ---- charts --------------------------------------------------------------------------------------
def drawn(*what):
    """Texts, and the centres of all points, of a chart."""
    root = ET.fromstring(charts.chart(*what))
    texts = [e.text for e in root if e.tag.endswith("text")]
    points = [e for e in root if e.tag.endswith("circle")]
    return root, texts, [(float(e.get("cx")), float(e.get("cy"))) for e in points]


def test_chart():
    """Points in their places, between axes that have their labels; one line for each series."""
    assert charts.ticks(0, 800) == [0, 200, 400, 600, 800]
    assert charts.ticks(1.7, 3.2) == [2.0, 2.5, 3.0]
    series = {"a<b": [(0, 1.0, 0.0), (100, 3.0, 0.5)], "c": [(50, 2.0, 0.0)]}
    root, texts, points = drawn(series, "steps & more", "nats")
    assert {"a<b", "c", "steps & more", "nats", "0", "100"} <= set(texts)
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x2 < x1 and x0 + x1 == pytest.approx(2 * x2) and y0 + y1 == pytest.approx(2 * y2)
    assert y1 < y0 and all(60 <= x <= 530 and 15 <= y <= 350 for x, y in points)
    lines = [e for e in root if e.get("stroke-width") == "2"]
    assert [e.get("d").count("L") for e in lines] == [1, 0]
    root, texts, points = drawn(series, "", "", ["one", "two"])
    assert {"one", "two"} <= set(texts) and not [e for e in root if e.get("stroke-width") == "2"]

    for x, y in (0, 0.0), (200, 3.0), (5, -1.0):
        _, _, ((px, py),) = drawn({"a": [(x, y, 0.0)]}, "x", "y")
        assert 60 < px < 530 and 15 < py < 350
    with pytest.raises(UserError, match="there are no figures to draw"):
        charts.chart({"a": []}, "x", "y")
