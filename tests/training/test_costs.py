"""What an update costs, counted and not timed: passes, logits, bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_trainer
from support.tiny_models import tiny_causal_lm

from marlhf.config import LoraSettings
from marlhf.estimate.allocations import LiveBytes
from marlhf.models import policy
from marlhf.models.policy import Policy, backbone_of
from marlhf.rollout import batching
from marlhf.training.ppo import PPOTrainer

EPOCHS = 3
LORA = {"model": {"lora": LoraSettings(r=2)}}
NO_KL = {"kl": {"coef": 0.0}}


def counted_update(trainer: PPOTrainer) -> tuple[Counter[str], int]:
    """Passes of each backbone and elements of each head's logits in an update without its sampling,
    and the response tokens sampled."""
    found: Counter[str] = Counter()
    counting, tokens = [True], []

    def count(module: torch.nn.Module, what: str) -> None:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            if counting[0]:
                found[what] += output.numel() if what.startswith("logits") else 1

        module.register_forward_hook(hook)

    policy: Any = trainer.policy.model
    named = {"policy": policy.model}
    if trainer.reference is not None:
        named["reference"] = trainer.reference.model
    if policy.adapter is not None:
        named = {"base": policy.model.get_base_model()}
    for name, lm in named.items():
        count(backbone_of(lm), name)
        count(lm.get_output_embeddings(), f"logits of {name}")
    if trainer.critic is not None and policy.adapter is None:
        count(trainer.critic.model.backbone, "critic")
    usual = trainer.engine

    def uncounted(*arguments: Any) -> Any:
        counting[0] = False
        generation = usual.generate(*arguments)
        counting[0] = True
        tokens.append(int(generation.response_mask.sum()))
        return generation

    update = usual.update_weights
    engine = SimpleNamespace(generate=uncounted, sleep=usual.sleep, update_weights=update)
    trainer.worker = replace(trainer.worker, engine=engine)
    trainer.step(PROMPTS)
    return found, tokens[0]


@pytest.mark.parametrize("case", ["full", "lora", "head on the policy", "no KL", "lora, no KL"])
def test_passes_and_logits_of_an_update(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {
        "full": {},
        "lora": LORA,
        "head on the policy": {**LORA, "critic": {"backbone": "policy"}},
        "no KL": NO_KL,
        "lora, no KL": {**LORA, **NO_KL},
    }[case]
    monkeypatch.setattr(batching, "CPU_PASS_COST", 1000)  # all rows in a pass, whatever is padding
    trainer = tiny_trainer(
        tmp_path,
        ppo={"epochs": EPOCHS, "minibatches": 1},
        optimizer={"micro_batch_size": 8},
        **sections,
    )
    found, tokens = counted_update(trainer)
    logits = tokens * 260  # of response tokens alone
    wanted = {
        "full": {
            "policy": 1 + EPOCHS,
            "critic": 1 + EPOCHS,
            "reference": 1,
            "logits of policy": (1 + EPOCHS) * logits,
            "logits of reference": logits,
        },
        "lora": {"base": 3 + 2 * EPOCHS, "logits of base": (2 + EPOCHS) * logits},
        "head on the policy": {"base": 2 + EPOCHS, "logits of base": (2 + EPOCHS) * logits},
        "no KL": {
            "policy": 1 + EPOCHS,
            "critic": 1 + EPOCHS,
            "logits of policy": (1 + EPOCHS) * logits,
        },
        "lora, no KL": {"base": 2 + 2 * EPOCHS, "logits of base": (1 + EPOCHS) * logits},
    }[case]
    assert found == wanted


def peak_of_pass(vocabulary: int, training: bool) -> int:
    """Bytes that a pass over 2 x 32 response tokens allocates, beside weights."""
    lm = tiny_causal_lm("llama", vocabulary, tie_word_embeddings=True)
    lm.get_input_embeddings().requires_grad_(False)  # its gradient grows, as a weight does
    policy, ids = Policy(lm), torch.randint(3, vocabulary, (2, 40))
    attention, mask = torch.ones(2, 40).bool(), torch.ones(2, 32).bool()
    with torch.set_grad_enabled(training), LiveBytes([*lm.parameters(), *lm.buffers()]) as count:
        logprobs, _ = policy(ids, attention, mask, 0.7, () if training else ("entropy",))
        if training:
            logprobs.sum().backward()
    return count.peak


@pytest.mark.parametrize("training", [True, False], ids=["training", "scoring"])
def test_memory_does_not_grow_with_the_vocabulary(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "LOGITS_PER_CHUNK", 2**19)
    chunk = 4 * 2**19
    small, large = (peak_of_pass(size, training) for size in (2**15, 2**18))
    assert large <= small + chunk
    monkeypatch.setattr(policy, "LOGITS_PER_CHUNK", 10**9)
    assert peak_of_pass(2**18, training) > small + 20 * chunk
