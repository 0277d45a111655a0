"""The tensors of the tests are tiny: one thread is faster than several that wait for each other."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)
