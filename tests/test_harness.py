"""experiments/harness.py: A3 against the harness's own model of transformers, bounds against all
orders, and the command as its users meet it."""

import itertools
import json
import os
import sys

import oracle
import pytest
import torch

import train_char
from experiments import harness
from experiments.harness import Scorer
from plumbing.cli import UserError

lm_eval = pytest.importorskip("lm_eval", reason="its model is the reference: pip install lm_eval")
pretrained = pytest.importorskip("test_pretrained", reason="needs what that needs")

WINDOW = 64
TEXT = "".join(pretrained.TEXTS[:2])
PAIRS = [  # contexts and continuations
    ("The quick brown", " fox"),
    ("The quick brown", " dog jumps"),
    ("The quick brown ", "fox"),  # a space at the end belongs to the continuation
    ("", "The quick"),
    ("Wie schön", " leuchtet"),
    ("the", "\n"),
    ("The quick brown", " fox"),  # twice
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LLaMA with a tokenizer of 300 byte pairs, and a checkpoint of each of our models."""
    folder = tmp_path_factory.mktemp("models")
    t = pretrained.trained(pretrained.byte_level)
    bos = t.token_to_id("<s>")
    t.post_processor = pretrained.tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    pretrained.random_model(vocab_size=300, bos_token_id=bos).save_pretrained(folder / "llama")
    t.save(str(folder / "llama/tokenizer.json"))
    (folder / "llama/tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "text.txt").write_text(TEXT * 30, "utf-8")
    fixed = f"--data {folder}/text.txt --data_dir {folder}/tokens --device cpu --num_samples 0"
    fixed += " --n_layer 1 --n_head 2 --n_embd 16 --seq_len 64 --max_iters 20 --learning_rate 1e-2"
    for model in ("arm", "mdm", "block", "lomdm"):
        train_char.main(f"{fixed} --model {model} --out_dir {folder}/{model}".split())
    return folder


@pytest.fixture(scope="module")
def hf(folder):
    from lm_eval.models.huggingface import HFLM

    tokenizer = pretrained.transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "llama/tokenizer.json"), bos_token="<s>", eos_token="<|end|>"
    )
    load = pretrained.transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder / "llama", dtype=torch.float32)
    how = dict(device="cpu", max_length=WINDOW, add_bos_token=True)
    return HFLM(pretrained=model, tokenizer=tokenizer, **how)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, 0) for args in arguments]


def close(a, b, atol=1e-4):
    assert a == pytest.approx(b, abs=atol)


# ---- A3 is the model that it was -----------------------------------------------------------------
@pytest.fixture(scope="module")
def llama(folder):
    return Scorer(folder / "llama")


def test_log_likelihoods_are_those_of_the_harness(llama, hf):
    """Also for what the model itself would write, which is_greedy says."""
    (written,) = hf.generate_until(requests("generate_until", ("The", dict(max_gen_toks=1))))
    asked = requests("loglikelihood", *PAIRS, ("The", written + " quick"), ("The", written))
    want, got = hf.loglikelihood(asked), harness.adapter(llama).loglikelihood(asked)
    close([log_p for log_p, _ in got], [log_p for log_p, _ in want])
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert want[-1][1] and not all(greedy for _, greedy in want)
    assert len({round(log_p) for log_p, _ in want}) > 4  # they differ by whole nats


def test_rolling_is_that_of_the_harness(llama, hf, monkeypatch):
    asked = requests("loglikelihood_rolling", *[(t,) for t in ("The", TEXT[:60], "schön")])
    monkeypatch.setattr(hf, "add_bos_token", False)  # or there would be two
    close(harness.adapter(llama).loglikelihood_rolling(asked), hf.loglikelihood_rolling(asked))
    assert harness.adapter(llama).loglikelihood_rolling(requests("", ("",))) == [0]


def test_rolling_over_windows(folder):
    """All but the first see what was before: a window has 64 tokens, whichever are to be judged."""
    s = Scorer(folder / "llama")
    x = torch.randint(300, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [([], x[:64]), (x[63:64], x[64:127]), (x[86:127], x[127:])]
    assert [len(a + b) for a, b in pairs] == [64, 64, 64]
    close(s.rolling(x), sum(s.log_likelihood(*pair)[0] for pair in pairs))


def test_greedy_texts_are_those_of_the_harness(llama, hf):
    how = dict(until=["qu"], max_gen_toks=12, do_sample=False)
    texts = ["The quick brown", "the dog", "Wie", "The quick brown fox"]
    asked = requests("generate_until", *[(text, how) for text in texts])
    got = harness.adapter(llama).generate_until(asked)
    assert got == hf.generate_until(asked)
    stop = got[0][4:6]
    cut = llama.continuation(texts[0], how | dict(until=stop))
    assert cut == got[0].split(stop)[0]


def test_a_long_context_is_cut_on_the_left_and_said_once(folder, capsys):
    s = Scorer(folder / "llama")
    x = torch.randint(300, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    close(s.log_likelihood(x[:96], x[96:])[0], s.log_likelihood(x[36:96], x[96:])[0])
    s.log_likelihood(x[:96], x[96:])
    assert capsys.readouterr().out.count("cut on the left") == 1
    with pytest.raises(UserError, match="100 tokens to predict do not fit into the window of 64"):
        s.log_likelihood([], x)


# ---- the models of lomdm.py ----------------------------------------------------------------------
def test_an_arm_has_its_own_exact_numbers(folder):
    s = Scorer(folder / "arm")
    a, b = (torch.tensor(s.encode(text))[None] for text in ("The q", "uick"))
    want = s.model.nelbo(a) - s.model.nelbo(torch.cat((a, b), 1))
    (got,) = harness.adapter(s).loglikelihood(requests("", ("The q", "uick")))
    close(got[0], want.item())
    close(s.rolling(a[0].tolist()), -s.model.nelbo(a).item())


@torch.no_grad()
@pytest.mark.parametrize("learn_order,block_len", [(False, 6), (True, 6), (True, 3)])
def test_greedy_is_what_greedy_filling_gives(float64, learn_order, block_len):
    """For all contexts of two tokens, and a [MASK] at the end, the text that greedy filling gives
    is greedy, and none that differs in one token is."""
    how = dict(learn_order=learn_order, block_len=block_len, weights="exp", n_layer=1)
    m = oracle.make_lomdm(6, **how)
    gap = torch.tensor([False, True, True, False, True, False])
    b = torch.arange(6) // block_len
    written = set()
    for context in itertools.product(range(oracle.V), repeat=2):
        z = torch.full((6,), m.mask_id)
        z[[0, 3]] = torch.tensor(context)
        while (todo := gap & (z == m.mask_id)).any():
            w_hat = m.order_weights_hat(z[None])[0].masked_fill(~todo | (b != b[todo].min()), -1)
            z[w_hat.argmax()] = m.log_probs(z[None])[0, w_hat.argmax()].argmax()
        assert harness.is_greedy(m, z, gap)
        written.add(tuple(z.tolist()))

        for i in gap.nonzero()[:, 0]:
            other = z.clone()
            other[i] = (other[i] + 1) % oracle.V
            assert not harness.is_greedy(m, other, gap)
    assert len(written) > 5


@pytest.mark.parametrize("name", ["mdm", "block", "lomdm"])
def test_every_model_answers(folder, name):
    """Bounds have the sign and the size of what they bound."""
    s = Scorer(folder / name, draws=4)
    model = harness.adapter(s)
    for log_p, greedy in model.loglikelihood(requests("", *PAIRS)):
        assert -100 < log_p < 0 and greedy in (True, False)
    assert -10 * len(TEXT) < model.loglikelihood_rolling(requests("", (TEXT,)))[0] < 0
    how = dict(max_gen_toks=5, temperature=1.0)
    texts = model.generate_until(requests("", ("The", how), ("The quick", how)))
    assert all(len(text) == 5 for text in texts)


# ---- tasks ---------------------------------------------------------------------------------------
@pytest.fixture
def questions(tmp_path):
    """A folder with a task that needs no network."""
    choices = [" fox", " dog", " jumps", " lazy"]
    rows = [dict(question=q, choices=choices, answer=i) for i, (q, _) in enumerate(PAIRS[:4])]
    for row in rows:
        row["question"] = row["question"] or "the"
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = dict(data_files=dict(test=str(tmp_path / "mine.jsonl")), cache_dir=str(tmp_path))
    task = dict(
        task="mine", dataset_path="json", dataset_kwargs=files, test_split="test",
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="choices",
        doc_to_target="answer", metric_list=[dict(metric="acc")],
    )  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(task))  # which is YAML
    return tmp_path


def test_a_task_of_ones_own(folder, questions, hf, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    flags = ["--tasks", "mine", "--include_path", str(questions), "--data_dir", str(questions)]
    harness.main([str(folder / "llama"), *flags])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("|mine"))
    manager = lm_eval.tasks.TaskManager(include_path=str(questions), include_defaults=False)
    want = lm_eval.simple_evaluate(hf, tasks=["mine"], task_manager=manager)["results"]["mine"]
    close(float(row.split("|")[7]), want["acc,none"])
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: manager)  # takes seconds
    harness.main([str(folder / "mdm"), *flags, "--limit", "2", "--draws", "2"])
    assert "|mine" in capsys.readouterr().out


# ---- mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags,message",
    [
        ("--tasks nonsense", "there is no task nonsense"),
        ("--tasks a --limit 0", "--limit must be at least 1"),
        ("--tasks a --device cuda:99", "there is none here"),
        ("--tasks=", "--tasks is empty"),
    ],
)
def test_mistakes_are_one_line(folder, flags, message):
    with pytest.raises(UserError, match=message) as e:
        harness.main([str(folder / "arm"), *flags.split()])
    assert "\n" not in str(e.value)


def test_a_missing_package_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="pip install lm_eval"):
        harness.main([str(folder / "arm"), "--tasks", "piqa"])


def test_a_folder_that_holds_nothing(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        Scorer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded: model_type None is not"):
        Scorer(tmp_path)
