"""experiments/harness.py: A3 against the harness's own model of transformers, other orders against
walks by hand, and the command as its users meet it."""

import itertools
import json
import os
import sys

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


def make_llama(folder, most=64):
    """A random LLaMA with a tokenizer of 300 byte pairs, and a window of so many tokens."""
    t = pretrained.trained(pretrained.byte_level)
    bos = t.token_to_id("<s>")
    t.post_processor = pretrained.tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    how = dict(vocab_size=300, bos_token_id=bos, max_position_embeddings=most)
    pretrained.random_model(**how).save_pretrained(folder)
    t.save(str(folder / "tokenizer.json"))
    words = dict(bos_token="<s>", eos_token="<|end|>", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA, an A3 that began with it, and an ARM."""
    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "llama")
    (folder / "text.txt").write_text(TEXT * 30, "utf-8")
    fixed = f"--data {folder}/text.txt --data_dir {folder}/tokens --device cpu --num_samples 0"
    fixed += " --seq_len 64 --max_iters 20 --learning_rate 1e-2"
    train_char.main(f"{fixed} --model a3 --init_from {folder}/llama --out_dir {folder}/a3".split())
    train_char.main(
        f"{fixed} --model arm --n_layer 1 --n_head 2 --n_embd 16 --out_dir {folder}/arm".split()
    )
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


def test_whole_texts_are_refused(llama):
    with pytest.raises(UserError, match="this task is about whole texts"):
        harness.adapter(llama).loglikelihood_rolling(requests("", ("The",)))


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
    pairs = [(x[:96], x[96:]), (x[36:96], x[96:])]
    long, short = s.log_likelihoods(pairs)
    close(long[0], short[0])
    s.log_likelihoods(pairs)
    assert capsys.readouterr().out.count("cut on the left") == 1
    with pytest.raises(UserError, match="100 tokens to predict do not fit into the window of 64"):
        s.log_likelihoods([([], x)])


# ---- other orders --------------------------------------------------------------------------------
def by_hand(model, x, order, n):
    """log p of the n last tokens of x, which come in this order, one call for each: no cache, no
    sorting."""
    groups = torch.full((1, len(x)), -1)
    groups[0, len(x) - n :] = n  # all that is open is one last group
    total = 0.0
    for step, i in enumerate(order):
        at = len(x) - n + i
        total += model(x[None], groups)[0, at].log_softmax(-1)[x[at]].item()
        groups[0, at] = step
    return total


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "a3"])
def test_a_random_order_is_one_of_all(folder, name):
    """Three tokens have six orders. A random one is among them, and each comes."""
    s = Scorer(folder / name, by="random", draws=1)
    x = torch.randint(300, (9,), generator=torch.Generator().manual_seed(3))
    pair = [(x[:6].tolist(), x[6:].tolist())]
    six = {p: by_hand(s.model, x, p, 3) for p in itertools.permutations(range(3))}
    assert min(abs(a - b) for a, b in itertools.combinations(six.values(), 2)) > 1e-3

    found = set()
    for s.seed in range(40):
        [(log_p, _)] = s.log_likelihoods(pair)
        found.add(min(six, key=lambda p: abs(six[p] - log_p)))
        assert min(abs(nats - log_p) for nats in six.values()) < 1e-4
    assert found == set(six)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "a3"])
def test_the_surest_first_is_what_a_walk_by_hand_takes(folder, name):
    s = Scorer(folder / name, by="confidence")
    orders = []
    for x in torch.randint(300, (4, 9), generator=torch.Generator().manual_seed(5)):
        order = []
        groups = torch.tensor([6 * [-1] + 3 * [3]])
        while len(order) < 3:
            top = s.model(x[None], groups)[0, 6:].softmax(-1).amax(-1)
            order.append(max(set(range(3)) - {*order}, key=lambda i: top[i]))
            groups[0, 6 + order[-1]] = len(order) - 1
        [(log_p, _)] = s.log_likelihoods([(x[:6].tolist(), x[6:].tolist())])
        close(log_p, by_hand(s.model, x, order, 3))
        orders.append(tuple(order))
    assert len(set(orders)) > 1


@pytest.mark.parametrize("by", ["left", "confidence", "entropy", "margin"])
def test_neither_padding_nor_neighbours_change_an_answer(folder, by):
    """Rows of several lengths in one call, and each alone."""
    s = Scorer(folder / "a3", by=by)
    x = torch.randint(300, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    pairs = [(x[:9], x[9:12]), (x[12:15], x[15:20]), (x[20:40], x[40:41])]
    for (log_p, top), pair in zip(s.log_likelihoods(pairs), pairs, strict=True):
        [(alone, top_alone)] = s.log_likelihoods([pair])
        close(log_p, alone)
        assert top == top_alone


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
    harness.main([str(folder / "a3"), *flags, "--limit", "2", "--by", "random", "--draws", "2"])
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
        harness.main([str(folder / "a3"), *flags.split()])
    assert "\n" not in str(e.value)


def test_a_missing_package_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="pip install lm_eval"):
        harness.main([str(folder / "a3"), "--tasks", "piqa"])


def test_a_model_of_another_kind(folder):
    with pytest.raises(UserError, match="arm holds arm; this is for a3 and loa3"):
        Scorer(folder / "arm")


def test_a_folder_that_holds_nothing(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        Scorer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded: model_type None is not"):
        Scorer(tmp_path)
