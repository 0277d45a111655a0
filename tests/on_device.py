"""
What runs on an accelerator, on a machine that has none: test_device.py starts pytest on this
file.

The device "toy" keeps its tensors in the CPU's memory, but as on a GPU no operation may mix
them with tensors of the CPU, no generator of the CPU may draw them, and reading a number off
them is counted, as a GPU would have to finish all its work first. Not seen here: bfloat16,
torch.compile, kernels of its own, and speed.
"""

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import a3
import lomdm
import sample
import train_char
from beyond import loa3
from beyond.decoders import decoder_log_prob
from beyond.speculative import generate_speculative
from experiments import evidence
from plumbing import cli

# ---- the device --------------------------------------------------------------------------


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):  # torch.autocast asks, even if it is not enabled
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("toy", backend_module=Backend())
TOY = torch.device("toy", 0)
WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}
GENERATORS = set()  # addresses of those on the device
waited = 0  # how often the CPU had to wait for the device


class Tensor(torch.Tensor):
    """A tensor on the device: held is where it is in truth."""

    @staticmethod
    def __new__(cls, held):
        like = dict(strides=held.stride(), storage_offset=held.storage_offset())
        like |= dict(dtype=held.dtype, device=TOY)
        t = torch.Tensor._make_wrapper_subclass(cls, held.shape, **like)
        t.held = held
        return t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()


class Mode(TorchDispatchMode):  # sees factory functions, too
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Generator(torch._C.Generator):
    def __new__(cls, device="cpu"):
        g = super().__new__(cls, "cpu")
        is_here = torch.device(device).type == "toy"
        remember = GENERATORS.add if is_here else GENERATORS.discard
        remember(g._cdata)
        return g


