"""experiments/harness.py: A3 against the harness's own model of transformers, bounds against all
orders, and the command as its users meet it."""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

import lomdm
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
    for model in ("arm", "mdm", "block", "lomdm", "a3"):
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
    return Scorer(folder / "llama", batch_size=2)


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
    close(s.rolling(x), sum(log_p for log_p, _ in s.log_likelihoods(pairs)))


def test_greedy_texts_are_those_of_the_harness(llama, hf):
    how = dict(until=["qu"], max_gen_toks=12, do_sample=False)
    texts = ["The quick brown", "the dog", "Wie", "The quick brown fox"]
    asked = requests("generate_until", *[(text, how) for text in texts])
    got = harness.adapter(llama).generate_until(asked)
    assert got == hf.generate_until(asked)
    stop = got[0][4:6]
    (cut,) = llama.continuations([(texts[0], how | dict(until=stop))])
    assert cut == got[0].split(stop)[0]


@pytest.mark.parametrize("by", ["confidence", "entropy", "margin"])
def test_other_orders_write_other_texts(folder, llama, by):
    asked = [("The quick", dict(max_gen_toks=16))]
    assert Scorer(folder / "llama", by=by).continuations(asked) != llama.continuations(asked)


def test_a_long_context_is_cut_on_the_left_and_said_once(folder, capsys):
    s = Scorer(folder / "llama")
    x = torch.randint(300, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    close(
        s.log_likelihoods([(x[:96], x[96:])])[0][0], s.log_likelihoods([(x[36:96], x[96:])])[0][0]
    )
    s.log_likelihoods([(x[:96], x[96:])])
    assert capsys.readouterr().out.count("cut on the left") == 1
    with pytest.raises(UserError, match="100 tokens to predict do not fit into the window of 64"):
        s.log_likelihoods([([], x)])


# ---- the models of lomdm.py ----------------------------------------------------------------------


def test_an_arm_has_its_own_exact_numbers(folder):
    s = Scorer(folder / "arm")
    a, b = (
        torch.from_numpy(s.tokenizer.encode(t).astype("int64"))[None] for t in ("The q", "uick")
    )
    want = s.model.nelbo(a) - s.model.nelbo(torch.cat((a, b), 1))
    (got,) = harness.adapter(s).loglikelihood(requests("", ("The q", "uick")))
    close(got[0], want.item())
    close(s.rolling(a[0].tolist()), -s.model.nelbo(a).item())


def all_orders(model, x, gap):
    """The bound on -log p(gap | rest) in full: each block's orders with the probabilities that w
    gives them, one position after another."""
    K = min(len(x), model.config.block_len)
    w, z, total = model.order_weights(x[None])[0], x.masked_fill(gap, model.mask_id), 0
    for block in range(0, len(x), K):
        places = [i for i in range(block, block + K) if gap[i]]
        for order in itertools.permutations(places):
            now, q, cost = z.clone(), 1.0, 0.0
            for j, i in enumerate(order):
                w_hat = model.order_weights_hat(now[None])[0]
                share, share_hat = (v[i] / v[list(order[j:])].sum() for v in (w, w_hat))
                q = q * share
                cost = cost + (share / share_hat).log() - model.log_probs(now[None])[0, i, x[i]]
                now[i] = x[i]
            total = total + q * cost
        z[places] = x[places]
    return total.item()


EACH = pytest.mark.parametrize(
    "learn_order,block_len", [(False, 6), (True, 6), (True, 3), (False, 1)]
)
X, GAP = [1, 0, 4, 2, 3, 1], torch.tensor([False, True, True, False, True, False])


def random_lomdm(learn_order, block_len):
    """Whose orders are far from uniform, and a text that ends, but for the ARM, with a [MASK]."""
    torch.manual_seed(0)
    config = dict(learn_order=learn_order, block_len=block_len, weights="exp")
    model = lomdm.LoMDM(lomdm.Config(5, 6, 1, 2, 8, **config)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.7)
    return model, torch.tensor([*X[:-1], model.mask_id if block_len > 1 else X[-1]])


@torch.no_grad()
@EACH
def test_bound_is_the_mean_over_all_orders(learn_order, block_len):
    model, x = random_lomdm(learn_order, block_len)
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    draws = [harness.gap_bound(model, x, GAP, 500, g) for g in generators]
    draws = torch.tensor(draws, dtype=torch.double)
    error = draws.std().item() / math.sqrt(len(draws))
    assert abs(draws.mean().item() - all_orders(model, x, GAP)) < 4 * error + 1e-9


@torch.no_grad()
@EACH
def test_greedy_is_what_greedy_filling_gives(learn_order, block_len):
    m, x = random_lomdm(learn_order, block_len)
    b, written = torch.arange(6) // block_len, set()
    for text in itertools.product(range(5), repeat=3):  # contexts: all there are
        x[[0, 3, 5]] = torch.tensor([*text[:2], x[5] if block_len > 1 else text[2]])
        z = x.masked_fill(GAP, m.mask_id)
        while (todo := GAP & (z == m.mask_id)).any():
            w_hat = m.order_weights_hat(z[None])[0].masked_fill(~todo | (b != b[todo].min()), -1)
            z[w_hat.argmax()] = m.log_probs(z[None])[0, w_hat.argmax()].argmax()
        assert harness.is_greedy(m, z, GAP)
        written.add(tuple(z.tolist()))
        for i in GAP.nonzero()[:, 0]:
            y = z.clone()
            y[i] = (y[i] + 1) % 5
            assert not harness.is_greedy(m, y, GAP)
    assert len(written) > 5


@pytest.mark.parametrize("name", ["mdm", "block", "lomdm", "a3"])
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


# ---- stories -------------------------------------------------------------------------------------

STORY = ["The fox jumps.", "The dog", "over the fox", "and the", "lazy."]


def write_stories(path):
    named = {f"sentence{i}": s for i, s in enumerate(STORY, 1)}
    path.write_text(json.dumps(dict(sentences=STORY)) + "\n" + json.dumps(named))
    return str(path)


@torch.no_grad()
def hand_made(s):
    """The cost of the third sentence, in nats."""
    parts = [s.encode(t) for t in ("The fox jumps. The dog", " over the fox", " and the lazy.")]
    a, b, c = map(len, parts)
    x = torch.tensor([list(itertools.chain(*parts))])
    groups = torch.tensor([[-1] * a + list(range(b)) + [-1] * c])
    return -s.model.log_prob(x, groups).sum().item(), b


@pytest.mark.parametrize("name", ["llama", "a3"])
def test_cost_of_a_missing_sentence(folder, tmp_path, capsys, name):
    harness.main([str(folder / name), "--stories", write_stories(tmp_path / "s.jsonl")])
    out = capsys.readouterr().out.splitlines()
    want, n = hand_made(Scorer(folder / name))
    number = {line.split("  ")[0]: float(line.split("±")[0].split()[-1]) for line in out[-4:]}
    close(number["nats per sentence"], want, 1e-3)
    close(number["nats per token"], want / n, 1e-3)
    assert 0 <= number["rougeL F1"] <= number["rouge1 F1"] <= 1
    assert "2 stories (exact)" in out[-4]


def test_the_others_bound_it_or_see_one_side(folder, tmp_path, capsys):
    path = write_stories(tmp_path / "s.jsonl")
    harness.main([str(folder / "lomdm"), "--stories", path, "--limit", "1", "--temperature", "0"])
    assert "1 stories (a bound)" in capsys.readouterr().out
    harness.main([str(folder / "arm"), "--stories", path])
    out = capsys.readouterr().out.splitlines()
    assert "(exact, left side only)" in out[0]
    s = Scorer(folder / "arm")
    ((log_p, _),) = s.log_likelihoods(
        [(s.encode("The fox jumps. The dog"), s.encode(" over the fox"))]
    )
    close(float(out[1].split()[3]), -log_p)


@pytest.mark.parametrize("name", ["arm", "a3", "lomdm"])
def test_a_story_longer_than_the_window(folder, tmp_path, capsys, monkeypatch, name):
    """What is next to the gap stays, on both sides."""
    seen, cost = [], harness.story_cost
    monkeypatch.setattr(harness, "story_cost", lambda *a: seen.append(a) or cost(*a))
    story = ["a" * 99, "The fox jumps", "over", "the dog.", "b" * 99]
    story = [s.replace("b", "o") for s in story]
    (tmp_path / "s.jsonl").write_text(json.dumps(dict(sentences=story)))
    harness.main([str(folder / name), "--stories", str(tmp_path / "s.jsonl"), "--draws", "1"])
    assert capsys.readouterr().out.count("cut on the left") == 1
    scorer, x, gap = seen[0]
    text = "".join(scorer.tokenizer.pieces(x.tolist()))
    assert text == "a" * 16 + " The fox jumps over the dog. " + "o" * 19
    assert gap.tolist() == [False] * 30 + [True] * 5 + [False] * 29


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        ("", "--tasks or --stories: one of the two"),
        ("--tasks a --stories b", "--tasks or --stories: one of the two"),
        ("--tasks nonsense", "there is no task nonsense"),
        ("--stories nowhere", "--stories nowhere: cannot read it"),
        ("--stories bad.jsonl", "bad.jsonl, line 2: not a story of five sentences"),
        ("--stories empty.jsonl", "empty.jsonl has no stories"),
        ("--stories long.jsonl", "do not fit into the window"),
        ("--stories bad.jsonl --limit 0", "--limit must be at least 1"),
        ("--stories bad.jsonl --by margin", "--by is for a3"),
        ("--stories bad.jsonl --device cpu:9", "there is none here"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    good = json.dumps(dict(sentences=STORY))
    Path("bad.jsonl").write_text(good + '\n{"sentences": ["one"]}')
    Path("empty.jsonl").write_text("")
    Path("long.jsonl").write_text(json.dumps(dict(sentences=[*STORY[:2], TEXT, *STORY[3:]])))
    with pytest.raises(UserError, match=message) as e:
        harness.main([str(folder / "arm"), *flags.split()])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("package", ["lm_eval.api.model", "rouge_score.rouge_scorer"])
def test_a_missing_package_is_one_line(folder, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    stories = ["--stories", write_stories(tmp_path / "s.jsonl")]
    flags = ["--tasks", "piqa"] if package.startswith("lm_eval") else stories
    with pytest.raises(UserError, match=f"pip install {package.split('.')[0]}"):
        harness.main([str(folder / "a3"), *flags])


def test_a_folder_that_holds_nothing(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        Scorer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded: KeyError"):
        Scorer(tmp_path)
