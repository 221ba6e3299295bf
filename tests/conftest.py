"""One thread a process: tiny models gain nothing from more, and threads that wait for each other on
a busy machine make the tests many times slower."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
os.environ["PYTHONPATH"] = os.pathsep.join(  # where they find `support`
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)
if "MARLHF_TEST_CACHE" not in os.environ:  # workers and the processes of tests use the same
    os.environ["MARLHF_TEST_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["MARLHF_TEST_CACHE"], ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = os.environ["MARLHF_TEST_CACHE"]
