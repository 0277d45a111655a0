"""
What runs on an accelerator, on a machine that has none: test_device.py starts pytest on this file.

The device "toy" keeps its tensors in the CPU's memory, but as on a GPU no operation may mix them
with tensors of the CPU, no generator of the CPU may draw them, and reading a number off them is
counted, as a GPU would have to finish all its work first. Not seen here: bfloat16, torch.compile,
kernels of its own, and speed.
"""

import os
import random
import sys
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


# ---- the device ----------------------------------------------------------------------------------
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
        like = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        t = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=TOY, **like)
        t.held = held
        return t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"{self.held}, on the device"


class Mode(TorchDispatchMode):  # sees factory functions, too
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Generator(torch._C.Generator):
    def __new__(cls, device="cpu"):
        g = super().__new__(cls, "cpu")
        (GENERATORS.discard if torch.device(device).type == "cpu" else GENERATORS.add)(g._cdata)
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
    if here and name not in ("aten::_to_copy", "aten::copy_", "aten::index"):  # x[i]: any i
        mixed = [t for t in given if not isinstance(t, Tensor) and t.ndim]
        assert not mixed, f"{name} of the device's tensors and the CPU's {tuple(mixed[0].shape)}"
    if g := kwargs.get("generator"):
        assert g._cdata in GENERATORS, f"{name} on the device, with the CPU's generator"
    if name == "aten::_fused_sdp_choice":
        return 0  # attention in plain operations
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
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(cli, "pick_device", torch.device)
    save, tensor = torch.save, torch.tensor

    def detached(t):
        t = t.detach() if isinstance(t, torch.Tensor) else t
        return t.held.clone() if isinstance(t, Tensor) else t

    monkeypatch.setattr(torch, "save", lambda obj, path: save(tree_map(detached, obj), path))

    def made(x, device="cpu", **kw):  # torch.tensor() does not ask the Mode
        return tensor(x, **kw).to(device)

    monkeypatch.setattr(torch, "tensor", made)
    with Mode():
        yield


def wait_of(f):
    """What f() returns, and how often the CPU waited."""
    before = waited
    return f(), waited - before


# ---- the device is one ---------------------------------------------------------------------------
def test_the_device():
    t = torch.arange(6, device=TOY).view(2, 3)
    assert t.device == TOY and (t + 1).device == TOY and t.cpu().tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(AssertionError, match="aten::add of the device's tensors and the CPU's"):
        t + torch.ones(3)
    with pytest.raises(AssertionError, match="aten::gather of the device's tensors"):
        t.gather(1, torch.tensor([[0], [1]]))
    with pytest.raises(AssertionError, match="CPU's generator"):
        torch.rand(2, device=TOY, generator=torch.Generator())
    for f in (lambda: t[0, 0].item(), lambda: bool(t.any()), lambda: t.cpu(), t.nonzero):
        assert wait_of(f)[1] == 1
    assert wait_of(lambda: (t * 2 + 1).sum())[1] == wait_of(lambda: torch.ones(2).sum())[1] == 0


# ---- models --------------------------------------------------------------------------------------
SIZE = dict(vocab_size=11, seq_len=8, n_layer=2, n_head=2, n_embd=16)
MODELS = {
    "arm": lambda: lomdm.LoMDM(lomdm.Config(**SIZE, block_len=1)),
    "mdm": lambda: lomdm.LoMDM(lomdm.Config(**SIZE)),
    "block": lambda: lomdm.LoMDM(lomdm.Config(**SIZE, block_len=4)),
    "lomdm": lambda: lomdm.LoMDM(lomdm.Config(**SIZE, learn_order=True)),
    "lomdm in blocks": lambda: lomdm.LoMDM(
        lomdm.Config(**SIZE, learn_order=True, weights="exp", block_len=4)
    ),
    "a3": lambda: a3.A3(a3.Config(**SIZE)),
    "loa3": lambda: loa3.LoA3(loa3.Config(**SIZE, random_share=0.5)),
}


