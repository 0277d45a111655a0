"""
beyond/llama.py against transformers, on small random models of each kind it reads; and the way
from such a folder through train_char.py and sample.py.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import a3
import sample
import train_char
from beyond import llama
from plumbing import data
from plumbing.cli import UserError
from plumbing.tokenizers import HuggingFace

WHY = "pretrained models are compared with transformers' own: pip install transformers"
transformers = pytest.importorskip("transformers", reason=WHY)
safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")

V, L, BOS = 50, 24, 1
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
KINDS = {  # what differs from a LLaMA with 4 heads of 8 channels for queries, 2 for keys
    "llama": dict(),
    "one head of keys": dict(num_key_value_heads=1),
    "a head of keys for each": dict(num_key_value_heads=4),
    "tied": dict(tie_word_embeddings=True),
    "slow turns": dict(rope_parameters=dict(rope_type="default", rope_theta=1e5)),
    "llama 3": dict(rope_parameters=LLAMA3),
    "wide heads": dict(head_dim=12),
    "narrow heads": dict(head_dim=4),
    "other eps": dict(rms_norm_eps=0.1),
    "mistral": dict(kind="mistral", sliding_window=None),
    "mistral, window as long as the text": dict(kind="mistral", sliding_window=64),
    "qwen 2": dict(kind="qwen2"),
    "qwen 3": dict(kind="qwen3", head_dim=8),
}


def random_model(kind="llama", **changes):
    """Of transformers. With these weights its logits differ by whole units between tokens."""
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, vocab_size=V)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    sizes |= dict(bos_token_id=BOS, eos_token_id=None, pad_token_id=None)
    config = transformers.AutoConfig.for_model(kind, **sizes | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        scale = 1.0 if "embed" in name or "lm_head" in name else 0.3
        torch.nn.init.normal_(p, mean=float("norm" in name), std=scale)
    return model


@torch.no_grad()
def their_logits(model, x):
    """What a model of transformers predicts each token of x (B, L) to be: (B, L, V)."""
    shifted = torch.nn.functional.pad(x[:, :-1], (1, 0), value=model.config.bos_token_id)
    return model(shifted).logits


@torch.no_grad()
def check_same(theirs, folder, **how):
    mine = llama.from_pretrained(folder, **how).eval()
    assert {p.dtype for p in mine.parameters()} == {torch.float32}
    x = torch.randint(V, (3, L), generator=torch.Generator().manual_seed(1))
    want, got = their_logits(theirs, x), mine(x, a3.chunk_groups(*x.shape))
    assert want.std(-1).min() > 1
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    return mine, x


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model, and the folder it was saved to."""
    folder, model = tmp_path_factory.mktemp("llama"), random_model()
    model.save_pretrained(folder)
    return model, folder


# ---- left to right it is the model -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_left_to_right_it_is_that_model(tmp_path, kind):
    theirs = random_model(**KINDS[kind])
    theirs.save_pretrained(tmp_path)
    mine, x = check_same(theirs, tmp_path)
    z = x.clone()
    z[:, 5:] = mine.mask_id
    got, at = mine.sample(z, temperature=0)  # by the cache
    prompt = torch.nn.functional.pad(x[:, :5], (1, 0), value=BOS)
    want = theirs.generate(prompt, do_sample=False, max_new_tokens=L - 5)
    assert torch.equal(got, want[:, 1:])
    assert at.tolist() == 3 * [5 * [-1] + list(range(L - 5))]


@pytest.mark.parametrize("how", [dict(seq_len=L), dict(positions=False), dict(seq_len=L + 1)])
def test_neither_window_nor_learned_positions_change_it(small, how):
    mine, _ = check_same(*small, **how)
    assert mine.config.seq_len == how.get("seq_len", 64)


def test_weights_in_several_files(tmp_path):
    """In bfloat16, which become float32. A file that is missing or cut off is one line."""
    random_model().bfloat16().save_pretrained(tmp_path, max_shard_size="10KB")
    load = transformers.AutoModelForCausalLM.from_pretrained
    check_same(load(tmp_path, dtype=torch.float32).eval(), tmp_path)

    one, other, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    cut(one)
    assert "damaged or cut off (" in refusal(tmp_path)
    other.unlink()
    one.unlink()
    assert "No such file" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["slow turns", "llama 3"])
