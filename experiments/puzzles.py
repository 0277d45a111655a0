"""
Texts whose good orders are known: most are easy in one order and hard in others.

    python -m experiments.puzzles
    python train_char.py --model loa3 --data data/puzzles/scrambled.txt --text_len 68

All texts of a kind have the same length, and no order of positions is good for all kinds. In
NAME_in_order.txt the characters of every text stand in a good order, so that an ARM trained on that
file is told what others have to find. What a text costs at least, by the way it is made:

    films       an automaton's four moments, the last one first       16 ln 2         11.0904
    scrambled   films whose cells changed places, all in one way      16 ln 2         11.0904
    marked      films scrambled in one of four ways, and a mark       16 ln 2 + ln 4  12.4766
                that tells which
    star        edges in random order of a star with four arms, two   star_cost()   47.0756
                names, and the path between them from its centre
    sudoku      a 4 x 4 sudoku, filled in; there are only 288         ln 288           5.6630

In films each cell follows from three of the moment before. In a star the path is easy from its end,
as each node has one edge that leads to it, and hard from the centre, where four arms begin.
"""

import itertools
import math
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

from plumbing import cli
from plumbing.checkpoint import write_text
from plumbing.cli import need
from plumbing.films import CELLS, ROWS, films

PLACES = np.arange(ROWS * (CELLS + 1)).reshape(ROWS, CELLS + 1)  # a film, row by row
TIME = PLACES[::-1].ravel()  # its positions, first moment first
ARMS = 4
LONG = 3  # edges of an arm
NAMES = "abcdefghijklmnop"


# Each function below yields n pairs of a text and a good order of its positions, as a list.


def plain(n, seed):
    for film in films(n, seed):
        yield film, TIME.tolist()


def scrambling(seed):
    """The positions (L,) in a film of the characters of a scrambled film: cells change places
    with cells, and line ends stay."""
    places = PLACES.copy()
    cells = places[:, :-1].ravel()
    places[:, :-1] = np.random.default_rng(seed).permutation(cells).reshape(ROWS, CELLS)
    return places.ravel()


def scramble(film, places):
    """The film with the character at places[i] in position i, and its good order."""
    text = "".join(film[place] for place in places)
    position_of = np.argsort(places)
    return text, position_of[TIME].tolist()


def scrambled(n, seed):
    places = scrambling(0)  # whatever the seed of the films
    for film in films(n, seed):
        yield scramble(film, places)


def marked(n, seed):
    g = np.random.default_rng((seed, 1))
    for film in films(n, seed):
        way = int(g.integers(4))
        text, order = scramble(film, scrambling(way))
        yield f"{way}{text}", [0, *(1 + i for i in order)]


def star(n, seed):
    """Names are drawn without repetition: the centre, and those of four arms of three. The twelve
    edges are shuffled. Then comes the end of one arm, and the path to it. The path is no choice, so
    a text costs ln(16! / 3!) + ln 12! + ln 4 nats, less ln 4! as the arms have no numbers."""
    g = np.random.default_rng(seed)
    for _ in range(n):
        names = [NAMES[i] for i in g.permutation(len(NAMES))[: 1 + ARMS * LONG]]
        arms = [[names[0], *names[1 + LONG * i :][:LONG]] for i in range(ARMS)]
        edges = [a + b for arm in arms for a, b in itertools.pairwise(arm)]
        shuffled = [edges[i] for i in g.permutation(len(edges))]
        arm = arms[int(g.integers(ARMS))]
        text = " ".join(shuffled) + f" {arm[0]}-{arm[-1]}: {''.join(arm)}\n"

        # The path last, and from its end.
        path = range(len(text) - 2 - LONG, len(text) - 1)
        rest = [i for i in range(len(text)) if i not in path]
        yield text, [*rest, *reversed(path)]


def star_cost():
    return math.lgamma(17) - math.lgamma(4) + math.lgamma(13) + math.log(4) - math.lgamma(5)


def grids():
    """All 288 sudokus of 4 x 4, as strings of 16 digits."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    for grid in itertools.product(rows, repeat=4):
        columns = all(len(set(column)) == 4 for column in zip(*grid, strict=True))
        boxes = (grid[i][j : j + 2] + grid[i + 1][j : j + 2] for i in (0, 2) for j in (0, 2))
        if columns and all(len(set(box)) == 4 for box in boxes):
            yield "".join(grid)


def sudoku(n, seed):
    every = list(grids())
    for i in np.random.default_rng(seed).integers(0, len(every), n):
        yield every[i] + "\n", list(range(17))


PUZZLES = {  # (what makes them, the least cost of a text in nats)
    "films": (plain, 16 * math.log(2)),
    "scrambled": (scrambled, 16 * math.log(2)),
    "marked": (marked, 16 * math.log(2) + math.log(4)),
    "star": (star, star_cost()),
    "sudoku": (sudoku, math.log(288)),
}


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("puzzles", nargs="*", help=f"of {', '.join(PUZZLES)} [all]")
    p.add_argument("--to", default="data/puzzles", help="the folder to write to [data/puzzles]")
    p.add_argument("--n", type=int, default=22000, help="texts; the last tenth validates [22000]")
    p.add_argument("--seed", type=int, default=1, help="[1]")
    a = p.parse_args(argv)
    cli.check_range("n", a.n, 1, 2**24)
    cli.check_range("seed", a.seed, 0, 2**32)

    for name in a.puzzles:
        need(name in PUZZLES, f"{name} is not one of {', '.join(PUZZLES)}")
    return a


def main(argv=None):
    a = parse(argv)
    Path(a.to).mkdir(parents=True, exist_ok=True)
    for name in a.puzzles or PUZZLES:
        make, least = PUZZLES[name]
        pairs = list(make(a.n, a.seed))
        path = Path(a.to, f"{name}.txt")
        write_text(path, "".join(text for text, _ in pairs))
        in_order = ("".join(text[i] for i in order) for text, order in pairs)
        write_text(path.with_stem(f"{name}_in_order"), "".join(in_order))

        L = len(pairs[0][0])
        how = f"{a.n:,} texts of {L} characters (--text_len {L})"
        print(f"{path}: {how}, each {least:.4f} nats or more; and {name}_in_order.txt")


if __name__ == "__main__":
    cli.run(main)
