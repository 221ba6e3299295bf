"""Weights in fp32 with autocast, as here, against DeepSpeed's own bf16: memory, errors, movement.

    python benchmarks/deepspeed_bf16.py             on CPUs, two ranks

A random Llama with weights that bf16 holds exactly, as most files have them, takes optimiser steps
of a policy gradient on responses that it sampled. Variants:

    ours             fp32 weights, products in bf16 by autocast, gradients summed over ranks in fp32
    torch_autocast   the same by DeepSpeed's defaults: linear layers are gathered and summed in bf16
    bf16             DeepSpeed's bf16 weights with sharded fp32 masters, gradients summed in bf16
    bf16, fp32 sums  the same with gradients summed and accumulated in fp32

Errors are against a plain model in float64, movement against training in fp32. Bytes are per
parameter: those of tensors between two steps, and what the resident set grows by in a step and in a
gather of all weights. What moves is sent over the loopback interface, which nothing else may use.
ZeRO-2 has tied embeddings, ZeRO-3 untied ones.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.forked_ranks import ranks

from marlhf.common.cpu_memory import trim_heap
from marlhf.config import OptimizerSettings
from marlhf.distributed import Distributed
from marlhf.distributed.trained import Sharded
from marlhf.models.policy import Critic, Policy

PROMPT, RESPONSE, ROWS, STEPS, LR = 24, 40, 4, 5, 1e-6
FP32_SUMS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
# what DeepSpeed's configuration has in addition to that of `precision: fp32`
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "torch_autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, fp32 sums": {"bf16": {"enabled": True}, **FP32_SUMS},
}
# small buckets, so that memory is that of weights, gradients and moments
BUCKETS = {"reduce_bucket_size": 2_000_000, "stage3_prefetch_bucket_size": 2_000_000}


def write_model(folder: Path, tied: bool) -> None:
    """66 million weights, or 79 untied, in a file of bf16; logits spread as if trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=7,
        num_attention_heads=12,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.model.norm.weight.mul_(6.3)  # standard deviation of the logits: 3.5
    model.bfloat16().save_pretrained(folder / f"model-{tied}")


def language_model(folder: Path, tied: bool) -> Any:
    """The model in fp32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder / f"model-{tied}", dtype=torch.float32)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the defaults of a job."""
    job = OptimizerSettings()
    betas = (job.betas[0], job.betas[1])
    return torch.optim.AdamW(module.parameters(), LR, betas, job.eps, job.weight_decay, fused=True)


