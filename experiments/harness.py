"""
An A3 on the tasks of lm-evaluation-harness (pip install lm_eval).

    python -m experiments.harness runs/a3 --tasks hellaswag,piqa --limit 100
    python -m experiments.harness SmolLM2 --tasks tasks_piqa --include_path data/tasks
    python -m experiments.harness runs/a3 --tasks piqa --by confidence

The folder is an out_dir of train_char.py, or a LLaMA in Hugging Face's format, which becomes an A3.
What a continuation costs in one order is exact, given its context. The order is from left to right,
or the model's choice: where it is surest comes first. At random, the cost is the mean over several
orders. (That is an upper bound of what a text costs if its order is drawn, too.)

A text begins with the model's own start token, and where documents were separate in training behind
an end of text. The harness's hf model has a start token with add_bos_token=True.
"""

import os
import zlib
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch

import a3
from beyond import llama
from plumbing import checkpoint, cli
from plumbing.cli import UserError, need
from plumbing.tokenizers import HuggingFace, tokenizer_of
from train_char import make_model

ORDERS = "left", "random", "confidence", "entropy", "margin"


# ---- what a continuation costs -------------------------------------------------------------------
def surest_first(model, x, gap, by):
    """The step (B, L) at which decoding by that rule fills each position of the gap (B, L), if it
    is to write x (B, L). What is before the gap is given, and what is behind it is not there."""
    L = x.shape[1]
    is_given = gap.cumsum(1) == 0
    revealed_at = torch.where(is_given, -1, L)  # L: still open
    read = a3.Cache(model, x)

    for step in range(int(gap.sum(1).max())):
        at, real = a3.pack(gap & (revealed_at == L))  # (B, m); shorter rows are padded
        score = model.score(read(x, revealed_at, at), at, by, None).masked_fill(~real, -torch.inf)
        best = score.argmax(dim=1, keepdim=True)
        at, real = at.gather(1, best), real.gather(1, best)
        revealed_at.scatter_(1, at, torch.where(real, step, revealed_at.gather(1, at)))
    return revealed_at


def groups_of(model, x, gap, by, generator):
    """Groups (B, L) of one token: from left to right, but by that rule inside of the gap (B, L)."""
    place = torch.arange(x.shape[1], device=x.device).expand_as(x).double()
    if by == "left":
        return place.long()
    if by == "random":
        when = torch.rand(x.shape, generator=generator, device=x.device).double()
    else:
        when = surest_first(model, x, gap, by) / x.shape[1]  # below 1

    # All of the gap belongs between its first position and the next.
    first = gap.int().argmax(dim=1, keepdim=True)
    return torch.where(gap, first + when, place).argsort(dim=1).argsort(dim=1)


