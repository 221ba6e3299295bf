"""Early stopping on its own; `test_sft.py` has it in a run."""

import math

import torch

from marlhf.distributed import Distributed
from marlhf.training.early_stopping import EarlyStopping


def test_without_a_finite_held_out_loss_there_is_nothing_to_bring_back():
    module = torch.nn.Linear(2, 1)
    before = module.weight.detach().clone()
    stopping = EarlyStopping(module, 2, Distributed())
    for loss in (math.nan, math.inf):
        assert not stopping.is_over
        stopping.record(loss)
    assert stopping.is_over
    stopping.restore()
    assert torch.equal(module.weight, before)
