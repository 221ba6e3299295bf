"""Jobs on a pretended accelerator: no operation meets two devices, and how often the host waits."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
import torch
from nltk.tree import Tree
from support import audits
from support.accelerator import DEVICE, Accelerator, is_on, pretended
from support.evaluations import results_of
from support.runs import PROMPTS, tiny_trainer
from support.tiny_models import (
    BYTES_VOCAB,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)
from torch import Tensor

from marlhf.algorithm.estimators import ESTIMATORS
from marlhf.config import (
    ImportanceSettings,
    LoraSettings,
    QuantizationSettings,
    RewardConfig,
    RolloutSettings,
    SFTConfig,
)
from marlhf.config.loading import config_from_dict, merge
from marlhf.models.adapters import add_adapter
from marlhf.models.policy import Policy
from marlhf.rewards.tokens import TOKEN_REWARDS
from marlhf.rollout import packed_weights
from marlhf.rollout.transformers_engine import generate
from marlhf.runs.metrics import Metrics
from marlhf.segmenters import SEGMENTERS
from marlhf.training import reward_model, sft


@pytest.fixture(scope="module")
def accelerator() -> Iterator[Accelerator]:
    with pretended() as device:
        yield device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy `lm`, a reward model `rm` and texts."""
    path = tmp_path_factory.mktemp("models")
    models = {
        "lm": tiny_causal_lm("llama", BYTES_VOCAB, num_hidden_layers=1),
        "rm": tiny_sequence_classifier("llama", BYTES_VOCAB, num_hidden_layers=1),
        "encoder": tiny_sequence_classifier("bert", BYTES_VOCAB, num_hidden_layers=1),
    }
    for name, model in models.items():
        model.save_pretrained(path / name)
        byte_tokenizer(add_bos=True).save_pretrained(path / name)
    rows = [
        {"prompt": f"p{i}", "text": "text " * (i + 1), "chosen": "a" * (i + 1), "rejected": "b"}
        for i in range(8)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flat(text: str) -> Tree:
    """A tree of one level."""
    return Tree("S", text.split() or [text])


def inside(prompts: list[str], completions: list[str]) -> list[Any]:
    """Rewards inside responses."""
    return [[(len(text) // 2, 0.5), (len(text), 1.0)] for text in completions]


FOUR_BITS = {"lora": LoraSettings(r=2), "quantization": QuantizationSettings()}
GROUPS = {"rollout": {"responses_per_prompt": 2}}
RUNS: dict[str, dict[str, Any]] = {
    "reward model and spans": {
        "reward": {"models": ["rm", "per_segment"], "clip": 1.0, "missing_eos_penalty": 0.5},
        "segmenter": {"name": "union", "of": ["sentence", {"name": "ngram", "n": 4}]},
    },
    "curiosity": {
        "reward": {"tokens": ["curiosity"], "whiten": True, "clip": 1.0},
        "segmenter": "phrases",
    },
    "lora": {
        "model": {**FOUR_BITS, "gradient_checkpointing": True},
        "segmenter": "perplexity",
    },
    "sampling": {
        "rollout": {"top_k": 40, "top_p": 0.9, "stop_strings": ["aa"], "min_new_tokens": 2},
        "segmenter": "word",
    },
    "importance": {
        "rollout": {"importance": ImportanceSettings(), "temperature": 0.8},
        "ppo": {"weights": ["low_probability", "positive"], "entropy_coef": 0.01, "dual_clip": 3.0},
        "segmenter": "line",
    },
    "grpo": {"ppo": {"estimator": "grpo", "aggregate": "response"}, **GROUPS, "segmenter": "token"},
    "rloo": {"ppo": {"estimator": "rloo"}, **GROUPS, "segmenter": "sequence"},
    "reinforce": {"ppo": {"estimator": "reinforce"}, "segmenter": "random_ngram"},
    "prefix tree": {"ppo": {"estimator": "prefix_tree"}, **GROUPS, "segmenter": "syntax"},
    "continuations": {
        "ppo": {"estimator": {"name": "monte_carlo", "continuations": 2, "max_prefixes": 2}},
        "segmenter": "entropy_jump",
    },
    "macro losses": {
        "macro": {"ratio": "macro_product", "value_loss": "macro", "last_token_alone": True},
        "ppo": {"bootstrap_truncated": True, "target_kl": 0.5, "lam": {"name": "per_token"}},
        "kl": {"target": 1.0},
        "segmenter": {"name": "parsing", "parser": f"{__name__}.flat"},
    },
    "paper code": {
        "macro": {"ratio": "macro_mean", "reward": "mean", "discount": "per_macro"},
        "ppo": {"critic_lam": {"name": "length_adaptive"}, "redraw_minibatches": True},
        "segmenter": "ngram",
    },
    "head on the policy": {
        "critic": {"backbone": "policy"},
        "kl": {"where": "loss"},
        "ptx": {"path": "rows.jsonl", "batch_size": 4, "max_length": 64},
    },
    "bf16": {
        "model": {"lora": LoraSettings(r=2), "precision": "bf16"},
        "reward": {"models": ["rm"]},
        "segmenter": "sentence",
    },
}


def configured(folder: Path, output: Path, sections: dict[str, Any]) -> Any:
    """A trainer of two updates, each with an evaluation and a checkpoint."""
    changes: dict[str, Any] = {
        key: dict(v) if isinstance(v, dict) else v for key, v in sections.items()
    }
    models = changes.get("reward", {}).pop("models", None)
    score: Any = inside
    if models is not None:
        segments = {"name": "per_segment", "reward": str(folder / "encoder"), "boundary": " "}
        paths = [segments if name == "per_segment" else str(folder / name) for name in models]
        score = [*paths, inside]
    if "ptx" in changes:
        changes["ptx"]["path"] = str(folder / changes["ptx"]["path"])
    rollout = {"batch_size": 4, "max_new_tokens": 6, **changes.pop("rollout", {})}
    changes["model"] = {"path": str(folder / "lm"), **changes.get("model", {})}
    return tiny_trainer(
        output,
        score=score,
        rollout=rollout,
        data={"eval_rows": 2},
        log={"eval_every": 1, "samples": 1},
        checkpoint={"every": 1},
        **changes,
    )


def rows(output: Path) -> list[dict[str, Any]]:
    """Metrics of a run, without its times."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    timed = ("seconds", "per_second", "memory_gb")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in lines]


@pytest.mark.parametrize("case", RUNS)
def test_a_run_and_its_resume(
    case: str, accelerator: Accelerator, folder: Path, tmp_path: Path
) -> None:
    trainer = configured(folder, tmp_path, RUNS[case])
    assert trainer.distributed.device.type == "cuda"
    trained = [p for p in trainer.policy.model.parameters() if p.requires_grad]
    assert all(map(is_on, trained))
    trainer.train()
    expected = rows(tmp_path)
    checkpoint = sorted((tmp_path / "checkpoints").iterdir())[0]
    sections = {**RUNS[case], "overwrite": False, "resume": str(checkpoint)}
    configured(folder, tmp_path, sections).train()
    assert rows(tmp_path) == expected


def test_every_segmenter_estimator_and_token_reward_runs() -> None:
    words = set(re.findall(r"\w+", repr(RUNS))) | {"gae"}  # the default
    for registry in (SEGMENTERS, ESTIMATORS, TOKEN_REWARDS):
        assert set(registry.factories) <= words


def job(kind: Any, folder: Path, output: Path, **changes: Any) -> Any:
    """Configuration of two steps of `sft` or `reward`, each with an evaluation and a checkpoint."""
    values = {
        "model": {"path": str(folder / "lm")},
        "data": {"path": str(folder / "rows.jsonl"), "eval_rows": 2},
        "output_dir": str(output),
        "steps": 2,
        "batch_size": 4,
        "max_length": 48,
        "optimizer": {"learning_rate": 1e-2, "micro_batch_size": 2},
        "log": {"progress": False, "tensorboard": False, "eval_every": 1},
        "checkpoint": {"every": 1},
    }
    return config_from_dict(kind, merge(values, changes))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (SFTConfig, {"packing": True, "early_stopping": 2}),
        (SFTConfig, {"model": {"lora": {"r": 2}, "precision": "bf16"}}),
        (RewardConfig, {"model": {"gradient_checkpointing": True}}),
        (RewardConfig, {"model": {"lora": {"r": 2}, "precision": "bf16"}, "early_stopping": 2}),
    ],
    ids=["sft", "sft with lora", "reward", "reward with lora"],
)
def test_a_supervised_job_and_its_resume(
    kind: Any, changes: dict[str, Any], accelerator: Accelerator, folder: Path, tmp_path: Path
) -> None:
    run = sft.run if kind is SFTConfig else reward_model.run
    if kind is SFTConfig:
        changes = {**changes, "data": {"completion_column": "text"}}
    with accelerator.counted() as counts:
        run(job(kind, folder, tmp_path, **changes))
    assert counts.kernels["_fused_adamw_"] == 2
    expected = rows(tmp_path)
    checkpoint = sorted((tmp_path / "checkpoints").iterdir())[0]
    run(job(kind, folder, tmp_path, **changes, resume=str(checkpoint)))
    assert rows(tmp_path) == expected


def test_an_evaluation(accelerator: Accelerator, folder: Path, tmp_path: Path) -> None:
    changes = {
        "policies": {"a": str(folder / "lm"), "b": str(folder / "lm")},
        "data": {"path": str(folder / "rows.jsonl"), "eval_rows": 0},
        "rewards": [str(folder / "rm"), {"name": "length", "target": 5}],
        "best_of": [1, 2],
        "reference": str(folder / "lm"),
        "output_dir": str(tmp_path),
    }
    with accelerator.counted() as counts:
        results = results_of(tmp_path, **changes)
    assert counts.kernels["mm"] > 100
    assert results


def refused_by_cuda(x: Tensor, y: Tensor) -> list[tuple[str, Callable[[], Any]]]:
    """What raises with `x` on the accelerator and `y` on the CPU, three numbers each."""
    return [
        ("same device", lambda: x + y),
        ("same device", lambda: y * x.sum()),
        ("same device", lambda: torch.cat([x, y])),
        ("same device", lambda: torch.stack([x.sum(), y.sum()])),
        ("same device", lambda: y.sum().add_(x.sum())),
        ("same device", lambda: x.gather(0, torch.tensor([0]))),
        ("same device", lambda: torch.nn.Linear(3, 1)(x)),
        ("same device", lambda: y[torch.tensor([0], device="cuda")]),
        ("same device", lambda: x.index_put_((torch.tensor([0, 1, 2]),), y)),
        ("generator", lambda: torch.rand(2, generator=torch.Generator("cuda"))),
        ("generator", lambda: torch.zeros_like(x).uniform_(generator=torch.Generator())),
        ("located on", lambda: setattr(x, "grad", y)),
        ("numpy", lambda: x.numpy()),
        ("numpy", lambda: np.asarray(x)),
    ]


def test_what_cuda_refuses_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    for words, work in refused_by_cuda(x, y):
        with pytest.raises((RuntimeError, TypeError), match=words):
            work()
    assert (x.device, copy.deepcopy(x).device, y.device) == (DEVICE, DEVICE, torch.device("cpu"))
    z = torch.ones(3, requires_grad=True)
    (z.to("cuda") * x).sum().backward()
    assert isinstance(z.grad, Tensor)
    assert not is_on(z.grad)
    torch.save(x, tmp_path / "x.pt")
    assert is_on(torch.load(tmp_path / "x.pt"))
    assert not is_on(torch.load(tmp_path / "x.pt", map_location="cpu"))


def test_what_makes_the_host_wait(accelerator: Accelerator) -> None:
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    index, mask = torch.tensor([0, 2]), x > 0
    waits: list[tuple[Callable[[], Any], int]] = [
        (lambda: x * torch.tensor(2.0), 0),  # a number of the CPU
        (lambda: x.masked_fill(mask, 0.0), 0),
        (lambda: torch.zeros(3, device="cuda"), 0),
        (lambda: x.new_zeros(2), 0),
        (lambda: float(y.sum()), 0),
        (lambda: x.to("cuda"), 0),
        (lambda: x.cpu(), 1),
        (lambda: y.to("cuda"), 1),
        (lambda: y.copy_(x), 1),
        (lambda: torch.tensor([1.0], device="cuda"), 1),
        (lambda: float(x.sum()), 1),
        (lambda: bool(mask.all()), 1),
        (lambda: x.tolist(), 1),
        (lambda: x[mask], 1),
        (lambda: x[index], 1),  # copied
        (lambda: x[index.to("cuda")], 1),  # the copy alone
    ]
    for i, (work, count) in enumerate(waits):
        with accelerator.counted() as counts:
            work()
        assert sum(counts.waits.values()) == count, i


def test_an_audit(accelerator: Accelerator, tmp_path: Path) -> None:
    run = audits.train(audits.build_model(tmp_path))
    words = ["--prompts", "2", "--responses", "2", "--arm", "ppo.estimator=rloo"]
    assert audits.audit(run, *words)["arms"]


# (module, function, a move between devices in it, the run that meets it)
MOVES = [
    ("distributed.placement", "Placement.place", "values_of(parameter).to", "plain"),
    ("rollout.transformers_engine", "generate", "x.to", "plain"),
    ("rollout.worker", "RolloutWorker._passes", "part.to", "plain"),
    ("rollout.worker", "RolloutWorker._reward", "inside.to", "plain"),
    ("rollout.scores", "score_to_rewards", "scores.to", "plain"),
    ("training.diagnostics", "measure", "generation.lengths.to", "plain"),
    ("rewards.learned", "RewardModel.__call__", "x.to", "reward model and spans"),
    ("rewards.curiosity", "Curiosity.update", "all_reduce(moments).cpu", "curiosity"),
    ("training.ptx", "TextStream.batch", "to", "head on the policy"),
]


def without(module: Any, function: str, move: str) -> CodeType:
    """The code of a function of a module, without one call that moves a tensor."""
    removed = []

    class Remover(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            name = ast.unparse(node.func)
            if name != move and name.split(").")[-1] != move:
                return node
            assert isinstance(node.func, ast.Attribute)
            removed.append(node)
            return node.func.value

    tree = ast.parse(inspect.getsource(module))
    path = function.split(".")
    scope: Any = tree
    for name in path:
        scope = next(x for x in scope.body if getattr(x, "name", None) == name)
    Remover().visit(scope)
    assert len(removed) == 1
    code = compile(tree, module.__file__, "exec")
    for name in path:
        parts = [x for x in code.co_consts if isinstance(x, CodeType)]
        code = next(x for x in parts if x.co_name == name)
    return code


@pytest.mark.parametrize("move", MOVES, ids=lambda move: f"{move[0]}: {move[2]}")
def test_a_move_that_is_left_out_is_caught(
    move: tuple[str, str, str, str],
    accelerator: Accelerator,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, path, call, case = move
    module = importlib.import_module(f"marlhf.{name}")
    function: Any = module
    for part in path.split("."):
        function = getattr(function, part)
    monkeypatch.setattr(inspect.unwrap(function), "__code__", without(module, path, call))

    def work() -> None:
        trainer = configured(folder, tmp_path, RUNS.get(case, {}))
        for _ in range(2):
            trainer.step(PROMPTS[:4])

    with pytest.raises(Exception, match=r"same device|indices should be"):
        work()


@pytest.mark.parametrize(
    "macro",
    [
        {},
        {"value_loss": "macro"},
        {"value_loss": "macro", "ratio": "macro_product"},
    ],
    ids=["token", "macro values", "macro values and ratios"],
)
def test_waits_of_a_micro_batch(
    macro: dict[str, str], accelerator: Accelerator, folder: Path, tmp_path: Path
) -> None:
    """Of policy and critic: the difference of two micro-batches with padding to one.

    Four are of transformers' masks, two read widths, one tells how many tokens there are.
    """
    kept, ppo = [], {"minibatches": 1, "epochs": 1}
    trainer = configured(folder, tmp_path, {"macro": macro, "ppo": ppo})
    update, trainer.update = trainer.update, lambda experience, *_: kept.append(experience)
    trainer.step(PROMPTS[:4])
    waits = []
    for size in (4, 2):
        for learner in (update.policy, update.critic):
            learner.settings = replace(learner.settings, micro_batch_size=size)
        with accelerator.counted() as counts:
            update(kept[0], 0, Metrics())
        waits.append(counts.waits)
    assert sum((waits[1] - waits[0]).values()) == 7, waits[1] - waits[0]


def policy_on_it(family: str, layers: int, lora: bool, base: Any = torch.float32) -> Policy:
    """A policy that never ends a response, with matrices of the dtype `base` under its adapters."""
    sizes = {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    model = tiny_causal_lm(family, BYTES_VOCAB, **sizes)
    model.generation_config.eos_token_id = None
    if lora:
        model = add_adapter(model, LoraSettings(r=2), "policy")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            elif "base_layer" in name:
                parameter.data = parameter.data.to(base)
    return Policy(model.to(DEVICE), "policy" if lora else None)


def decoded(
    accelerator: Accelerator, layers: int, lora: bool, base: Any
) -> tuple[Counter[str], Counter[str]]:
    """Waits and kernels of four decoding steps in bf16."""
    policy, counted = policy_on_it("llama", layers, lora, base), []
    for tokens in (20, 24):
        settings = RolloutSettings(
            max_new_tokens=tokens, min_new_tokens=tokens, top_k=50, top_p=0.9, stop_strings=["abc"]
        )
        with accelerator.counted() as counts, torch.autocast("cuda", torch.bfloat16):
            generate(policy, byte_tokenizer(), [[5, 6, 7], [9]], [0, 1], settings)
        counted.append(counts)
    return counted[1].waits - counted[0].waits, counted[1].kernels - counted[0].kernels


@pytest.mark.parametrize(
    ("lora", "base", "most"),
    [(False, torch.float32, 44), (True, torch.float32, 59), (True, torch.bfloat16, 52)],
    ids=["full", "adapters", "adapters of a bf16 base"],
)
def test_waits_and_kernels_of_a_decoded_token(
    lora: bool, base: Any, most: int, accelerator: Accelerator
) -> None:
    waits, of_one = decoded(accelerator, 1, lora, base)
    assert sum(waits.values()) == 3 * 4, waits
    _, of_two = decoded(accelerator, 2, lora, base)
    assert sum((of_two - of_one).values()) == most * 4, of_two - of_one


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_in_fewer_products_sample_the_same(
    family: str, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_on_it(family, 1, lora=True)
    settings = RolloutSettings(max_new_tokens=8, old_logprobs="engine")
    arguments = byte_tokenizer(), [[5, 6, 7], [9]], [0, 1], settings
    samples, kernels = [], []
    for fewest in (100, 1):
        monkeypatch.setattr(packed_weights, "FEWEST_TOKENS", fewest)
        with accelerator.counted() as counts:
            samples.append(generate(policy, *arguments))
        kernels.append(sum(counts.kernels.values()))
    assert torch.equal(samples[0].response_ids, samples[1].response_ids)
    torch.testing.assert_close(samples[0].logprobs, samples[1].logprobs, rtol=0, atol=1e-5)
    assert kernels[1] < kernels[0]
    policy.adapter = None
    assert (generate(policy, *arguments).logprobs - samples[0].logprobs).abs().max() > 1e-2
