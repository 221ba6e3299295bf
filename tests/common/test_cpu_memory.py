"""Memory on a CPU: free pages go back to the system, and gradient buffers are reused."""

import ctypes
import subprocess
import sys

import pytest
import torch

from marlhf.common.cpu_memory import GradientBuffer

# Blocks that the C library takes from its heap; the last one keeps it from shrinking by itself.
PROGRAM = """
import sys, torch
from marlhf.common.cpu_memory import trim_heap

def resident_mb():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024

blocks = [torch.ones(16_000) for _ in range(4_000)]
keep = torch.ones(16_000)
del blocks
before = resident_mb()
trim_heap(torch.device(sys.argv[1]))
print(before - resident_mb())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_trimming_returns_freed_pages_of_a_cpu_process():
    def freed_mb(device: str) -> float:
        command = [sys.executable, "-c", PROGRAM, device]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert freed_mb("cpu") > 200  # of 256
    assert freed_mb("meta") < 50  # the control: nothing is trimmed for another device


def test_a_gradient_buffer_gives_zeros_to_one_model_after_another():
    buffer = GradientBuffer()
    first, second = [torch.ones(2, 3), torch.ones(4)], [torch.ones(5)]
    buffer.attach_to(first)
    addresses = [x.grad.data_ptr() for x in first]
    assert [x.grad.tolist() for x in first] == [[[0.0] * 3] * 2, [0.0] * 4]
    first[0].grad += 1
    buffer.attach_to(second)
    assert second[0].grad.tolist() == [0.0] * 5
    assert second[0].grad.data_ptr() == addresses[0]