def counter(file: str, key: str) -> int:
    """A number that the kernel gives under a key."""
    match = re.search(rf"\b{key}:\s*(\d+)", Path("/proc", file).read_text())
    assert match is not None
    return int(match[1])


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM the most since its peak was reset."""
    return 1024 * counter("self/status", key)


def settle() -> int:
    """Resident bytes of this process after freed memory went back."""
    gc.collect()
    trim_heap(torch.device("cpu"))
    return memory("VmRSS")


def bytes_of_tensors() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, Tensor)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def weighted(logprobs: Tensor, rows: slice) -> Tensor:
    """Loss of a policy gradient with random advantages: a sum over rows, divided by all tokens."""
    advantages = torch.randn(ROWS, RESPONSE, generator=torch.Generator().manual_seed(1))
    return -(advantages[rows] * logprobs).sum() / advantages.numel()


def relative(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """|x - y| / |y| over all tensors."""
    apart = sum(float((x[name].double() - y[name].double()).square().sum()) for name in y)
    return (apart / sum(float(t.double().square().sum()) for t in y.values())) ** 0.5


def differences(x: Tensor, y: Tensor) -> dict[str, float]:
    """Largest and mean |x - y|."""
    gap = (x.double() - y.double()).abs()
    return {"max": float(gap.max()), "mean": float(gap.mean())}


def reference(folder: Path, tied: bool) -> dict[str, Any]:
    """Sample responses; the gradient in float64, training in fp32, and errors of a critic."""
    write_model(folder, tied)
    model = language_model(folder, tied)
    prompts = torch.randint(16384, (ROWS, PROMPT))
    sampling = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    ids = model.generate(prompts, max_new_tokens=RESPONSE, **sampling)
    save: dict[str, Any] = {"ids": ids}

    def logprobs() -> Tensor:
        logits = model(ids).logits[:, PROMPT - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)

    def gradient() -> dict[str, Tensor]:
        weighted(logprobs(), slice(None)).backward()
        return {"model." + name: p.grad.float() for name, p in model.named_parameters()}

    model.double()
    save["gradient"] = gradient()
    save["logprobs"] = logprobs().detach()
    model.zero_grad()
    model.float()
    result: dict[str, Any] = {"gradient": relative(gradient(), save["gradient"])}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        result["log-probs"] = differences(first := logprobs(), save["logprobs"])
    optimizer = adamw(model)
    for _ in range(STEPS):
        model.zero_grad()
        gradient()
        optimizer.step()
    with torch.no_grad():
        save["movement"] = logprobs() - first
    save["steps"] = {"model." + n: p.detach() - before[n] for n, p in model.named_parameters()}
    torch.save(save, folder / f"reference-{tied}")
    result["moved"] = differences(save["movement"], torch.zeros(()))
    return {**result, **critic_errors(ids, folder, tied)}


@torch.no_grad()
def critic_errors(ids: Tensor, folder: Path, tied: bool) -> dict[str, Any]:
    """Errors of values of unit scale: by autocast, and with all weights in bf16."""
    critic = Critic(language_model(folder, tied).model, nn.Linear(768, 1))
    nn.init.normal_(critic.head.weight, std=1 / (6.3 * 768**0.5))
    masks = torch.ones_like(ids, dtype=torch.bool), torch.ones(ROWS, RESPONSE, dtype=torch.bool)
    exact = critic(ids, *masks).values
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = critic(ids, *masks).values
    in_bf16 = critic.bfloat16()(ids, *masks).values
    errors = {"autocast": differences(by_autocast, exact), "bf16": differences(in_bf16, exact)}
    return {f"values, {name}": error for name, error in errors.items()}


def trained(variant: str, distributed: Distributed, module: nn.Module) -> Sharded:
    """The module under a DeepSpeed engine of the variant."""
    if variant == "ours":
        ours = distributed.prepare(module, adamw(module), None)
        assert isinstance(ours, Sharded)
        return ours
    import deepspeed

    other = distributed.prepare(lone := nn.Linear(1, 1), adamw(lone), None)
    config = {**other.model.config, **VARIANTS[variant]}
    engine, *_ = deepspeed.initialize(model=module, optimizer=adamw(module), config=config)
    return Sharded(engine)


def train(variant: str, stage: int, tied: bool, folder: Path) -> dict[str, Any]:
    """Figures of this rank: its memory, errors, movement and seconds."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    distributed = Distributed("bf16" if variant == "ours" else "fp32")
    world, rank = distributed.world_size, distributed.rank
    exact = torch.load(folder / f"reference-{tied}", mmap=True)  # the first rank compares
    count = sum(p.numel() for p in exact["steps"].values())
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    mask = torch.ones_like(exact["ids"], dtype=torch.bool)
    inputs = exact["ids"][rows], mask[rows], mask[rows, PROMPT:]
    unused = bytes_of_tensors()
    learner = trained(variant, distributed, module := Policy(language_model(folder, tied)))
    named = dict(module.named_parameters())

    def whole(get: Callable[[nn.Parameter], Any]) -> dict[str, Tensor]:
        return {name: get(p).detach().float() for name, p in named.items()}

    def forward() -> Tensor:
        with distributed.autocast():
            return learner.model(*inputs).logprobs

    @torch.no_grad()
    def logprobs() -> Tensor:
        return torch.cat(distributed.gather_objects([forward()]))

    results: dict[str, Any] = {"logprobs": logprobs()}
    figures: dict[str, Any] = {"log-probs": differences(results["logprobs"], exact["logprobs"])}
    seconds = []
    for step in range(STEPS):
        resident = settle()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        distributed.barrier()
        crossed, began = counter("net/dev", "lo"), time.perf_counter()
        learner.backward(weighted(forward(), rows))
        if step == 0:
            gradient = whole(safe_get_full_grad)
            if rank == 0:
                figures["gradient"] = relative(gradient, exact["gradient"])
                torch.save(gradient, folder / f"gradient-{variant}-{world}")
            del gradient
        learner.step()
        distributed.barrier()
        seconds.append(time.perf_counter() - began)
        figures["step sends"] = (counter("net/dev", "lo") - crossed) / count / world
        figures["step adds"] = (memory("VmHWM") - resident) / count
    figures |= {"seconds": min(seconds), "held": (bytes_of_tensors() - unused) / count}
    resident, crossed = settle(), counter("net/dev", "lo")
    with distributed.gathered(module):
        figures["gather adds"] = (settle() - resident) / count
        distributed.barrier()
    figures["gather sends"] = (counter("net/dev", "lo") - crossed) / count / world

    results["movement"] = movement = logprobs() - results["logprobs"]
    pair = torch.stack([movement.double().flatten(), exact["movement"].double().flatten()])
    figures["correlation"] = float(torch.corrcoef(pair)[0, 1])
    figures["movement"] = float(pair[0].norm() / pair[1].norm())
    start = dict(Policy(language_model(folder, tied)).named_parameters())
    masters = whole(safe_get_full_fp32_param)
    if rank == 0:
        masters = {n: p.view(start[n].shape) for n, p in masters.items()}
        results["steps"] = {n: masters[n] - start[n].detach() for n in named}
        figures["masters"] = relative(results["steps"], exact["steps"])
        changed = sum(int((masters[n].bfloat16() != start[n].bfloat16()).sum()) for n in named)
        figures["changed"] = changed / count
        torch.save(results, folder / f"results-{variant}-{world}")
    if world == 1:  # against the first of two ranks
        alone = torch.load(folder / f"gradient-{variant}-1", mmap=True)
        gradient = torch.load(folder / f"gradient-{variant}-2", mmap=True)
        two = torch.load(folder / f"results-{variant}-2", mmap=True)
        figures["ranks"] = {
            "gradient": relative(alone, gradient),
            "masters": relative(results["steps"], two["steps"]),
            "log-probs": differences(results["logprobs"], two["logprobs"]),
        }
    return figures


