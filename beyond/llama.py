""" A pretrained LLaMA as an A3: the peculiarities of the family, and its files in Hugging
Face's format.

    model = from_pretrained("SmolLM2-135M", seq_len=256)

reads LLaMA 2 and 3, SmolLM2, TinyLlama, Mistral without a sliding window, Qwen 2 and 3. Left
to right the A3 then predicts what the LLaMA does, to rounding, and train_char.py --init_from
adapts it to any order. Needs the package safetensors. The tokenizer in the same folder,
tokenizer.json, is read by plumbing/tokenizers.py with the package tokenizers.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

import a3
from a3 import need

# ---- the model -------------------------------------------------------------------------------


@dataclass
class Config(a3.Config):
    """What members of the family have otherwise than a3.py's network."""

    local_heads: float = 0.0  # a trained model has found its neighbours
    start_id: int | None = None  # BOS; None: a token on top of the others, with the id vocab_size
    n_kv_head: int | None = None  # fewer heads for keys and values, each for several queries
    head_dim: int | None = None  # None: n_embd / n_head
    hidden: int | None = None  # width of the MLP; None: that of a3.py
    rope_base: float = 1e4
    rope_turns: tuple | None = None  # (head_dim / 2,) radians per position, instead of rope_base
    norm_eps: float = 1e-5
    tied: bool = False  # the output reads the input's embeddings
    positions: bool = True  # learned positions besides the rotary, which begin as zeros
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Qwen 3

    def __post_init__(self):
        C, H = self.n_embd, self.n_head
        if self.head_dim is None:
            super().__post_init__()
            self.head_dim = C // H
        if self.n_kv_head is None:
            self.n_kv_head = H
        if self.hidden is None:
            self.hidden = 32 * math.ceil(8 * C / 3 / 32)

        need(self.seq_len >= 1, f"seq_len must be at least 1, not {self.seq_len}")
        need(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")
        divides = self.n_kv_head >= 1 and H % self.n_kv_head == 0
        fits = divides and self.head_dim % 2 == 0
        need(fits, f"n_kv_head must divide n_head ({H}), and head_dim must be even")


class Block(a3.Block):
    """a3.py's block with heads of any width, fewer of them for keys and values, biases and
    norms."""

    def __init__(self, config):
        nn.Module.__init__(self)
        C, D, eps = config.n_embd, config.head_dim, config.norm_eps
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.dropout = config.dropout

        self.norm1 = nn.RMSNorm(C, eps=eps)
        rows = (self.n_head + 2 * self.n_kv_head) * D
        self.qkv = nn.Linear(C, rows, bias=config.qkv_bias)
        self.q_norm = nn.RMSNorm(D, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, eps=eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(self.n_head * D, C, bias=False)
        self.norm2 = nn.RMSNorm(C, eps=eps)
        self.gate_up = nn.Linear(C, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, C, bias=False)

    def queries(self, u, rotary):
        rows = slice(0, self.proj.in_features)
        return a3.rotate(self.q_norm(self.project(u, rows)), *rotary)

    def keys_values(self, u, rotary):
        rows = slice(self.proj.in_features, None)
        k, v = self.project(u, rows).chunk(2, dim=1)
        return a3.rotate(self.k_norm(k), *rotary), v

    def attend(self, h, q, k, v, mask):
        # The cache holds few heads. Here each is repeated for the queries that share it.
        times = self.n_head // self.n_kv_head
        if times > 1:
            k = k.repeat_interleave(times, dim=1)
            v = v.repeat_interleave(times, dim=1)
        return super().attend(h, q, k, v, mask)


class Llama(a3.A3):
    """An A3 whose network is that of a LLaMA or a relative."""

    Block = Block

    def __init__(self, config):
        super().__init__(config)
        V, C = config.vocab_size, config.n_embd
        self.norm = nn.RMSNorm(C, eps=config.norm_eps)
        if config.start_id is not None:  # one of the tokens
            self.start_id = config.start_id
            self.wte = nn.Embedding(V, C)
        if not config.positions:
            self.wpe = None
        if config.tied:
            self.lm_head = nn.Linear(C, len(self.wte.weight), bias=False)
            self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.02)

    def embed_slots(self, slots):
        return super().embed_slots(slots) if self.wpe is not None else 0.0

    def rotary(self, slots):
        c = self.config
        if c.rope_turns is None:
            j = torch.arange(0, c.head_dim, 2, device=slots.device) / c.head_dim
            radians = c.rope_base**-j  # (head_dim / 2,)
        else:
            radians = torch.tensor(c.rope_turns, device=slots.device)
        angle = slots[:, None, :, None] * torch.cat((-radians, radians))  # see a3.rotary_tables()
        return angle.cos(), angle.sin()


# ---- its files -------------------------------------------------------------------------------

THEIR_NAMES = {  # our part of a parameter's name: theirs
    "wte": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
    "norm1": ["input_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "q_norm": ["self_attn.q_norm"],
    "k_norm": ["self_attn.k_norm"],
    "proj": ["self_attn.o_proj"],
    "norm2": ["post_attention_layernorm"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


def llama_3_turns(head_dim, rope):
    """Radians per position, as LLaMA 3 stretches them: slow turns get slower by the factor,
    fast ones stay as rope_theta has them, and in between is a ramp."""
    radians = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * radians / (2 * math.pi)  # in the old context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return tuple((radians * (ramp + (1 - ramp) / rope["factor"])).tolist())


KINDS = "llama", "mistral", "qwen2", "qwen3"
OTHER_FORMS = {  # how a file's name ends that shows what a folder holds instead: what to do
    ".gguf": "GGUF is for llama.cpp; take the folder that it was made from",
    ".bin": "weights in an older format; the package transformers writes the newer one: "
    "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(FOLDER)",
    ".pth": "weights in the format of Meta; take the folder in that of Hugging Face",
    "tokenizer.model": "a tokenizer without its model; take the whole folder",
}


def recognise(folder):
    """ValueError, which says what to do, for what is known not to be a model to read."""
    folder = Path(folder)
    hub = "hf download NAME --local-dir FOLDER"
    need(folder.exists(), f"no such folder; one from the hub: {hub}; to go on with a run: --resume")

    # BERT and others have such a folder, too.
    if (folder / "config.json").is_file():
        c = json.loads((folder / "config.json").read_text("utf-8"))
        kind = c.get("model_type") if isinstance(c, dict) else None
        need(kind in KINDS, f"model_type {kind} is not supported; {', '.join(KINDS)} are")

    # So has what was made of a model.
    names = [folder.name, *(path.name for path in folder.glob("*"))]
    merge = "model.merge_and_unload().save_pretrained(FOLDER)"
    is_lora = "adapter_config.json" in names
    need(not is_lora, f"a LoRA; the package peft makes it one with its model: {merge}")
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        for ending, what in OTHER_FORMS.items():
            need(not any(name.endswith(ending) for name in names), what)


def read_config(c, seq_len):
    """Hugging Face's config.json, a dict in its older or newer form, as fields of Config."""
    kind = c["model_type"]
    L = seq_len or c["max_position_embeddings"]
    bos = c.get("bos_token_id")

    # The rotary embedding is described in one of three places.
    rope = {"rope_theta": c.get("rope_theta", 1e4)}
    rope |= c.get("rope_scaling") or {}
    rope |= c.get("rope_parameters") or {}
    turn = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1))
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    act = c.get("hidden_act")

    def supported(holds, what):
        need(holds, f"{what} is not supported")

    supported(not c.get("quantization_config"), "quantization_config")
    supported(turn in ("default", "llama3"), f"rope_type {turn}")
    supported(not window or window >= L, f"a sliding_window of {window}, below {L} tokens,")
    biased = c.get("attention_bias") or c.get("mlp_bias")
    supported(not biased, "attention_bias or mlp_bias")
    supported(act in (None, "silu"), f"hidden_act {act}")
    supported(partial == 1, f"partial_rotary_factor {partial}")
    supported(bos is None or bos in range(c["vocab_size"]), f"bos_token_id {bos}")

    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return {
        "vocab_size": c["vocab_size"],
        "seq_len": L,
        "n_layer": c["num_hidden_layers"],
        "n_head": c["num_attention_heads"],
        "n_embd": c["hidden_size"],
        "hidden": c["intermediate_size"],
        "n_kv_head": c.get("num_key_value_heads"),
        "head_dim": head_dim,
        "norm_eps": c.get("rms_norm_eps", 1e-6),
        "tied": c.get("tie_word_embeddings", False),
        "start_id": bos,
        "rope_base": rope["rope_theta"],
        "rope_turns": llama_3_turns(head_dim, rope) if turn == "llama3" else None,
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
    }


@torch.no_grad()
def from_pretrained(folder, seq_len=None, **changes):
    """The model in `folder` as an A3 in float32. seq_len: its window; None takes all of
    theirs, which may be long: positions=False saves the learned positions then. changes: other
    fields of Config. Learned positions begin as zeros, and the vector for hidden neighbours as
    the mean embedding, so left to right it predicts what it did. ValueError, one line, for
    what does not fit."""
    folder = Path(folder)
    bad = OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError
    try:
        recognise(folder)
        theirs = json.loads((folder / "config.json").read_text("utf-8"))
        model = Llama(Config(**(read_config(theirs, seq_len) | changes)))
        tensors = open_files(folder)
        check_head(model, tensors)
        for name, p in model.named_parameters():
            fill(model, name, p, tensors)

        # Nothing may be left but what is computed anew, or a head that is tied.
        spare = ("rotary_emb.inv_freq", "lm_head.weight")[: 1 + model.config.tied]
        left = [name for name in tensors if not name.endswith(spare)]
        need(not left, f"no place for {left[:1]} in this model")
    except bad as e:
        raise ValueError(f"{folder} cannot be loaded: {in_words(e)}") from None

    model.query[:] = model.wte.weight.mean(0)
    if model.wpe is not None:
        model.wpe.weight.zero_()
    return model


def in_words(e):
    """An exception without the name of its class."""
    if isinstance(e, KeyError):
        return f"{e} is missing"
    if isinstance(e, json.JSONDecodeError):
        return f"a .json file is damaged ({e})"
    return str(e)


def open_files(folder):
    """{their name of a tensor: the open file that holds it}, of one file or of several."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("it needs a package: pip install safetensors") from None

    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))

    try:
        files = [safe_open(folder / name, "pt") for name in names]
    except SafetensorError as e:
        raise ValueError(f"a .safetensors file is damaged or cut off ({e})") from None
    return {tensor: file for file in files for tensor in file.keys()}  # noqa: SIM118


def check_head(model, tensors):
    """Refuse a file with a head of its own beside a config that says there is none: one of
    them is wrong, and nobody here knows which."""
    head = "lm_head.weight"
    words = "model.embed_tokens.weight"
    if model.config.tied and head in tensors:
        one, other = (tensors[name].get_tensor(name).float() for name in (head, words))
        what = f"tie_word_embeddings is true, but {head} is not {words}"
        need(torch.equal(one, other), f"{what}; with false in config.json, that head counts")


def fill(model, name, p, tensors):
    """Copy what belongs into our parameter p, and take it out of tensors."""
    *layer, part, kind = f".{name}".split(".")  # blocks 3 qkv weight, or norm weight
    where = f"model.layers.{layer[2]}." if layer[2:] else ""
    parts = [f"{where}{their}.{kind}" for their in THEIR_NAMES.get(part, ())]
    if not parts:  # what they do not have
        return
    rows = [tensors.pop(their).get_tensor(their) for their in parts]

    # Queries, keys and values are one matrix here. Keys that are too few and values that are
    # too many would fit as well.
    kv = model.config.n_kv_head * model.config.head_dim
    if part == "qkv":
        need(len(rows[1]) == len(rows[2]) == kv, f"{parts[1]} and {parts[2]} must have {kv} rows")

    # Our embeddings may have more rows than they know tokens.
    rows = torch.cat(rows)
    n = model.config.vocab_size if part in ("wte", "lm_head") else len(p)
    fits = len(rows) == n and rows.shape[1:] == p.shape[1:]
    need(fits, f"{parts} is {tuple(rows.shape)}, not {tuple(p.shape)}")
    p[: len(rows)] = rows
