"""
Writes RESULTS.md: page.md, in which what stands in {{double braces}} is replaced by what the logs
say, and the pictures that are made of logs alone.

    python -m experiments.report

A run is named without its seed: a figure is a mean over the seeds that have been run, ± its
standard error. Where none has, the section is left out.
"""

import math
import re
import statistics
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

from experiments import charts, run_all
from experiments.run_all import FIVE, SIZES
from plumbing import checkpoint, cli
from plumbing.cli import refuse

HERE = Path("experiments")
NOT_YET = "(not there yet)"
LABELS = {
    "arm": "ARM", "mdm": "MDM", "block4": "block diffusion, 4", "block16": "block diffusion, 16",
    "block17": "block diffusion, 17: a line", "lomdm": "LoMDM", "lomdm_exp": "LoMDM, exp weights",
    "lomdm_frozen": "LoMDM, order frozen", "mdm_32": "MDM, twice the windows",
    "a3": "A3", "loa3": "LoA3",
    "share01": "LoA3, `--random_share 0.1`", "share03": "LoA3, `--random_share 0.3`",
    "stages": "A3 from the ARM, three stages", "stage3": "A3 from the ARM, stage 3 only",
    "vector": "A3, queries of one vector",
    "vector_stage3": "A3 from the ARM, stage 3 only, queries of one vector",
    "mdm_by_time": "MDM, random times", "lomdm_by_time": "LoMDM, random times",
}  # fmt: skip


def label(name):
    """For a reader. Prefixes go, as each has a table of its own."""
    name = re.sub("^((fresh|film|both|long|base|gpt2)_)+", "", name)
    longer = name not in LABELS and name.endswith("_time")
    base = name.removesuffix("_time") if longer else name
    return LABELS.get(base, base) + (", equal time" if longer else "")


# ---- what the logs say ---------------------------------------------------------------------------
def everything():
    return *run_all.items(cuda=False), *run_all.items(cuda=True)


def seeds(name):
    """The runs of this name, one for each seed."""
    found = [item for item in everything() if item.name.rpartition("_s")[0] == name]
    refuse(not found, f"page.md: run_all.py has no run of the name {name}")
    return found


def logs(name):
    """[(header, validations)] of the seeds that have been run."""
    done = [item for item in seeds(name) if run_all.state(item) == "done"]
    found = [checkpoint.read_log(run_all.LOGS / item.name) for item in done]
    return [(header, [row for row in rows if "val" in row]) for header, *rows in found]


def seconds(name):
    """Of training, in the fastest of the seeds, as others had to share the machine."""
    done = [item for item in seeds(name) if run_all.state(item) == "done"]
    rows = (checkpoint.read_log(run_all.LOGS / item.name)[1:] for item in done)
    return f"{min(max(row.get('seconds', 0) for row in some) for some in rows):.0f}"


def best(name):
    """{kind: {seed: (value, error over windows)}}, at the step where the first kind is lowest."""
    found = defaultdict(dict)
    for header, rows in logs(name):
        judged = [row for row in rows if row["kind"] == rows[0]["kind"]]
        step = min(judged, key=lambda row: row["val"])["step"]
        for row in rows:
            if row["step"] == step:
                found[row["kind"]][header["settings"]["seed"]] = row["val"], row["val_error"]
    return found


def figure(name, word=""):
    """The kind that has this word, the first one if none is given, and {seed: value} of it."""
    found = best(name)
    kinds = [kind for kind in found if word.replace("_", " ") in kind]
    refuse(found and not kinds, f"page.md: {name} has no figure {word}, but {', '.join(found)}")
    kind = kinds[0] if kinds else ""
    return kind, {seed: value for seed, (value, _) in found[kind].items()}


def mean_error(values):
    """The mean, and its standard error, 0 where one value does not tell."""
    n = len(values)
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0


def shown(values, sign=""):
    mean, error = mean_error(values)
    return f"{mean:{sign}.4f}" + (f" ± {error:.4f}" if len(values) > 1 else "")


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


# ---- what stands in braces -----------------------------------------------------------------------
def multiplied(words):
    """The words but for one such as x68, tokens a text; its number, or 1; and the unit."""
    times = math.prod(int(word[1:]) for word in words if re.fullmatch(r"x\d+", word))
    words = [word for word in words if not re.fullmatch(r"x\d+", word)]
    return words, times, "nats a text" if times > 1 else "nats per token"


def losses(*names):
    """A table of validation figures. A word such as x68 multiplies them all: tokens a text."""
    names, times, unit = multiplied(names)
    head = "model", "steps x batch", "seconds", f"{unit} ± seeds", "seeds", "± windows"
    out = [row(*head, "what it is"), "|---" * 7 + "|"]
    for name in names:
        for kind, found in best(name).items() or [(NOT_YET, {})]:
            if not found:
                out.append(row(label(name), "", "", "", 0, "", kind))
                continue
            s, values = logs(name)[0][0]["settings"], [times * value for value, _ in found.values()]
            size = f"{s['max_iters']:,} x {s['batch_size']}"
            size += ", twice" if s["model"].startswith("lomdm") else ""
            windows = times * statistics.mean(error for _, error in found.values())
            cells = label(name), size, seconds(name), shown(values), len(values), f"{windows:.4f}"
            out.append(row(*cells, kind))
    return "\n".join(out + elsewhere(names))


