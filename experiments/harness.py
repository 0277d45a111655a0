"""
A model on the tasks of lm-evaluation-harness, and on stories with a sentence missing.

    python -m experiments.harness runs/a3 --tasks hellaswag,piqa --limit 100
    python -m experiments.harness SmolLM2 --tasks mine --include_path DIR
    python -m experiments.harness runs/a3 --stories stories.jsonl

The folder is an out_dir of train_char.py, or a LLaMA in Hugging Face's format, which becomes an A3.
A3 and the ARM say exactly what a continuation costs, left to right. The others bound it: the order
is drawn over the continuation alone, and what may come after it stays hidden. A text begins with
the model's own start token; the harness's hf model has one with add_bos_token=True.

A line of stories.jsonl is {"sentences": [five of them]}, or has the fields sentence1 .. sentence5.
The third is hidden: what it costs given the others, and how a drawn one, of as many tokens,
overlaps it. An ARM sees only those before, and in blocks none sees later blocks.
"""

import json
import math
import os
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from itertools import groupby, pairwise
from pathlib import Path

import torch

import a3
import lomdm
from beyond import llama
from experiments.evidence import shown
from plumbing import checkpoint, cli
from plumbing.cli import UserError, refuse
from plumbing.tokenizers import HuggingFace, tokenizer_of
from sample import RULES
from train_char import make_model


# ---- what a gap costs ----------------------------------------------------------------------------
def gap_bound(model, x, gap, draws, g):
    """For lomdm.py's models an upper bound on -log p(the gap (L,) bool of x (L,) | the rest), nats:
    each block races in its own part of the gap. What is mask_id in x stays hidden throughout."""
    K, hidden = min(len(x), model.config.block_len), x == model.mask_id
    gap = gap.view(-1, K)  # (n, K)
    size = gap.sum(-1)
    steps = math.lcm(*size[size > 0].tolist())  # so that k is uniform on {0 .. size - 1}
    k = lomdm.stratified_counts(draws, len(size), steps, g, x.device) * size // steps  # (draws, n)
    w = model.order_weights(x[None]).view(1, -1, K).expand(draws, -1, -1)  # (draws, n, K)
    masked = (lomdm.race(w * gap, g).argsort(-1) >= k[..., None]) & gap
    x = x.masked_fill(hidden, 0).repeat(draws, 1)  # any token: it costs it, nobody counts it
    nll, w_hat = model.predict_masked(x, masked | hidden.view(-1, K))
    recon, order, _ = lomdm.jump_terms(nll, w, w_hat, masked)
    return ((recon + order) * size / K).sum(-1).mean().item()


def is_greedy(model, x, gap):
    """Whether a model of lomdm.py fills the gap of x (L,) like that: the place of the largest w_hat
    first, always with the likeliest token. Ends where it differs, so that x is what it sees."""
    z, K = x.masked_fill(gap, model.mask_id), min(len(x), model.config.block_len)
    b, todo = torch.arange(len(x), device=x.device) // K, gap.clone()
    while todo.any():
        h, attention = model.features(z[None])
        w_hat = model.g_hat(h, *attention)[0]  # (L,)
        i = (w_hat * (todo & (b == b[todo][0]))).argmax()
        if model.logits(h[0, i]).argmax() != x[i]:
            return False
        z[i], todo[i] = x[i], False
    return True


def in_batches(f, items, key, most):
    """[f's result for each item]: f takes a list of up to `most`, all with the same key."""
    found, order = {}, sorted(range(len(items)), key=lambda i: key(items[i]))
    for _, alike in groupby(order, lambda i: key(items[i])):
        alike = list(alike)
        for some in (alike[j : j + most] for j in range(0, len(alike), most)):
            found |= zip(some, f([items[i] for i in some]), strict=True)
    return [found[i] for i in range(len(items))]


