"""evidence.py: the estimator by times against exact integration, and tables against hand-made
runs."""

import itertools
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import evidence
import lomdm
import sample
import train_char
from sample import UserError


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def exact_rate(model, x, t):
    """The integrand of equation (2) at one time t for one text x (1, L), from all 2^L masks."""
    L = x.shape[1]
    masks = torch.tensor(list(itertools.product([False, True], repeat=L)))  # (2^L, L)
    x = x.expand(len(masks), L)
    z = x.masked_fill(masks, model.mask_id)
    alpha, velocity = lomdm.schedule(t, L, L, model.order_weights(x[:1]))
    _, velocity_hat = lomdm.schedule(t, L, L, model.order_weights_hat(z))
    p = torch.where(masks, 1 - alpha, alpha).prod(1)  # (2^L,)
    velocity = velocity.expand_as(velocity_hat)
    recon, order = lomdm.nelbo_rate(model.log_probs(z), x, masks, velocity, velocity_hat)
    return (p * (recon + order)).sum()


@pytest.mark.parametrize("learn_order", [False, True])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_loss_at_times_is_the_papers_bound(float64, learn_order, t):
    """At any time its mean is the integrand of equation (2), and the mean of its gradient the
    gradient of that, the forward weights' included, within five standard errors."""
    torch.manual_seed(0)
    model = lomdm.LoMDM(lomdm.Config(3, 3, 1, 2, 8, learn_order=learn_order))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    x = torch.tensor([[0, 2, 1]])
    rate = exact_rate(model, x, torch.tensor([[t]])) / 3
    names = ["lm_head.weight"] + ["g.score.weight", "g_hat.score.weight"] * learn_order
    params = [dict(model.named_parameters())[n] for n in names]
    want = [rate, *torch.autograd.grad(rate, params)]
    values = []
    for _ in range(20):
        many = torch.full((2000, 1), t)
        loss, metrics = evidence.loss_at_times(model, x.expand(2000, 3), t=many)
        values.append([metrics["nelbo"], *torch.autograd.grad(loss, params)])
    for w, *got in zip(want, *values, strict=True):
        got = torch.stack(got).flatten(1) if w.ndim else torch.stack(got)[:, None]
        error = got.std(0) / math.sqrt(len(got))
        z = (got.mean(0) - w.detach().flatten()).abs() / (error + 1e-12)
        assert z[error > 1e-9].max() < 5
        assert error.max() < 0.1 * w.detach().abs().max()  # and that says something


