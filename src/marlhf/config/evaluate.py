"""The configuration of `marlhf evaluate`.

The docstring under a field is its line in `marlhf evaluate --help`.
"""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, model_validator
from pydantic.dataclasses import dataclass

from marlhf.common.registry import Spec
from marlhf.config.sections import (
    STRICT,
    Count,
    DataSettings,
    Minutes,
    Natural,
    NonEmptyPath,
    NonNegative,
    Positive,
    RolloutSettings,
    Text,
)

Label = Annotated[str, Field(min_length=1, pattern=r"\S")]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LoadingSettings:
    """How every policy and the reference are loaded."""

    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the matrix products."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model."""
    chat_template: str | None = None
    """A Jinja chat template, for tokenizers that have none."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PassSettings:
    """pass@k: the chance that one of k responses passes (Chen et al. 2021, unbiased)."""

    k: Annotated[list[Count], Field(min_length=1)] = Field(default_factory=lambda: [1])
    """Numbers of tries; none above rollout.responses_per_prompt."""
    reward: str | None = None
    """Reward that decides whether a response passes, by its name in the results; default: the
    weighted sum of all rewards."""
    threshold: float = 1.0
    """A response passes when that reward is at least this much."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class JudgeSettings:
    """A language model as judge, behind an OpenAI-compatible endpoint."""

    url: Text
    """Address of the API, such as https://api.openai.com/v1."""
    model: Text
    """Model that judges."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable with the API key; null: the server wants none. The key itself is never
    written or shown."""
    task: Literal["general", "summarization", "dialogue", "question_answering"] = "general"
    """The criteria that the judge is told."""
    limit: Count | None = None
    """Judge the first prompts only."""
    temperature: NonNegative | None = 0.0
    """Sampling temperature of the judge; null: leave it to the server."""
    max_tokens: Count = 512
    """Length limit of its answer, in tokens."""
    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """Further keys of the request's body, passed through."""
    concurrency: Count = 8
    """Concurrent requests."""
    timeout_seconds: Positive = 60.0
    """Time for one answer."""
    retries: Natural = 5
    """Further tries after a time-out, a connection error or status 408, 409, 429 or 5xx, after
    pauses that double (or last as long as the server asks)."""
    reasks: Natural = 2
    """Further tries after an answer without a verdict, which is then counted as invalid."""
    price_in: NonNegative | None = None
    """Price of a million tokens read, for the estimate; give both prices or none."""
    price_out: NonNegative | None = None
    """Price of a million tokens written."""
    max_cost: Positive | None = None
    """Limit of the cost, in the unit of the prices."""
    max_requests: Count | None = None
    """Limit of the number of requests."""
    ask: bool = True
    """On a terminal, ask before the first request."""

    @model_validator(mode="after")
    def _check(self) -> JudgeSettings:
        if not self.url.isprintable() or " " in self.url:
            raise ValueError("url: must hold no blank, line break or control character")
        no_address = "url: its host or port is none that exists"
        try:
            parts = urlsplit(self.url)
            port = parts.port
            (parts.hostname or "").encode("idna")
        except ValueError:  # a port above 65535, half an IPv6 address, an empty label
            raise ValueError(no_address) from None
        if port == 0:
            raise ValueError(no_address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                "url: must begin with http:// or https://, such as https://api.openai.com/v1"
            )
        if parts.username is not None or parts.password is not None:
            raise ValueError("url: must hold no user name or password; see api_key_env")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in: give both price_in and price_out, or none of them")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError("max_cost: needs price_in and price_out")
        if self.api_key_env is not None and not self.api_key_env.isidentifier():
            raise ValueError(
                "api_key_env: must be the name of an environment variable, such as "
                "OPENAI_API_KEY (never the key)"
            )
        reserved = sorted({"model", "messages", "stream", "n"} & self.extra.keys())
        if reserved:
            raise ValueError(f"extra: {reserved[0]!r} cannot be given here")
        return self


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RaterSettings:
    """A file for human raters, and the scoring of their ratings."""

    format: Literal["csv", "jsonl"] = "csv"
    """Format of the file to fill in; CSV opens in a spreadsheet."""
    limit: Count | None = None
    """Prompts in it, drawn by the seed; default: all."""
    ratings: list[NonEmptyPath] = Field(default_factory=list)
    """Files that raters have filled in, to be scored."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything a `marlhf evaluate` run needs."""

    policies: (
        NonEmptyPath
        | Annotated[list[NonEmptyPath], Field(min_length=1)]
        | dict[Label, NonEmptyPath]
    )
    """Policies to evaluate: a run's folder, a model's path or hub name, a list of these, or a
    mapping {label: path}."""
    baseline: str | None = None
    """Label of the policy that the others are compared with; default: the first."""
    reference: NonEmptyPath | None = None
    """Model or run that KL is measured to; null: no KL."""
    model: LoadingSettings = Field(default_factory=LoadingSettings)
    """How models are loaded."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The prompts. With a training run's section its held-out rows are used; with eval_rows=0 all
    rows of `path`."""
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    """Sampling. Here batch_size is the responses sampled at once over all ranks, and
    micro_batch_size the sequences of a log-prob pass (default: all)."""
    temperatures: list[Positive] = Field(default_factory=list)
    """Temperatures to sweep, instead of rollout.temperature; win rates by judge and raters are at
    the first."""
    rewards: Spec | list[Spec] = Field(default_factory=list)
    """Rewards as in `reward.models` of ppo: each is reported, and their weighted sum as `score`."""
    rouge_column: str | None = None
    """Column with a text to compare responses with: ROUGE-1, -2 and -L (`marlhf[rouge]`)."""
    pass_at: PassSettings | None = None
    """pass@k."""
    best_of: list[Count] = Field(default_factory=list)
    """Best-of-n curve: values of n, none above rollout.responses_per_prompt."""
    judge: JudgeSettings | None = None
    """Win rates by a language model."""
    raters: RaterSettings | None = None
    """Win rates by people."""
    resamples: Annotated[int, Field(ge=100, le=10**6)] = 2000
    """Bootstrap resamples of the prompts behind every 95% interval."""
    output_dir: NonEmptyPath = "runs/evaluation"
    """Where results are written; run again to resume where it stopped."""
    overwrite: bool = False
    """Sample and score again, deleting the results in output_dir. A judge's answers and raters'
    files stay: each answer is stored with its question."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Fixes every random draw."""
    distributed_timeout_minutes: Minutes = 360
    """How long a rank waits for the others, as while one writes a checkpoint, before the run
    fails."""

    @model_validator(mode="after")
    def _cross_checks(self) -> EvaluateConfig:
        rollout = self.rollout
        for key in ("importance", "old_logprobs", "ahead"):
            if getattr(rollout, key) != getattr(RolloutSettings, key):
                raise ValueError(f"rollout.{key}: is of ppo alone; nothing is trained here")
        if rollout.min_new_tokens > rollout.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens: given {rollout.min_new_tokens}, must not exceed "
                f"rollout.max_new_tokens={rollout.max_new_tokens}"
            )
        counts = {"best_of": self.best_of, "pass_at.k": self.pass_at.k if self.pass_at else []}
        for key, values in counts.items():
            if values and max(values) > rollout.responses_per_prompt:
                raise ValueError(
                    f"{key}: given {max(values)}, must not exceed "
                    f"rollout.responses_per_prompt={rollout.responses_per_prompt}"
                )
            if values and self.rewards in ([], {}):
                raise ValueError(f"{key}: needs `rewards`, which is empty")
        if not self.data.shuffle:
            raise ValueError("data.shuffle: given false, has no meaning here; leave it out")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError("temperatures: one of them is given twice")
        if self.policies in ([], {}):
            raise ValueError("policies: is empty, must name at least one")
        return self

    @property
    def swept_temperatures(self) -> list[float]:
        """Every temperature to sample at."""
        return self.temperatures or [self.rollout.temperature]
