"""
Writes RESULTS.md: page.md, in which {{word ..}} is replaced by what the logs say.

    python -m experiments.report

    {{losses arm mdm}}          a table of the validation figures of these runs
    {{pairs a3-arm left:a-b}}   a table of differences, seed by seed; left: of these figures
    {{ratios arm left:a3}}      how many times as many steps the runs plain_arm, .. take
    {{curves c.svg left:a3}}    a picture of validation figures during training
    {{rows NAME PATTERN}}       what a measurement printed: each match is a row of its groups
    {{nats arm left}}           one figure of a run, that has the word left
    {{find NAME PATTERN}}       the group of each match in what a measurement printed
    {{log NAME NAME}}           where measurements were made, and links to what they printed

The word x68 multiplies: a text of 68 tokens. In a pattern a space is any white space, and NUM a
number with its error. A run is named without its seed: a figure is a mean over the seeds that have
been run, ± its standard error. A section in which something has not been made is left out, but of
pairs and ratios only those rows.
"""

import itertools
import math
import re
import statistics
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

from experiments import charts, table
from plumbing import checkpoint, cli
from plumbing.cli import need

HERE = Path("experiments")
NOT_YET = "NOT_MADE_YET"  # one word, which no line break divides
OLD = " †"  # after what was made by other code than today's
LABELS = {
    "arm": "ARM",
    "mdm": "MDM",
    "mdm_by_time": "MDM, random times",
    "block16": "block diffusion, 16",
    "lomdm": "LoMDM",
    "lomdm_exp": "LoMDM, steep weights",
    "lomdm_frozen": "LoMDM, equal weights",
    "lomdm_by_time": "LoMDM, random times",
    "a3": "A3",
    "a3_groups": "A3, groups of 1 to 8",
    "stages": "A3 from the ARM, three stages",
    "stage3": "A3 from the ARM, stage 3 only",
    "loa3": "LoA3",
    "planned": "A3 with a planned order",
    "share01": "LoA3, a tenth in random order",
    "adapted": "A3",
    "shared": "A3, one query vector",
    "mixed": "A3, half left to right",
}


FORMS = {
    "plain_": ", plain",
    "adamw_": ", AdamW only",
    "uniform_": ", all steps alike",
    "free_": ", no local heads",
    "told_": ", told the order",
    "tasks_125_": ", 125 steps",
    "tasks_500_": ", 500 steps",
}


def label(name):
    """What a reader calls a run. What its table has in common goes: film_, the seed."""
    name = re.sub(r"_s\d+$", "", name)
    tables = "early laptop time film_long both scrambled tasks base gpt2"
    prefixes = [*FORMS, *(f"{name}_" for name in tables.split())]
    prefix = re.match(f"({'|'.join(prefixes)})?", name)[0]
    name = name.removeprefix(prefix)
    return LABELS.get(name, name) + FORMS.get(prefix, "")


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells):
    return [row(*cells), "|---" * len(cells) + "|"]


# ---- figures of runs -----------------------------------------------------------------------------
def done_runs(name):
    """The runs of this name, one for each seed, that have been made."""
    found = [item for item in table.items() if item.name.rpartition("_s")[0] == name]
    need(found, f"page.md: table.py has no run of the name {name}")
    return [item for item in found if table.is_done(item)]


def validations(name):
    """[(header, rows)] of these runs, the rows that have a validation figure."""
    logs = map(table.read_log, done_runs(name))
    return [(header, [row for row in rows if "val" in row]) for header, rows in logs]


def best(name):
    """{kind: {seed: (value, error over windows)}}, at the step where the first kind is lowest."""
    found = defaultdict(dict)
    for header, rows in validations(name):
        judged = [row for row in rows if row["kind"] == rows[0]["kind"]]
        step = min(judged, key=lambda row: row["val"])["step"]
        for row in rows:
            if row["step"] == step:
                found[row["kind"]][header["settings"]["seed"]] = row["val"], row["val_error"]
    return found


def figure(name, word=""):
    """The kind that has this word, the first one if none is given, and {seed: value} of it."""
    found = best(name)
    kinds = [kind for kind in found if word in kind]
    need(kinds or not found, f"page.md: {name} has no figure {word}, but {', '.join(found)}")
    kind = kinds[0] if kinds else ""
    return kind, {seed: value for seed, (value, _) in found[kind].items()}