def run(name, rows):
    Path(name).mkdir(parents=True)
    lines = [{"settings": {}}] + [
        dict(zip(("step", "val", "val_error", "kind"), r, strict=True)) for r in rows
    ]
    Path(name, "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_table_and_curves(tmp_path, monkeypatch, capsys):
    """Seeds belong together; the other figures are those of the step that the first one chose."""
    monkeypatch.chdir(tmp_path)
    run(
        "out/m_s1",
        [
            (1, 3.0, 0.1, "a"),
            (1, 9.0, 0.3, "b"),
            (2, 2.0, 0.1, "a"),
            (2, 5.0, 0.3, "b"),
            (3, 2.5, 0.1, "a"),
            (3, 1.0, 0.3, "b"),
        ],
    )
    run("out/m_s2", [(1, 4.0, 0.2, "a"), (1, 7.0, 0.5, "b")])
    evidence.main(["table", "out/m_s1", "out/m_s2"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["m", "a", "2", "3.0000", "1.0000", "0.1500"],
        ["m", "b", "2", "6.0000", "1.0000", "0.4000"],
    ]
    evidence.main(["curves", "out/m_s1", "out/m_s2", "--svg", "c.svg"])
    assert "1: 3.5000 ± 0.5000 2: 2.0000 ± 0.0000 3: 2.5000 ± 0.0000" in capsys.readouterr().out
    circles = [e for e in ET.parse("c.svg").iter() if e.tag.endswith("circle")]
    assert len(circles) == 3 and len({c.get("cx") for c in circles}) == 3
    with pytest.raises(UserError, match="cannot read out.nowhere.log.jsonl"):
        evidence.main(["table", "out/nowhere"])


def test_ticks():
    assert evidence.ticks(0, 800) == [0, 200, 400, 600, 800]
    assert evidence.ticks(1.7, 3.2) == [2.0, 2.5, 3.0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Small trained models on a text where the line end is the only character that repeats."""
    where = tmp_path_factory.mktemp("runs")
    (where / "text.txt").write_text("to be or not\n" * 300)
    flags = f"--data {where}/text.txt --data_dir {where}/tokens --n_layer 1 --n_head 2 --n_embd 16 "
    flags += "--seq_len 16 --device cpu --num_samples 0 --max_iters 3 --eval_interval 3"
    for name in ("arm", "mdm", "lomdm", "a3"):
        train_char.main([*flags.split(), "--model", name, "--out_dir", str(where / name)])
    return where


def test_bounds_are_those_of_nelbo(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    evidence.main(["bounds", "arm", "lomdm"])
    arm, lomdm_line, difference = capsys.readouterr().out.splitlines()
    _, model = sample.load_checkpoint("arm/ckpt.pt", "cpu")
    raw = list(next(Path("tokens").glob("*/val.bin")).read_bytes()[::2])
    x = torch.tensor(raw[: len(raw) // 16 * 16]).view(-1, 16)
    exact = model.eval().nelbo(x).mean() / 16
    assert f"jump {exact:.4f} ±" in arm and "paper - jump 0.00000" in arm
    assert "w 0.7" in lomdm_line and difference.startswith("arm - lomdm: -")


@pytest.mark.parametrize(
    "argv,says",
    [
        ("fraction mdm lomdm a3 --svg f.svg", "a3 0.0: "),
        ("order lomdm --svg o.svg", "line end 1.0"),
        ("passage lomdm --svg p.svg", "--- sample 1"),
        ("samples lomdm mdm --judge arm --samples 4", "mdm              uniform      16"),
        ("infill a3 lomdm mdm", "in gaps of 4 (bound)"),
        ("variance mdm lomdm --draws 3", "times   loss"),
    ],
)
def test_commands_run(runs, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(runs)
    evidence.main(argv.split())
    assert says in capsys.readouterr().out
    for path in Path().glob("*.svg"):
        ET.parse(path)


@pytest.mark.parametrize(
    "argv,message",
    [
        ("order mdm", "without a learned order"),
        ("passage arm", "without a learned order"),
        ("bounds a3", "it is exact"),
        ("variance a3", "for one block"),
        ("samples a3", "for the models of lomdm.py"),
    ],
)
def test_wrong_models(runs, monkeypatch, argv, message):
    monkeypatch.chdir(runs)
    with pytest.raises(UserError, match=message):
        evidence.main(argv.split())


def test_page_and_picture():
    """The page holds the samples and nothing from outside; the picture every character once."""
    samples = [(["a", "</script>", "\n", "é&"], [2, -1, 0, 1]), (["b"], [0])]
    page = sample.page(samples, "about <b>")
    assert page.count("</script>") == 1 and "http" not in page and len(page) < 20_000
    data = json.loads(page.split("const data = ")[1].split(";\n")[0])
    assert data["about"] == "about <b>"
    assert data["samples"][0] == {"pieces": samples[0][0], "at": samples[0][1]}
    picture = ET.fromstring(sample.svg(samples, width=5))
    cells = [e for e in picture if e.tag.endswith("text")][2:]
    assert "".join(e.text for e in cells) == "a</script>↵é&b"
    assert [e.get("class") for e in cells] == ["c9", *[None] * 9, "c0", "c4", "c4", "c0"]
    places = [(e.get("x"), e.get("y")) for e in cells]
    assert len(set(places)) == len(places) and places[5][0] == places[0][0]  # wrapped
