"""Weights and moments written by some ranks and read by others, without processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from marlhf.common.errors import UserError
from marlhf.distributed.fragments import (
    MOMENTS,
    Fragment,
    FragmentFiles,
    load_fragments,
    save_fragments,
)
from marlhf.distributed.trained import load_weights

SHAPES = {"embed": torch.Size([7, 3]), "norm": torch.Size([2]), "head": torch.Size([3, 7])}
Rank = tuple[list[Fragment], torch.optim.Optimizer]


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def zero_2(rank: int, count: int) -> Rank:
    """A rank's part of all parameters in one row, which cuts them anywhere."""
    total = sum(shape.numel() for shape in SHAPES.values())
    size = -(-total // count)
    flat, begin = nn.Parameter(torch.zeros(size)), rank * size
    fragments, place = [], 0
    for name, shape in SHAPES.items():
        start = min(max(begin - place, 0), shape.numel())
        stop = min(max(begin + size - place, 0), shape.numel())
        offset = max(place + start - begin, 0)
        fragments.append(Fragment(name, shape, start, stop - start, flat, offset))
        place += shape.numel()
    return fragments, torch.optim.AdamW([flat], fused=True)


def zero_3(rank: int, count: int) -> Rank:
    """A rank's part of every parameter, each with a holder of its own."""
    fragments, holders = [], []
    for name, shape in SHAPES.items():
        size = -(-shape.numel() // count)
        start = min(rank * size, shape.numel())
        holders.append(nn.Parameter(torch.zeros(size)))
        stop = min(start + size, shape.numel())
        fragments.append(Fragment(name, shape, start, stop - start, holders[-1]))
    return fragments, torch.optim.AdamW(holders, fused=True)


def alone(_: int, __: int) -> Rank:
    """All parameters in full, one of them not contiguous."""
    holders = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    holders["head"] = nn.Parameter(torch.zeros(7, 3).t())
    fragments = [Fragment(n, p.shape, 0, p.numel(), p) for n, p in holders.items()]
    return fragments, torch.optim.AdamW(holders.values(), fused=True)


LAYOUTS = {"zero 2": zero_2, "zero 3": zero_3, "alone": alone}


def full(key: str) -> dict[str, Tensor]:
    """The weights, or moments: other numbers for each."""
    factor = ("weight", *MOMENTS).index(key) + 1
    return {name: factor * x for name, x in weights().items()}


def write(folder: Path, layout: Any, count: int, steps: int = 2) -> None:
    """The files of ranks after that many steps."""
    for rank in range(count):
        fragments, optimizer = layout(rank, count)
        for fragment in (f for f in fragments if f.count):
            holder = fragment.holder
            part = weights()[fragment.name].reshape(-1)[fragment.start :][: fragment.count]
            fragment.put(holder, part)
            if steps:
                state = {key: (i + 2) * holder.detach() for i, key in enumerate(MOMENTS)}
                optimizer.state[holder] = {"step": torch.tensor(float(steps)), **state}
        save_fragments(fragments, optimizer, folder / f"rank-{rank}.safetensors")


def read(folder: Path, wrote: int, layout: Any, count: int) -> dict[str, dict[str, Tensor]]:
    """What ranks read of such files, put together in full."""
    keys = ("weight", *MOMENTS)
    whole = {key: {n: torch.full(s, torch.nan) for n, s in SHAPES.items()} for key in keys}
    for rank in range(count):
        fragments, optimizer = layout(rank, count)
        load_fragments(fragments, optimizer, FragmentFiles(folder, wrote))
        for f in (f for f in fragments if f.count):
            state: dict[str, Tensor] = optimizer.state[f.holder]
            assert state["step"] == 2
            for key in keys:
                x = f.holder.detach() if key == "weight" else state[key]
                assert x.stride() == f.holder.stride()
                part = x.reshape(-1)[f.offset :][: f.count]
                whole[key][f.name].view(-1)[f.start :][: f.count] = part
    return whole


@pytest.mark.parametrize(
    ("layout", "count"), [("alone", 1), ("zero 2", 1), ("zero 2", 4), ("zero 3", 1), ("zero 3", 4)]
)
@pytest.mark.parametrize(("writer", "wrote"), [("zero 2", 3), ("zero 2", 4), ("zero 3", 5)])
def test_any_ranks_read_what_any_others_wrote(
    writer: str, wrote: int, layout: str, count: int, tmp_path: Path
) -> None:
    """Bit for bit; five ranks are more than a parameter has entries."""
    write(tmp_path, LAYOUTS[writer], wrote)
    for key, tensors in read(tmp_path, wrote, LAYOUTS[layout], count).items():
        for name, value in full(key).items():
            assert torch.equal(tensors[name], value), (key, name)


def test_one_process_reads_the_weights_alone(tmp_path: Path) -> None:
    write(tmp_path, zero_2, 3)
    (tmp_path / "learner.json").write_text(json.dumps({"layout": "fragments", "ranks": 3}))
    module = nn.ParameterDict({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    load_weights(tmp_path, dict(module.named_parameters()))
    assert all(torch.equal(module[name], x) for name, x in weights().items())


def test_before_the_first_step_there_is_no_state(tmp_path: Path) -> None:
    write(tmp_path, zero_2, 2, steps=0)
    fragments, optimizer = zero_3(0, 1)
    load_fragments(fragments, optimizer, FragmentFiles(tmp_path, 2))
    assert torch.equal(fragments[0].holder.view(7, 3), weights()["embed"])
    assert not any(optimizer.state.values())


FAULTS = {
    "missing": "rank-1.safetensors is missing",
    "cut": "rank-1.safetensors is no file of safetensors, or an incomplete one",
    "no fragments": "rank-1.safetensors holds no fragments",
    "of others": "embed: entries 11 to 20 are in no file",
    "a moment less": "rank-1.safetensors has no exp_avg/embed",
    "a moment's shape": "rank-1.safetensors: exp_avg/embed is not fp32 of 10 entries",
    "another model": "embed has shape",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_named(fault: str, tmp_path: Path) -> None:
    write(tmp_path, zero_3, 2)
    file = tmp_path / "rank-1.safetensors"
    data = file.read_bytes()
    if fault == "missing":
        file.unlink()
    elif fault == "cut":
        file.write_bytes(data[:-4])
    elif fault == "no fragments":
        save_file({"weight/embed": torch.zeros(2)}, file)
    elif fault == "of others":
        file.write_bytes((tmp_path / "rank-0.safetensors").read_bytes())
    elif fault == "a moment less":
        file.write_bytes(data.replace(b'"exp_avg/embed"', b'"exp_avX/embed"'))
    elif fault == "a moment's shape":
        file.write_bytes(
            data.replace(b'"exp_avg/embed": {"dtype": "F32"', b'"exp_avg/embed": {"dtype": "I32"')
        )
    fragments, optimizer = zero_2(0, 1)
    if fault == "another model":
        (first, *others) = fragments
        fragments = [Fragment("embed", torch.Size([3, 7]), 0, 21, first.holder), *others]
    with pytest.raises(UserError, match=FAULTS[fault]):
        load_fragments(fragments, optimizer, FragmentFiles(tmp_path, 2))
