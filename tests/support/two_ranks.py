"""A tiny run, started once a rank: `python two_ranks.py FOLDER SECTIONS_JSON`.

It leaves the run's files, the critic's weights, and `launch.json`: how the models were spread.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlhf.config import LoraSettings, QuantizationSettings
from marlhf.models import loading
from marlhf.rollout import transformers_engine
from marlhf.training.ppo import PPOTrainer
from support.runs import PROMPTS, tiny_trainer


def weights(trainer: PPOTrainer, module: Any) -> dict[str, torch.Tensor]:
    """All weights of a policy or critic, from wherever they are."""
    module = trainer.distributed.unwrap(module)
    with trainer.distributed.gathered(module):
        return {name: x.detach().clone() for name, x in module.state_dict().items()}


def goes_on_after_loading(trainer: PPOTrainer, folder: Path) -> bool:
    """Whether an update after `load` is that after `save`, bit by bit."""
    learners = {"policy": trainer.policy, "critic": trainer.critic}
    outcomes = []
    for name, learner in learners.items():
        learner.save(folder / name)
    for _ in range(2):
        row = trainer.step(PROMPTS)
        numbers = {k: v for k, v in row.items() if "_second" not in k and "memory" not in k}
        outcomes.append(
            (numbers, [weights(trainer, learner.model) for learner in learners.values()])
        )
        trainer.step_count -= 1
        for name, learner in learners.items():
            learner.load(folder / name)
    (first, before), (second, after) = outcomes
    pairs = [(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a]
    return first == second and all(torch.equal(a, b) for a, b in pairs)


def noting_dtypes() -> dict[str, list[str]]:
    """Of the policy's weights while it samples, by the kind of their layer."""
    found: dict[str, list[str]] = {}
    real = transformers_engine.generate

    def generate(policy: Any, *arguments: Any) -> Any:
        for part in policy.model.modules():
            for parameter in part.parameters(recurse=False):
                name = str(parameter.dtype).removeprefix("torch.")
                found[type(part).__name__] = sorted({*found.get(type(part).__name__, []), name})
        return real(policy, *arguments)

    transformers_engine.generate = generate
    return found


def counting_reads() -> list[str]:
    """Paths of the models whose files this rank reads."""
    paths, real = [], loading._read_weights

    def read(auto: Any, settings: Any, *arguments: Any, **keys: Any) -> Any:
        paths.append(settings.path)
        return real(auto, settings, *arguments, **keys)

    loading._read_weights = read
    return paths


def spoil_the_second_update(trainer: PPOTrainer, name: str) -> None:
    """Let the gradient of one of the policy's weights, and of no other, be NaN in it."""
    module: Any = trainer.distributed.unwrap(trainer.policy.model)
    (weight,) = (p for n, p in module.named_parameters() if n.endswith(name))
    weight.register_hook(lambda g: g * float("nan") if trainer.step_count == 1 else None)


def sub_groups(trainer: PPOTrainer) -> int:
    """Into how many DeepSpeed cuts a rank's part of the policy; 0 without ZeRO-3."""
    return len(getattr(trainer.policy.optimizer, "fp16_groups", ()))


def timeouts() -> list[float]:
    """Those of all groups of ranks, in seconds."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return sorted({backend.options._timeout.total_seconds() for backend in backends})


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    sections = json.loads(sys.argv[2])
    if lora := sections.get("model", {}).get("lora"):
        sections["model"]["lora"] = LoraSettings(**lora)
    if quantization := sections.get("model", {}).get("quantization"):
        sections["model"]["quantization"] = QuantizationSettings(**quantization)
    resume, spoiled = sections.pop("resume", False), sections.pop("spoiled", None)
    reads = counting_reads()
    trainer = tiny_trainer(folder, **sections)
    if spoiled is not None:
        spoil_the_second_update(trainer, spoiled)
    trainer.eval_prompts = list(trainer.stream.prompts[:3])  # an uneven share each
    sampled_in = noting_dtypes()
    trainer.train()
    distributed = trainer.distributed
    assert trainer.reference is not None
    launch = {
        "ranks": distributed.world_size,
        "stage": distributed.zero_stage,
        "policy": type(trainer.policy.model).__name__,
        "critic": trainer.critic and type(trainer.critic.model).__name__,
        "reference_here": sum(p.numel() for p in trainer.reference.parameters()),
        "sub_groups": sub_groups(trainer),
        "timeouts": timeouts(),
        "sampled_in": sampled_in,
        "reads": distributed.gather_objects([len(reads)]),
        "goes_on": resume and goes_on_after_loading(trainer, folder),
    }
    critic = weights(trainer, trainer.critic.model) if trainer.critic else {}
    if distributed.is_main:
        torch.save(critic, folder / "critic.pt")
        (folder / "launch.json").write_text(json.dumps(launch))


if __name__ == "__main__":
    main()
