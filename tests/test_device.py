"""On an accelerator, or a stand-in for one."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices that are written in Python",
)
def test_all_that_runs_on_a_device():
    """In a process of its own: a device that is registered is there for good."""
    options = ["-q", "-p", "no:cacheprovider", "-m", ""]  # the slow ones, too
    argv = [sys.executable, "-m", "pytest", *options, "tests/on_device.py"]
    root = Path(__file__).parents[1]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
