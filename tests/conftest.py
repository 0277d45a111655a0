"""What all tests need, whatever the machine and the script that runs them."""

import os
import signal

import pytest
import torch

# The tensors of the tests are tiny. One thread is faster than several that wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)

# Tests send signals to processes that they start. A script in the background, or under
# nohup, ignores some, and so would these: train_char.py leaves what is ignored so.
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number and signal.getsignal(number) == signal.SIG_IGN:
        default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(number, default)


@pytest.fixture
def float64():
    """Numbers in double precision. Tests of the models hold 1e-12 against what oracle.py
    lists."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
