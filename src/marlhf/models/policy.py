"""Policy, reference and critic: log-probabilities and values.

A policy is a causal LM whose forward returns log-probabilities of response tokens; a critic is a
backbone with a scalar head whose forward returns values. With LoRA policy, critic and reference
share one frozen base: each forward activates its own adapter, the reference none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from marlhf.common.errors import UserError, short_repr
from marlhf.common.types import Sequences

LOGITS_PER_CHUNK = 2**24  # fp32 logits alive at a time on a CPU: 64 MiB, whatever the vocabulary
_MOST_LOGITS_PER_CHUNK = 2**27  # on a GPU; a larger chunk gains nothing
_SHARE_OF_MEMORY = 128  # a chunk takes at most this part of a GPU's memory


class PolicyOutput(NamedTuple):
    """Output of a policy's forward pass.

    logprobs   [B,T] fp32, nats, 0 outside the mask
    extras     further outputs, by the names requested
    """

    logprobs: Tensor
    extras: dict[str, Tensor]


class CriticOutput(NamedTuple):
    """Output of a critic's forward pass: values [B,T] and last_values [B], fp32."""

    values: Tensor
    last_values: Tensor


class Policy(nn.Module):
    """Log-probabilities of responses under a causal LM.

    model     a transformers causal LM, or a PEFT model around one
    adapter   with PEFT: the adapter to run with, None for the bare base (the reference)
    head      Linear(H, 1), a value head on this policy's hidden states
    eos_ids   every token that ends a response
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str | None = None,
        head: nn.Linear | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.head = head
        self.eos_ids = list(eos_ids)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        response_mask: Tensor,
        temperature: float = 1.0,
        min_tokens: int = 0,
        extras: Collection[str] = (),
        position_ids: Tensor | None = None,
    ) -> PolicyOutput:
        """Log-probabilities of response tokens, fp32, nats; 0 outside the mask.

        input_ids, attention_mask [B,P+T] as in `Sequences`; logits are divided by `temperature`.
        EOS is masked for the first `min_tokens` tokens of a response, as in sampling: its
        probability would get no gradient there.
        position_ids [B,P+T] instead of an attention mask: packed rows without padding on the left.
        Each position 0 starts another example, which attends to itself alone.
        Logits are computed for response positions only, one chunk at a time.

        extras   names of further outputs:
            entropy            [B,T] nats, 0 outside the mask
            token_ranks        [B,T] int64, number of likelier tokens, 0 outside the mask
            hidden_states      [B,T+1,H] the last layer's, before each token and after the last
            token_embeddings   [B,T,H] input embeddings of the response tokens
            values             [B,T] and last_values [B] of the head, as `Critic` returns them
        """
        T = response_mask.shape[1]
        with use_adapter(self.model, self.adapter):
            causal_lm = unwrapped(self.model)
            hidden = backbone_forward(
                backbone_of(causal_lm), input_ids, attention_mask, position_ids
            )
            # a mask would tell the host in every use, and in its gradient, how much it keeps
            kept = response_mask.nonzero(as_tuple=True)
            before = hidden[:, -T - 1 : -1][kept]
            targets = input_ids[:, -T:][kept]
            excluded = None
            if min_tokens and self.eos_ids:
                early = torch.arange(T, device=hidden.device) < min_tokens
                excluded = early.expand_as(response_mask)[kept], self.eos_ids
            logprobs, of_logits = target_logprobs(
                causal_lm, before, targets, temperature, extras, excluded
            )
            outputs = {}
            if "hidden_states" in extras:
                outputs["hidden_states"] = hidden[:, -T - 1 :]
            if "values" in extras:
                assert self.head is not None
                states = head_states(self.head, hidden[:, -T - 1 :])
                outputs["values"], outputs["last_values"] = split_states(states, response_mask)
            if "token_embeddings" in extras:
                outputs["token_embeddings"] = causal_lm.get_input_embeddings()(input_ids[:, -T:])

        def placed(x: Tensor) -> Tensor:
            return x.new_zeros(response_mask.shape).index_put(kept, x)

        placed_extras = {name: placed(x) for name, x in of_logits.items()}
        return PolicyOutput(placed(logprobs), {**outputs, **placed_extras})


class Critic(nn.Module):
    """V(prompt, response[:t]) from a backbone and a scalar head.

    backbone  a transformers base model (no language-model head)
    head      Linear(H, 1)
    offset    subtracted from the head's output (a reward model's `score_offset`)
    model     the PEFT model that owns a shared backbone, to switch its adapters
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        offset: float = 0.0,
        model: nn.Module | None = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.trunk = backbone  # the name of its weights in checkpoints
        self.head = head
        self.offset = offset
        self._owner = [model]  # in a list: not a submodule
        self.adapter = adapter

    @property
    def owner(self) -> nn.Module | None:
        """The PEFT model that owns the backbone, None if it is not shared."""
        return self._owner[0]

    @property
    def backbone(self) -> nn.Module:
        """The base model that gives hidden states."""
        return self.trunk

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor
    ) -> CriticOutput:
        """Values of the states before each response token, and after the last one.

        values[b,t] is the head's output at the position before token t.
        """
        T = response_mask.shape[1]
        with use_adapter(self.owner, self.adapter):
            hidden = backbone_forward(self.backbone, input_ids, attention_mask)[:, -T - 1 :]
        states = head_states(self.head, hidden) - self.offset
        return CriticOutput(*split_states(states, response_mask))


