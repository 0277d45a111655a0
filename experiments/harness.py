"""
A model on the tasks of lm-evaluation-harness (pip install lm_eval).

    python -m experiments.harness runs/a3 --tasks hellaswag,piqa --limit 100
    python -m experiments.harness SmolLM2 --tasks mine --include_path DIR

The folder is an out_dir of train_char.py, or a LLaMA in Hugging Face's format, which becomes an A3.
A3 and the ARM say exactly what a continuation costs, left to right. The others bound it: the order
is drawn over the continuation alone, and what may come after it stays hidden. A text begins with
the model's own start token, and where documents were separate in training behind an end of text.
The harness's hf model has a start token with add_bos_token=True. Texts are read one at a time.
"""

import os
from argparse import RawDescriptionHelpFormatter
from itertools import pairwise
from pathlib import Path

import torch

import a3
from beyond import llama
from experiments.evidence import gap_cost
from plumbing import checkpoint, cli
from plumbing.cli import UserError, need
from plumbing.tokenizers import HuggingFace, tokenizer_of
from train_char import make_model


# ---- what a continuation costs -------------------------------------------------------------------
def is_greedy(model, x, gap):
    """Whether a model of lomdm.py fills the gap of x (L,) like that: the place of the largest w_hat
    first, always with the likeliest token. Ends where it differs, so that x is what it sees."""
    z = x.masked_fill(gap, model.mask_id)
    todo = gap.clone()
    b = torch.arange(len(x), device=x.device) // min(len(x), model.config.block_len)
    while todo.any():
        h = model.features(z[None])
        w_hat = model.g_hat(h)[0]  # (L,)
        i = (w_hat * (todo & (b == b[todo][0]))).argmax()
        if model.logits(h[0, i]).argmax() != x[i]:
            return False
        z[i] = x[i]
        todo[i] = False
    return True


class Scorer:
    """A model, and its tokenizer. Here a text is a list of tokens."""

    def __init__(self, folder, device="cpu", draws=16, seed=1337):
        if Path(folder, "config.json").is_file():
            with cli.one_line(ValueError, ImportError):
                self.model = llama.from_pretrained(folder, positions=False).to(device)
            self.tokenizer = HuggingFace.at(folder)
            self.begin = []
        else:
            ckpt, self.model = checkpoint.load(Path(folder) / "ckpt.pt", make_model, device)
            self.tokenizer = tokenizer_of(**ckpt["tokenizer"])
            self.begin = [self.tokenizer.end] if ckpt.get("separate") else []
        self.model.eval()
        self.is_a3 = isinstance(self.model, a3.A3)
        self.window = self.model.config.seq_len
        self.block = 1 if self.is_a3 else self.model.config.block_len
        self.device = device
        self.draws = draws
        self.generator = torch.Generator(device).manual_seed(seed)
        self.has_cut = False

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

    def place(self, context, more):
        """x (L,), and where `more` is, (L,) bool. It ends with a whole block, in [MASK]s: a
        diffusion model has only seen windows of that length."""
        ids = [*context, *more]
        ids += [self.model.mask_id] * (-len(ids) % self.block)
        x = torch.tensor(ids, dtype=torch.long, device=self.device)
        at = torch.arange(len(x), device=self.device) - len(context)
        return x, (at >= 0) & (at < len(more))

    @torch.no_grad()
    def log_likelihood(self, context, more):
        """log p(more | context) in nats, and whether it is what the model would write."""
        x, gap = self.place(self.fit(context, len(more)), more)
        if self.block > 1:
            costs = gap_cost(self.model, x.expand(self.draws, -1), self.generator, gap)
            return -costs.mean().item(), is_greedy(self.model, x, gap)

        if self.is_a3:
            logits = self.model(x[None], a3.chunk_groups(1, len(x), device=x.device))
        else:
            logits = self.model.log_probs(x[None])
        log_p = logits[0, gap].log_softmax(-1)  # (n, V)
        target = x[gap]
        cost = log_p.gather(1, target[:, None]).double().sum().item()
        return cost, bool((log_p.argmax(-1) == target).all())

    def rolling(self, text):
        """log p(text). A text of several windows: each sees a token or more of those before."""
        total = 0.0
        first = len(self.begin)
        text = self.begin + text
        cuts = [first, *range(self.window, len(text), max(1, self.window - 1)), len(text)]
        for begin, end in pairwise(cuts):
            if begin < end:
                context = text[max(0, end - self.window) : begin]
                total += self.log_likelihood(context, text[begin:end])[0]
        return total

    def continuation(self, text, how):
        """What is written after a text, by the settings of the harness: at most half a window, up
        to a stop."""
        n = min(how.get("max_gen_toks", 256), max(1, self.window // 2))
        temperature = how.get("temperature", 1.0 if how.get("do_sample") else 0.0)
        if not how.get("do_sample", temperature > 0):
            temperature = 0.0

        context = self.fit(self.begin + self.encode(text), n)
        z, gap = self.place(context, [self.model.mask_id] * n)
        x, _ = self.model.sample(z[None], temperature, generator=self.generator)
        ids = x[0, gap].tolist()
        if self.tokenizer.end in ids:
            ids = ids[: ids.index(self.tokenizer.end)]

        # A word may begin with a space that shows only behind another.
        written = "".join(self.tokenizer.pieces([*context, *ids])[len(context) :])
        stops = how.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            written = written.split(stop)[0] if stop else written
        return written


# ---- tasks ---------------------------------------------------------------------------------------
def adapter(scorer):
    """The scorer as the harness calls it. How context and continuation meet is the harness's."""
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
            return [scorer.log_likelihood(scorer.begin + c, more) for c, more in pairs]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return [scorer.rolling(scorer.encode(request.args[0])) for request in requests]

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
    "draws": dict(type=int, default=16, help="orders for each bound [16]"),
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
    scorer = Scorer(a.folder, cli.pick_device(a.device), a.draws)
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
