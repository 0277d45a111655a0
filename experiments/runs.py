"""What train_char.py leaves behind: checkpoints, logs, and which runs are seeds of one another."""

import json
import re
from collections import defaultdict
from pathlib import Path

import torch

import train_char
from plumbing import checkpoint, cli, data
from plumbing.cli import UserError, refuse


# ---- checkpoints ---------------------------------------------------------------------------------
class Run:
    """The best checkpoint of a run, and its validation split in windows (N, L): as many as asked
    for, evenly spread, or all."""

    def __init__(self, out_dir, device="cpu", windows=None, data_dir=None):
        self.name, path = str(Path(out_dir)), Path(out_dir) / "ckpt.pt"
        self.ckpt, self.model = checkpoint.load(path, train_char.make_model, device)
        self.model.eval()
        try:
            s = train_char.Settings(**self.ckpt["settings"])
        except TypeError:
            raise UserError(f"{path} has settings that train_char.py does not know") from None
        cli.check(s)
        where = s.data, s.tokenizer, s.val_data, data_dir or s.data_dir, s.text_len
        corpus = data.load(*where)
        self.sha256, self.tokenizer = corpus.sha256, corpus.tokenizer
        other = self.sha256 != self.ckpt["data_sha256"]
        refuse(other, f"{out_dir} was not trained on --data {s.data} as it is now")
        n, L = len(corpus.val), self.model.config.seq_len
        starts = train_char.spread(n, L, windows or n)
        self.val = train_char.windows(corpus.val, starts, L, device)

    def over_windows(self, f, *more):
        """f(model, x (B, L), generator, *more) -> (B, ..) for all windows: (N, ..)."""
        g = torch.Generator(self.val.device).manual_seed(2)
        some = self.val.split(max(1, 2**14 // self.val.shape[1]))  # 16k tokens a pass
        with torch.no_grad():
            return torch.cat([f(self.model, x, g, *more).cpu().double() for x in some])


# ---- logs ----------------------------------------------------------------------------------------
ASIDE = (  # settings that change no figure, and the seed
    "seed", "out_dir", "data_dir", "device", "compile", "resume", "log_interval", "num_samples",
)  # fmt: skip


def without_seed(out_dir):
    """runs/lomdm_s2 -> runs/lomdm."""
    return re.sub(r"_s\d+$", "", str(Path(out_dir)))


def by_seed(out_dirs):
    """{name: [validations of each run]}. Runs are seeds of one another if their folders are the
    same but for an ending _s1, _s2, .., their settings but for those ASIDE, and their data."""
    groups = defaultdict(list)
    for out_dir in out_dirs:
        header, *rows = checkpoint.read_log(out_dir)
        same = {k: v for k, v in header["settings"].items() if k not in ASIDE}
        same["init_from"] = without_seed(same.get("init_from") or "")  # seed for seed
        same["data_sha256"], seed = header.get("data_sha256"), header["settings"].get("seed")
        group = groups[without_seed(out_dir), json.dumps(same, sort_keys=True)]
        for other, again, _ in group:
            refuse(seed == again, f"{other} and {out_dir} are one run twice: both have seed {seed}")
        group.append((out_dir, seed, validations(out_dir, rows)))
    names = [name for name, _ in groups]
    return {  # where a name would stand for several groups, each goes by its first run
        name if names.count(name) == 1 else str(Path(group[0][0])): [rows for *_, rows in group]
        for (name, _), group in groups.items()
    }


def validations(out_dir, rows):
    """[(step, val, error, kind)] of a log."""
    parts = ("step", "val", "val_error", "kind")
    found = [tuple(row[part] for part in parts) for row in rows if {*parts} <= row.keys()]
    refuse(not found, f"{Path(out_dir) / 'log.jsonl'} has no validation yet")
    return found
