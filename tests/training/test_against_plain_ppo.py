"""Two whole updates of the trainer against `plain_ppo`.

Of the trainer it takes the sampled token ids alone; every metric and every weight must then agree.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from support.plain_ppo import (
    CRITIC_LEARNING_RATE,
    EOS,
    EPS,
    LEARNING_RATE,
    MAX_PROMPT_LENGTH,
    Plain,
    PlainPPO,
    Row,
    trained,
)
from support.runs import PROMPTS, WorkerInstead, vowels
from support.tiny_models import (
    BYTES_VOCAB,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)

from marlhf.config import PPOConfig
from marlhf.config.loading import config_from_dict, merge
from marlhf.training.ppo import PPOTrainer

UPDATES = 2
TARGET_KL = 0.01
IN_ORDER = (0, 1) * 4  # the minibatch of each prompt
TEXT_ROWS = [
    {"prompt": "ab", "text": " c"},
    {"prompt": "what follows is", "text": " long"},
    {"prompt": "?", "text": "longer than its limit"},
]


def byte_ids(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


BOS = 0
TEXTS = (
    ([BOS, *byte_ids(" c"), EOS], 1),
    ([BOS, *byte_ids(" long"), EOS], 1),
    ([BOS, *byte_ids("longer than i")], 1),  # cut to 14 tokens
)
COMPLETIONS = (
    ([BOS, *byte_ids("ab c"), EOS], 3),
    ([BOS, *byte_ids("ows is long"[-10:]), EOS], 6),  # the prompt is cut on its left
    (byte_ids("?longer than"), 1),  # one token of it is left
)
TIMES = ("_seconds", "tokens_per_second", "peak_memory_gb")

# Adam's epsilon is large so that it does not blow up the rounding of gradients near zero.
SECTIONS: dict[str, Any] = {
    "model": {"path": "given in Python"},
    "segmenter": {"name": "ngram", "n": 3},
    "data": {"eval_rows": 0},
    "rollout": {"batch_size": 8, "max_new_tokens": 11, "max_prompt_length": MAX_PROMPT_LENGTH},
    "ppo": {"gamma": 0.97, "minibatches": 2, "epochs": 2},
    "kl": {"coef": 0.2},
    "optimizer": {
        "learning_rate": LEARNING_RATE,
        "critic_learning_rate": CRITIC_LEARNING_RATE,
        "eps": EPS,
        "weight_decay": 0.1,
        "micro_batch_size": 3,
    },
}


@dataclass(frozen=True)
class Run:
    """A run of the trainer: models before it, weights after it, sampled rows and metrics of each
    update."""

    lm: Any
    classifier: Any
    ref: Any
    rollouts: list[list[Row]]
    metrics: list[dict[str, Any]]
    policy: dict[str, torch.Tensor]
    critic: dict[str, torch.Tensor]


def run_of_trainer(sections: dict[str, Any], family: str = "llama", offset: float = 0.0) -> Run:
    lm = with_eos_bias(tiny_causal_lm(family, BYTES_VOCAB, seed=1))
    classifier = tiny_sequence_classifier(family, BYTES_VOCAB, seed=2)
    classifier.config.score_offset = offset
    with_head = sections.get("critic", {}).get("backbone") == "policy"
    if with_head:
        classifier = WithHead(None, torch.nn.Linear(32, 1, bias=False))
        torch.nn.init.zeros_(classifier.score.weight)
    before = copy.deepcopy(lm), copy.deepcopy(classifier), copy.deepcopy(lm)
    tokenizer = byte_tokenizer(add_bos=True)
    with TemporaryDirectory() as folder:
        base = {k: v for k, v in SECTIONS.items() if "preset" not in sections or k != "ppo"}
        values = merge(base, sections) | {"steps": UPDATES, "output_dir": folder}
        without_critic = values.get("ppo", {}).get("estimator", "gae") != "gae"
        if without_critic:  # to use these
            values["ppo"] = {k: v for k, v in values["ppo"].items() if k != "gamma"}
        if without_critic or with_head:
            optimizer = values["optimizer"].items()
            values["optimizer"] = {k: v for k, v in optimizer if k != "critic_learning_rate"}
        if "ptx" in values:
            texts = Path(folder, "texts.jsonl")
            texts.write_text("".join(json.dumps(row) + "\n" for row in TEXT_ROWS))
            values["ptx"] |= {"path": str(texts), "batch_size": len(TEXT_ROWS)}
        config = config_from_dict(PPOConfig, values)
        trainer = PPOTrainer(
            config,
            reward=vowels,
            train_dataset=PROMPTS,
            model=lm,
            tokenizer=tokenizer,
            critic=None if with_head or "lora" in sections.get("model", {}) else classifier,
        )
        if config.model.lora is not None:
            critic = before[1] if with_head else adapted(trainer, "critic")
            before = adapted(trainer, "policy"), critic, before[2]
        generations = record_generations(trainer)
        metrics = [trainer.step(PROMPTS) for _ in range(UPDATES)]
    rollouts = []
    for generation in generations:
        prompts = [p for p in PROMPTS for _ in range(config.rollout.responses_per_prompt)]
        rows = []
        for prompt, ids, length in zip(prompts, *generation, strict=True):
            response = ids[:length]
            written = len(response)
            while written and response[written - 1] in (1, 2):  # EOS and padding at the end
                written -= 1
            text = tokenizer.decode(response[:written])
            prompt_ids = tokenizer(prompt)["input_ids"]
            rows.append(Row(shortened(prompt_ids), response, vowels([prompt], [text])[0]))
        rollouts.append(rows)
    policy = dict(trainer.policy.model.model.named_parameters())
    prefix = classifier.base_model_prefix
    critic = {} if trainer.critic is None else weights_of_critic(trainer.critic.model, prefix)
    if with_head:
        critic = {"score.weight": trainer.policy.model.head.weight}
    return Run(*before, rollouts, metrics, policy, critic)


def with_eos_bias(model: Any) -> Any:
    """Responses that end at different lengths."""
    head = model.get_output_embeddings()
    biased = torch.nn.Linear(head.in_features, head.out_features)
    biased.weight = head.weight
    with torch.no_grad():
        biased.bias.zero_()
        biased.bias[EOS] = 3.5
    model.set_output_embeddings(biased)
    return model


def record_generations(trainer: PPOTrainer) -> list[Any]:
    """`(response ids, lengths)` of each update to come."""
    found: list[Any] = []
    worker: Any = trainer.worker

    def recording(*arguments: Any) -> Any:
        rollout = worker(*arguments)
        generation = rollout.generation
        found.append((generation.response_ids.tolist(), generation.response_mask.sum(1).tolist()))
        return rollout

    trainer.worker = WorkerInstead(worker, recording)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def shortened(ids: list[int]) -> list[int]:
    """BOS and the last tokens."""
    return ids if len(ids) <= MAX_PROMPT_LENGTH else [ids[0], *ids[1 - MAX_PROMPT_LENGTH :]]


class WithHead(torch.nn.Module):
    """A backbone with LoRA and a scalar head, as a classifier is laid out."""

    base_model_prefix = "model"

    def __init__(self, backbone: Any, head: Any) -> None:
        super().__init__()
        self.model, self.score = backbone, head


def adapted(trainer: PPOTrainer, adapter: str) -> Any:
    """A copy of the policy or critic, on a base of its own, with its adapter on for good."""
    critic = None if trainer.critic is None else trainer.critic.model
    model, critic = copy.deepcopy((trainer.policy.model.model, critic))
    model.set_adapter(adapter)
    return (
        model
        if critic is None or adapter == "policy"
        else WithHead(model.get_base_model().model, critic.head)
    )


def weights_of_critic(critic: Any, prefix: str) -> dict[str, torch.Tensor]:
    backbone = {f"{prefix}.{name}": p for name, p in critic.backbone.named_parameters()}
    return backbone | {"score.weight": critic.head.weight}


def disagreements(run: Run, s: Plain) -> list[str]:
    """What differs between the trainer and the plain PPO."""
    plain = PlainPPO(run.lm, run.classifier, s, run.ref)
    found = []
    for update, rows in enumerate(run.rollouts):
        wanted = plain.update(rows) | {"step": update + 1}
        metrics = {
            k: v
            for k, v in run.metrics[update].items()
            if not k.endswith(TIMES) and not (v is None and k not in wanted)
        }
        assert set(metrics) == set(wanted)
        found += [
            f"update {update + 1}: {name} is {value}, plain {wanted[name]}"
            for name, value in metrics.items()
            if value != pytest.approx(wanted[name], rel=2e-5, abs=2e-5)
        ]
    of_critic = trained(plain.classifier)
    if s.critic_coef is not None:
        of_critic = {"score.weight": of_critic["score.weight"]}
    for module, weights, wanted in [
        ("policy", run.policy, trained(plain.lm)),
        ("critic", run.critic, of_critic if run.critic else {}),
    ]:
        for name, weight in wanted.items():
            error = float((weights[name].detach().double() - weight.detach()).abs().max())
            if error > 1e-5:
                found.append(f"{module}: {name} differs by {error:.2e}")
    return found


PAPER_CODE = Plain(
    last_token_alone=True,
    score_clip=2.5,
    gamma=1.0,
    reward="mean",
    discount="per_macro",
    whiten=False,
    epochs=1,
)
GROUPS = {"rollout": {"responses_per_prompt": 2, "batch_size": 8}}
CASES: dict[str, tuple[Plain, dict[str, Any]]] = {
    "token": (Plain(n=1), {"segmenter": "token"}),
    "ngram": (Plain(), {}),
    "paper code": (
        PAPER_CODE,
        {"preset": "paper_code", "rollout": {"temperature": 0.8}, "ppo": {"minibatches": 2}},
    ),
    "kl in the loss": (Plain(kl_in_loss=True), {"kl": {"where": "loss"}}),
    "rloo": (
        Plain(estimator="rloo", copies=2),
        {"ppo": {"estimator": "rloo"}, **GROUPS},
    ),
    "grpo": (
        Plain(estimator="grpo", copies=2, kl_in_loss=True),
        {"ppo": {"estimator": "grpo"}, **GROUPS},
    ),
    "copies with a critic": (Plain(copies=2), GROUPS),
    "score_offset": (Plain(offset=0.7), {}),
    "temperature and top_k": (
        Plain(temperature=0.7),
        {"rollout": {"temperature": 0.7, "top_k": 40}},
    ),
    "min_new_tokens": (Plain(min_tokens=4), {"rollout": {"min_new_tokens": 4}}),
    "value_loss macro": (Plain(value_loss="macro"), {"macro": {"value_loss": "macro"}}),
    "ratio macro_product": (
        Plain(ratio="macro_product"),
        {"macro": {"ratio": "macro_product"}},
    ),
    "bootstrap_truncated": (Plain(bootstrap=True), {"ppo": {"bootstrap_truncated": True}}),
    "kl target, in the rewards": (
        Plain(kl_target=0.5, kl_horizon=16),
        {"kl": {"target": 0.5, "horizon": 16}},
    ),
    "kl target, in the loss": (
        Plain(kl_target=6.0, kl_horizon=8, kl_in_loss=True),
        {"kl": {"target": 6.0, "horizon": 8, "where": "loss"}},
    ),
    "ptx": (Plain(texts=TEXTS, ptx_coef=0.7), {"ptx": {"coef": 0.7, "max_length": 14}}),
    "ptx and target_kl, with a prompt": (
        Plain(texts=COMPLETIONS, ptx_coef=2.0, target_kl=TARGET_KL),
        {
            "ptx": {"coef": 2.0, "prompt_column": "prompt", "max_length": 12},
            "ppo": {"target_kl": TARGET_KL},
        },
    ),
    "entropy bonus": (Plain(entropy_coef=0.3), {"ppo": {"entropy_coef": 0.3}}),
    "positive advantages weigh more": (
        Plain(positive=3.0),
        {"ppo": {"weights": {"name": "positive", "weight": 3.0}}},
    ),
    "redrawn minibatches": (
        Plain(drawn=((IN_ORDER, (1, 0, 1, 0, 0, 1, 1, 0)), (IN_ORDER, (0, 1, 0, 1, 0, 1, 1, 0)))),
        {"ppo": {"redraw_minibatches": True}},
    ),
    "target_kl": (Plain(target_kl=TARGET_KL), {"ppo": {"target_kl": TARGET_KL}}),
    "lora": (Plain(), {"model": {"lora": {"r": 4}}}),
    "a head on the policy": (
        Plain(critic_coef=0.5),
        {"critic": {"backbone": "policy", "coef": 0.5}},
    ),
    "a head on the policy's adapter": (
        Plain(critic_coef=0.1, bootstrap=True),
        {
            "critic": {"backbone": "policy"},
            "model": {"lora": {"r": 4}},
            "ppo": {"bootstrap_truncated": True},
        },
    ),
    "cosine": (
        Plain(schedule=(1.0, 0.5 * (1 + math.cos(math.pi / 2)))),
        {"optimizer": {"schedule": "cosine"}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_is_a_plain_ppo(case: str) -> None:
    plain, sections = CASES[case]
    run = run_of_trainer(sections, offset=plain.offset)
    lengths = {len(row.response) for rows in run.rollouts for row in rows}
    assert len(lengths) > 3
    assert abs(run.metrics[1]["kl_mean"]) > 0.01
    if plain.target_kl is not None:
        assert {0 < row["policy_steps"] < 4 for row in run.metrics} == {True}
    assert disagreements(run, plain) == []


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_families_with_tied_embeddings(family: str) -> None:
    assert disagreements(run_of_trainer({}, family), Plain()) == []


@cache
def run_with_everything() -> Run:
    return run_of_trainer(CASES["bootstrap_truncated"][1])


MISTAKES: list[dict[str, Any]] = [
    {"shift_values": 1},
    {"shift_values": -1},
    {"shift_logprobs": 1},
    {"temperature": 1.01},
    {"n": 4},
    {"last_token_alone": True},
    {"gamma": 1.0},
    {"lam": 0.9},
    {"reward": "mean"},
    {"discount": "per_macro"},
    {"whiten": False},
    {"bootstrap": False},
    {"kl_coef": 0.19},
    {"kl_in_loss": True},
    {"ratio": "macro_product"},
    {"value_loss": "macro"},
    {"epochs": 1},
    {"minibatches": 1},
    {"clip": 0.3},
    {"value_clip": 0.3},
    {"offset": 0.1},
    {"max_grad_norm": 2.0},
    {"betas": (0.9, 0.999)},
    {"weight_decay": 0.0},
    {"schedule": (1.0, 1.0)},
    {"micro_batch_denominators": True},
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_would_be_found(mistake: dict[str, Any]) -> None:
    assert disagreements(run_with_everything(), replace(Plain(bootstrap=True), **mistake))


@pytest.mark.parametrize(
    ("case", "mistake"),
    [
        ("kl target, in the rewards", {"kl_horizon": 32}),
        ("kl target, in the rewards", {"kl_target": 1e9, "kl_horizon": 1e9}),
        ("target_kl", {"target_kl": 1e9}),
        ("min_new_tokens", {"min_tokens": 3}),
        ("ptx", {"ptx_coef": 0.8}),
        ("ptx", {"texts": tuple((ids, 2) for ids, _ in TEXTS)}),
        ("ptx", {"texts": tuple((ids[:-1], 1) for ids, _ in TEXTS)}),
        ("target_kl", {"target_kl": TARGET_KL / 10}),
        ("a head on the policy", {"critic_coef": 0.45}),
    ],
    ids=str,
)
def test_a_mistake_in_the_options_would_be_found(case: str, mistake: dict[str, Any]) -> None:
    plain, sections = CASES[case]
    assert disagreements(run_of_trainer(sections), replace(plain, **mistake))
