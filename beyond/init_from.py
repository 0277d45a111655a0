"""
Going on from a trained model: train_char.py --init_from FOLDER.

The folder is the out_dir of a run, whose model goes on with another text, or whose ARM becomes
an A3. Or it holds a LLaMA in Hugging Face's format, which becomes an A3. The model keeps its
sizes and its tokenizer.
"""

from dataclasses import fields
from pathlib import Path

import a3
from beyond import llama
from plumbing import checkpoint, cli
from plumbing.cli import UserError, need
from plumbing.tokenizers import HuggingFace, tokenizer_of


def load(s, given, make_model):
    """The model in the folder --init_from, and what data.load() takes as its tokenizer. The
    settings s are made to say what the model is. given: the flags that were given, which may
    not differ from that. make_model: as checkpoint.load() takes it."""
    folder = Path(s.init_from)
    check_source(folder)
    cli.check(s)  # is each flag for this model?
    same = s.tokenizer in (None, s.init_from)  # to name the same folder is harmless
    need(same, f"--tokenizer is that of {folder}; leave it out")

    with cli.one_line(ValueError, ImportError):
        is_run = (folder / "ckpt.pt").is_file()
        if (folder / "config.json").is_file() and not is_run:
            model, tokenizer = from_llama(s, folder)
        else:
            model, tokenizer = from_run(s, folder, make_model)

    # Others trained a LLaMA with AdamW, and it goes on so. For a CPU, making its wide matrices
    # orthogonal takes longer than a step of training.
    if isinstance(model, llama.Llama):
        s.optimizer = s.optimizer or "adamw"
    take_over(s, given, model.config)
    return model, tokenizer


def check_source(folder):
    """UserError for what is known to be neither a run nor a LLaMA; it says what is there. A
    folder with nothing in it is refused in from_run()."""
    if (folder / "ckpt.pt").is_file():
        return
    try:
        llama.recognise(folder)
    except ValueError as e:
        raise UserError(f"--init_from {folder}: {llama.in_words(e)}") from None
    has_words = (folder / "tokenizer.json").is_file() or not (folder / "config.json").is_file()
    make = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    how = f"transformers and sentencepiece make it: {make}"
    need(has_words, f"--init_from {folder}: no tokenizer.json; {how}")


def from_llama(s, folder):
    """A LLaMA as an A3 of s.seq_len tokens, as it could have very many."""
    need(s.model == "a3", f"--init_from {folder}: a LLaMA becomes --model a3")
    how = {"dropout": s.dropout or 0.0, "left_neighbour": s.left_neighbour}
    model = llama.from_pretrained(folder, s.seq_len, **how)
    return model, HuggingFace.at(folder)


def from_run(s, folder, make_model):
    """The best model of a run as it is, but for --dropout; or its ARM as an A3."""
    changed = {} if s.dropout is None else {"dropout": s.dropout}
    ckpt, model = checkpoint.load(
        folder / "ckpt.pt", lambda name, config: make_model(name, config | changed)
    )
    name = ckpt["model_name"]
    if name == "llama":  # it became an A3 when it was trained
        name = "a3"

    if (s.model, name) == ("a3", "arm"):
        model = from_arm(s, model)
    else:
        need(s.model == name, f"--init_from {folder}: go on with it as --model {name}")
    return model, tokenizer_in(ckpt)


def from_arm(s, arm):
    """An A3 of an ARM's sizes and dropout that begins with its weights."""
    kept = {f.name for f in fields(a3.Config)} & {f.name for f in fields(arm.config)}
    config = {name: getattr(arm.config, name) for name in kept}
    model = a3.A3(a3.Config(**config, left_neighbour=s.left_neighbour))
    model.load_arm(arm.state_dict())
    return model


def take_over(s, given, config):
    """Set the flags that say what a model is. What was given may not differ."""
    for f in fields(s):
        # Many flags say nothing about a model, and some are for other models only.
        had = getattr(config, f.name, None)
        if had is not None and s.model in (f.metadata["only"] or s.model).split():
            same = given.get(f.name, had) == had
            need(same, f"--{f.name} is {had} in {s.init_from}; leave it out")
            setattr(s, f.name, had)


# ---- the tokenizer ---------------------------------------------------------------------------


def tokenizer_in(ckpt):
    """What data.load() takes as tokenizer, for the one in a checkpoint. For GPT-2's it is the
    name, so that a text that is already in its tokens on disk is found."""
    is_gpt2 = ckpt["tokenizer"]["kind"] == "gpt2"
    return "gpt2" if is_gpt2 else tokenizer_of(**ckpt["tokenizer"])


def tokenizer_of_run(s, ckpt):
    """The same for --resume. A run that began with --init_from has its tokenizer in its
    checkpoint, and that of any other follows its flags."""
    return tokenizer_in(ckpt) if s.init_from else s.tokenizer
