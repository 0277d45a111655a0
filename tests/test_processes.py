"""plumbing/processes.py: signals as a terminal, a shell or a scheduler sends them, and
processes that agree."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from plumbing import processes
from plumbing.cli import Stopped, UserError

ROOT = Path(__file__).parents[1]
ACK = "\nstopping after this step; saving ... (again: without saving)\n"


# ---- signals -------------------------------------------------------------------------------


def test_the_first_signal_is_answered_at_once(capfd, monkeypatch):
    """What comes soon after it means the same, and later it means: do not wait for the
    save. The old handlers come back."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with processes.stop_signals() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err == ACK and stop == [signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "" and stop == [signal.SIGTERM]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers

    monkeypatch.setattr(processes, "PATIENCE", -1)
    with pytest.raises(Stopped) as e, processes.stop_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert e.value.args == ("stopped without saving", signal.SIGINT)


def test_what_is_ignored_stays_so(monkeypatch):
    """As a script in the background ignores Ctrl-C in the terminal."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with processes.stop_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop
    finally:
        signal.signal(signal.SIGINT, old)


def test_a_thread_leaves_signals_alone():
    """Only the main thread may ask for them."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def work():
        with processes.stop_signals() as stop:
            seen.append(
                (list(stop), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])
            )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [([], handlers)]


def test_torchrun_sends_signals_twice(capfd, monkeypatch):
    """Several processes never end without saving, and one of them speaks."""
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes, "PATIENCE", -1)
    for rank, said in (0, "\nstopping when the processes next report; saving ...\n"), (1, ""):
        monkeypatch.setattr(processes, "RANK", rank)
        with processes.stop_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert stop == [signal.SIGINT] and capfd.readouterr().err == said


# ---- processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["banana", "cuda:99", "mps"])
def test_several_processes_take_no_other_device(monkeypatch, device):
    monkeypatch.setattr(processes, "WORLD", 2)
    with pytest.raises(UserError, match=f"--device {device}: several processes take cpu or cuda"):
        processes.join(device)


MODEL = """
import torch
torch.manual_seed(0)
model = torch.nn.ModuleDict(dict(
    a=torch.nn.Linear(3, 4), b=torch.nn.Linear(4, 1).double(), unused=torch.nn.Linear(2, 2)
))
x = torch.randn(6, 3)
def loss(x):
    return (model["b"](model["a"](x).tanh().double()) ** 2).mean()
"""
TWO = """
import os, time
from plumbing import processes
assert processes.WORLD == 2
assert processes.join("cpu") == dict(device="cpu")
with processes.first_only():
    if processes.RANK == 0:
        time.sleep(0.5)
        open("prepared", "w").close()
    assert os.path.exists("prepared")
print("one of us speaks")
loss(x[processes.RANK::2]).backward()
processes.average_gradients(model)
steps = torch.tensor([[1.0, 5.0], [2.0, 6.0]]) + 2 * processes.RANK
both = [processes.mean_and_any(steps, f) for f in ([2] * processes.RANK, [], True)]
torch.save(dict(
    grads={n: p.grad for n, p in model.named_parameters()},
    flags=[flag for _, flag in both], steps=[numbers.tolist() for numbers, _ in both],
), f"{processes.RANK}.pt")
try:
    with processes.first_only():
        raise ValueError("found by each")
except ValueError:
    processes.leave()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path, monkeypatch):
    """Of a loss over all of the batch, whatever the dtype; what is not used keeps no
    gradient."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    argv = [sys.executable, "-c", MODEL + TWO]
    how = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [
        subprocess.Popen(argv, **how, env=env | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    out, err = zip(*(run.communicate(timeout=60) for run in runs), strict=True)
    assert [run.returncode for run in runs] == [0, 0], err
    assert out == ("one of us speaks\n", "")

    one = {}
    exec(MODEL, one)
    one["loss"](one["x"]).backward()
    for rank in range(2):
        got = torch.load(f"{rank}.pt", weights_only=True)
        assert got["flags"] == [True, False, True]
        assert got["steps"] == [[[2.0, 6.0], [3.0, 7.0]]] * 3
        assert got["grads"]["unused.weight"] is None
        for name, p in one["model"].named_parameters():
            torch.testing.assert_close(got["grads"][name], p.grad)