def head_states(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Outputs of a scalar head: `hidden [B,T+1,H] -> [B,T+1]`, fp32, as bf16 would round values."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()


def split_states(states: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Split values `[B,T+1]` into those before each token [B,T] and after the last [B]."""
    last = states.gather(1, response_mask.sum(1, keepdim=True)).squeeze(1)
    return states[:, :-1], last


def score_offset(config: Any, key: str) -> float:
    """What a reward model's configuration subtracts from its scores; 0 without any.

    Raises UserError, naming `key`.
    """
    offset = getattr(config, "score_offset", None)
    if offset is None:
        return 0.0
    if not isinstance(offset, int | float) or not abs(offset) < torch.finfo(torch.float32).max:
        raise UserError(
            f"{key}: the config.json has score_offset {short_repr(offset)}, must be a finite number"
        )
    return float(offset)


def length_switch(config: Any) -> int | None:
    """Length beyond which a LongRoPE model switches rotary factors, in tokens; else None."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    switching = [p for p in parts if p.get("rope_type") == "longrope"]
    return min((p["original_max_position_embeddings"] for p in switching), default=None)


@contextmanager
def use_adapter(model: nn.Module | None, adapter: str | None) -> Iterator[None]:
    """Run a PEFT model with one adapter, or with none; no-op for other models.

    The adapter stays active on exit, because gradient checkpointing reruns the layers in the
    backward pass.
    """
    if model is None or not hasattr(model, "peft_config"):
        yield
        return
    from marlhf.compat.peft import activate, adapter_layers, enable

    layers = adapter_layers(model)
    for layer in layers:
        activate(layer, adapter)
    try:
        yield
    finally:
        for layer in layers:
            enable(layer)


def forward(model: nn.Module, sequences: Sequences, **arguments: Any) -> Any:
    """Call a policy or critic, wrapped for several ranks or not, on `Sequences`."""
    s = sequences
    return model(s.input_ids, s.attention_mask, s.response_mask, **arguments)


def backbone_of(model: Any) -> nn.Module:
    """The base model inside a transformers model with a head. Raises UserError."""
    for name in (model.base_model_prefix, "model"):  # Llama 4's prefix names no attribute
        if isinstance(backbone := getattr(model, name, None), nn.Module):
            return backbone
    raise UserError(f"model.path: {type(model).__name__} keeps its backbone where nothing names it")


def hidden_width(model: Any) -> int:
    """Width of a causal LM's last hidden states; in some it is below `hidden_size`."""
    inside = model.config.get_text_config().hidden_size
    return getattr(model.get_output_embeddings(), "in_features", inside)


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """The map hidden states -> logits, with the family's scaling and soft-capping of logits."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()

    def setting(*names: str) -> float | None:
        """The first of the families' names that is set, and not 0."""
        return next((value for n in names if (value := getattr(config, n, None))), None)

    softcap = setting("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    multiplier = setting("logit_scale") or 1.0
    divisor = setting("logits_scaling", "logits_mup_width_multiplier") or 1.0
    size = getattr(config, "unpadded_vocab_size", None)

    def logits(hidden: Tensor) -> Tensor:
        raw = head(hidden)
        if size and size < raw.shape[-1]:
            raw = raw[..., :size].contiguous()  # no view, which could not be overwritten
        raw = raw * multiplier if multiplier != 1.0 else raw
        raw = raw / divisor if divisor != 1.0 else raw
        return softcap * torch.tanh(raw / softcap) if softcap else raw

    return logits


def unwrapped(model: Any) -> Any:
    """The model itself: without PEFT's wrapper, which a model with adapters has."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def backbone_forward(
    backbone: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Hidden states [B,P+T,H]; positions count from the first real token under left padding.

    Given positions and no mask, transformers separates the examples of a packed row: for any
    attention, its mask never crosses a position that is not the previous one plus 1.
    """
    assert (attention_mask is None) != (position_ids is None)
    if attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        attention_mask = attention_mask.long()
    output = backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
    )
    return output.last_hidden_state


def logits_per_chunk(gpu_memory: int | None) -> int:
    """Logits of a chunk on a GPU of that many bytes; None: a CPU.

    Each chunk of a backward pass writes and adds a complete gradient of the head, so that few large
    ones are faster. A power of two: the same for all GPUs of a kind.
    """
    if gpu_memory is None:
        return LOGITS_PER_CHUNK
    largest = 2 ** int(math.log2(gpu_memory / (4 * _SHARE_OF_MEMORY)))
    return min(max(largest, LOGITS_PER_CHUNK), _MOST_LOGITS_PER_CHUNK)


def _memory_of(device: torch.device) -> int | None:
    is_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if is_gpu else None


def target_logprobs(
    causal_lm: Any,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    extras: Collection[str],
    excluded: tuple[Tensor, Sequence[int]] | None = None,
    per_chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`hidden [N,H], targets [N] -> logprobs [N]` and extras [N], in chunks of tokens.

    In training every chunk is checkpointed except the last, which backward needs first.

    excluded    mask [N] of tokens, and the ids that have probability 0 there
    per_chunk   logits of a chunk; default: those of the device
    """
    head = head_of(causal_lm)
    if per_chunk is None:
        per_chunk = logits_per_chunk(_memory_of(hidden.device))
    size = max(1, per_chunk // causal_lm.config.get_text_config().vocab_size)
    names = [name for name in ("entropy", "token_ranks") if name in extras]
    no_token = torch.zeros_like(targets, dtype=torch.bool)
    mask, excluded_ids = excluded or (no_token, [])

    def chunk(hidden: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        logits = head(hidden).float()
        if temperature != 1.0:
            logits = logits / temperature
        for i in excluded_ids:  # probability 0 has gradient 0: no need for autograd
            logits.detach()[:, i].masked_fill_(mask, torch.finfo(logits.dtype).min)
        outputs = {}
        if "token_ranks" in names:
            fixed = logits.detach()
            outputs["token_ranks"] = (fixed > fixed.gather(-1, targets[:, None])).sum(-1)
        logprobs, entropy, _ = _TargetLogprobs.apply(logits, targets, "entropy" in names)
        outputs["entropy"] = entropy
        return (logprobs, *(outputs[name] for name in names))

    if len(targets) == 0:
        nothing = hidden.sum(-1).float()  # an empty tensor that is still in the graph
        return nothing, dict.fromkeys(names, nothing)
    sizes = [size] * ((len(targets) - 1) // size)
    sizes = [len(targets) - sum(sizes), *sizes]
    chunks = list(zip(*(x.split(sizes) for x in (hidden, targets, mask)), strict=True))
    recomputed = len(chunks) - 1 if torch.is_grad_enabled() else 0
    parts = [checkpoint(chunk, *part, use_reentrant=False) for part in chunks[:recomputed]]
    parts += [chunk(*part) for part in chunks[recomputed:]]
    logprobs, *others = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, dict(zip(names, others, strict=True))


class _TargetLogprobs(torch.autograd.Function):
    """`logits [N,V], targets [N] -> logprobs [N], entropy [N] or None`, in place of the logits.

    Exponentials and gradient overwrite them, so both passes need one array of their size; the
    entropy and its gradient need another.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        entropy = None
        if with_entropy:
            entropy = logits.logsumexp(-1) - (torch.softmax(logits, -1) * logits).sum(-1)
        chosen = logits.gather(-1, targets[:, None])
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights, total, targets, entropy)
        return (chosen - top - total.log()).squeeze(-1), entropy, weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        gradient, of_entropy, of_weights = gradients
        assert of_weights is None
        if gradient is None and of_entropy is None:
            return None, None, None
        weights, total, targets, entropy = ctx.saved_tensors
        gradient = torch.zeros_like(total[:, 0]) if gradient is None else gradient
        p = None if of_entropy is None else weights / total
        of_logits = weights.mul_(-gradient[:, None] / total)
        of_logits.scatter_add_(1, targets[:, None], gradient[:, None])
        if p is not None:
            assert of_entropy is not None  # dH/dz = -p (log p + H)
            surprise = torch.xlogy(p, p).add_(p.mul_(entropy[:, None]))
            of_logits.sub_(surprise.mul_(of_entropy[:, None]))
        return of_logits, None, None