def elsewhere(names):
    """A note on the seeds of these runs that were not made where most of them were."""
    where = defaultdict(lambda: defaultdict(list))  # {hardware: {name: [seed]}}
    for name in names:
        for header, _ in logs(name):
            where[header["hardware"]][name].append(str(header["settings"]["seed"]))
    usual = max(where, key=lambda machine: sum(map(len, where[machine].values())), default=None)
    notes = [
        f"On {machine}: "
        + ", ".join(f"{label(name)} (seed {', '.join(some)})" for name, some in runs.items())
        for machine, runs in where.items()
        if machine != usual
    ]
    return ["", f"*{'; '.join(notes)}; all others on {usual}.*"] if notes else []


def pairs(*names):
    """A table of differences, seed by seed, both on the same windows: a-b is what a costs more, by
    their first figures; left:a-b by those that have the word left. x68 as in losses()."""
    names, times, unit = multiplied(names)
    out = [row("", f"{unit} ± seeds", "seeds", "what they are"), "|---" * 4 + "|"]
    for pair in names:
        word, _, pair = pair.rpartition(":")
        (one, a), (other, b) = (figure(name, word) for name in pair.split("-"))
        less = [times * (a[seed] - b[seed]) for seed in sorted(a.keys() & b.keys())]
        kind = f"{one} − {other}" if one != other else one
        what = row(shown(less, "+") if less else "", len(less), kind if less else NOT_YET)
        out.append(f"| {' − '.join(map(label, pair.split('-')))} {what}")
    return "\n".join(out)


def nats(name, word="", times="1"):
    """Inline: the figure whose kind has this word, the first one if none is given."""
    values = figure(name, word)[1].values()
    return shown([int(times) * value for value in values]) if values else NOT_YET


def each(name, times="1"):
    """Inline: the first figure of every seed."""
    values = figure(name)[1].values()
    return ", ".join(f"{int(times) * value:.4f}" for value in values) or NOT_YET


def measurement(name):
    """The item of this name, and what it has printed, None unless that is of today's runs."""
    found = [item for item in everything() if item.name == name]
    refuse(not found, f"page.md: run_all.py has no measurement of the name {name}")
    path, done = run_all.LOGS / f"{name}.txt", run_all.state(found[0]) == "done"
    return found[0], path.read_text("utf-8") if done else None


def find(name, pattern):
    """Inline: what the group in a pattern, in which \\s is a space, finds in a measurement."""
    _, text = measurement(name)
    if text is None:
        return NOT_YET
    found = re.search(pattern, text, re.M)
    refuse(not found, f"page.md: what {name} printed has no {pattern}")
    return found[1]


def size_of(s):
    """Of the model and of the training in these settings."""
    size = f"{s['n_layer']} layers, {s['n_embd']} wide, {s['seq_len']} tokens of context"
    return f"{size}, {s['max_iters']:,} steps of {s['batch_size']} windows"


def output(name):
    """What a measurement has printed, with its command, and how large its runs are."""
    item, text = measurement(name)
    if text is None:
        return f"{NOT_YET}: {name}"
    sizes = defaultdict(list)
    for run in sorted(run_all.needs(item)):
        header, *_ = checkpoint.read_log(run_all.LOGS / run)
        sizes[size_of(header["settings"])].append(run)
    of = "; ".join(f"{', '.join(runs)}: {size}" for size, runs in sizes.items())
    return f"```\n{text.rstrip()}\n```" + (f"\n\n*{of}.*" if of else "")


def made(name):
    """Inline: where, how and at what size a run was made."""
    if not logs(name):
        return NOT_YET
    header, s = logs(name)[0][0], logs(name)[0][0]["settings"]
    how = f"{s['dtype']}, compiled" if s["compile"] else s["dtype"]
    return f"{size_of(s)}; {header['hardware']}, {how}"


def steps(name):
    """A table of one run's figures as it goes on."""
    if not logs(name):
        return f"{NOT_YET}: {name}"
    _, rows = logs(name)[0]
    kinds = list(dict.fromkeys(line["kind"] for line in rows))
    at = {(line["step"], line["kind"]): line for line in rows}
    out = [row("step", *(f"{kind} ± windows" for kind in kinds)), "|---" * (1 + len(kinds)) + "|"]
    for step in dict.fromkeys(line["step"] for line in rows):
        found = [at[step, kind] for kind in kinds]
        out.append(row(f"{step:,}", *(f"{f['val']:.4f} ± {f['val_error']:.4f}" for f in found)))
    return "\n".join(out)


