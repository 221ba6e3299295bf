"""Responses of each policy, and their log-probabilities under it and under the reference."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from marlhf.common.errors import UserError
from marlhf.common.memory_errors import doing
from marlhf.common.seeds import EVAL_STEP, row_seed
from marlhf.common.tokenization import ResponseDecoder, has_text
from marlhf.common.types import Generation, Sequences
from marlhf.config.sections import sampling_engine
from marlhf.evaluation.bench import Bench
from marlhf.evaluation.policies import PolicySource
from marlhf.evaluation.records import JsonLine, Key, fingerprint
from marlhf.models.policy import Policy, forward
from marlhf.rewards.learned import right_pad
from marlhf.rollout.batching import micro_batches
from marlhf.rollout.engine import Engine, EngineContext, start_engine
from marlhf.rollout.policy_weights import policy_weights
from marlhf.rollout.transformers_engine import left_pad

# settings that change no response, or are part of the key
_WITHOUT_EFFECT = (
    *("batch_size", "micro_batch_size", "responses_per_prompt", "temperature"),
    *("importance", "old_logprobs", "ahead"),
)


def fingerprints(bench: Bench, source: PolicySource) -> list[str]:
    """Fingerprint per prompt of everything that its responses depend on except their key."""
    config = bench.config
    settings = {k: v for k, v in asdict(config.rollout).items() if k not in _WITHOUT_EFFECT}
    settings["engine"] = sampling_engine(config.rollout.engine)
    if settings["engine"] == "transformers":
        del settings["engine"]  # responses recorded before there were engines remain valid
    common = [source.identity, settings, config.seed, config.model.precision]
    return bench.from_main([fingerprint(common, ids) for ids in source.prompt_ids])


def pending_samples(bench: Bench, source: PolicySource, prints: Sequence[str]) -> list[Key]:
    """Keys of the responses still to be sampled.

    Raises UserError where recorded ones are by other settings, another model or other data.
    """
    lines, keys = bench.samples.lines, bench.response_keys([source])
    stale = sum(key in lines and lines[key]["fingerprint"] != prints[key[2]] for key in keys)
    if stale:
        raise UserError(
            f"output_dir: {bench.config.output_dir!r} holds {stale} responses of {source.label!r} "
            "that were sampled by another model, from other data, or with other settings (seed, "
            "model.precision, rollout); choose another, or set overwrite=true to sample anew"
        )
    return [key for key in keys if key not in lines]


def sample_policy(bench: Bench, source: PolicySource, prints: Sequence[str]) -> None:
    """Sample the missing responses; the policy is in memory only meanwhile."""
    if pending := pending_samples(bench, source, prints):
        _sample_keys(bench, source, prints, pending)
        free_memory()


@doing("sampling")
def _sample_keys(
    bench: Bench, source: PolicySource, prints: Sequence[str], pending: list[Key]
) -> None:
    policy = source.load(bench.distributed.placement(sharded=False))
    context = EngineContext(
        policy, source.tokenizer, bench.distributed, bench.config.rollout.longest
    )
    engine = start_engine(bench.engine, context)

    def sample(keys: list[Key]) -> list[JsonLine]:
        lines = _sampled(bench, policy, engine, source, keys)
        for line, (_, _, row, _) in zip(lines, keys, strict=True):
            line |= {"prompt": bench.prompts[row].text, "fingerprint": prints[row]}
        return lines

    try:
        engine.update_weights(policy_weights(policy))
        bench.record_all(bench.samples, pending, f"responses of {source.label}", sample)
    finally:
        engine.close()


def _sampled(
    bench: Bench, policy: Policy, engine: Engine, source: PolicySource, keys: Sequence[Key]
) -> list[JsonLine]:
    """Records of responses sampled at one temperature.

    Noise depends on seed, row and sample alone: policies and temperatures are compared on the same
    draws, and sample 0 has those of a training run's own held-out evaluation.
    """
    settings = replace(bench.config.rollout, temperature=keys[0][1])
    ids = [source.prompt_ids[row] for _, _, row, _ in keys]
    seeds = [row_seed(bench.config.seed, EVAL_STEP - sample, row) for _, _, row, sample in keys]
    generation = engine.generate(ids, seeds, settings)
    logprobs = sequence_logprobs(bench, policy, generation, settings.temperature)
    lengths, finished = generation.lengths.tolist(), generation.finished.tolist()
    decoder = ResponseDecoder(source.tokenizer, policy.eos_ids, settings.skip_special_tokens)
    lines = []
    for i in range(len(keys)):
        tokens = generation.response_ids[i, : lengths[i]].tolist()
        response = decoder.text(tokens, has_text(ids[i], source.tokenizer))
        lines.append({"response": response, "tokens": tokens, "finished": finished[i]})
        lines[-1]["logprob"] = logprobs[i]
    return lines


@torch.no_grad()
@doing("scoring")
def sequence_logprobs(
    bench: Bench, policy: Policy, generation: Generation, temperature: float
) -> list[float]:
    """[B] log pi(response | prompt) as sampled at `temperature`, nats, by a log-prob pass."""
    sequences = Sequences.of(generation)
    totals = [0.0] * len(sequences.input_ids)
    settings = bench.config.rollout
    size = settings.micro_batch_size or len(totals)
    for index in micro_batches(sequences.attention_mask, size):
        with bench.distributed.autocast():
            logprobs, _ = forward(
                policy,
                sequences.select(index),
                temperature=temperature,
                min_tokens=settings.min_new_tokens,
            )
        for i, total in zip(index.tolist(), logprobs.double().sum(1).tolist(), strict=True):
            totals[i] = total
    return totals


@doing("scoring")
def measure_kl(bench: Bench, reference: PolicySource) -> None:
    """Record the k1 KL of every response, log(policy / reference) at its temperature, nats."""
    samples, identity = bench.samples.lines, bench.from_main(reference.identity)
    prints = {
        key: fingerprint(identity, samples[key]["fingerprint"], samples[key]["tokens"])
        for key in bench.response_keys()
    }
    prompt_ids = {source.label: source.prompt_ids for source in bench.sources}

    def prepare():
        policy = reference.load(bench.distributed.placement(sharded=False))

        def values_of(keys: list[Key]) -> list[float | None]:
            rows = [prompt_ids[label][row] for label, _, row, _ in keys]
            generation = _generation(bench, rows, [samples[key] for key in keys])
            logprobs = sequence_logprobs(bench, policy, generation, keys[0][1])
            return [samples[key]["logprob"] - x for key, x in zip(keys, logprobs, strict=True)]

        return values_of

    bench.measure("kl", prints, prepare)
    free_memory()


def _generation(bench: Bench, prompts: list[list[int]], lines: Sequence[JsonLine]) -> Generation:
    """Recorded responses as a batch."""
    tensors = (
        *left_pad(prompts, 0),
        *right_pad([line["tokens"] for line in lines]),
        torch.tensor([line["finished"] for line in lines]),
    )
    return Generation(*(x.to(bench.distributed.device) for x in tensors))


def free_memory() -> None:
    """Free the memory of models that are no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