def run(variant: str, stage: int, tied: bool, folder: Path, world: int = 2) -> dict[str, Any]:
    """Figures of the first rank; memory is that of the rank with most."""
    work = lambda _: json.dumps(train(variant, stage, tied, folder))  # noqa: E731
    outcomes = ranks(world, work, folder, {"stage": stage, **BUCKETS})
    figures = [json.loads(outcome) for outcome in outcomes]
    print(f"ZeRO-{stage}, {world} ranks, {variant}: {figures[0]}", file=sys.stderr, flush=True)
    most = ("held", "step adds", "gather adds")
    return figures[0] | {key: max(f[key] for f in figures) for key in most}


def short(value: Any) -> str:
    """Three digits of a figure, or of largest and mean."""
    return " / ".join(f"{x:.3g}" for x in (value.values() if isinstance(value, dict) else [value]))


def main() -> None:
    """Print a table for each ZeRO stage, and one rank against two."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # freed memory goes back at once
        settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    warnings.simplefilter("ignore")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("deepspeed")  # once, for all ranks that are forked
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stage, tied in ((2, True), (3, False)):
            (outcome,) = ranks(1, lambda _, tied=tied: json.dumps(reference(folder, tied)), folder)
            for key, value in json.loads(outcome).items():
                print(f"{'tied' if tied else 'untied'}, one process, {key}: {short(value)}")
            columns = {variant: run(variant, stage, tied, folder) for variant in VARIANTS}
            print(f"\n| ZeRO-{stage} | {' | '.join(VARIANTS)} |\n|---|{'---|' * len(VARIANTS)}")
            for key in columns["ours"]:
                cells = [short(figures[key]) for figures in columns.values()]
                print(f"| {key} | {' | '.join(cells)} |", flush=True)
        for variant in ("ours", "bf16"):
            alone = run(variant, 3, False, folder, world=1)["ranks"]
            print(f"{variant}, one rank and two:", {k: short(v) for k, v in alone.items()})


if __name__ == "__main__":
    main()
