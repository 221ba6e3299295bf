"""The engine `vllm`: vLLM in the trainer's process, one instance per rank, or servers.

In this process weights go in from memory, tensor by tensor; `vllm_servers` has the servers.
Log-probabilities for the loss are still those of the policy's own forward pass; vLLM's are in
`Generation.logprobs`, so that the gap is measured.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from marlhf.common.errors import UserError, one_line
from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.models.policy import unwrapped
from marlhf.rollout.engine import EngineContext
from marlhf.rollout.vllm_client import checked_address
from marlhf.rollout.vllm_sampling import PolicyFacts, Sampled
from marlhf.rollout.vllm_servers import VLLMServers, check_servers

_OF_THIS_PROCESS = ("memory_fraction", "cache_gb", "dtype", "tensor_parallel", "options")
_OF_SERVERS = ("timeout_seconds", "on_failure")
# arguments of `vllm.LLM`, and the settings that give them
_SET = {
    "gpu_memory_utilization": "memory_fraction",
    "kv_cache_memory_bytes": "memory_fraction, on a CPU cache_gb",
    "dtype": "dtype",
    "tensor_parallel_size": "tensor_parallel",
}


Request = tuple[Sequence[int], int]  # token ids of a prompt, and a seed


@dataclass(frozen=True)
class VLLMSettings:
    """Configuration of the engine: in this process, or servers at addresses.

    Unlike `VLLM` it can be made where vLLM is not installed.

    memory_fraction   share of a GPU's memory for vLLM's weights and KV cache
    cache_gb          on a CPU, GiB for the KV cache
    dtype             of its weights; `auto`: bfloat16 where `model.precision` is bf16, else float32
    tensor_parallel   ranks that hold one instance together, instead of one on each; of several
    options           further arguments of `vllm.LLM`, passed through; none that these set

    address           of one or several servers, instead of these
    timeout_seconds   without a token, or an answer, before a server counts as lost
    on_failure        of a server: `stop`, or `continue` with the others
    """

    memory_fraction: float = 0.4
    cache_gb: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    address: str | list[str] | None = None
    timeout_seconds: float = 120.0
    on_failure: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        if not 0 < self.memory_fraction < 1:
            raise UserError(f"memory_fraction: given {self.memory_fraction:g}, must be in (0, 1)")
        if self.cache_gb <= 0:
            raise UserError(f"cache_gb: given {self.cache_gb:g}, must be above 0")
        if self.tensor_parallel < 1:
            raise UserError(f"tensor_parallel: given {self.tensor_parallel}, must be at least 1")
        if not 0 < self.timeout_seconds < math.inf:
            raise UserError(f"timeout_seconds: given {self.timeout_seconds:g}, must be above 0")
        for option, key in _SET.items():
            if option in self.options:
                raise UserError(f"options.{option}: leave it out, and set {key}")
        of_the_other = _OF_SERVERS if self.address is None else _OF_THIS_PROCESS
        for name in of_the_other:
            if getattr(self, name) != getattr(VLLMSettings, name, {}):
                use = "needs address" if self.address is None else "is of vllm without address"
                raise UserError(f"{name}: {use}; leave it out")
        if self.address is not None:
            _ = self.addresses  # raises where one is none

    @property
    def addresses(self) -> list[str]:
        """Addresses of the servers. Raises UserError."""
        texts = [self.address] if isinstance(self.address, str) else self.address or []
        addresses = [checked_address(text) for text in texts]
        if not addresses or len({*addresses}) < len(addresses):
            raise UserError("address: must hold at least one server, and each only once")
        return addresses

    @property
    def samples_ahead(self) -> bool:
        """Whether it samples while the trainer trains."""
        return self.address is not None

    @property
    def samples_together(self) -> bool:
        """Whether ranks sample together, and all of them must ask equally often."""
        return self.tensor_parallel > 1

    def __call__(self, context: EngineContext) -> VLLMEngine | VLLMServers:
        """Start vLLM, or meet the servers."""
        if self.address is None:
            return VLLMEngine(self, context)
        return VLLMServers(self.addresses, self.timeout_seconds, self.on_failure, context)


class VLLM(VLLMSettings):
    """The engine's configuration, of a vLLM that is installed or servers that answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address is not None:
            check_servers(self.addresses, self.timeout_seconds)
            return
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vllm is imported
        try:
            importlib.import_module("vllm")
        except ImportError as error:
            raise UserError(
                f"needs the package vllm ({one_line(error)}); install marlhf[vllm]"
            ) from error


