"""
Several processes that train one model, as torchrun starts them, and the signals that stop a run.

Every function here does nothing, or the obvious, when there is only one process.
"""

import contextlib
import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from plumbing.cli import Stopped, need, pick_device

RANK = 0
WORLD = 1
if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():  # torchrun sets all of them
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])
PATIENCE = 2  # seconds in which more signals mean the same, as torchrun sends several


# ---- meeting -------------------------------------------------------------------------------------
def join(device_name):
    """Meet the others. Returns {"device": that of this process}, a GPU if there is one for each;
    or {} if there are no others. UserError if there are too few GPUs."""
    if WORLD == 1:
        return {}
    kind = pick_device(device_name or ("cuda" if torch.cuda.is_available() else "cpu")).type
    need(kind in ("cpu", "cuda"), f"--device {kind} is one process; several: cuda or cpu")

    name = kind
    if kind == "cuda":
        here = torch.cuda.device_count()
        wanted = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        need(wanted <= here, f"{wanted} processes, but {here} GPUs here")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)

    dist.init_process_group(
        "nccl" if kind == "cuda" and dist.is_nccl_available() else "gloo",
        timeout=datetime.timedelta(days=1),  # the others wait while one prepares or validates
        device_id=torch.device(name) if kind == "cuda" else None,
    )
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return dict(device=name)


@contextlib.contextmanager
def first_only():
    """The first process runs the body, and then the others: what it prepared is there for them. A
    mistake that it finds they find as well, so that each ends by itself."""
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


# ---- agreeing ------------------------------------------------------------------------------------
def mean(tensor):
    """Make a tensor the mean of all processes' tensors, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
        tensor /= WORLD
    return tensor


def mean_and_any(numbers, flag):
    """The mean of all processes' numbers, on the CPU, and whether any process has the flag. Both
    travel in one message, so that the flag costs nothing."""
    flags = numbers.new_full((1,), float(bool(flag)))
    both = mean(torch.cat((numbers.flatten(), flags))).cpu().double()
    return both[:-1].view(numbers.shape), both[-1].item() > 0


def agree(value):
    """Whether all processes have the same."""
    found = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, value)
    return len(set(found)) == 1


def average_gradients(model):
    """Make the gradients those of the mean loss of all processes, which used the same parameters.
    All in one message: many small ones would take longer."""
    if WORLD == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    averaged = mean(torch.cat([g.flatten() for g in grads]))
    for g, part in zip(grads, averaged.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


# ---- stopping ------------------------------------------------------------------------------------
@contextlib.contextmanager
def stop_signals():
    """A list, empty until SIGINT (Ctrl-C), SIGTERM or SIGHUP (a closed terminal) comes, which is
    then in it: time to save and end. Whoever is not waited for asks again, and it ends unsaved."""
    stop = []
    came_at = []
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none

    def on_signal(number, _):
        came_at.append(time.monotonic())
        if number == hangup:
            hang_up(terminals)
        if not stop:
            stop.append(number)
            say_stopping(terminals)
        elif WORLD == 1 and number != hangup and came_at[-1] - came_at[0] > PATIENCE:
            raise Stopped("stopped without saving", number)

    # What is ignored stays so: nohup, or a job in the background of a script.
    numbers = {signal.SIGINT, signal.SIGTERM, hangup} - {None}
    old = {n: h for n in numbers if (h := signal.getsignal(n)) != signal.SIG_IGN}
    for n in old:
        signal.signal(n, on_signal)

    try:
        yield stop
    except Stopped:  # all is saved: impatience shall not spoil the end
        old = dict.fromkeys(old, signal.SIG_IGN)
        raise
    finally:
        for n, handler in old.items():
            signal.signal(n, handler or signal.SIG_DFL)


def say_stopping(terminals):
    """Answer a signal on stderr at once. print() may be in use just now, or a line of progress."""
    if RANK:
        return
    line = "stopping after this step; saving ... (again: without saving)"
    if WORLD > 1:  # they stop together, when they next exchange their metrics
        line = "stopping after a few steps; saving ..."
    with contextlib.suppress(OSError):
        os.write(2, f"{(2 in terminals) * os.linesep}{line}{os.linesep}".encode())


def hang_up(terminals):
    """Print nowhere: on a terminal that is gone, the next line of progress would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in terminals:
        os.dup2(nowhere, fd)