class Scorer:
    """A model, and its tokenizer. Here a text is a list of tokens."""

    def __init__(self, folder, device="cpu", by=None, draws=16, batch_size=16, seed=1337):
        if Path(folder, "config.json").is_file():
            try:
                self.model = llama.from_pretrained(folder, positions=False).to(device)
            except (ValueError, ImportError) as e:
                raise UserError(str(e)) from None
            self.tokenizer = HuggingFace.at(folder)
        else:
            ckpt, self.model = checkpoint.load(Path(folder) / "ckpt.pt", make_model, device)
            self.tokenizer = tokenizer_of(**ckpt["tokenizer"])
        self.model.eval()
        is_a3, c = isinstance(self.model, a3.A3), self.model.config
        refuse(by and not is_a3, f"--by is for a3; {folder} holds another model")
        self.is_a3, self.how = is_a3, dict(by=by or "left") if is_a3 else {}
        self.window, self.block, self.cut = c.seq_len, 1 if is_a3 else c.block_len, False
        self.device, self.draws, self.batch_size = device, draws, batch_size
        self.g = torch.Generator(device).manual_seed(seed)

    def encode(self, text):
        return self.tokenizer.encode(text).tolist()

    def fit(self, context, n):
        """The end of a context that leaves room for n more tokens."""
        room = self.window - n
        refuse(room < 0, f"{n} tokens to predict do not fit into the window of {self.window}")
        if len(context) > room and not self.cut:
            self.cut = True
            print(f"contexts longer than the window of {self.window} tokens are cut on the left")
        return context[max(0, len(context) - room) :]

    def place(self, before, middle, after=()):
        """x (L,), and where its middle is, (L,) bool. It ends with a whole block, in [MASK]s: a
        diffusion model has only seen windows of that length."""
        ids = [*before, *middle, *after]
        ids += [self.model.mask_id] * (-len(ids) % self.block)
        at = torch.arange(len(ids), device=self.device) - len(before)
        x = torch.tensor(ids, dtype=torch.long, device=self.device)
        return x, (at >= 0) & (at < len(middle))

    @torch.no_grad()
    def log_likelihoods(self, pairs):
        """[(log p(continuation | context) in nats, is that what the model would write?)]"""
        pairs = [(self.fit(context, len(more)), more) for context, more in pairs]
        f = self.left_to_right if self.block == 1 else self.any_order
        return in_batches(f, pairs, lambda pair: len(pair[0] + pair[1]), self.batch_size)

    def left_to_right(self, pairs):
        x, gaps = map(torch.stack, zip(*(self.place(*pair) for pair in pairs), strict=True))
        groups = a3.chunk_groups(*x.shape, device=self.device)
        if self.is_a3:
            h = a3.sorted_features(self.model, x, groups, single=True)
        else:
            h, _ = self.model.features(x)
        found = []
        for h_row, x_row, gap in zip(h, x, gaps, strict=True):
            log_p, target = self.model.logits(h_row[gap]).log_softmax(-1), x_row[gap]  # (n, V)
            cost = log_p.gather(1, target[:, None]).double().sum().item()
            found.append((cost, bool((log_p.argmax(-1) == target).all())))
        return found

    def any_order(self, pairs):
        """A bound instead, from below."""
        m, placed = self.model, [self.place(*pair) for pair in pairs]
        return [(-gap_bound(m, *at, self.draws, self.g), is_greedy(m, *at)) for at in placed]

    def rolling(self, text):
        """log p(text). A text of several windows: each sees a token or more of those before."""
        cuts = [0, *range(self.window, len(text), max(1, self.window - 1)), len(text)]
        pairs = [(text[max(0, b - self.window) : a], text[a:b]) for a, b in pairwise(cuts) if a < b]
        return sum(log_p for log_p, _ in self.log_likelihoods(pairs))

    def write(self, jobs):
        """What is written after contexts of one length: [n tokens], jobs being [(context, n,
        temperature)] which differ in nothing else."""
        _, n, temperature = jobs[0]
        placed = [self.place(context, [self.model.mask_id] * n) for context, _, _ in jobs]
        z = torch.stack([x for x, _ in placed])
        x, _ = self.model.sample(z, temperature, generator=self.g, **self.how)
        return x[:, placed[0][1]].tolist()

    def continuations(self, requests):
        """Texts, for [(text, settings of the harness)]: at most half a window, up to a stop."""
        jobs, texts = [], []
        for context, how in requests:
            n = min(how.get("max_gen_toks", 256), max(1, self.window // 2))
            sampling = how.get("do_sample", how.get("temperature", 0) > 0)
            temperature = how.get("temperature", 1.0) if sampling else 0.0
            jobs.append((self.fit(self.encode(context), n), n, temperature))
        drawn = in_batches(self.write, jobs, lambda j: (len(j[0]), *j[1:]), self.batch_size)
        for ids, (_, how) in zip(drawn, requests, strict=True):
            ids = ids[: ids.index(self.tokenizer.end)] if self.tokenizer.end in ids else ids
            text, stops = "".join(self.tokenizer.pieces(ids)), how.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts


# ---- tasks ---------------------------------------------------------------------------------------
def adapter(scorer):
    """The scorer as the harness calls it. How context and continuation meet is the harness's."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise UserError("--tasks needs a package: pip install lm_eval") from None

    class Adapter(TemplateLM):
        eot_token_id = -1  # stands for no context: the start token is there anyway

        def tok_encode(self, string, add_special_tokens=None, **_):
            return scorer.encode(string)

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [([i for i in context if i >= 0], more) for _, context, more in requests]
            return scorer.log_likelihoods(pairs)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return [scorer.rolling(scorer.encode(request.args[0])) for request in requests]

        def generate_until(self, requests, disable_tqdm=False):
            return scorer.continuations([request.args for request in requests])

    return Adapter()


def evaluate(a, scorer):
    """Prints the harness's table."""
    if a.data_dir:
        os.environ["HF_HOME"] = a.data_dir  # read by the package datasets when it is imported
    model = adapter(scorer)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager, names = TaskManager(include_path=a.include_path), a.tasks.split(",")
    unknown = [name for name in names if name not in manager.all_tasks]
    refuse(unknown, f"there is no task {', '.join(unknown)}; --include_path is for those of yours")
    how = dict(limit=a.limit, num_fewshot=a.num_fewshot, log_samples=False, bootstrap_iters=1000)
    print(make_table(simple_evaluate(model, tasks=names, task_manager=manager, **how)))


# ---- stories -------------------------------------------------------------------------------------
def read_stories(path, limit):
    """[five sentences]"""
    found = []
    try:
        for line in Path(path).read_text("utf-8").splitlines()[:limit]:
            story = json.loads(line)
            story = story.get("sentences") or [story[f"sentence{i}"] for i in range(1, 6)]
            story = [sentence.strip() for sentence in story]
            if len(story) != 5 or not all(story):
                raise ValueError
            found.append(story)
    except OSError as e:
        raise UserError(f"--stories {path}: cannot read it ({e})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}, line {len(found) + 1}: not a story of five sentences") from None
    refuse(not found, f"{path} has no stories")
    return found


@torch.no_grad()
def story_cost(scorer, x, gap):
    """Nats of the gap (L,) bool of x (L,), given the rest."""
    if not scorer.is_a3:
        return gap_bound(scorer.model, x, gap, scorer.draws, scorer.g)
    groups = torch.where(gap, gap.cumsum(0), -1)  # the given first, then the gap left to right
    return -scorer.model.log_prob(x[None], groups[None]).sum().item()


def stories(a, scorer):
    """Prints means and standard errors over stories."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("--stories needs a package: pip install rouge_score") from None
    judge, found = RougeScorer(["rouge1", "rougeL"]), defaultdict(list)
    for s1, s2, s3, s4, s5 in read_stories(a.stories, a.limit):
        texts = f"{s1} {s2}", f" {s3}", f" {s4} {s5}"
        before, middle, after = map(scorer.encode, texts)
        room = max(0, scorer.window - len(middle))
        after = after[: max(room // 2, room - len(before))]  # half of it, if both are long
        x, gap = scorer.place(scorer.fit(before, len(middle + after)), middle, after)
        nats, z = story_cost(scorer, x, gap), x.masked_fill(gap, scorer.model.mask_id)
        y, _ = scorer.model.sample(z[None], a.temperature, generator=scorer.g, **scorer.how)
        drawn = "".join(scorer.tokenizer.pieces(y[0, gap].tolist()))
        found["nats per token"].append(nats / len(middle))
        found["nats per sentence"].append(nats)
        for name, score in judge.score(s3, drawn).items():
            found[f"{name} F1"].append(score.fmeasure)
    bound = "a bound" if scorer.block > 1 else "exact" if scorer.is_a3 else "exact, left side only"
    for name, values in found.items():
        what = f" ({bound})" if "nats" in name else " (of a drawn sentence)"
        print(f"{name:18} {shown(values)}, {len(values)} stories{what}")


# ---- start ---------------------------------------------------------------------------------------
FLAGS = {
    "tasks": dict(help="of the harness, with commas between"),
    "stories": dict(help="a .jsonl of five sentences a line"),
    "include_path": dict(help="a folder with tasks of yours"),
    "data_dir": dict(help="where the package datasets keeps what it downloads"),
    "limit": dict(type=int, help="questions of each task, or stories; by default all"),
    "num_fewshot": dict(type=int, help="examples before each question; by default the task's"),
    "by": dict(choices=RULES, help="a3: which tokens are written next [left]"),
    "draws": dict(type=int, default=16, help="orders for each bound [16]"),
    "temperature": dict(type=float, default=1.0, help="of sentences that are drawn [1]"),
    "batch_size": dict(type=int, default=16, help="texts of one length at a time [16]"),
    "device": dict(default="cpu", help="[cpu]"),
}


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("folder", help="an out_dir of train_char.py, or a LLaMA")
    for name, how in FLAGS.items():
        p.add_argument(f"--{name}", **how)
    a = p.parse_args(argv)
    for name, value in vars(a).items():
        refuse(value == "", f"--{name} is empty")
        if isinstance(value, int | float):
            least = 0 if name in ("num_fewshot", "temperature") else 1
            cli.check_range(name, value, least, 2**20)
    refuse(bool(a.tasks) == bool(a.stories), "--tasks or --stories: one of the two")
    return a


def main(argv=None):
    a = parse(argv)
    scorer = Scorer(a.folder, cli.pick_device(a.device), a.by, a.draws, a.batch_size)
    (evaluate if a.tasks else stories)(a, scorer)


if __name__ == "__main__":
    cli.run(main)
