"""
Several processes that train one model, as torchrun starts them, and the signals that stop a
run.

Every function here does nothing, or the obvious, when there is only one process.
"""

import contextlib
import datetime
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from plumbing.cli import Stopped, need

RANK = 0
WORLD = 1
if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():  # torchrun sets all of them
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])
PATIENCE = 2  # seconds in which more signals mean the same, as some launchers send several


# ---- meeting -------------------------------------------------------------------------------
def join(device_name):
    """Meet the others. Returns {"device": that of this process}, a GPU if there is one for
    each; or {} if there are no others. UserError if there are too few GPUs."""
    if WORLD == 1:
        return {}
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    need(name in ("cpu", "cuda"), f"--device {name}: several processes take cpu or cuda")

    if name == "cuda":
        here = torch.cuda.device_count()
        wanted = int(os.environ["LOCAL_WORLD_SIZE"])
        need(wanted <= here, f"{wanted} processes, but {here} GPUs here")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)

    dist.init_process_group(
        "gloo" if name == "cpu" else "nccl",
        timeout=datetime.timedelta(days=1),  # the others wait while one prepares or validates
        device_id=None if name == "cpu" else torch.device(name),
    )
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return dict(device=name)


@contextlib.contextmanager
def first_only():
    """The first process runs the body, and then the others: what it prepared is there for
    them. A mistake that it finds they find as well, so that each ends by itself."""
    if RANK:
        dist.barrier()
    try:
        yield
    finally:
        if WORLD > 1 and not RANK:
            dist.barrier()


def leave():
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


# ---- averaging -----------------------------------------------------------------------------
def mean(tensor):
    """Make a tensor the mean of all processes' tensors, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
        tensor /= WORLD
    return tensor


def mean_and_any(numbers, flag):
    """The mean of all processes' numbers, on the CPU, and whether any process has the flag.
    Both travel in one message, so that the flag costs nothing."""
    flags = numbers.new_full((1,), float(bool(flag)))
    both = mean(torch.cat((numbers.flatten(), flags))).cpu().double()
    return both[:-1].view(numbers.shape), both[-1].item() > 0


def average_gradients(model):
    """Make the gradients those of the mean loss of all processes, which used the same
    parameters. All in one message: many small ones would take longer."""
    if WORLD == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    averaged = mean(torch.cat([g.flatten() for g in grads]))
    for g, part in zip(grads, averaged.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


# ---- stopping ------------------------------------------------------------------------------
@contextlib.contextmanager
def stop_signals():
    """A list, empty until SIGINT (Ctrl-C) or SIGTERM comes, which is then in it: time to
    save and end. Whoever is not waited for asks again, and it ends unsaved."""
    stop = []
    patient_until = 0.0

    def on_signal(number, _):
        nonlocal patient_until
        if not stop:
            stop.append(number)
            patient_until = time.monotonic() + PATIENCE
            say_stopping()
        elif WORLD == 1 and time.monotonic() > patient_until:
            raise Stopped("stopped without saving", number)

    # What is ignored stays so, as in a job in the background of a script. Python gives
    # signals to its main thread, and other threads may not ask for them.
    is_main = threading.current_thread() is threading.main_thread()
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if is_main}
    old = {n: handler for n, handler in old.items() if handler != signal.SIG_IGN}
    for n in old:
        signal.signal(n, on_signal)
    try:
        yield stop
    finally:
        for n, handler in old.items():
            signal.signal(n, handler)


def say_stopping():
    """Answer a signal on stderr at once. print() may be in use just now, or a line of
    progress."""
    line = "stopping after this step; saving ... (again: without saving)"
    if WORLD > 1:  # they stop together, when they next exchange their metrics
        line = "stopping when the processes next report; saving ..."
    if RANK == 0:
        os.write(2, f"\n{line}\n".encode())
