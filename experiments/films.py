"""Films of the automaton: is the order of time found, and does what is drawn follow the
rule?"""

import itertools
from pathlib import Path

import torch

from experiments import puzzles
from experiments.runs import order_log_weights, shown
from plumbing import pictures
from plumbing.cli import need
from plumbing.data import TEXT_LEN
from plumbing.films import CELLS, ROWS


def need_films(run):
    films = run.ckpt["settings"]["data"] in TEXT_LEN
    need(films, f"{run.name} was not trained on an automaton")


def is_scrambled(run):
    return Path(run.ckpt["settings"]["data"]).name == "scrambled.txt"


def rows(runs, a):
    """--data automaton and automaton-both: the mean log-weight of each row of the films, in
    order of time, less that of the film, for each direction that films may be written in. And
    Kendall's tau between the order and time: 1 if every row is revealed before what follows
    from it."""
    for run in runs:
        run.need_order()
        need_films(run)
        s = run.over_windows(order_log_weights)  # (N, L)
        s = (s - s.mean(1, keepdim=True)).unflatten(1, (ROWS, -1))[..., :-1]  # no line ends
        first = "".join(run.tokenizer.pieces(run.val[:, 0].tolist()))

        # A mark at the beginning tells which way a film of automaton-both runs.
        for mark in sorted(set(first) & {"v", "^"}) or [""]:
            chosen = torch.tensor([mark in ("", c) for c in first])
            film = s[chosen] if mark == "v" else s[chosen].flip(1)  # (n, ROWS, cells), in time
            means = " ".join(shown(film[:, i].mean(1)) for i in range(ROWS))
            tau = shown(kendall(film))
            print(f"{run.name} {mark} tau {tau}; rows, first in time first: {means}")


def kendall(film):
    """tau (n,) of log-weights film (n, ROWS, cells), over all pairs of cells in different
    rows: the share of pairs of which the earlier row is revealed first, from -1 to 1."""
    pairs = itertools.combinations(range(ROWS), 2)
    first = [film[:, i, :, None] > film[:, j, None, :] for i, j in pairs]
    return 2 * torch.stack(first).double().mean((0, 2, 3)) - 1


def found(runs, a):
    """Films of one direction, plain or scrambled by puzzles.py: the order of a run, as it is for
    the films themselves. How many of the 48 cells that follow from three others come after all
    three? And tau, as `rows` has it. With --svg a film, coloured by the order of time, and then by
    that of each run."""
    pictured = []
    for run in runs:
        run.need_order()
        if is_scrambled(run):
            places = puzzles.scrambling(0)
        else:
            need_films(run)
            need(run.val.shape[1] == puzzles.PLACES.size, "found is for films of one direction")
            places = puzzles.PLACES.ravel()

        # Back to where the cells were before they were scrambled: (N, L), and then by time.
        of_film = torch.as_tensor(places).argsort()
        s = run.over_windows(order_log_weights)[:, of_film]
        in_time = s.unflatten(1, (ROWS, -1))[..., :CELLS].flip(1)  # (N, ROWS, CELLS)
        after, tau = after_parents(in_time), kendall(in_time)
        cells = (ROWS - 1) * CELLS
        print(f"{run.name} after their parents {shown(after)} of {cells} tau {shown(tau)}")

        x = run.val[:1].cpu()[:, of_film]
        if not pictured:
            time = torch.as_tensor(puzzles.TIME).argsort()
            pictured += pictures.pieces(run.tokenizer, x, time[None])
        turn = s[:1].argsort(1, descending=True).argsort(1)
        pictured += pictures.pieces(run.tokenizer, x, turn)
    pictures.show(pictured, order=True)
    if a.svg:
        pictures.write(a.svg, pictures.svg(pictured))


def after_parents(film):
    """How many cells (n,) of log-weights film (n, ROWS, cells), in time, come after all three that
    they follow from."""
    last_parent = torch.stack([film[:, :-1].roll(k, 2) for k in (1, 0, -1)]).amin(0)
    return (film[:, 1:] < last_parent).double().sum((1, 2))


def films(runs, a):
    """--data automaton and automaton-both: how many of the films that a run draws follow the
    rule, and the first one, each cell's turn below it, from 0 to 9."""
    for run in runs:
        need_films(run)
        z = torch.full((a.samples, run.val.shape[1]), run.model.mask_id, device=a.device)
        x, at = run.model.sample(z, generator=torch.Generator(a.device).manual_seed(1))
        drawn = pictures.pieces(run.tokenizer, x, at)
        good = sum(follows_the_rule("".join(pieces)) for pieces, _ in drawn)
        print(f"{run.name}: {good} of {a.samples} films are right; the first:")
        pictures.show(drawn[:1], order=True)


def follows_the_rule(film):
    """Does each row of this text follow from the one before it in time, by rule 30? Without
    marks the last row is the first in time. With marks "v" it is the first row, with "^" the
    last, and every second moment is left out."""
    mark = film[:1] if film[:1] in ("v", "^") else ""
    lines = film.splitlines()
    alike = all(line.startswith(mark) for line in lines)
    lines = [line[len(mark) :] for line in lines]
    whole = len(lines) == ROWS and all(len(line) == CELLS for line in lines)
    if not (alike and whole):
        return False
    if mark != "v":
        lines.reverse()

    moments = [[c == "#" for c in line] for line in lines]
    for now, then in itertools.pairwise(moments):
        for _ in range(2 if mark else 1):
            now = [now[i - 1] ^ (now[i] | now[(i + 1) % CELLS]) for i in range(CELLS)]
        if now != then:
            return False
    return True
