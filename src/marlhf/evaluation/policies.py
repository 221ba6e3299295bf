"""Models to evaluate: labels, paths, and everything that needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlhf.common.chat_templates import fix_date
from marlhf.common.errors import UserError
from marlhf.common.paths import local_path
from marlhf.common.tokenization import Tokenizer
from marlhf.config import EvaluateConfig, ModelSettings
from marlhf.config.evaluate import LoadingSettings
from marlhf.data.encoding import check_prompts, encode
from marlhf.data.prompts import Prompt, render
from marlhf.distributed import Placement
from marlhf.evaluation.records import identity
from marlhf.models import loading


@dataclass(frozen=True)
class PolicySource:
    """A model that is not loaded yet.

    label       its name in results
    key         its name in messages
    longest     tokens of the longest sequence, prompt and response
    prompt_ids  token ids of every prompt
    identity    changes when the model's files do
    """

    label: str
    key: str
    settings: ModelSettings
    lm_config: Any
    tokenizer: Tokenizer
    longest: int
    prompt_ids: list[list[int]]
    identity: list[Any]

    def load(self, placement: Placement) -> Any:
        """Load the weights. Raises UserError."""
        return loading.load_policy(
            self.settings, self.tokenizer, self.lm_config, self.key, self.longest, placement
        )


def labelled(policies: str | Sequence[str] | dict[str, str]) -> dict[str, str]:
    """Return `{label: path}`; labels default to the runs' folder names. Raises UserError."""
    if isinstance(policies, dict):
        return policies
    paths = [policies] if isinstance(policies, str) else list(policies)
    by_label: dict[str, str] = {}
    for path in paths:
        parts = [part for part in Path(path).expanduser().parts if part not in ("final", "/")]
        label = parts[-1] if parts else path
        if label in by_label:
            raise UserError(
                f"policies: {by_label[label]!r} and {path!r} would both be called {label!r}; give "
                "a mapping {label: path}"
            )
        by_label[label] = path
    return by_label


def model_folder(path: str) -> str:
    """Path of a model; for the folder of a run, the policy in its `final/`."""
    folder = local_path(path, "policies")
    final = folder / "final"
    return str(final) if final.is_dir() and not (folder / "config.json").is_file() else path


def policy_settings(loading_settings: LoadingSettings, path: str) -> ModelSettings:
    """How one policy is loaded. Raises UserError."""
    return ModelSettings(
        path=model_folder(path),
        precision=loading_settings.precision,
        trust_remote_code=loading_settings.trust_remote_code,
        chat_template=loading_settings.chat_template,
    )


def source(
    label: str, path: str, key: str, config: EvaluateConfig, prompts: Sequence[Prompt]
) -> PolicySource:
    """Load a model without its weights, and check the prompts with it. Raises UserError."""
    settings = policy_settings(config.model, path)
    lm_config = loading.load_model_config(settings, key)
    tokenizer = loading.load_tokenizer(settings, key)
    fix_date(tokenizer, config.data.template_date)
    loading.check_tokenizer(tokenizer, lm_config, key)
    loading.check_architecture(lm_config, settings, key)
    positions = loading.position_limit(lm_config)
    check_prompts([prompts], tokenizer, config.rollout, positions)
    texts = [render(prompt, tokenizer) for prompt in prompts]
    special = [prompt.messages is None for prompt in prompts]
    ids, _ = encode(texts, tokenizer, config.rollout.max_prompt_length, special)
    longest, files = config.rollout.longest, identity(settings.path)
    return PolicySource(label, key, settings, lm_config, tokenizer, longest, ids, files)


def check_same_tokens(reference: PolicySource, policies: Sequence[PolicySource]) -> None:
    """Check that policies have the reference's tokens: KL compares token by token.

    Raises UserError where they differ.
    """
    vocabulary = reference.tokenizer.get_vocab()
    sizes = reference.lm_config.get_text_config().vocab_size
    for policy in policies:
        same_size = policy.lm_config.get_text_config().vocab_size == sizes
        if not same_size or policy.tokenizer.get_vocab() != vocabulary:
            raise UserError(
                f"reference: {reference.settings.path!r} has other tokens than {policy.key} "
                f"({policy.settings.path!r}); KL needs the same"
            )