class Scorer:
    """A model, and its tokenizer. Here a text is a list of tokens. No answer depends on what was
    asked before, so that what is broken off may go on."""

    def __init__(self, folder, device="cpu", by="left", draws=4, seed=1337):
        if Path(folder, "config.json").is_file():
            with cli.one_line(ValueError, ImportError):
                self.model = llama.from_pretrained(folder, positions=False).to(device)
            self.tokenizer = HuggingFace.at(folder)
            self.begin = []
        else:
            ckpt, self.model = checkpoint.load(Path(folder) / "ckpt.pt", make_model, device)
            is_a3 = isinstance(self.model, a3.A3)
            need(is_a3, f"{folder} holds {ckpt['model_name']}; this is for a3 and loa3")
            self.tokenizer = tokenizer_of(**ckpt["tokenizer"])
            self.begin = [self.tokenizer.end] if ckpt.get("separate") else []
        self.model.eval()
        self.folder = folder
        self.window = self.model.config.seq_len
        self.device = device
        self.by = by
        self.draws = draws if by == "random" else 1
        self.seed = seed
        self.has_cut = False

    def generator(self, x):
        """For draws about x (B, L). They follow from the seed and these tokens."""
        number = zlib.crc32(repr(x.tolist()).encode(), self.seed)  # of 32 bits, as torch uses
        return torch.Generator(self.device).manual_seed(number)

    def encode(self, text):
        return self.tokenizer.encode(text).tolist()

    def fit(self, context, n):
        """The end of a context that leaves room for n more tokens."""
        room = self.window - n
        need(room >= 0, f"{n} tokens to predict do not fit into the window of {self.window}")
        if len(context) > room and not self.has_cut:
            self.has_cut = True
            print(f"contexts longer than the window of {self.window} tokens are cut on the left")
        return context[max(0, len(context) - room) :]

    def place(self, pairs):
        """Contexts and continuations side by side: x (B, L), padded behind, and where the
        continuations are, (B, L) bool."""
        pairs = [(self.fit(context, len(more)), more) for context, more in pairs]
        L = max(len(context) + len(more) for context, more in pairs)
        x = torch.zeros(len(pairs), L, dtype=torch.long)
        gap = torch.zeros(len(pairs), L, dtype=torch.bool)
        for row, (context, more) in enumerate(pairs):
            n = len(context)
            x[row, : n + len(more)] = torch.tensor([*context, *more])
            gap[row, n : n + len(more)] = True
        return x.to(self.device), gap.to(self.device)

    @torch.no_grad()
    def log_likelihoods(self, pairs):
        """[(log p(more | context) in nats, whether each token is the likeliest in its turn)] of
        pairs (context, more). For random orders the mean of several."""
        x, gap = self.place(pairs)
        x, gap = (v.repeat_interleave(self.draws, dim=0) for v in (x, gap))
        groups = groups_of(self.model, x, gap, self.by, self.generator(x))

        h = a3.sorted_features(self.model, x, groups, single=True)
        log_p = self.model.logits(h[gap]).log_softmax(-1)  # (n, V), row by row
        target = x[gap]
        is_top = log_p.argmax(-1) == target
        log_p = log_p.gather(1, target[:, None])[:, 0].double()

        sizes = [len(more) * self.draws for _, more in pairs]
        parts = zip(log_p.split(sizes), is_top.split(sizes), strict=True)
        return [(part.sum().item() / self.draws, bool(top.all())) for part, top in parts]

    def write(self, context, n, temperature=0.0, top_p=None):
        """n tokens that follow a context, and their text."""
        context = self.fit(context, n)
        x, gap = self.place([(context, [self.model.mask_id] * n)])
        how = dict(by=self.by, top_p=top_p, generator=self.generator(x))
        x, _ = self.model.sample(x, temperature, **how)
        return self.text(context, x[gap].tolist())

    def text(self, context, ids):
        """The text of tokens up to their end. A word may begin with a space that shows only behind
        another."""
        if self.tokenizer.end in ids:
            ids = ids[: ids.index(self.tokenizer.end)]
        return "".join(self.tokenizer.pieces([*context, *ids])[len(context) :])

    def continuation(self, text, how):
        """What is written after a text, by the settings of the harness: at most half a window, up
        to a stop."""
        n = min(how.get("max_gen_toks", 256), max(1, self.window // 2))

        # Greedy, unless the task asks for samples by a temperature, or by do_sample.
        temperature = how.get("temperature", 1.0 if how.get("do_sample") else 0.0)
        if how.get("do_sample") is False:
            temperature = 0.0

        written = self.write(self.begin + self.encode(text), n, temperature)
        stops = how.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            written = written.split(stop)[0] if stop else written
        return written


# ---- tasks ---------------------------------------------------------------------------------------
def adapter(scorer, rows=4):
    """The scorer as the harness calls it. How context and continuation meet is the harness's.
    rows: how many continuations are read at a time, the longest first."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise UserError("this needs a package: pip install lm_eval") from None

    class Adapter(TemplateLM):
        eot_token_id = -1  # stands for no context: the start token is there anyway

        def tok_encode(self, string, add_special_tokens=None, **_):
            return scorer.encode(string)

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [([i for i in context if i >= 0], more) for _, context, more in requests]
            pairs = [(scorer.begin + context, more) for context, more in pairs]
            order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
            found = {}
            for begin in range(0, len(order), rows):
                some = order[begin : begin + rows]
                answers = scorer.log_likelihoods([pairs[i] for i in some])
                found |= dict(zip(some, answers, strict=True))
            return [found[i] for i in range(len(pairs))]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise UserError("this task is about whole texts; experiments.evidence perplexity is so")

        def generate_until(self, requests, disable_tqdm=False):
            return [scorer.continuation(*request.args) for request in requests]

    return Adapter()


# ---- start ---------------------------------------------------------------------------------------
FLAGS = {
    "tasks": dict(required=True, help="of the harness, with commas between"),
    "include_path": dict(help="a folder with tasks of yours"),
    "data_dir": dict(help="where the package datasets keeps what it downloads"),
    "limit": dict(type=int, help="questions of each task; by default all"),
    "num_fewshot": dict(type=int, help="examples before each question; by default the task's"),
    "by": dict(default="left", choices=ORDERS, help="the order of a continuation [left]"),
    "draws": dict(type=int, default=4, help="of --by random, orders of each continuation [4]"),
    "device": dict(default="cpu", help="[cpu]"),
}


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("folder", help="an out_dir of train_char.py, or a LLaMA")
    for name, how in FLAGS.items():
        p.add_argument(f"--{name}", **how)
    a = p.parse_args(argv)
    for name, value in vars(a).items():
        need(value != "", f"--{name} is empty")
        if isinstance(value, int):
            cli.check_range(name, value, 0 if name == "num_fewshot" else 1, 2**20)
    return a


def main(argv=None):
    a = parse(argv)
    scorer = Scorer(a.folder, cli.pick_device(a.device), a.by, a.draws)
    if a.data_dir:
        os.environ["HF_HOME"] = a.data_dir  # read by the package datasets when it is imported
    model = adapter(scorer)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager(include_path=a.include_path)
    names = a.tasks.split(",")
    unknown = [name for name in names if name not in manager.all_tasks]
    need(not unknown, f"there is no task {', '.join(unknown)}; --include_path is for yours")
    how = dict(limit=a.limit, num_fewshot=a.num_fewshot, log_samples=False, bootstrap_iters=1000)
    print(make_table(simple_evaluate(model, tasks=names, task_manager=manager, **how)))


if __name__ == "__main__":
    cli.run(main)
