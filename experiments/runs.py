"""A trained run as the measurements see it: its model, its validation windows, means over them."""

import math
from pathlib import Path

import numpy as np
import torch

import a3
import train_char
from beyond import init_from
from plumbing import checkpoint, cli, data
from plumbing.cli import UserError, need
from plumbing.tokenizers import tokenizer_of


class Run:
    """The best checkpoint of a run, and its validation split in windows (N, L): as many as asked
    for, evenly spread, or all. val_data: a file or folder to take instead of that split."""

    def __init__(self, out_dir, device="cpu", windows=None, data_dir=None, val_data=None):
        self.name = str(Path(out_dir))
        path = Path(out_dir) / "ckpt.pt"
        self.ckpt, model = checkpoint.load(path, train_char.make_model, device)
        self.model = model.eval()
        try:
            s = train_char.Settings(**self.ckpt["settings"])
        except TypeError:
            raise UserError(f"{path} has settings that train_char.py does not know") from None
        cli.check(s)

        L = model.config.seq_len
        if val_data:
            val = self.read(val_data, L)
        else:
            train_char.find_paths(s, self.ckpt)
            kind = init_from.tokenizer_of_run(s, self.ckpt)
            folder = data_dir or s.data_dir
            corpus = data.load(s.data, kind, s.val_data, folder, s.text_len)
            self.tokenizer = corpus.tokenizer
            self.sha256 = corpus.sha256
            same = self.sha256 == self.ckpt["data_sha256"]
            need(same, f"{out_dir} was not trained on --data {s.data} as it is now")
            val = corpus.val

        n = len(val)
        starts = train_char.spread(n, L, windows or n)
        self.val = train_char.windows(val, starts, L, device)

    def read(self, val_data, L):
        """The tokens of a file or folder, in the memory, with this run's tokenizer."""
        self.tokenizer = tokenizer_of(**self.ckpt["tokenizer"])
        texts = list(data.documents_in(data.files_of("--val_data", val_data)))
        ids = self.tokenizer.encode_all(texts) if texts else []
        if self.ckpt.get("separate"):
            ids = [*self.tokenizer.separator(), *ids]
        need(len(ids) >= L, f"--val_data {val_data} has {len(ids)} tokens, a window {L}")
        return np.array(ids, self.tokenizer.dtype)

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
        return learned or hasattr(self.model, "order_log_weights")

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
