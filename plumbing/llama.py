"""
A LLaMA or a relative in Hugging Face's format as an A3: its names and settings in ours. It is not
in a3.py, as there is nothing about A3 in it.
"""

import json
import math
from pathlib import Path

import torch

from a3 import A3, Config

BAD = OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError  # of bad files
LLAMA_PARTS = {
    "wte": ["model.embed_tokens"], "norm": ["model.norm"], "lm_head": ["lm_head"],
    "norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "q_norm": ["self_attn.q_norm"], "k_norm": ["self_attn.k_norm"], "proj": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"],
}  # fmt: skip


def llama_3_turns(head_dim, rope):
    """Radians per position: slow turns get slower by the factor, fast ones stay as rope_theta has
    them, and in between is a ramp."""
    f = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)  # in the old context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return tuple((f * (ramp + (1 - ramp) / rope["factor"])).tolist())


def llama_config(c, seq_len):
    """Hugging Face's config.json, in its older or newer form, as fields of Config."""
    kind, L = c["model_type"], seq_len or c["max_position_embeddings"]
    rope = {"rope_theta": c.get("rope_theta", 1e4)} | (c.get("rope_scaling") or {})
    rope |= c.get("rope_parameters") or {}
    turn = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1))
    bos = c.get("bos_token_id")
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    missing = {
        f"model_type {kind}": kind not in ("llama", "mistral", "qwen2", "qwen3"),
        f"rope_type {turn}": turn not in ("default", "llama3"),
        f"a sliding_window of {window}, below {L} tokens,": window and window < L,
        "attention_bias or mlp_bias": c.get("attention_bias") or c.get("mlp_bias"),
        f"hidden_act {c.get('hidden_act')}": c.get("hidden_act") not in (None, "silu"),
        f"partial_rotary_factor {partial}": partial != 1,
        f"bos_token_id {bos}": bos is not None and bos not in range(c["vocab_size"]),
    }
    if any(missing.values()):
        raise ValueError(f"{next(what for what in missing if missing[what])} is not supported")
    D = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return dict(
        vocab_size=c["vocab_size"], seq_len=L, n_layer=c["num_hidden_layers"],
        n_head=c["num_attention_heads"], n_embd=c["hidden_size"], hidden=c["intermediate_size"],
        n_kv_head=c.get("num_key_value_heads"), head_dim=D,
        norm_eps=c.get("rms_norm_eps", 1e-6), tied=c.get("tie_word_embeddings", False),
        start_id=bos, rope_base=rope["rope_theta"],
        rope_turns=llama_3_turns(D, rope) if turn == "llama3" else None,
        qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3",
    )  # fmt: skip


@torch.no_grad()
def from_pretrained(folder, seq_len=None, **changes):
    """A LLaMA or a relative, a folder in Hugging Face's format, as an A3 in float32: as load_arm()
    is for an ARM of ours. Learned positions begin as zeros. seq_len: None takes all its context,
    which may be long: positions=False saves its wpe. changes: fields of Config. ValueError, one
    line, for what does not fit. Needs safetensors."""
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    try:
        theirs = json.loads((folder / "config.json").read_text("utf-8"))
        model = A3(Config(**(llama_config(theirs, seq_len) | changes)))
        kv = model.config.n_kv_head * model.config.head_dim
        shards, index = ["model.safetensors"], folder / "model.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        shards = [safe_open(folder / name, "pt") for name in shards]
        holds = {tensor: shard for shard in shards for tensor in shard.keys()}  # noqa: SIM118
        for name, p in model.named_parameters():
            *layer, part, kind = f".{name}".split(".")  # blocks 3 qkv weight, or norm weight
            where = f"model.layers.{layer[2]}." if layer[2:] else ""
            parts = [f"{where}{their}.{kind}" for their in LLAMA_PARTS.get(part, ())]
            if parts:
                rows = [holds.pop(their).get_tensor(their) for their in parts]
                if part == "qkv" and not len(rows[1]) == len(rows[2]) == kv:
                    raise ValueError(f"{parts[1]} and {parts[2]} must have {kv} rows")
                rows = torch.cat(rows)
                n = model.config.vocab_size if part in ("wte", "lm_head") else len(p)
                if len(rows) != n or rows.shape[1:] != p.shape[1:]:
                    raise ValueError(f"{parts} is {tuple(rows.shape)}, not {tuple(p.shape)}")
                p[: len(rows)] = rows
        spare = ("rotary_emb.inv_freq", "lm_head.weight")[: 1 + model.config.tied]
        if left := [name for name in holds if not name.endswith(spare)]:
            raise ValueError(f"no place for {left[0]} in this model")
    except (*BAD, SafetensorError) as e:
        raise ValueError(f"{folder} cannot be loaded: {type(e).__name__} {e}") from None
    model.query[:] = model.wte.weight.mean(0)
    if model.wpe is not None:
        model.wpe.weight.zero_()
    return model