def mean_error(values):
    """The mean, and its standard error, 0 where one value does not tell."""
    n = len(values)
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0


def shown(values, sign="", digits=4):
    mean, error = mean_error(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def multiplied(words):
    """The words but for one such as x68; its number, or 1; and the unit."""
    factors = [int(word[1:]) for word in words if re.fullmatch(r"x\d+", word)]
    words = [word for word in words if not re.fullmatch(r"x\d+", word)]
    times = math.prod(factors)
    return words, times, "nats a text" if factors else "nats per token"


def made(names):
    """A line about these runs: how large they are, where they were made, and their names."""
    sizes = {}  # a set that keeps its order
    where = defaultdict(list)
    for item in (item for name in names for item in done_runs(name)):
        header, _ = table.read_log(item)
        s = header["settings"]
        compiled = ", compiled" if s["compile"] else ""
        size = f"{s['n_layer']} layers, {s['n_embd']} wide, {s['seq_len']} tokens of context"
        sizes[f"{size}, {s['dtype']}{compiled}"] = True
        where[machine_of(item)].append(item.name)

    usual = max(where, key=lambda machine: len(where[machine]))
    others = [f", {', '.join(where[m])} on {m}" for m in where if m != usual]
    made_on = f"Made on {usual}{''.join(others)}"
    return f"*{'; '.join(sizes)}. {made_on}. Logs: {', '.join(names)}.*"


def machine_of(item):
    header, _ = table.read_log(item)
    return header["hardware"] + (OLD if table.is_old(item) else "")


# ---- the words -----------------------------------------------------------------------------------
def losses(*names):
    names, times, unit = multiplied(names)
    out = head("model", "steps x windows", "seconds", f"{unit} ± seeds", "seeds", "what it is")
    for name in names:
        if not done_runs(name):
            return NOT_YET
        s = validations(name)[0][0]["settings"]
        size = f"{s['max_iters']:,} x {s['batch_size']}"
        twice = {"lomdm": ", a third of them twice", "lomdm-by-time": ", each twice"}
        size += twice.get(s["model"], "")
        for kind, found in best(name).items():
            values = [times * value for value, _ in found.values()]
            cost = shown(values)
            if len(values) == 1:
                ((_, error),) = found.values()
                cost += f" (± {times * error:.4f} over windows)"
            out.append(row(label(name), size, seconds(name), cost, len(values), kind))
    return "\n".join([*out, "", made(names)])


def seconds(name):
    """Of training, in the fastest of the seeds, as others had to share the machine."""
    logs = (table.read_log(item)[1] for item in done_runs(name))
    return f"{min(max(row.get('seconds', 0) for row in rows) for rows in logs):.0f}"


def pairs(*names):
    names, times, unit = multiplied(names)
    used = {}  # a set that keeps its order
    out = head("", f"{unit} ± seeds", "seeds", "what they are")
    for pair in names:
        word, _, pair = pair.rpartition(":")
        one, other = pair.split("-")
        kind, a = figure(one, word)
        other_kind, b = figure(other, word)
        less = [times * (a[seed] - b[seed]) for seed in sorted(a.keys() & b.keys())]
        if not less:
            continue
        kinds = kind if kind == other_kind else f"{kind} − {other_kind}"
        out.append(row(f"{label(one)} − {label(other)}", shown(less, "+"), len(less), kinds))
        used |= {one: True, other: True}
    return "\n".join([*out, "", made(used)]) if used else NOT_YET


def curve(name, word=""):
    """{seed: [(step, value)]} of the kind of figure that has this word."""
    kind, _ = figure(name, word)
    return {
        header["settings"]["seed"]: [(r["step"], r["val"]) for r in rows if r["kind"] == kind]
        for header, rows in validations(name)
    }


def reached(points, level):
    """The step at which points [(step, value)] first fall to a level, on straight lines between
    them. If they begin below it, that is the first step at the latest."""
    if points[0][1] <= level:
        return points[0][0]
    for (step, value), (next_step, next_value) in itertools.pairwise(points):
        if next_value <= level < value:
            return step + (next_step - step) * (value - level) / (value - next_value)
    return math.nan


def ratios(*names):
    """How many times as many steps the plain_ runs take to where they are after so many."""
    marks = 1000, 2000, 3000
    out = head("", *(f"{mark:,} plain steps" for mark in marks), "seeds", "what it is")
    used = {}
    for name in names:
        word, _, name = name.rpartition(":")
        kind, _ = figure(name, word)
        fast, slow = curve(name, word), curve(f"plain_{name}", word)
        seeds = sorted(fast.keys() & slow.keys())
        if not seeds:
            continue
        cells = [
            shown([mark / reached(fast[seed], dict(slow[seed])[mark]) for seed in seeds], digits=2)
            for mark in marks
        ]
        out.append(row(label(name), *cells, len(seeds), kind))
        used |= {name: True, f"plain_{name}": True}
    return "\n".join([*out, "", made(used)]) if used else NOT_YET


def nats(name, *words):
    words, times, _ = multiplied(words)
    _, found = figure(name, " ".join(words))
    return shown([times * value for value in found.values()]) if found else NOT_YET


def curves(picture, *names):
    series = {}
    for name in names:
        word, _, name = name.rpartition(":")
        kind, _ = figure(name, word)
        at = defaultdict(list)
        for _, rows in validations(name):
            for line in rows:
                if line["kind"] == kind:
                    at[line["step"]].append(line["val"])
        if not at:
            return NOT_YET
        points = [(step, *mean_error(values)) for step, values in sorted(at.items())]
        series[f"{label(name)}, {word}" if word else label(name)] = points

    what = "nats per token, validation"
    svg = charts.chart(series, "steps", what)
    checkpoint.write_text(HERE / "pictures" / picture, svg)
    return f"![{what}](pictures/{picture})"


def measurement(name):
    found = [item for item in table.items() if item.name == name]
    need(found, f"page.md: table.py has no measurement of the name {name}")
    return found[0]


def matches(name, pattern):
    """All matches in what this measurement has printed, [] if it has not been made."""
    header, text = table.read_log(measurement(name))
    if not header:
        return []

    number = r"([-+]?\d[\d.,]*\d(?: ± [\d.]+)?)"
    pattern = pattern.replace("NUM", number).replace(" ", r"\s+")
    found = list(re.finditer(pattern, text, re.M))
    need(found, f"page.md: what {name} printed has no {pattern}")
    return found


def rows(name, *pattern):
    out = []
    for match in matches(name, " ".join(pattern)):
        first, *more = (group or "" for group in match.groups())
        out.append(row(label(first), *more))
    return "\n".join([*out, "", log(name)]) if out else NOT_YET


def find(name, *pattern):
    found = matches(name, " ".join(pattern))
    return ", ".join(match[1] for match in found) or NOT_YET


def log(*names):
    """Where measurements were made, and a link to all that they printed."""
    where = defaultdict(list)
    for item in map(measurement, names):
        if not table.is_done(item):
            return NOT_YET
        where[machine_of(item)].append(f"[{item.log.name}](logs/{item.log.name})")
    made_on = [f"{', '.join(links)}: made on {machine}." for machine, links in where.items()]
    return f"*{' '.join(made_on)}*"


# ---- the page ------------------------------------------------------------------------------------
WORDS = {word.__name__: word for word in (losses, pairs, ratios, nats, curves, rows, find, log)}


def fill(match):
    word, *more = match[1].split()
    need(word in WORDS, f"page.md: {word} is none of {', '.join(WORDS)}")
    return WORDS[word](*more)


def wrapped(paragraph):
    prose = not paragraph.startswith(("|", "#", "!"))
    return textwrap.fill(paragraph, 99, break_on_hyphens=False) if prose else paragraph


def page():
    """RESULTS.md, as it should be. A section in which something is missing is left out, and named
    at the end. Draws its pictures."""
    text = re.sub(r"\{\{(.+?)\}\}", fill, (HERE / "page.md").read_text("utf-8"), flags=re.S)
    text = "\n\n".join(map(wrapped, text.strip().split("\n\n"))) + "\n"
    sections = re.split(r"^(?=#+ )", text, flags=re.M)
    missing = [part.partition("\n")[0].lstrip("# ") for part in sections if NOT_YET in part]
    if missing:
        sections[-1] += "\n"
        sections.append(f"---\n\nNot made yet: {'; '.join(missing)}.\n")
    return "".join(part for part in sections if NOT_YET not in part)


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    return p.parse_args(argv)


def main(argv=None):
    parse(argv)
    need(HERE.is_dir(), "start it where train_char.py is")
    text = page()
    checkpoint.write_text(HERE / "RESULTS.md", text)
    print(f"wrote {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    cli.run(main)
