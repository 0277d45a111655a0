"""Films of a cellular automaton: texts whose right order of reading is known."""

import numpy as np

ROWS = 4
CELLS = 16  # of a row


def films(n, seed, both=False):
    """n films of rule 30 on a ring of 16 cells: 4 rows, a line each. The last moment comes
    first: a cell follows from three in the line below it, and left to right is the wrong
    order. A film costs at least 16 ln 2 = 11.09 nats, .1631 a character, as its first
    moment has to be guessed.

    both: only every other moment is shown, and a film has one of two directions, which a mark
    before each row tells: v, time runs down, or ^, up. Such a film costs 17 ln 2 = 11.78 nats,
    .1637 a character."""
    g = np.random.default_rng(seed)

    # All moments of all films, of which some are shown: (n, ROWS, CELLS), the first moment first.
    every = 2 if both else 1
    moments = [g.integers(0, 2, (n, CELLS))]
    for _ in range((ROWS - 1) * every):
        old = moments[-1]
        moments.append(np.roll(old, 1, 1) ^ (old | np.roll(old, -1, 1)))
    shown = np.stack(moments[::every], 1)

    # Time runs up, or in half of the films down.
    down = g.random(n) < (0.5 if both else 0)
    shown = np.where(down[:, None, None], shown, shown[:, ::-1])
    for rows, is_down in zip(shown, down, strict=True):
        mark = ("v" if is_down else "^") if both else ""
        yield "".join(mark + "".join(".#"[cell] for cell in row) + "\n" for row in rows)
