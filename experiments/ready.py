"""
Make the checkpoint of a run as small as it may be, to be committed: python sample.py uses it where
nothing has been trained yet.

    python train_char.py --model loa3 --random_share 0.1 $HOW --max_iters 8000 --out_dir runs/loa3
    python train_char.py --model lomdm --weights exp $HOW --max_iters 5000 --out_dir runs/lomdm
    python -m experiments.ready runs/loa3 ready/loa3
    python -m experiments.ready runs/lomdm ready/lomdm
    python -m beyond.playground ready/loa3 ready/lomdm --html beyond/play.html

with HOW="--device cpu --dtype bfloat16 --compile --eval_interval 500 --optimizer adamw". The two in
ready/ are older than Muon, and the LoMDM is older than the division of its order by 32 (it was 8;
the weights of that map were multiplied by 4 since, which is the same). So today's code would make
others.

Weights are rounded to bfloat16, which halves the file. What the rounded model costs on validation
text is printed, beside what the unrounded one does.
"""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch

import train_char
from experiments.runs import Run
from plumbing import checkpoint, cli
from plumbing.cli import need


def round_weights(ckpt):
    """The same checkpoint with its weights in bfloat16, which load_state_dict() turns back. save()
    adds the format, and in which folder the run was made is nobody's business."""
    weights = {name: p.to(torch.bfloat16) for name, p in ckpt["model"].items()}
    state = {name: value for name, value in ckpt.items() if name != "format"}
    return state | {"model": weights, "cwd": ""}


def cost(run):
    """The first of its figures, nats per token with the error over windows, as train_char.py
    validates."""
    text = run.val.flatten().cpu().numpy()
    s = train_char.Settings(seq_len=run.val.shape[1], eval_windows=len(run.val))
    figure, nats, error = train_char.estimate_loss(run.model, text, s, "cpu")[0]
    return train_char.as_text(figure, nats, error, run.tokenizer.unit)


def main(argv=None):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("out_dir", help="of train_char.py")
    p.add_argument("to", help="the folder that gets a small ckpt.pt")
    p.add_argument("--windows", type=int, default=2000, help="of validation [2000]")
    a = p.parse_args(argv)
    cli.check_range("windows", a.windows, 2, 2**20)

    same = Path(a.out_dir).resolve() == Path(a.to).resolve()
    need(not same, "the small checkpoint would overwrite the run's; name another folder")
    run = Run(a.out_dir, windows=a.windows)
    path = Path(a.to, "ckpt.pt")
    checkpoint.save(path, round_weights(run.ckpt))
    small = Run(a.to, windows=a.windows)
    size = path.stat().st_size / 1e6
    print(f"{a.out_dir}: {cost(run)}; {path}: {cost(small)}, {size:.2f} MB")


if __name__ == "__main__":
    cli.run(main)
