"""Texts whose good orders are known: what follows from what, and what they cost at least."""

import itertools
import math
from pathlib import Path

import pytest

from experiments import puzzles
from experiments.films import follows_the_rule
from plumbing.cli import UserError


@pytest.mark.parametrize("name", puzzles.PUZZLES)
def test_orders_are_orders(name):
    """Of all positions, for texts of one length."""
    make, least = puzzles.PUZZLES[name]
    texts = list(make(40, 1))
    (L,) = {len(text) for text, _ in texts}
    assert all(sorted(order) == list(range(L)) for _, order in texts)
    assert 0 < least < L * math.log(len({c for text, _ in texts for c in text}))
    assert len({text for text, _ in texts}) > 20


def test_scrambled_films_are_films():
    """In its order a text is a film, first moment first; all texts are scrambled in one way, or in
    the way that the mark tells."""
    for name, first in (("scrambled", 0), ("marked", 1)):
        make, _ = puzzles.PUZZLES[name]
        ways = {}
        for text, order in make(30, 3):
            rows = "".join(text[i] for i in order[first:]).splitlines(keepends=True)
            assert follows_the_rule("".join(reversed(rows)))
            assert not follows_the_rule(text[first:])
            ways.setdefault(text[:first], set()).add(tuple(order))
        assert all(len(orders) == 1 for orders in ways.values())
        assert len(ways) == len(set.union(*ways.values())) == (1, 4)[first]


def test_a_path_follows_from_its_end():
    """Each node but the centre has one edge that leads to it; four lead away from the centre."""
    for text, order in puzzles.star(30, 1):
        edges, _, rest = text.rpartition(" ")[0].rpartition(" ")
        path = text[-5:-1]
        assert rest == f"{path[0]}-{path[-1]}:"
        before = {edge[1]: edge[0] for edge in edges.split()}
        assert len(before) == 12 and list(before.values()).count(path[0]) == 4
        for a, b in itertools.pairwise(path):
            assert before[b] == a
        assert "".join(text[i] for i in order[-4:]) == path[::-1]


def test_what_a_star_costs():
    """As many texts as there are, all equally likely."""
    labelled = math.perm(16, 13) // math.factorial(4)
    count = labelled * math.factorial(12) * 4
    assert puzzles.star_cost() == pytest.approx(math.log(count))


def test_sudokus():
    every = list(puzzles.grids())
    assert len(every) == len(set(every)) == 288


def test_command(tmp_path, capsys):
    """Every text as it is, and once more with its characters in the good order."""
    puzzles.main(["star", "sudoku", "--n", "12", "--to", str(tmp_path / "new")])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(tmp_path / "new" / f"{name}.txt") for name in ("star", "sudoku")
    ]
    text, in_order = (
        Path(tmp_path, "new", f"{name}.txt").read_text() for name in ("star", "star_in_order")
    )
    L = len(text) // 12
    for i, (star, order) in enumerate(puzzles.star(12, 1)):
        assert text[i * L :][:L] == star
        assert in_order[i * L :][:L] == "".join(star[j] for j in order)

    with pytest.raises(UserError, match="--n must be at least 1"):
        puzzles.main(["sudoku", "--n", "0", "--to", str(tmp_path)])
