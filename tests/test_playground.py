"""
beyond/playground.py: the page computes what torch computes, every probability and weight, and
draws the same texts from the same uniform numbers. A headless Chromium opens it; where there is
none, those tests are skipped.
"""

import html
import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

import lomdm
from beyond import playground
from beyond.loa3 import LoA3
from plumbing import checkpoint
from plumbing.cli import UserError
from train_char import MODELS, make_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")

TINY = {"seq_len": 12, "n_layer": 2, "n_head": 4, "n_embd": 32}
SMALL = {"seq_len": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}  # --preset small
VOCAB = "\n _&<abé"
LETTERS = "\n !$&',-.3:;?" + "".join(map(chr, (*range(65, 91), *range(97, 123))))  # Shakespeare's
KINDS = {  # in each kind of model: its name, and its Config
    "arm": ("arm", {}),
    "mdm": ("mdm", {}),
    "no local heads": ("mdm", {"local_heads": 0.0}),
    "block": ("block", {"block_len": 4}),
    "lomdm": ("lomdm", {}),
    "lomdm exp": ("lomdm", {"weights": "exp"}),
    "lomdm in blocks": ("lomdm", {"block_len": 4}),
    "a3": ("a3", {}),
    "a3 as in the paper": ("a3", {"left_neighbour": False}),
    "loa3": ("loa3", {}),
    "loa3 random": ("loa3", {"random_share": 0.3}),
}
NUMBER = {kind: n for n, kind in enumerate(KINDS)}  # of a model on the page


# ---- pages ---------------------------------------------------------------------------------


def random_model(name, config):
    """A model with large random weights, so that nothing is nearly uniform: neither attention,
    nor the guesses, nor the orders."""
    model = make_model(name, {**MODELS[name][2], **config}).eval()
    with torch.no_grad():
        for part, p in model.named_parameters():
            if part.startswith("order."):
                p.add_(0.05 * torch.randn_like(p))
            elif part.endswith("norm.weight") or part.endswith(("norm1.weight", "norm2.weight")):
                p.uniform_(0.7, 1.3)
            elif p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
            else:
                p.normal_(std=1.5 / math.sqrt(p.shape[-1]))
    if isinstance(model, LoA3):  # both directions are likely, and small steps let races happen
        model.order.log_weight_steps.data.mul_(0.1)
        model.order.q_hat_logits.data.mul_(0.1)
    return model


def save(folder, name, model, vocab, data="shakespeare"):
    """A run in a folder, as train_char.py leaves it."""
    folder.mkdir()
    tokenizer = {"kind": "char", "vocab": list(vocab)}
    state = dict(model_name=name, config=asdict(model.config), model=model.state_dict())
    state |= dict(settings={"data": data}, tokenizer=tokenizer, step=3, best=1.5)
    checkpoint.save(folder / "ckpt.pt", state)
    return folder


def build(where, models, vocab):
    """A page with {folder: (name, model)}."""
    folders = [save(where / n, name, model, vocab) for n, (name, model) in models.items()]
    path = where / "play.html"
    playground.main([*map(str, folders), "--html", str(path)])
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A page with a tiny model of each kind, and the models in that order."""
    torch.manual_seed(1)
    config = {"vocab_size": len(VOCAB), **TINY}
    models = {kind: (name, random_model(name, config | own)) for kind, (name, own) in KINDS.items()}
    path = build(tmp_path_factory.mktemp("tiny"), models, VOCAB)
    return path, [model for _, model in models.values()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The same, two models of the size of the small preset, of which one has been trained a bit."""
    torch.manual_seed(2)
    config = {"vocab_size": len(LETTERS), **SMALL}
    random = random_model("a3", config)
    trained = make_model("lomdm", config | {"learn_order": True, "weights": "exp"})
    optimizer = torch.optim.AdamW(trained.parameters(), 3e-3)
    for _ in range(20):
        x = torch.randint(20, (8, 1)) + torch.arange(64) // 3  # texts like aaabbbccc..
        trained.loss(x % len(LETTERS))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    models = {"a3": ("a3", random), "lomdm": ("lomdm", trained.eval())}
    return build(tmp_path_factory.mktemp("small"), models, LETTERS), [random, trained]