def both(name):
    """The same model twice, on the CPU and on the device, with weights that are not small."""
    torch.manual_seed(0)
    model, other = MODELS[name](), MODELS[name]().to(TOY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    other.load_state_dict(model.state_dict())
    return model.eval(), other.eval()


def rows(n=6):
    return torch.randint(11, (n, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_loss_is_that_of_the_cpu_and_never_waits(name, chunked, monkeypatch):
    """The same draws give the same loss and gradients. chunked: logits come a few at a time."""
    found, x = [], rows()
    for model, x in zip(both(name), (rows(), rows().to(TOY)), strict=True):
        if chunked:
            monkeypatch.setattr(sys.modules[nll_of(model)], "MAX_LOGITS", 11 * 5)
        torch.manual_seed(3)
        (loss, metrics), times = wait_of(lambda model=model, x=x: model.loss(x, **inputs(model, x)))
        _, backward = wait_of(loss.backward)
        assert times == backward == 0
        numbers = [loss.detach(), *metrics.values(), *(p.grad for p in model.parameters())]
        found.append([t.cpu() for t in numbers])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def nll_of(model):
    return "a3" if isinstance(model, a3.A3) else "lomdm"


def inputs(model, x):
    if type(model) is not a3.A3:
        return {}
    return dict(groups=a3.random_groups(*x.shape, 3, device=x.device), single=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_bound_is_that_of_the_cpu(name):
    found = []
    for model, device in zip(both(name), ("cpu", TOY), strict=True):
        x, g = rows().to(device), torch.Generator(device).manual_seed(2)
        found.append(model.nelbo(x, 3, generator=g).cpu())
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("by", sample.RULES)
@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_the_cpu(name, by):
    """Greedy, with given tokens; and what a decoder costs that is walked through a text."""
    two_streams, found = name in ("a3", "loa3"), []
    ordered = name in ("arm", "lomdm", "lomdm in blocks", "loa3")  # "order" is one, and known
    if by == "order" and name == "a3":
        pytest.skip("it has none")
    for model, device in zip(both(name), ("cpu", TOY), strict=True):
        z = rows().masked_fill(torch.arange(48).view(6, 8) % 5 > 0, 11).to(device)
        results = []
        for how in (dict(), dict(per_step=2)):
            g = torch.Generator(device).manual_seed(4)
            results += [t.cpu() for t in model.sample(z, 0.0, by=by, generator=g, **how)]
        if two_streams and by == "left":
            groups = a3.chunk_groups(6, 8, device=device)
            x, calls = generate_speculative(model, rows().to(device), groups, 3, temperature=0.0)
            results += [x.cpu(), torch.tensor(calls)]
        if by != "random" and (by != "order" or ordered):
            results.append(decoder_log_prob(model, rows().to(device), by).cpu())
        found.append(results)
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


# ---- scripts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["lomdm", "a3", "loa3"])
def test_training_is_that_of_the_cpu_and_waits_to_log_only(model, tmp_path, monkeypatch, capsys):
    """Stopped and resumed on the device. Its CPU waits at step 4, 8 and 10, for what is logged,
    validated and saved there, and else runs ahead."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0).choices(["the", "quick", "brown", "fox", "jumps", "over"], k=600)
    Path("text.txt").write_text(" ".join(words), encoding="utf-8")
    steps, step = [], torch.optim.AdamW.step

    def counted(self):
        steps.append(waited)
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    flags = f"--model {model} --data text.txt --data_dir tokens --n_layer 2 --n_head 2 --n_embd 16 "
    flags += "--seq_len 16 --batch_size 4 --eval_interval 8 --log_interval 4 --num_samples 1"
    flags += " --gradient_accumulation_steps 2 --seed 3"
    for device in ("cpu", "toy"):
        del steps[:]
        train_char.main(f"{flags} --device {device} --out_dir {device} --max_iters 8".split())
        train_char.main(f"--resume --device {device} --out_dir {device} --max_iters 10".split())
    new = [b > a for a, b in pairwise(steps)]
    assert new == [False, False, False, True, False, False, False, True, False]
    one, other = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("cpu", "toy"))
    for name in one["model"]:
        assert torch.allclose(one["model"][name], other["model"][name], atol=1e-3), name
    assert abs(one["best"] - other["best"]) < 1e-3
    capsys.readouterr()
    sample.main(["--device", "toy", "--out_dir", "toy", "--prompt", "the ", "--num_samples", "1"])
    assert "the " in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Models that have learned next to nothing, on the CPU."""
    here, back = tmp_path_factory.mktemp("runs"), Path.cwd()
    (here / "text.txt").write_text("the quick brown fox, or a lazy dog.\nYes: no!\n" * 30, "utf-8")
    os.chdir(here)
    for model in ("mdm", "block --block_len 4", "lomdm", "a3", "loa3"):
        flags = "--data text.txt --data_dir tokens --n_layer 1 --n_head 2 --n_embd 16 --seq_len 16"
        flags += f" --batch_size 4 --max_iters 2 --num_samples 0 --out_dir {model.split()[0]}"
        train_char.main(f"--model {model} {flags} --device cpu".split())
    os.chdir(back)
    return here


@pytest.mark.parametrize(
    "command",
    [
        "bounds lomdm block",
        "passage lomdm loa3 --windows 2",
        "strips block lomdm --text thequickbrownfoxoralazydog",
        "fraction lomdm loa3",
        "variance mdm lomdm --draws 5",
        "infill mdm a3",
    ],
)
def test_evidence_is_that_of_the_cpu(command, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    found = []
    for device in ("cpu", "toy"):
        evidence.main([*command.split(), "--device", device])
        found.append(capsys.readouterr().out.split())
    one, other = found
    assert len(one) == len(other) > 5
    for a, b in zip(one, other, strict=True):
        assert a == b or abs(float(a.strip(":,;+")) - float(b.strip(":,;+"))) < 2e-3
