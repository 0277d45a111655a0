"""A trained run as the measurements see it: its model, its validation windows, means over them."""

import math
from pathlib import Path

import torch

import a3
import train_char
from beyond import loa3
from plumbing import checkpoint, cli, data
from plumbing.cli import UserError, need


class Run:
    """The best checkpoint of a run, and its validation split in windows (N, L): as many as asked
    for, evenly spread, or all."""

    def __init__(self, out_dir, device="cpu", windows=None, data_dir=None):
        self.name = str(Path(out_dir))
        path = Path(out_dir) / "ckpt.pt"
        self.ckpt, model = checkpoint.load(path, train_char.make_model, device)
        self.model = model.eval()
        try:
            s = train_char.Settings(**self.ckpt["settings"])
        except TypeError:
            raise UserError(f"{path} has settings that train_char.py does not know") from None
        cli.check(s)

        train_char.where_is(s, self.ckpt)
        kind = train_char.text_tokenizer(s, self.ckpt)
        folder = data_dir or s.data_dir
        corpus = data.load(s.data, kind, s.val_data, folder, s.text_len)
        self.tokenizer = corpus.tokenizer
        self.sha256 = corpus.sha256
        same = self.sha256 == self.ckpt["data_sha256"]
        need(same, f"{out_dir} was not trained on --data {s.data} as it is now")

        n = len(corpus.val)
        L = model.config.seq_len
        starts = train_char.spread(n, L, windows or n)
        self.val = train_char.windows(corpus.val, starts, L, device)

    @property
    def is_a3(self):
        return isinstance(self.model, a3.A3)

    @property
    def block_len(self):
        """The length in which orders are drawn."""
        return getattr(self.model.config, "block_len", self.model.config.seq_len)

    @property
    def has_order(self):
        learned = getattr(self.model.config, "learn_order", False)
        return learned or isinstance(self.model, loa3.LoA3)

    def need_lomdm(self):
        need(not self.is_a3, f"{self.name} holds an A3; this is for lomdm.py's models")

    def need_order(self):
        need(self.has_order, f"{self.name} holds a model without a learned order")

    @torch.no_grad()
    def over_windows(self, f, *more):
        """f(model, x (B, L), generator, *more) -> (B, ..) for all windows: (N, ..)."""
        g = torch.Generator(self.val.device).manual_seed(2)
        some = self.val.split(max(1, 2**14 // self.val.shape[1]))  # 16k tokens a pass
        return torch.cat([f(self.model, x, g, *more).cpu().double() for x in some])


def order_log_weights(model, x, *_):
    """Of the learned order of x (B, L): (B, L), large is early."""
    if isinstance(model, a3.A3):
        return model.order_log_weights(x)
    return model.order_weights(x).log()


def mean_error(v):
    """Mean and standard error of (N,); of one number the error is NaN."""
    v = torch.as_tensor(v, dtype=torch.double)
    error = v.std() / math.sqrt(len(v)) if len(v) > 1 else v.new_tensor(math.nan)
    return v.mean().item(), error.item()


def shown(v, form="{:.4f} ± {:.4f}"):
    return form.format(*mean_error(v))
