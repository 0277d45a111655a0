"""What all tests need, whatever the machine and the script that runs them."""

import os
import signal

import torch

# The tensors of the tests are tiny: one thread is faster than several that wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)

# Tests send signals to processes that they start. A script in the background, or under nohup,
# ignores some, and so would these: train_char.py leaves what is ignored so.
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