class VLLMEngine:
    """vLLM, sampling for this rank, or for a group of ranks that hold it together."""

    def __init__(self, settings: VLLMSettings, context: EngineContext) -> None:
        # the engine runs in this process, so that it can take tensors, and exits with it
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads
        vllm: Any = importlib.import_module("vllm")
        self._distributed, ranks = context.distributed, context.distributed.world_size
        self._group = settings.tensor_parallel if ranks > 1 else 1  # alone it holds all of it
        if ranks % self._group:
            raise UserError(
                f"rollout.engine: tensor_parallel: given {self._group}, must divide the number of "
                f"processes, {ranks}"
            )
        lm = unwrapped(context.distributed.unwrap(context.policy).model)
        self._facts = PolicyFacts.of(context)
        on_cpu = context.distributed.device.type == "cpu"
        dtype = "bfloat16" if context.distributed.precision == "bf16" else "float32"
        arguments: dict[str, Any] = {
            "runner": "generate",
            "load_format": "dummy",  # `update_weights` sets the weights
            "dtype": dtype if settings.dtype == "auto" else settings.dtype,
            "max_model_len": self._facts.longest,
            "logprobs_mode": "processed_logprobs",  # those it samples from
            "generation_config": "vllm",  # sampling settings are ours alone
            "enable_sleep_mode": not on_cpu,
        }
        if on_cpu:
            arguments["kv_cache_memory_bytes"] = int(settings.cache_gb * 2**30)
        else:
            arguments["gpu_memory_utilization"] = settings.memory_fraction
        if context.distributed.world_size > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
            arguments["tensor_parallel_size"] = self._group
        arguments |= settings.options
        with tempfile.TemporaryDirectory(prefix="marlhf-vllm-") as folder:
            config = copy.deepcopy(lm.config)
            config.architectures = [type(lm).__name__]  # absent where no files were read
            config.save_pretrained(folder)
            context.tokenizer.save_pretrained(folder)
            self._llm = vllm.LLM(model=folder, **arguments)
        self._sleeps, self._asleep = bool(arguments["enable_sleep_mode"]), False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Generation:
        """Sample one response per prompt; the same for the same seeds, batch and version."""
        vllm: Any = importlib.import_module("vllm")
        self._wake()
        requests, first = self._of_group(list(zip(prompts, seeds, strict=True)))
        parameters = [
            vllm.SamplingParams(**self._facts.parameters(seed, settings)) for _, seed in requests
        ]
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt, _ in requests]
        results = self._llm.generate(inputs, parameters, use_tqdm=False)
        ours = results[first : first + len(prompts)]
        return self._facts.generation(prompts, [_response(r.outputs[0]) for r in ours])

    def _of_group(self, requests: list[Request]) -> tuple[list[Request], int]:
        """The requests of all ranks that hold the instance, and where this rank's begin."""
        if self._group == 1:
            return requests, 0
        of_ranks: list[list[Request]] = self._distributed.gather_objects([requests])
        first = self._distributed.rank - self._distributed.rank % self._group
        before = sum(map(len, of_ranks[first : self._distributed.rank]))
        group = of_ranks[first : first + self._group]
        return [request for of_rank in group for request in of_rank], before

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the weights in place, and drop cached keys and values of the old ones."""
        self._wake()
        arguments = {"weights_iterator": self._facts.with_tied(weights)}
        self._llm.collective_rpc("reload_weights", kwargs=arguments)
        self._llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Move weights to the host and drop the KV cache; on a CPU a no-op."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Shut vLLM down."""
        self._llm.llm_engine.engine_core.shutdown()

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


def _response(output: Any) -> Sampled:
    tokens = list(output.token_ids)
    logprobs = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    return Sampled(tokens, logprobs, output.finish_reason == "stop")
