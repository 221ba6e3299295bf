"""The engine contract: prompts and seeds in, responses out, all as token ids.

An engine is named in YAML by `rollout.engine`: `transformers`, an import path, or a mapping with
`name` and arguments. The name stands for a factory, a class whose fields are its configuration; it
is built before any model is loaded, and called on an `EngineContext` once the policy is there.

Nothing downstream depends on the engine: log-probabilities and values come from forward passes over
the sampled sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from marlhf.common.errors import UserError, short_repr
from marlhf.common.plugins import plugin_call
from marlhf.common.registry import Registry, Spec, plugin_name
from marlhf.common.tokenization import Tokenizer
from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.distributed import Distributed
from marlhf.models.policy import unwrapped
from marlhf.rollout.plugin_engine import PluginEngine

ENGINES = Registry(
    kind="engine",
    group="marlhf.engines",
    factories={
        "transformers": "marlhf.rollout.transformers_engine.Transformers",
        "vllm": "marlhf.rollout.vllm_engine.VLLM",
    },
    arguments=("context",),
)
METHODS = ("generate", "update_weights", "sleep", "close")
AHEAD = ("begin",)  # of engines whose factory has a true `samples_ahead`


class Engine(Protocol):
    """Samples responses on this rank.

    A training run calls each method equally often on all ranks; an evaluation may not.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Generation:
        """Sample one response per prompt, with the sampling settings of `settings` alone.

        prompts   token ids
        seeds     seeds[i] fixes all randomness of response i, whatever batch it is in
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the policy's weights, adapters merged, tensor by tensor.

        Called before the first `generate`, and after each update.
        On several ranks each step of `weights` may be a collective: take all of them or none.
        """
        ...

    def sleep(self) -> None:
        """Give memory back until the next call."""
        ...

    def close(self) -> None:
        """Release everything for good."""
        ...


@dataclass(frozen=True)
class EngineContext:
    """What `start_engine` passes to an engine's factory.

    policy    a `Policy`, wrapped for several ranks or not
    longest   tokens of the longest sequence, prompt and response
    """

    policy: nn.Module
    tokenizer: Tokenizer
    distributed: Distributed
    longest: int


EngineFactory = Callable[[EngineContext], Engine]


class AheadEngine(Engine, Protocol):
    """An engine that samples elsewhere, while the trainer trains."""

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Callable[[], Generation]:
        """Start what `generate` does; the returned function waits for the responses.

        It is called before the next `update_weights`, on all ranks before on any.
        """
        ...


def samples_ahead(factory: EngineFactory) -> bool:
    """Whether an engine is an `AheadEngine`: its factory has a true `samples_ahead`."""
    return bool(getattr(factory, "samples_ahead", False))


def check_ahead(factory: EngineFactory, ahead: int) -> None:
    """Check that an engine can sample `ahead` updates ahead. Raises UserError."""
    if ahead and not samples_ahead(factory):
        raise UserError(
            f"rollout.ahead: given {ahead}, but {ENGINES.label(factory)} samples in the trainer's "
            "process, where the trainer waits for it; servers can: "
            "rollout.engine={name: vllm, address: [...]}"
        )


def build_engine(spec: Spec | EngineFactory) -> EngineFactory:
    """Build an engine's factory, see `Registry.build`. Raises UserError."""
    return ENGINES.build(spec)


def start_engine(factory: EngineFactory, context: EngineContext) -> Engine:
    """Start an engine on a policy. Raises UserError where it is none by the contract.

    What an engine of another package raises or gives wrongly later is a UserError that names it.
    """
    name = ENGINES.label(factory)
    with plugin_call(name):
        engine = factory(context)
    methods = (*METHODS, *(AHEAD if samples_ahead(factory) else ()))
    if missing := [method for method in methods if not callable(getattr(engine, method, None))]:
        raise UserError(
            f"{name}: gave {short_repr(engine)}, which has no {', '.join(missing)}; an "
            f"engine has the methods {', '.join(methods)}"
        )
    if type(engine).__module__.startswith("marlhf."):  # a fault there is a bug
        return engine
    policy = context.distributed.unwrap(context.policy)
    vocabulary = unwrapped(policy.model).get_input_embeddings().num_embeddings
    return PluginEngine(name, engine, vocabulary, context.distributed.device)


def engine_name(engine: Engine) -> str:
    """Name of an engine in messages."""
    return plugin_name(engine.engine if isinstance(engine, PluginEngine) else engine)