@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_older_form_of_the_config(tmp_path, kind, word):
    """Once the base of the angles stood by itself, and what slows them beside it."""
    theirs = random_model(**KINDS[kind])
    theirs.save_pretrained(tmp_path)
    rope = dict(KINDS[kind]["rope_parameters"])
    theta, turn = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = rope | {word: turn} if turn == "llama3" else None
    edit_config(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    check_same(theirs, tmp_path)


def test_a_model_without_bos_gets_a_start_token_of_its_own(tmp_path):
    """As some Qwens need. Its embedding is random: there is no likelihood to compare."""
    random_model(bos_token_id=None).save_pretrained(tmp_path)
    mine = llama.from_pretrained(tmp_path)
    assert mine.start_id == V and len(mine.wte.weight) == V + 1
    assert mine(torch.zeros(1, 3, dtype=torch.long), a3.chunk_groups(1, 3)).shape == (1, 3, V)


# ---- any order ---------------------------------------------------------------------------


@pytest.fixture
def any_order(small):
    return llama.from_pretrained(small[1], L, positions=False).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
def test_a_token_moves_only_predictions_after_it(any_order, size):
    g = torch.Generator().manual_seed(2)
    x, groups = torch.randint(V, (1, L), generator=g), a3.random_groups(1, L, size, g)
    before = any_order(x, groups)
    for i in range(L):
        y = x.clone()
        y[0, i] = (x[0, i] + 1) % V
        moved = (any_order(y, groups) - before).abs().amax(-1)[0]  # (L,)
        assert torch.equal(moved > 1e-9, groups[0] > groups[0, i])


@torch.no_grad()
@pytest.mark.parametrize("by,per_step", [("left", 1), ("entropy", 1), ("random", 3)])
def test_ragged_rows_keep_what_is_given(any_order, by, per_step):
    """And what the cache predicted is what one pass over the finished text predicts."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(V, (4, L), generator=g)
    share = torch.tensor([[0.0], [0.2], [0.6], [1.0]])
    given = torch.rand(4, L, generator=g) < share
    z = torch.where(given, x, any_order.mask_id)
    y, steps = any_order.sample(z, temperature=0, per_step=per_step, by=by, generator=g)
    assert torch.equal(y[given], x[given]) and (y < V).all()
    assert torch.equal(steps < 0, given)
    assert torch.equal(any_order(y, steps).argmax(-1)[~given], y[~given])


# ---- what does not fit -------------------------------------------------------------------


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, **shapes):
    """Tensors of the first layer become zeros of another shape, or go."""
    weights = safetensors.load_file(folder / "model.safetensors")
    for short, shape in shapes.items():
        name = f"model.layers.0.{short.replace('__', '.')}"
        weights.pop(name, None)
        if shape:
            weights[name] = torch.zeros(shape)
    safetensors.save_file(weights, folder / "model.safetensors")


def set_head(folder, add):
    """Give it a head of its own: its embeddings, plus a number."""
    weights = safetensors.load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + add
    safetensors.save_file(weights, folder / "model.safetensors")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def refusal(folder, **changes):
    """The message, which is a line."""
    with pytest.raises(ValueError) as e:
        llama.from_pretrained(folder, **changes)
    assert "\n" not in str(e.value) and str(e.value).startswith(f"{folder} cannot be loaded: ")
    assert not re.search(r"\w(Error|Exception)\b", str(e.value))  # no name of a class
    return str(e.value)


Q = "self_attn__q_proj__weight"
K = "self_attn__k_proj__weight"
YARN = dict(rope_type="yarn", rope_theta=1e4)
MISTAKES = [  # in config.json
    (edit_config, dict(model_type="gpt2"), "model_type gpt2 is not supported"),
    (edit_config, dict(rope_parameters=YARN), "rope_type yarn is not"),
    (edit_config, dict(rope_parameters=None, rope_scaling=dict(type="linear")), "type linear"),
    (edit_config, dict(model_type="mistral", sliding_window=8), "of 8, below 64 tokens,"),
    (edit_config, dict(attention_bias=True), "attention_bias or mlp_bias is"),
    (edit_config, dict(hidden_act="gelu"), "hidden_act gelu is not"),
    (edit_config, dict(num_key_value_heads=3), "n_kv_head must divide"),
    (edit_config, dict(bos_token_id=50), "bos_token_id 50 is not"),
    (edit_config, dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not"),
    (edit_config, dict(hidden_size=64), "not (50, 64)"),
    (edit_config, dict(vocab_size=60), "(50, 32)"),
    (edit_config, dict(num_hidden_layers=3), "model.layers.2."),
    (edit_config, dict(num_hidden_layers=1), "no place for ['model.layers.1."),
    # in the weights
    (edit_weights, {Q: None}, "model.layers.0.self_attn.q_proj.weight"),
    (edit_weights, {Q: (40, 32)}, "is (72, 32), not (64, 32)"),
    (edit_weights, {Q: (24, 32), K: (24, 32)}, "must have 16 rows"),
    (
        edit_weights,
        dict(self_attn__q_proj__bias=(32,)),
        "no place for ['model.layers.0.self_at",
    ),
    (edit_weights, dict(mlp__down_proj__weight=(50, 40)), "is (50, 40)"),
    (edit_config, dict(hidden_size=None), "int"),
    (edit_config, dict(quantization_config={"bits": 4}), "quantization_config is"),
    # in the files
    (lambda f: (f / "config.json").write_text("[1]"), {}, "model_type None is not"),
    (lambda f: cut(f / "config.json"), {}, "a .json file is damaged (Unterm"),
    (lambda f: (f / "config.json").unlink(), {}, "config.json"),
    (lambda f: cut(f / "model.safetensors"), {}, "damaged or cut off ("),
    (lambda f: (f / "model.safetensors").unlink(), {}, "model.safetensors"),
]


@pytest.mark.parametrize("spoil,how,message", MISTAKES)
def test_what_does_not_fit_is_one_line(small, tmp_path, spoil, how, message):
    folder = Path(shutil.copytree(small[1], tmp_path / "model"))
    spoil(folder, **how)
    assert message in refusal(folder)


def test_a_head_beside_one_that_is_tied(small, tmp_path):
    """A copy of the embeddings is one. Another head is never dropped silently, and counts if
    the config does not tie it."""
    shutil.copytree(small[1], tmp_path / "model")
    edit_config(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight is not model.embed_tokens.weight; with" in refusal(tmp_path / "model")
    edit_config(tmp_path / "model", tie_word_embeddings=False)
    check_same(small[0], tmp_path / "model")

    theirs = random_model(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "tied")
    set_head(tmp_path / "tied", 0.0)
    check_same(theirs, tmp_path / "tied")
    set_head(tmp_path / "tied", 1e-3)
    assert "tie_word_embeddings is true" in refusal(tmp_path / "tied")


def test_fields_that_there_are_not(small):
    assert "'width'" in refusal(small[1], width=3)
    assert "dropout must be in" in refusal(small[1], dropout=2.0)


# ---- train_char.py and sample.py ---------------------------------------------------------

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind. ",
    "Wie schön leuchtet der Morgenstern — ganz früh um fünf!\n",
    "  two spaces,\ttabs\n\nand empty lines  ",
    "日本語のテキスト, 😀 and 👩‍👩‍👧‍👦, e\u0301.",
)


def byte_level():
    """As GPT-2's and LLaMA 3's: a character may need several tokens."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<s>"]
    return t, dict(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)


