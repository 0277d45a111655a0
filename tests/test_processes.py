"""plumbing/processes.py: signals as a terminal, a shell or a scheduler sends them, and processes
that agree."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from plumbing import processes
from plumbing.cli import UserError

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(code, **how):
    argv = [sys.executable, "-c", code]
    return subprocess.Popen(argv, **dict(dict(env=ENV, text=True, stderr=subprocess.PIPE), **how))


# ---- signals -------------------------------------------------------------------------------------

SLOW = """
import sys, time
from plumbing import cli, processes

def main():
    processes.PATIENCE = 0.5
    with processes.stop_signals() as stop:
        open("ready" + sys.argv[1], "w").close()
        while not stop:
            time.sleep(0.01)
        end = time.monotonic() + float(sys.argv[2])  # the step goes on, and then it saves
        while time.monotonic() < end:
            time.sleep(0.01)
            if sys.argv[1] == "":  # in a terminal
                print("saving", file=sys.stderr)
        open("saved" + sys.argv[1], "w").close()
    raise cli.Stopped("all saved", stop[0])

cli.run(main)
"""
ACK = "stopping after this step; saving ... (again: without saving)\n"


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def until(there):
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ignore_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of another kind")
def test_signals(work):
    """The first is acknowledged at once, what comes soon after it means the same, and whoever asks
    again later does not wait for the save. All cases at a time, as each takes its while."""
    INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    saved, unsaved = f"{ACK}all saved\n", f"{ACK}stopped without saving\n"
    cases = [  # (seconds to save, [(seconds, signal)], exit code, stderr)
        ("0", [(0, INT)], 130, saved),
        ("0", [(0, TERM)], 143, saved),
        ("0", [(0, HUP)], 129, saved),
        ("1", [(0, INT), (0.02, INT), (0.04, TERM)], 130, saved),
        ("30", [(0, INT), (1, INT)], 130, unsaved),
        ("30", [(0, INT), (1, TERM)], 143, unsaved),
        ("1.5", [(0, INT), (1, HUP)], 130, saved),  # nobody asks for haste by closing a window
        ("0", [(0, HUP), (0.5, INT)], 130, saved),  # nohup
    ]
    runs = []
    for i, (seconds, *_) in enumerate(cases):
        nohup = ignore_hangups if i == len(cases) - 1 else None
        argv = [sys.executable, "-c", SLOW, str(i), seconds]
        how = dict(env=ENV, text=True, stderr=subprocess.PIPE, preexec_fn=nohup)
        runs.append(subprocess.Popen(argv, **how))
    until(lambda: all(Path(f"ready{i}").exists() for i in range(len(cases))))
    began = time.monotonic()
    order = sorted((at, i, n) for i, (_, sent, _, _) in enumerate(cases) for at, n in sent)
    for at, i, number in order:
        time.sleep(max(0, began + at - time.monotonic()))
        runs[i].send_signal(number)
    for i, (run, (_, _, code, err)) in enumerate(zip(runs, cases, strict=True)):
        got = run.communicate(timeout=20)[1]
        assert (run.returncode, got) == (code, err), cases[i]
        assert Path(f"saved{i}").exists() == (err == saved)


def test_a_closed_terminal(work):
    """Its window goes: the run saves, though nothing can be printed any more."""
    pty = pytest.importorskip("pty")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", SLOW, "", "0.3"], ENV)
    until(Path("ready").exists)
    os.close(terminal)  # the system sends SIGHUP
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129 and Path("saved").exists()


def test_the_first_signal_is_answered_at_once(capfd):
    """Also in the middle of a line of progress, and the old handlers come back."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with processes.stop_signals() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err == ACK and stop == [signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "" and stop == [signal.SIGTERM]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_torchrun_sends_signals_twice(capfd, monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes, "PATIENCE", -1)
    said = "stopping after a few steps; saving ...\n"
    for rank in (0, 1):
        monkeypatch.setattr(processes, "RANK", rank)
        with processes.stop_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert stop == [signal.SIGINT] and capfd.readouterr().err == (said if rank == 0 else "")


# ---- processes -----------------------------------------------------------------------------------

def test_one_process_meets_nobody(monkeypatch):
    """Also where LOCAL_RANK was left behind by something else."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    try:
        importlib.reload(processes)
        assert (processes.RANK, processes.WORLD) == (0, 1)
    finally:
        monkeypatch.undo()
        importlib.reload(processes)
    assert processes.join("cpu") == {} and processes.join(None) == {}
    with processes.first_only():
        pass
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).backward()
    processes.average_gradients(model)
    assert model.weight.grad.tolist() == [[1, 1]]
    assert processes.mean(torch.tensor([3.0])).tolist() == [3] and processes.agree("alone")
    for flag in (["SIGINT"], []):
        numbers, stopping = processes.mean_and_any(torch.tensor([[3.0], [4.0]]), flag)
        assert numbers.tolist() == [[3], [4]] and stopping == bool(flag)
    processes.leave()


@pytest.mark.parametrize("device,says", [("banana", "none that torch knows"), ("cuda:99", "none")])
def test_several_processes_take_no_other_device(monkeypatch, device, says):
    monkeypatch.setattr(processes, "WORLD", 2)
    with pytest.raises(UserError, match=f"--device {device} .*{says}"):
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
import os, sys, time, torch
from plumbing import processes
assert processes.WORLD == 2
device = processes.join(None if torch.cuda.device_count() > 1 else "cpu")["device"]
with processes.first_only():
    if processes.RANK == 0:
        time.sleep(0.5)
        open("prepared", "w").close()
    assert os.path.exists("prepared")
print("one of us speaks")
model.to(device)
loss(x[processes.RANK::2].to(device)).backward()
processes.average_gradients(model)
same = processes.mean(torch.tensor([1.0 + 2 * processes.RANK], device=device))
assert processes.agree("all") and not processes.agree(processes.RANK)
steps = torch.tensor([[1.0, 5.0], [2.0, 6.0]], device=device) + 2 * processes.RANK
both = [processes.mean_and_any(steps, f) for f in ([2] * processes.RANK, [], True)]
flags = [found for _, found in both]
steps = [numbers.tolist() for numbers, _ in both]
torch.save(dict(
    grads={n: p.grad for n, p in model.named_parameters()}, mean=same.tolist(),
    flags=flags, steps=steps,
), f"{processes.RANK}.pt")
try:
    with processes.first_only():
        raise ValueError("found by each")
except ValueError:
    processes.leave()
"""


def test_two_processes_have_the_gradients_of_one(work):
    """Of a loss over all of the batch, whatever the dtype; what is not used keeps no gradient."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = ENV | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    ranks = [dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]
    runs = [start(MODEL + TWO, env=env | rank, stdout=subprocess.PIPE) for rank in ranks]
    out, err = zip(*(run.communicate(timeout=60) for run in runs), strict=True)
    assert [run.returncode for run in runs] == [0, 0], err
    assert out == ("one of us speaks\n", "")
    one = {}
    exec(MODEL, one)
    one["loss"](one["x"]).backward()
    for rank in range(2):
        got = torch.load(f"{rank}.pt", map_location="cpu", weights_only=True)
        assert got["mean"] == [2.0] and got["flags"] == [True, False, True]
        assert got["steps"] == [[[2.0, 6.0], [3.0, 7.0]]] * 3
        for name, p in one["model"].named_parameters():
            torch.testing.assert_close(got["grads"][name], p.grad)
    assert got["grads"]["unused.weight"] is None