def curves(picture, *names):
    """A picture: validation at each step."""
    series = {}
    for name in names:
        refuse(label(name) in series, f"page.md: two curves are {label(name)}")
        at = defaultdict(list)
        for _, rows in logs(name):
            for line in rows:
                if line["kind"] == rows[0]["kind"]:
                    at[line["step"]].append(line["val"])
        series[label(name)] = [(step, *mean_error(values)) for step, values in sorted(at.items())]
    return draw(picture, series, "steps", "nats per token, validation")


def draw(picture, series, xlabel, ylabel):
    series = {name: points for name, points in series.items() if points}
    if not series:
        return NOT_YET
    svg = charts.chart(series, xlabel, ylabel)
    checkpoint.write_file(HERE / "pictures" / picture, lambda path: path.write_text(svg, "utf-8"))
    return f"![{ylabel}](pictures/{picture})"


def power_law(points):
    """The line through (x, y), least squares: slope, its standard error, and y at 0."""
    n, (mx, my) = len(points), (statistics.mean(column) for column in zip(*points, strict=True))
    sxx = sum((x - mx) ** 2 for x, _ in points)
    slope = sum((x - mx) * (y - my) for x, y in points) / sxx
    rest = sum((y - my - slope * (x - mx)) ** 2 for x, y in points)
    return slope, math.sqrt(rest / (n - 2) / sxx), my - slope * mx


def scaling(picture):
    """Loss against compute: a table, the power law through each model's points, and a picture."""
    points, kinds = defaultdict(list), {}  # of each model: logarithms of FLOP and nats
    head = "layers x width", *(f"{label(name)}: nats ± windows, TFLOP" for name in FIVE)
    out = [row(*head), "|---" * len(head) + "|"]
    for size in (f"{n_layer}x{n_embd}" for n_layer, n_embd in SIZES):
        cells = [size]
        for name in FIVE:
            counted = "loa3" if name == "a3" else name  # as many operations
            mflop = find(f"count_{size}", rf"^{counted} +\S+M +([\d.,]+)")
            if not logs(f"{name}_{size}") or mflop == NOT_YET:
                cells.append(NOT_YET)
                continue
            kinds[name], found = next(iter(best(f"{name}_{size}").items()))
            ((value, error),) = found.values()
            s = logs(f"{name}_{size}")[0][0]["settings"]
            tokens = s["max_iters"] * s["batch_size"] * s["seq_len"]
            flop = 1e6 * float(mflop.replace(",", "")) * tokens
            points[name].append((math.log10(flop), math.log10(value)))
            cells.append(f"{value:.4f} ± {error:.4f}, {flop / 1e12:,.1f}")
        out.append(row(*cells))
    laws = {name: power_law(found) for name, found in points.items() if len(found) == len(SIZES)}
    if "arm" in laws:
        head = "", "nats ~ FLOP to the power ± fit", "meets the ARM at", "what they are"
        out += ["", row(*head), "|---" * 4 + "|"]
        for name, (slope, error, at_0) in laws.items():
            steeper = laws["arm"][0] - slope
            x = (at_0 - laws["arm"][2]) / steeper if steeper > 0 else math.inf
            where = f"10^{x:.0f} FLOP" if x < 100 else "never"
            unsure = abs(steeper) < 2 * math.hypot(error, laws["arm"][1])
            where = "" if name == "arm" else where + (", but see the errors" if unsure else "")
            out.append(row(label(name), f"{slope:+.4f} ± {error:.4f}", where, kinds[name]))
    series = {label(name): [(x, 10**y, 0.0) for x, y in found] for name, found in points.items()}
    words = "compute, powers of ten of FLOP", "nats per token, validation"
    return "\n".join([*out, "", draw(picture, series, *words)])


# ---- the page ------------------------------------------------------------------------------------
WORDS = (losses, pairs, steps, nats, each, find, output, made, curves, scaling)


def fill(match):
    word, *more = match[1].split()
    known = {f.__name__: f for f in WORDS}
    refuse(word not in known, f"page.md: {word} is none of {', '.join(known)}")
    return known[word](*more)


def page():
    """RESULTS.md, as it should be. A section in which something is missing is left out, and named
    at the end. Draws its pictures."""
    text = re.sub(r"\{\{(.+?)\}\}", fill, (HERE / "page.md").read_text("utf-8"))
    sections = re.split(r"^(?=#+ )", text, flags=re.M)
    missing = [s.partition("\n")[0].lstrip("# ") for s in sections if NOT_YET in s]
    if missing:
        names = "; ".join(f"*{name}*" for name in missing)
        how = "`python -m experiments.run_all --list`, with `--device cuda` for a GPU,"
        what = f"{how} says what is left to be made for: {names}"
        sections.append(f"# Not there yet\n\n{what}\n")
    return "".join(s for s in sections if NOT_YET not in s)


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    return p.parse_args(argv)


def main(argv=None):
    parse(argv)
    refuse(not HERE.is_dir(), "start it where train_char.py is")
    text = page()
    checkpoint.write_file(HERE / "RESULTS.md", lambda path: path.write_text(text, "utf-8"))
    print(f"wrote {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    cli.run(main)