def dump(path, address=""):
    """What a browser has made of the page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=5000", path.as_uri() + address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def run_on(path, script):
    """What a script returns that runs at the end of the page, as JSON."""
    report = f"document.body.dataset.result = JSON.stringify((() => {{ {script} }})());"
    changed = path.with_name("changed.html")
    text = path.read_text("utf-8").replace("</body>", f"<script>{report}</script></body>")
    changed.write_text(text, "utf-8")
    found = re.search(r'<body[^>]* data-result="(.*?)"', dump(changed), re.S)
    assert found, "the script has failed"
    return json.loads(html.unescape(found[1]))


def answers(path, addresses):
    """The answers to many addresses, from one browser."""
    return run_on(path, f"return {json.dumps(addresses)}.map(answer);")


# ---- the same in torch ---------------------------------------------------------------------


def as_on_page(path, models):
    """The models with the weights as the page has them: rounded."""
    text = re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1]
    rounded = []
    for model, packed in zip(models, json.loads(text)["models"], strict=True):
        copy = make_model(packed["name"], packed["config"]).eval()
        state = dict(model.state_dict())
        for name, p in packed["weights"].items():
            state[name] = state[name].clone()
            values = unpack(p)
            state[name].view(-1)[: len(values)] = values
        copy.load_state_dict(state)
        rounded.append(copy)
    return rounded


def unpack(packed):
    """What playground.pack() packed, (n,) float32."""
    if "numbers" in packed:
        return torch.tensor(packed["numbers"])
    value = {c: i for i, c in enumerate(playground.DIGITS)}
    digits = torch.tensor([value[c] for c in packed["digits"]]).view(-1, 2 + 16 * 9)
    scale = 91 * digits[:, 0] + digits[:, 1]  # of each group
    nine = digits[:, 2:].reshape(-1, 16, 9)
    low = 91 * nine[..., 0:8:2] + nine[..., 1:8:2]  # (groups, 16, 4)
    thirds = nine[..., 8:] // torch.tensor([1, 3, 9, 27]) % 3
    number = 91 * 91 * thirds + low - (3 * 91 * 91 - 1) // 2
    weight = number.flatten(1).double() * (scale[:, None] * packed["unit"])
    return weight.flatten()[: packed["length"]].float()


def tokens_of(text, vocab, mask_id):
    """(1, L), for a text without backslashes."""
    return torch.tensor([[mask_id if c == "_" else vocab.index(c) for c in text]])


def whole_blocks(z, model):
    """With gaps up to the end of a block."""
    K = min(z.shape[1], getattr(model.config, "block_len", 1))
    missing = -z.shape[1] % K
    return torch.cat((z, z.new_full((1, missing), model.mask_id)), 1)


@torch.no_grad()
def guesses(model, text, vocab):
    """log-probabilities (m, V) at the m gaps of a text, and their weights (m,), or None."""
    z = tokens_of(text, vocab, model.mask_id)
    gaps = (z[0] == model.mask_id).nonzero()[:, 0]
    if hasattr(model, "g_hat"):
        learned = model.config.learn_order
        z = whole_blocks(z, model)
        w_hat = model.order_weights_hat(z)[0, gaps] if learned else None
        return model.log_probs(z)[0, gaps], w_hat

    revealed_at = torch.where(z == model.mask_id, z.shape[1], -1)
    log_p = model.read(z, revealed_at, gaps[None]).log_softmax(-1)[0]
    if not isinstance(model, LoA3):
        return log_p, None
    return log_p, Race(model).chances(gaps)


def pick(weights, u):
    """The first whose running sum is above u times the sum."""
    sums = weights.double().cumsum(0)
    return int((sums <= u * sums[-1]).sum())


class Race:
    """The learned order of LoA3, one place after another: the mixture of the three ways."""

    def __init__(self, model):
        self.s = model.order.log_weights(model.config.seq_len).double()
        self.log_way = model.order.log_q_hat_way()[0].double()

    def chances(self, left):
        return (self.log_way[:, None] + self.s[:, left].log_softmax(1)).exp().sum(0)

    def choose(self, left, u):
        chances = self.chances(left)
        n = pick(chances, u)
        self.log_way = (self.log_way + self.s[:, left].log_softmax(1)[:, n]).log_softmax(0)
        return left.pop(n), -math.log(chances[n])


@torch.no_grad()
def write(model, text, vocab, rule, uniforms, temperature=1.0, per_step=1):
    """A text with its gaps filled by these uniform numbers, and its steps: what the page's
    writeStep() does, with torch's models. How the samplers of lomdm.py and a3.py choose, but with
    the inverse of a cumulative sum in the place of a race."""
    u = iter(uniforms)
    x = tokens_of(text, vocab, model.mask_id)
    is_lomdm = hasattr(model, "g_hat")
    gaps = [i for i, token in enumerate(x[0].tolist()) if token == model.mask_id]
    revealed_at = torch.where(x == model.mask_id, x.shape[1], -1)
    race = Race(model) if not is_lomdm and rule == "order" else None

    given = [i for i in range(x.shape[1]) if i not in gaps]
    for n in range(len(given) if race else 0):
        place, _ = race.choose(given, next(u))
        revealed_at[0, place] = n - x.shape[1]

    steps = []
    while gaps:
        # Who may be next, and how does the network see these places?
        K = model.config.block_len if is_lomdm else x.shape[1]
        here = [i for i in gaps if i // K == gaps[0] // K]
        if is_lomdm:
            h = model.features(whole_blocks(x[:, : (gaps[0] // K + 1) * K], model))
            logits, weights = model.logits(h)[0], model.g_hat(h)[0]
        else:
            logits = x.new_zeros(x.shape[1], len(vocab), dtype=torch.float)
            logits[here] = model.read(x, revealed_at, torch.tensor([here]))[0]

        # Where?
        places, prices = [], []
        left = list(here)
        while left and len(places) < per_step:
            if race:
                place, price = race.choose(left, next(u))
            elif rule in ("order", "random"):
                w = weights[left] if rule == "order" else torch.ones(len(left))
                n = pick(w, next(u))
                place, price = left.pop(n), -math.log(w[n] / w.sum())
            else:
                score = -torch.tensor(left) if rule == "left" else None
                score = lomdm.certainty(logits[left], rule) if score is None else score
                place, price = left.pop(int(score.argmax())), 0
            places.append(place)
            prices.append(price)

        # What?
        p = lomdm.probabilities(logits[places], temperature)
        tokens = [pick(row, next(u)) for row in p]
        nll = -logits[places].log_softmax(1)[range(len(tokens)), tokens]
        x[0, places] = torch.tensor(tokens)
        revealed_at[0, places] = len(steps)
        gaps = [i for i in gaps if i not in places]
        steps.append((places, tokens, nll.tolist(), prices))
    return "".join(vocab[token] for token in x[0]), steps


# ---- the page is the model -----------------------------------------------------------------

TEXTS = [
    "",
    "a",
    "ab é&< \n",
    "_",
    "a_b",
    "_a b__é",
    "ab a_ab \n&<é",
    "____________",
    "__b_a__é__a_",
]


def address(number, text, question="json", **more):
    rest = "".join(f"&{name}={value}" for name, value in more.items())
    return f"#model={number}&{question}={quote(text, safe='')}{rest}"


def differences(found, model, text, vocab):
    """The largest differences of an answer from the model: log-probabilities, log-weights."""
    assert found["text"] == text
    assert found["gaps"] == [i for i, c in enumerate(text) if c == "_"]
    log_p, weights = guesses(model, text, vocab)
    if not found["gaps"]:
        assert found["probs"] == [] and found["weights"] == (None if weights is None else [])
        return 0, 0

    assert all([c for c, _ in row] == list(vocab) for row in found["probs"])
    p = torch.tensor([[p for _, p in row] for row in found["probs"]], dtype=torch.double)
    in_p = (p.log() - log_p).abs().max().item()
    if weights is None:
        assert found["weights"] is None
        return in_p, 0
    w = torch.tensor(found["weights"], dtype=torch.double)
    return in_p, (w.log() - weights.log()).abs().max().item()


@needs_chromium
def test_every_probability_and_weight_is_the_models(tiny):
    """Of each kind of model, for texts with none, one and many gaps, short and long ones. With the
    weights as they are on the page, only the order of additions differs."""
    path, models = tiny
    rounded = as_on_page(path, models)
    asked = [(n, text) for n in range(len(models)) for text in TEXTS[1:]]
    found = answers(path, [address(n, text) for n, text in asked])
    for (n, text), answer in zip(asked, found, strict=True):
        kind = list(KINDS)[n]
        assert max(differences(answer, rounded[n], text, VOCAB)) < 5e-5, (kind, text)
        assert max(differences(answer, models[n], text, VOCAB)) < 0.02, (kind, text)  # see below


@needs_chromium
def test_small_models_move_by_less_than_a_hundredth_of_a_nat(small):
    path, models = small
    assert path.stat().st_size < 4e6
    rounded = as_on_page(path, models)
    torch.manual_seed(3)
    for n, model in enumerate(models):
        texts = []
        for gaps in (0, 1, 8, 32, 64):
            ids = torch.randint(len(LETTERS), (64,))
            text = [LETTERS[i] for i in ids]
            for i in torch.randperm(64)[:gaps]:
                text[i] = "_"
            texts.append("".join(text))
        for text, answer in zip(texts, answers(path, [address(n, t) for t in texts]), strict=True):
            assert max(differences(answer, rounded[n], text, LETTERS)) < 1e-4
            assert max(differences(answer, model, text, LETTERS)) < 0.01


@needs_chromium
@pytest.mark.parametrize("text", ["____________", "a__b_é_ _"])
def test_the_same_uniforms_write_the_same_text(tiny, text):
    """Positions, characters and prices, for each kind of model and each rule, one token a step and
    three."""
    path, models = tiny
    rounded = as_on_page(path, models)
    generator = torch.Generator().manual_seed(4)
    asked = []
    for kind, n in NUMBER.items():
        learned = kind.startswith(("lomdm", "loa3"))
        rules = ["order"] * learned + ["left", "random", "confidence", "entropy", "margin"]
        rules = rules if kind != "arm" else ["left"]
        for rule, (per_step, T) in itertools.product(rules, [(1, 1.0), (3, 0.5)]):
            # As many as are ever used: the given ones, and two for each gap.
            u = torch.rand(2 * len(text), generator=generator, dtype=torch.double).tolist()
            asked.append((n, rule, u, T, 1 if kind == "arm" else per_step))

    found = answers(path, [
        address(n, text, "sample", rule=rule, u=",".join(map(repr, u)), temperature=T, perStep=m)
        for n, rule, u, T, m in asked
    ])  # fmt: skip
    for (n, rule, u, T, m), answer in zip(asked, found, strict=True):
        kind = list(KINDS)[n]
        expected, steps = write(rounded[n], text, VOCAB, rule, u, T, m)
        assert answer.get("text") == expected.replace("_", r"\_"), (kind, rule, answer)
        assert len(answer["steps"]) == len(steps)
        for mine, (places, tokens, nll, prices) in zip(answer["steps"], steps, strict=True):
            assert mine["places"] == places
            assert mine["characters"] == [VOCAB[token] for token in tokens]
            assert mine["tokenPrices"] == pytest.approx(nll, abs=1e-4)
            assert mine["placePrices"] == pytest.approx(prices, abs=1e-4)


@needs_chromium
def test_prices_of_places_are_the_learned_order(tiny):
    """From nothing, the places of LoA3 have the probability that Order.forward() gives them."""
    path, models = tiny
    for kind in ("loa3", "loa3 random"):
        model = as_on_page(path, models)[NUMBER[kind]]
        (answer,) = answers(path, [address(NUMBER[kind], "_" * 12, "sample", seed=5)])
        order = torch.tensor([[place for step in answer["steps"] for place in step["places"]]])
        log_q_hat = model.order(order, model.order.log_q_hat_way())[0]
        prices = [price for step in answer["steps"] for price in step["placePrices"]]
        assert prices == pytest.approx((-log_q_hat).tolist(), abs=1e-4)


# ---- the page is used ----------------------------------------------------------------------


@needs_chromium
def test_an_address_is_answered(tiny):
    """As another program would ask: text that HTML and addresses write otherwise, \\_ for a _, the
    first model if none is named, and one line about a mistake."""
    path, _ = tiny

    def ask(hash):
        return json.loads(re.search(r'<pre id="json">(.*?)</pre>', dump(path, hash), re.S)[1])

    found = ask("#json=" + quote("a<&é\\_ _\n"))
    assert found["text"] == "a<&é\\_ _\n" and found["gaps"] == [6] and found["model"] == "arm"
    assert [c for c, _ in found["probs"][0]] == list(VOCAB)
    assert sum(p for _, p in found["probs"][0]) == pytest.approx(1, abs=1e-6)

    assert "does not know “x”, “Z”" in ask("#model=1&json=a_xZ")["error"]
    assert "reads 12 at most" in ask("#json=" + "_" * 13)["error"]
    assert "11 models" in ask("#model=11&json=_")["error"]
    assert "uniform numbers" in ask("#model=1&sample=__&u=0.5,0.5")["error"]


@needs_chromium
def test_a_reader_plays(tiny):
    """The page starts by itself, steps, goes back, and shows two models beside each other."""
    path, _ = tiny
    found = run_on(path, """
        take("a_b__"); restart();
        const seen = () => panels.map(p => p.cells.getAttribute("aria-label"));
        const before = seen();
        $("step").click(); $("step").click();
        const two = [seen(), $("count").textContent, panels[0].just.textContent];
        for (const key of ["ArrowRight", "ArrowRight", "Home"])
          document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const restarted = seen();

        // The second model may have to write what the first one did, in its own order.
        panels[1].whose.value = "same"; restart();
        while (cursor < length() || gapsOf(panels[1].text).length) {
          ensure(panels[0], 99); go(cursor + 1);
        }
        const same = [seen(), panels[1].sum.textContent];
        take("xyz"); restart();
        return { before, two, restarted, same, problem: $("problem").textContent };
    """)  # fmt: skip
    assert found["before"] == ["a_b__"] * 2 == found["restarted"]
    texts, count, just = found["two"]
    assert [text.count("_") for text in texts] == [1, 1] and count == "2 of 3"
    assert just.startswith("Just written: ") and "Price: " in just
    texts, price = found["same"]
    assert texts[0] == texts[1] and "_" not in texts[0] and "choosing places" in price
    assert "ARM (GPT) does not know “x”, “y”, “z”" in found["problem"]


@needs_chromium
def test_a_film_is_a_picture(tmp_path):
    """Rows of cells, and the direction that the model has learned."""
    config = {"vocab_size": 3, **TINY, "seq_len": 68}
    folder = save(tmp_path / "film", "loa3", random_model("loa3", config), "\n#.", "automaton")
    playground.main([str(folder), "--html", str(tmp_path / "play.html")])
    found = run_on(tmp_path / "play.html", """
        go(20);
        const cells = panels[0].cells;
        return [cells.className, cells.querySelectorAll(".cell").length,
                cells.querySelectorAll(".gap").length, panels[0].way.textContent];
    """)  # fmt: skip
    assert found[:3] == ["cells film", 68, 48]
    assert "backwards, from the last row up" in found[3]


# ---- without a browser ---------------------------------------------------------------------


def test_the_page_stands_alone(tiny):
    """Nothing is loaded from anywhere, and no weight can end the script that holds it."""
    text = tiny[0].read_text("utf-8")
    assert text.count("</script>") == 3 and '"DATA"' not in text
    before, data, after = re.split(r'(?s)(?<=id="data">)(.*?)(?=</script>)', text)
    assert "<" not in data and "http" not in data

    loads = r"https?:|<script[^>]*src|<link(?![^>]*data:,)|@import|url\(|fetch\(|import\("
    assert not re.search(loads, before + after)


def test_a_packed_weight_is_off_by_half_a_step():
    """Of the largest in its group of 64, if that is not far below the largest of all."""
    torch.manual_seed(6)
    weight = torch.randn(40, 63)
    weight[3:9] *= 0.01
    weight[20:30] = 0
    packed = json.loads(json.dumps(playground.pack(weight)))
    assert packed["length"] == weight.numel() and len(packed["digits"]) == 40 * 146
    off = torch.nn.functional.pad((unpack(packed) - weight.flatten()).abs(), (0, 40)).view(-1, 64)
    groups = torch.nn.functional.pad(weight.flatten().abs(), (0, 40)).view(-1, 64)
    step = groups.amax(1, keepdim=True) / 12421 + weight.abs().max() / 12421 / 8280
    assert (off <= 0.501 * step).all()
    assert torch.equal(unpack(playground.pack(weight[0])), weight[0])  # what is small is exact
    assert not unpack(playground.pack(torch.zeros(40, 63))).any()


def test_mistakes_cost_one_line(tmp_path):
    model = random_model("mdm", {"vocab_size": 3, **TINY})
    good = save(tmp_path / "good", "mdm", model, "abc")
    state = torch.load(good / "ckpt.pt", weights_only=True)
    (tmp_path / "gpt2").mkdir()
    torch.save(state | {"tokenizer": {"kind": "gpt2", "vocab": None}}, tmp_path / "gpt2/ckpt.pt")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "play.html"

    for folders, html_path, message in [
        (["nowhere"], out, "no checkpoint at .*nowhere.*train one"),
        (["good", "empty"], out, "no checkpoint at .*empty"),
        (["good", "gpt2"], out, "gpt2 has the tokenizer gpt2; the page is for characters only"),
        (["good"], good / "ckpt.pt", "is a file of a run"),
        (["good"], good / "ckpt.pt/play.html", "cannot write"),
    ]:
        with pytest.raises(UserError, match=message) as e:
            playground.main([*(str(tmp_path / f) for f in folders), "--html", str(html_path)])
        assert "\n" not in str(e.value)
    with pytest.raises(SystemExit) as e:
        playground.main([])
    assert e.value.code == 2
    assert not out.exists() and sorted(p.name for p in good.iterdir()) == ["ckpt.pt"]


@pytest.mark.parametrize("L", [16, 64, 128, 256])
def test_examples_fit_and_are_what_they_are_called(L):
    model = {"config": {"seq_len": L}, "rowLength": 0, "vocab": LETTERS}
    found = dict(playground.examples_for(model))
    assert len(found) == 5 and all("_" in text and len(text) <= L for text in found.values())
    middle = found["a gap in the middle"]
    assert middle.startswith("To") and not middle.endswith("_")
    assert found["a beginning"].endswith("_") and found["an end"].startswith("_")


def test_the_committed_page_holds_the_committed_models(monkeypatch):
    """beyond/play.html is what experiments/ready.py says that makes it."""
    monkeypatch.chdir(playground.PAGE.parents[1])
    page = playground.page(["ready/loa3", "ready/lomdm"])
    assert page == Path("beyond/play.html").read_text("utf-8")
    assert len(page.encode()) <= 4e6
    size = sum(path.stat().st_size for path in Path("ready").rglob("ckpt.pt"))
    assert size <= 6e6
