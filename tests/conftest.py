"""One thread a process: tiny models gain nothing from more, and threads that wait for each other on
a busy machine make the tests many times slower."""

import os
from pathlib import Path

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
os.environ["PYTHONPATH"] = os.pathsep.join(  # where they find `support`
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)