def dispatch(func, args, kwargs):
    global waited
    name, target = func._schema.name, kwargs.get("device")
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = [t for t in given if isinstance(t, Tensor)]
    to_here = torch.device(target).type == "toy" if target is not None else bool(here)
    waited += bool(here) and (name in WAITS or not to_here)
    if not here and not to_here:
        return func(*args, **kwargs)

    # What a GPU refuses.
    if here and name not in ("aten::_to_copy", "aten::copy_", "aten::index"):  # x[i]: any i
        mixed = [t for t in given if not isinstance(t, Tensor) and t.ndim]
        assert not mixed, f"{name} of the device's tensors and the CPU's {mixed[0].shape}"
    if g := kwargs.get("generator"):
        assert g._cdata in GENERATORS, f"{name} on the device, with the CPU's generator"
    if name == "aten::_fused_sdp_choice":
        return 0  # attention in plain operations

    # The same operation on the tensors that are held.
    args, kwargs = tree_map(lambda t: t.held if isinstance(t, Tensor) else t, (args, kwargs))
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    out = func(*args, **kwargs)
    if not to_here:
        return out

    known = {id(t.held): t for t in here}  # an operation in place returns what it was given

    def wrap(t):
        return known.get(id(t), Tensor(t)) if isinstance(t, torch.Tensor) else t

    return tree_map(wrap, out)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The device is there, and can be saved from. torch.tensor() does not ask the Mode."""
    save, tensor = torch.save, torch.tensor

    def detached(t):
        t = t.detach() if isinstance(t, torch.Tensor) else t
        return t.held.clone() if isinstance(t, Tensor) else t

    def made(x, device="cpu", **kw):
        return tensor(x, **kw).to(device)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "save", lambda obj, path: save(tree_map(detached, obj), path))
    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(cli, "pick_device", torch.device)
    with Mode():
        yield


def wait_of(f):
    """What f() returns, and how often the CPU waited."""
    before = waited
    return f(), waited - before


# ---- the device is one -------------------------------------------------------------------


def test_the_device():
    t = torch.arange(6, device=TOY).view(2, 3)
    assert t.device == TOY == (t + 1).device and t.cpu().tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(
        AssertionError, match="aten::add of the device's tensors and the CPU's"
    ):
        t + torch.ones(3)
    with pytest.raises(AssertionError, match="aten::gather of the device's tensors"):
        t.gather(1, torch.tensor([[0], [1]]))
    with pytest.raises(AssertionError, match="CPU's generator"):
        torch.rand(2, device=TOY, generator=torch.Generator())

    for f in (lambda: t[0, 0].item(), lambda: bool(t.any()), lambda: t.cpu(), t.nonzero):
        assert wait_of(f)[1] == 1
    for f in (lambda: (t * 2 + 1).sum(), lambda: torch.ones(2).sum()):
        assert wait_of(f)[1] == 0


# ---- models ------------------------------------------------------------------------------

SIZE = dict(vocab_size=11, seq_len=6, n_layer=2, n_head=2, n_embd=16)
STEEP = dict(learn_order=True, weights="exp", block_len=3)
MODELS = {
    "arm": lambda: lomdm.LoMDM(lomdm.Config(**SIZE, block_len=1)),
    "block": lambda: lomdm.LoMDM(lomdm.Config(**SIZE, block_len=3)),
    "lomdm": lambda: lomdm.LoMDM(lomdm.Config(**SIZE, learn_order=True)),
    "lomdm in blocks": lambda: lomdm.LoMDM(lomdm.Config(**SIZE, **STEEP)),
    "a3": lambda: a3.A3(a3.Config(**SIZE)),
    "loa3": lambda: loa3.LoA3(loa3.Config(**SIZE, random_share=0.5)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def on_both(name):
    """The same model with weights that are not small, and the same texts: on the CPU and on
    the device."""
    torch.manual_seed(0)
    model, other = MODELS[name](), MODELS[name]().to(TOY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    other.load_state_dict(model.state_dict())

    x = torch.randint(11, (6, 6))
    yield model.eval(), x, "cpu"
    yield other.eval(), x.to(TOY), TOY


def same(results, other, atol=1e-4):
    """The tensors of two lists, one of them on the device."""
    for a, b in zip(results, other, strict=True):
        assert torch.allclose(a.cpu(), b.cpu(), atol=atol)


@pytest.mark.parametrize("chunked", [False, True])
@every_model
def test_a_loss_is_that_of_the_cpu_and_never_waits(name, chunked, monkeypatch):
    """The same draws give the same loss and gradients. chunked: logits come a few at a time."""
    if chunked:
        monkeypatch.setattr(a3, "MAX_LOGITS", 11 * 5)
        monkeypatch.setattr(lomdm, "MAX_LOGITS", 11 * 5)
    found = []
    for model, x, device in on_both(name):
        how = {}
        torch.manual_seed(3)
        if name == "a3":
            how = dict(groups=a3.random_groups(*x.shape, 3, device=device), single=False)
        (loss, metrics), times = wait_of(
            lambda model=model, x=x, how=how: model.loss(x, **how)
        )
        _, backward = wait_of(loss.backward)
        assert times == backward == 0
        grads = [p.grad for p in model.parameters()]
        found.append([loss.detach(), *metrics.values(), *grads])
    same(*found, atol=1e-5)


@pytest.mark.parametrize("by", ["left", "confidence", "order", slow("random")])
@every_model
def test_samples_and_bounds_are_those_of_the_cpu(name, by):
    """Greedy, with given tokens; and what a decoder costs that is walked through a text."""
    if by == "order" and name == "a3":
        pytest.skip("it has none")
    found = []
    for model, x, device in on_both(name):
        z = x.masked_fill(torch.arange(36, device=device).view(6, 6) % 5 > 0, 11)
        g = torch.Generator(device).manual_seed(4)
        results = [*model.sample(z, 0.0, by=by, generator=g)]
        results += [*model.sample(z, 0.0, None, 2, by, generator=g)]
        results += [model.nelbo(x, 2, generator=g)]
        if name in ("a3", "loa3"):
            groups = a3.chunk_groups(6, 6, device=device)
            text, calls = generate_speculative(model, x, groups, 3, temperature=0.0)
            results += [text, torch.tensor(calls)]
        if by != "random" and (by, name) != (
            "order",
            "block",
        ):  # it takes other steps each time
            results += [decoder_log_prob(model, x, by)]
        found.append(results)
    same(*found)


# ---- scripts -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["lomdm", slow("a3"), slow("loa3")])
def test_training_is_that_of_the_cpu_and_waits_to_log_only(
    model, tmp_path, monkeypatch, capsys
):
    """Stopped and resumed on the device. Its CPU waits at step 4, 8 and 10, for what is logged,
    validated and saved there, and else runs ahead."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0).choices(["the", "quick", "brown", "fox", "jumps", "over"], k=300)
    Path("text.txt").write_text(" ".join(words), encoding="utf-8")
    steps, step = [], torch.optim.AdamW.step

    def counted(self):
        steps.append(waited)
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    flags = f"--model {model} --data text.txt --data_dir tokens --n_layer 1 --n_head 2 "
    flags += "--n_embd 16 --seq_len 16 --batch_size 4 --eval_interval 8 --log_interval 4 "
    flags += "--num_samples 1 --gradient_accumulation_steps 2 --seed 3"
    for device in ("cpu", "toy"):
        steps.clear()
        train_char.main(f"{flags} --device {device} --out_dir {device} --max_iters 8".split())
        more = f"--resume --device {device} --out_dir {device} --max_iters 10"
        train_char.main(more.split())
    waits = [b > a for a, b in pairwise(steps)]
    assert waits == [i in (4, 8) for i in range(1, 10)]

    one, other = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("cpu", "toy"))
    same(one["model"].values(), other["model"].values(), atol=1e-3)
    assert abs(one["best"] - other["best"]) < 1e-3
    capsys.readouterr()
    sample.main(
        ["--device", "toy", "--out_dir", "toy", "--prompt", "the", "--num_samples", "1"]
    )
    assert "the" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Models that have learned next to nothing, on the CPU."""
    here, back = tmp_path_factory.mktemp("runs"), Path.cwd()
    text = "the quick brown fox, or a lazy dog.\nYes: no!\n" * 30
    (here / "text.txt").write_text(text, "utf-8")
    os.chdir(here)
    for model in ("mdm", "block --block_len 4", "lomdm", "a3", "loa3"):
        flags = "--data text.txt --data_dir tokens --n_layer 1 --n_head 2 --n_embd 16 "
        flags += "--seq_len 16 --batch_size 4 --max_iters 2 --num_samples 0 --device cpu"
        train_char.main(f"--model {model} --out_dir {model.split()[0]} {flags}".split())
    os.chdir(back)
    return here


COMMANDS = [
    "bounds lomdm block",
    "passage lomdm loa3 --windows 2",
    "infill mdm a3",
    slow("fraction lomdm loa3"),
    slow("variance mdm lomdm --draws 5"),
    slow("strips block lomdm --text thequickbrownfoxoralazydog"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_evidence_is_that_of_the_cpu(command, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    found = []
    for device in ("cpu", "toy"):
        evidence.main([*command.split(), "--device", device])
        found.append(capsys.readouterr().out.split())
    assert len(found[0]) > 5
    for a, b in zip(*found, strict=True):
        assert a == b or abs(float(a.strip(":,;+")) - float(b.strip(":,;+"))) < 2e-3
