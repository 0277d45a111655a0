"""
The middle sentence of five: what the true one costs a model that knows the others, or only those
before it, and how near it comes to it. The command is in experiments/tasks.py.

An A3 is given the gap, so it knows how many tokens are missing. A model that writes on from the
left does not know, and is cut at as many. The pretrained LLaMA is there in three ways: as an A3
that has not been trained, of which only the costs are told, as an ordinary model that sees the
beginning ("before"), and as one that is told both sides in a prompt ("told").
"""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from beyond import speculative
from experiments import evidence
from experiments.answers import fitting, going_on, header_of, read_lines
from experiments.harness import Scorer
from experiments.runs import shown
from plumbing.tokenizers import HuggingFace

TOLD = "The story begins: {}\nThe story ends: {}\nThe sentence between the two parts:"
ORDERS = 4  # random orders of each story
RULES = [  # and how many tokens, or drafts, at once
    ("left", 1), ("confidence", 1), ("entropy", 1),
    ("confidence", 2), ("confidence", 4), ("drafts", 4),
]  # fmt: skip
SHOWN = 10


# ---- a story as tokens ---------------------------------------------------------------------------
class Story(NamedTuple):
    before: list[int]
    middle: list[int]
    after: list[int]
    told: list[int]  # the prompt with both sides


def cut(sentences, tokenizer):
    """Five sentences as tokens, the third one missing."""
    before, middle, after = " ".join(sentences[:2]), sentences[2], " ".join(sentences[3:])
    parts = before, f" {middle}", f" {after}", TOLD.format(before, after)
    return Story(*(tokenizer.encode(part).tolist() for part in parts))


def length(sentences, tokenizer):
    """The tokens of five sentences."""
    before, middle, after, _ = cut(sentences, tokenizer)
    return len(before) + len(middle) + len(after)


def with_gap(scorer, story):
    """x (1, L), and where the middle is, (L,) bool."""
    ids = [*scorer.begin, *story.before, *story.middle, *story.after]
    x = torch.tensor([ids], device=scorer.device)
    at = torch.arange(len(ids), device=scorer.device) - len(scorer.begin) - len(story.before)
    return x, (at >= 0) & (at < len(story.middle))


def is_arm(scorer):
    """Whether it is the LLaMA as it came, which can follow a prompt."""
    return Path(scorer.folder, "config.json").is_file()


# ---- what the true middle costs ------------------------------------------------------------------
@torch.no_grad()
def costs(scorer, story):
    """Nats per token of the true middle: {order: with both sides given, "before": without what
    comes after, "told": as an ARM whose prompt has both sides}."""
    x, gap = with_gap(scorer, story)
    found = {}
    for by, n in {"left": 1, "random": ORDERS, "before": 1}.items():
        g = scorer.generator(x)
        found[by] = evidence.gap_cost(scorer.model, x.expand(n, -1), g, gap, by).mean().item()
    if is_arm(scorer):
        [(log_p, _)] = scorer.log_likelihoods([(story.told, story.middle)])
        found["told"] = -log_p
    return {by: nats / len(story.middle) for by, nats in found.items()}


# ---- what is written there -----------------------------------------------------------------------
@torch.no_grad()
def fill(scorer, story, by, at_once):
    """The text of a middle drawn by a rule, and the calls it took."""
    x, gap = with_gap(scorer, story)
    how = dict(top_p=0.9, generator=scorer.generator(x))
    z = x.masked_fill(gap, scorer.model.mask_id)
    if by == "drafts":
        groups = torch.where(gap, gap.cumsum(0) - 1, -1)[None]
        x, calls = speculative.generate_speculative(scorer.model, z, groups, at_once, **how)
    else:
        x, revealed_at = scorer.model.sample(z, per_step=at_once, by=by, **how)
        calls = int(revealed_at.max()) + 1
    before = [*scorer.begin, *story.before]
    return scorer.text(before, x[0, gap].tolist()), calls


def draws(scorer, story):
    """{how: [text, calls]}."""
    if not is_arm(scorer):
        return {f"{by} {n}": fill(scorer, story, by, n) for by, n in RULES}
    n = len(story.middle)
    sources = {"before": story.before, "told": story.told}
    return {how: (scorer.write(ids, n, 1.0, top_p=0.9), n) for how, ids in sources.items()}


def rouge_l(text, target):
    """F1 of the longest common subsequence of words, as in the package rouge_score."""
    one, other = (re.findall(r"[a-z0-9]+", t.lower()) for t in (text, target))
    best = [0] * (len(other) + 1)  # of one so far, and each beginning of other
    for word in one:
        row = [0]
        for j, match in enumerate(other):
            row.append(best[j] + 1 if word == match else max(row[j], best[j + 1]))
        best = row
    return 2 * best[-1] / (len(one) + len(other)) if best[-1] else 0.0


def of_story(scorer, sentences):
    """The costs and the draws of one story."""
    story = cut(sentences, scorer.tokenizer)
    return {"nats": costs(scorer, story), "draws": draws(scorer, story)}


# ---- all of it -----------------------------------------------------------------------------------
def show(rows, found):
    """Print what true middles cost, how near drawn ones come, and some of these. found: {model:
    what of_story() says of each row}, the LLaMA first."""
    print(f"{len(rows)} stories; nats per token of the true middle sentence")
    llama, *_ = found
    llama_before = [row["nats"]["before"] for row in found[llama]]
    for name, answers in found.items():
        nats = {by: [row["nats"][by] for row in answers] for by in answers[0]["nats"]}
        for by, each in nats.items():
            print(f"    {name:26} {by:8} {shown(each, '{:.3f} ± {:.3f}')}")

        # With both sides given, less with only the left one: its own cost, and the LLaMA's.
        for whose, before in (("before", nats["before"]), ("LLaMA's before", llama_before)):
            less = [x - y for x, y in zip(nats["left"], before, strict=True)]
            print(f"    {name:26} left - {whose} {shown(less, '{:+.3f} ± {:.3f}')}")

    print("ROUGE-L of a drawn middle with the true one, and calls of the model")
    for name, answers in found.items():
        for how in answers[0]["draws"]:
            texts, calls = zip(*(row["draws"][how] for row in answers), strict=True)
            each = [rouge_l(text, row[2]) for text, row in zip(texts, rows, strict=True)]
            mean = sum(calls) / len(calls)
            print(f"    {name:26} {how:14} {shown(each, '{:.3f} ± {:.3f}')}  {mean:.1f} calls")

    print(f"the first {SHOWN} stories")
    for i, row in enumerate(rows[:SHOWN]):
        print(f"\n{' '.join(row[:2])} [{row[2]}] {' '.join(row[3:])}")
        for name, answers in found.items():
            for how, (text, _) in answers[i]["draws"].items():
                print(f"    {name} {how}: {' '.join(text.split())}")


def infill(a):
    """Costs and draws of all models."""
    tokenizer = HuggingFace.at(a.folders[0])
    rows = [row["sentences"] for row in read_lines(Path(a.data, "stories.jsonl"))]
    rows = fitting(rows, lambda sentences: length(sentences, tokenizer))
    found = {}
    for folder in a.folders:
        name = Path(folder).name
        path = Path(a.out, f"{name}_stories.jsonl")
        code = __file__, evidence.__file__, speculative.__file__
        header = header_of(folder, "stories", rows, *code)
        load = partial(Scorer, folder, a.device)
        found[name] = going_on(path, header, rows[: a.items], load, of_story)
    show(rows[: a.items], found)