def word_pieces():
    """As LLaMA 2's: a text begins with a space that is not shown, rare letters are bytes."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    n, d = tokenizers.normalizers, tokenizers.decoders
    t.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    steps = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    t.decoder = d.Sequence(steps)
    special = ["<unk>", "<s>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256))]
    return t, dict(vocab_size=400, special_tokens=special, limit_alphabet=30)


def trained(make):
    t, how = make()
    how = tokenizers.trainers.BpeTrainer(show_progress=False, **how)
    t.train_from_iterator(TEXTS[:2], how)
    return t


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A LLaMA in the folder model/ with its tokenizer, and a text.txt beside it. roomy/ has
    more embeddings than tokens, as Qwen has, and narrow/ fewer."""
    where = tmp_path_factory.mktemp("speaking")
    t = trained(byte_level)
    (where / "text.txt").write_text("".join(TEXTS[:2]) * 30, "utf-8")
    for name, words in (("model", t.get_vocab_size()), ("roomy", 320), ("narrow", 20)):
        model = random_model(vocab_size=words, bos_token_id=t.token_to_id("<s>") % words)
        model.save_pretrained(where / name)
        t.save(str(where / name / "tokenizer.json"))
        (where / name / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return where


@pytest.fixture
def there(speaking, monkeypatch):
    monkeypatch.chdir(speaking)


def train(flags):
    fixed = "--model a3 --data text.txt --data_dir tokens --device cpu"
    train_char.main(f"{fixed} --num_samples 0 --batch_size 4 {flags}".split())


def log(out):
    lines = Path(out, "log.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_from_a_folder_to_a_page(there, capsys):
    """Train, go on, fill gaps, and show it."""
    train("--init_from model --max_iters 2 --seq_len 16")
    train_char.main(["--resume", "--max_iters", "3", "--num_samples", "1", "--device", "cpu"])
    assert log("out")[-1]["step"] == 3 and log("out")[0]["settings"]["optimizer"] == "adamw"
    train("--init_from out --max_iters 1 --out_dir on --optimizer muon")
    train("--init_from out --max_iters 1 --out_dir again")  # a LLaMA still
    used = [log(out)[0]["settings"]["optimizer"] for out in ("on", "again")]
    assert used == ["muon", "adamw"]
    sample.main(["--infill", "The quick _ fox — ___", "--device", "cpu"])
    assert "The quick" in capsys.readouterr().out
    sample.main(["--prompt", "schön 😀", "--html", "page.html", "--device", "cpu"])
    assert "schön 😀" in capsys.readouterr().out
    page = Path("page.html").read_text("utf-8")
    assert "sch" in page and "<s>" not in page


def test_training_begins_where_the_model_stands(there):
    train("--init_from model --max_iters 1 --learning_rate 1e-12 --out_dir still --seq_len 16")
    got = {row["kind"]: row["val"] for row in log("still") if "val" in row}
    val = data.load("text.txt", "model", folder="tokens").val.astype("int64")
    x = torch.from_numpy(val[: len(val) // 16 * 16]).view(-1, 16)
    logits = their_logits(transformers.AutoModelForCausalLM.from_pretrained("model"), x)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten()).item()
    assert got["exact, left to right"] == pytest.approx(want, abs=1e-3)
    assert abs(got["exact, random order"] - want) > 0.1  # which it has not learned yet


def test_a_vocabulary_with_room_for_more(there, capsys):
    """A gap is no row of the embeddings that no token has."""
    train("--init_from roomy --max_iters 1 --out_dir out_roomy --seq_len 16")
    sample.main(["--out_dir", "out_roomy", "--show", "order", "--infill", "The ____ fox"])
    digits = capsys.readouterr().out.splitlines()[-1]
    assert "0" in digits


def test_a_llama_takes_the_context_of_the_preset(there, monkeypatch):
    monkeypatch.setitem(train_char.PRESETS["base"], "seq_len", 24)
    train("--init_from model --max_iters 1 --out_dir out_preset --preset base")
    assert log("out_preset")[0]["settings"]["seq_len"] == 24


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--init_from narrow", "narrow has fewer embeddings than its tokenizer"),
        ("--init_from cut", "damaged or cut off"),
        ("--init_from model --tokenizer char", "^--tokenizer is that of model; leave it out"),
        ("--init_from model --data_dir new1", "tokenizers"),
        ("--init_from model --data_dir new2", "safetensors"),
    ],
)
def test_what_cannot_start_is_one_line(there, monkeypatch, flags, message):
    """The last two miss a package."""
    shutil.copytree("model", "cut", dirs_exist_ok=True)
    cut(Path("cut/model.safetensors"))
    if "new" in flags:
        monkeypatch.setitem(sys.modules, message, None)
    with pytest.raises(UserError, match=message) as e:
        train(f"{flags} --max_iters 1 --out_dir none --seq_len 16")
    assert "\n" not in str(e.value) and not Path("none/ckpt.pt").exists()


# ---- the tokenizer -----------------------------------------------------------------------


@pytest.fixture(params=[byte_level, word_pieces], ids=["bytes", "pieces"], scope="module")
def tokenizer(request):
    return HuggingFace([trained(request.param).to_str(), "<|end|>"])


@pytest.mark.parametrize("text", [*TEXTS, "", " a", "x\ufffd\ufffdy", "<|end|> after <s>"])
def test_pieces_stand_where_their_tokens_do(tokenizer, text):
    """They join to the text, and the first n pieces are what the first n tokens say, but for
    half a character. The name of a special token is plain text."""
    ids = tokenizer.encode(text).tolist()
    assert not {tokenizer.end, tokenizer.bpe.token_to_id("<s>")} & set(ids)

    pieces = tokenizer.pieces(ids)
    assert "".join(pieces) == text and len(pieces) == len(ids)
    for n in range(len(ids)):
        said = tokenizer.decode(ids[:n])
        assert "".join(pieces[:n]) == said or said.endswith("\ufffd")
        assert text.startswith("".join(pieces[:n]))


def test_pieces_of_any_tokens_join_to_what_they_say(tokenizer):
    """A model may write what is no text. (With bytes for rare letters, one that fits to none
    of its neighbours changes how all of them are read: what is shown cannot be taken back.)"""
    g, bytewise = torch.Generator().manual_seed(4), tokenizer.bpe.token_to_id("<0x41>")
    for _ in range(50):
        ids = torch.randint(tokenizer.size, (20,), generator=g).tolist()
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        assert bytewise or "".join(pieces) == tokenizer.decode(ids)


def test_documents_are_parted_by_the_end_token(tokenizer):
    ids = tokenizer.encode_all(["one", "two", " three"])
    parts = [tokenizer.encode(t).tolist() for t in ("one", "two", " three")]
    end = tokenizer.end
    assert ids.tolist() == [*parts[0], end, *parts[1], end, *parts[2]]


@pytest.mark.parametrize("eos", ["<|end|>", {"content": "<|end|>"}, None])
def test_the_end_token_is_the_one_that_the_folder_names(speaking, tmp_path, eos):
    shutil.copy(speaking / "model" / "tokenizer.json", tmp_path)
    assert HuggingFace.at(tmp_path).end is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(eos_token=eos)))
    found = HuggingFace.at(tmp_path)
    assert found.end == (found.bpe.token_to_id("<|end|>") if eos else None)


def test_a_tokenizer_does_not_cut_a_text(tokenizer):
    """tokenizer.json may say so, as it was fitted for something else."""
    t = tokenizers.Tokenizer.from_str(tokenizer.state["vocab"][0])
    t.enable_truncation(4)
    t.enable_padding(length=400)
    ids = HuggingFace([t.to_str(), None]).encode(TEXTS[0])
    assert ids.tolist() == tokenizer.encode(TEXTS[0]).tolist()


@pytest.mark.parametrize("vocab", [None, ["{}", None], ["", "<s>"]])
def test_a_damaged_tokenizer_is_one_line(vocab):
    with pytest.raises(UserError, match=r"the tokenizer\.json is damaged") as e:
        HuggingFace(vocab)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token": {}}'])
def test_a_damaged_tokenizer_config_is_one_line(speaking, tmp_path, text):
    shutil.copy(speaking / "model" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer_config.json is damaged") as e:
        HuggingFace.at(tmp_path)
    assert "\n" not in str(e.value)
