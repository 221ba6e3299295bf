"""A gate at load: refuses models that the library would not compute exactly.

Outputs as computed for sampling and training are compared with the reference outputs: the model's
forward on the same tokens alone, without padding or cache. It takes a dozen passes over two
sequences of twelve tokens. The model, its modes and the random state are left unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from marlhf.common.deferred import values_of
from marlhf.common.errors import UserError, one_line
from marlhf.common.memory_errors import is_memory_error
from marlhf.compat.torch import TorchDispatchMode
from marlhf.models.decoding import Decoder
from marlhf.models.policy import Policy, backbone_forward, backbone_of, head_of, unwrapped

_TOKENS, _PADDING, _STEPS = 12, 2, 4  # of the longer sequence; left of the shorter; sampled tokens
_TOLERANCE = 0.01  # of the standard deviation; kernels of one family differ by up to 0.002
_TOLERANCE_IN_HALF = 1.0  # bf16 rounds by up to 0.2; true faults differ by 1.5 and more
_ATTEMPTS = 2  # rounding may flip a router's near tie, but not with other tokens too


def check_model(
    model: Any, key: str = "model.path", longest: int | None = None, samples: bool = True
) -> None:
    """Refuse a causal LM, or a sequence classifier's backbone, that is not computed exactly.

    longest   tokens of the run's longest sequence, which must not change others in its batch
    samples   whether the model will be sampled from

    Raises UserError for any error of the model.
    """
    with _restored(model), torch.no_grad(), as_computed(model):
        faults = (_fault(_Case(model, attempt), longest, samples) for attempt in range(_ATTEMPTS))
        if all(fault := f for f in faults):
            raise UserError(f"{key}: {type(model).__name__} {fault}")


def check_adapter(model: Any, samples: bool = False) -> None:
    """Refuse adapters that a PEFT model cannot run with, or bypasses.

    `F.linear(x, self.proj.weight)` bypasses the adapter of `proj`: it has no effect and gets no
    gradient, but would have an effect once merged. Layers that get no token, such as unused
    experts, are not checked.

    samples   whether the model will be sampled from

    Raises UserError.
    """
    base = model.get_base_model()
    passes = _restored(model), torch.no_grad(), as_computed(base)
    with passes[0], passes[1], passes[2], _BypassedAdapters(base) as bypassed:
        try:
            case = _Case(model.train().get_base_model(), 0)
            case.padded()
            if samples:
                case.model.eval()
                case.causal()
                case.sampled()
        except Exception as error:  # of peft, of the model
            raise UserError(
                f"model.lora: {type(base).__name__} cannot run with adapters on these layers, "
                f"choose others in target_modules: {_raised(error)}"
            ) from error
    if bypassed.layers:
        names = ", ".join(bypassed.layers)
        raise UserError(
            f"model.lora: {type(base).__name__} reads weights past their adapters, in {names}; "
            "leave these layers out of target_modules, or give model.lora.extra.exclude_modules="
            f"[{names}]"
        )


@torch.no_grad()
def check_packing(policy: Policy) -> None:
    """Check that two examples packed in one row have the hidden states of separate rows.

    Raises UserError for a family in which one example sees another.
    """
    lm = unwrapped(policy.model)
    ids = torch.arange(1, 8, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    parts = ids[:, :3], ids[:, 3:]
    positions = [torch.arange(part.shape[1], device=lm.device)[None] for part in parts]
    backbone, fault = backbone_of(lm), "does not keep examples in one row apart"
    try:
        with as_computed(lm):
            apart = [
                backbone_forward(backbone, i, None, p)
                for i, p in zip(parts, positions, strict=True)
            ]
            together = backbone_forward(backbone, ids, None, torch.cat(positions, 1))
            if is_close(together, torch.cat(apart, 1)):
                return
    except Exception as error:  # of the model's code
        if is_memory_error(error):
            raise
        fault = f"cannot read several examples in one row ({one_line(error)})"
    raise UserError(f"packing: given true, but {type(lm).__name__} {fault}; must be false")


def check_finite(model: nn.Module, key: str) -> None:
    """Refuse NaN or infinite weights. Raises UserError."""
    for name, parameter in model.named_parameters():
        weight = values_of(parameter)
        # a sum may overflow
        if not (weight.is_meta or weight.sum().isfinite() or weight.isfinite().all()):
            raise UserError(f"{key}: the weights hold NaN or infinity, in {name}")


def _fault(case: _Case, longest: int | None, samples: bool) -> str:
    """The first fault of a model, "" if there is none."""
    for task, fault, compute in _checks(case, longest, samples):
        outcome = _outcome(case, compute)
        if outcome is not None:
            return f"fails {task}: {outcome}" if outcome else fault
    return ""


def _outcome(case: _Case, compute: Callable[[], _Pairs]) -> str | None:
    """The error raised, "" where the sides of a pair differ, None if all agree."""
    case.model.eval()
    try:
        return None if all(is_close(*pair) for pair in compute()) else ""
    except Exception as error:  # any error of the model's code
        if is_memory_error(error):
            raise
        return _raised(error)


_Pairs = list[tuple[Tensor, Tensor]]  # (the library's output, the reference output)


def _checks(
    case: _Case, longest: int | None, samples: bool
) -> Iterator[tuple[str, str, Callable[[], _Pairs]]]:
    """Each check's task, its fault if pairs differ, and the function that computes them."""
    yield "at a forward pass", "reads tokens to come: it is no causal language model", case.causal
    yield (
        "at a forward pass",
        "makes its logits from its last hidden states in a way that is not supported; please "
        "report it",
        case.alone,
    )
    yield (
        "with padding",
        "reads padding on the left, as families do that are recurrent without a mask, or that "
        "count positions from the padding",
        case.padded,
    )
    yield (
        "in training mode",
        "computes something else in training mode than in evaluation, or something random (its "
        "routing, perhaps), so that a policy's ratio to itself would not be 1",
        case.trained,
    )
    if longest is not None:
        yield (
            f"with {longest} tokens",
            f"computes a sequence differently in a batch with one of {longest} tokens, as rotary "
            "factors switch below it; must be limits on lengths below the switch",
            lambda: case.batched_with_longest(longest),
        )
    if samples:
        yield (
            "when it is sampled from",
            "cannot be sampled from: token by token, with a cache, it does not give its own logits",
            case.sampled,
        )


class _Case:
    """A batch of two sequences, the second left-padded, and passes of a model over them."""

    def __init__(self, model: Any, attempt: int) -> None:
        self.model, self._backbone = model, None
        vocabulary = model.config.get_text_config().vocab_size
        fractions = torch.arange(1, _TOKENS + 1, dtype=torch.float64) * 0.6180339887 + attempt / 7
        ids = ((fractions % 1) * vocabulary).long().to(model.device)
        self._sequences = [ids, ids[_PADDING:].flip(0)]
        self._batch = torch.stack([ids, nn.functional.pad(self._sequences[1], (_PADDING, 0))])
        self._mask = torch.ones_like(self._batch)
        self._mask[1, :_PADDING] = 0
        self._is_lm = model.get_output_embeddings() is not None
        self._reference: list[Tensor] = []

    def _reference_output(self, ids: Tensor) -> Tensor:
        """The model's logits [t,V] for one sequence alone; for a classifier, hidden states."""
        module = self.model if self._is_lm else backbone_of(self.model)
        output = module(input_ids=ids[None], use_cache=False)
        return (output.logits if self._is_lm else output.last_hidden_state)[0]

    def alone(self) -> _Pairs:
        """Compare the head's logits of the first sequence, without padding."""
        ids = self._sequences[0][None]
        hidden = backbone_forward(backbone_of(self.model), ids, torch.ones_like(ids))[0]
        return [(head_of(self.model)(hidden) if self._is_lm else hidden, self._reference[0])]

    def padded(self) -> _Pairs:
        """Compare a padded pass, as for log-probabilities and values."""
        hidden = backbone_forward(backbone_of(self.model), self._batch, self._mask)
        output = head_of(self.model)(hidden) if self._is_lm else hidden
        return list(zip((output[0], output[1, _PADDING:]), self._reference, strict=False))

    def causal(self) -> _Pairs:
        """Compute the reference outputs, and compare those of a prefix."""
        self._reference = [self._reference_output(ids) for ids in self._sequences]
        is_finite = all(output.isfinite().all() for output in self._reference)
        assert is_finite, "its outputs are not finite"
        prefix = self._sequences[0][:_STEPS]
        return [(self._reference_output(prefix), self._reference[0][:_STEPS])]

    def trained(self) -> _Pairs:
        """Compare a padded pass in training mode, and count its random draws."""
        self.model.train()
        with _Draws() as draws:
            pairs = self.padded()
        # random routing may change few tokens, and none of these
        return [*pairs, (torch.full((2,), draws.count), torch.zeros(2))]

    def batched_with_longest(self, longest: int) -> _Pairs:
        """Compare the first sequence, batched with one that reaches the run's last position."""
        positions = torch.arange(_TOKENS, device=self._batch.device).repeat(2, 1)
        positions[1, -1] = max(longest, _TOKENS) - 1
        output = backbone_of(self.model)(
            input_ids=self._batch,
            attention_mask=torch.ones_like(self._mask),
            position_ids=positions,
            use_cache=False,
        )
        hidden = output.last_hidden_state[0]
        return [(head_of(self.model)(hidden) if self._is_lm else hidden, self._reference[0])]

    def sampled(self) -> _Pairs:
        """Compare decoding, token by token, from prompts of two lengths, one of them repeated.

        Half-way one sequence leaves the batch.
        """
        start, prompts = _TOKENS - _STEPS, torch.tensor([0, 1, 1], device=self._batch.device)
        decoder, pairs = Decoder(self.model, self._batch[:, :start], self._mask[:, :start]), []
        logits = decoder.expand(prompts, _STEPS + 1)
        for t in range(start, _TOKENS + 1):
            expected = [self._reference[i][t - 1 - i * _PADDING] for i in prompts.tolist()]
            pairs += zip(logits, expected, strict=True)
            if t == start + _STEPS // 2:
                unfinished = torch.tensor([0, 2], device=prompts.device)
                prompts = prompts[unfinished]
                decoder.keep(unfinished)
            if t < _TOKENS:
                logits = decoder.step(self._batch[prompts, t])
        return pairs


class _Draws(TorchDispatchMode):
    """Counts operations that draw random numbers for the elements of a tensor.

    Attention is exempt, as randomness would show in its outputs; so are single numbers, which
    decide on dropping entire layers: the library sets that probability to 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_random and "attention" not in str(func) and isinstance(result, Tensor):
            self.count += result.numel() > 1
        return result


class _BypassedAdapters(TorchDispatchMode):
    """Records adapted layers whose base weight is read outside their forward.

    layers   their names, once for all blocks, in the form of `target_modules`
    """

    def __init__(self, base: nn.Module) -> None:
        from marlhf.compat.peft import BaseTunerLayer, has_lora_bias

        super().__init__()
        self.layers: dict[str, None] = {}
        self._names: dict[int, str] = {}  # by id of the weight, which gathering does not change
        self._running: set[str] = set()
        self._hooks = []
        for name, layer in base.named_modules():
            if not isinstance(layer, BaseTunerLayer) or name.endswith(".base_layer"):
                continue  # with nested wrappers, one per parameter, only the outer one runs
            assert isinstance(layer, nn.Module)
            has_bias = has_lora_bias(layer)
            for key, weight in layer.get_base_layer().named_parameters(recurse=False):
                if key != "bias" or has_bias:
                    self._names[id(weight)] = name
            enter, leave = partial(self._enter, name), partial(self._leave, name)
            # before the hook that gathers a sharded weight, and after the one that releases it
            self._hooks.append(layer.register_forward_pre_hook(enter, prepend=True))
            self._hooks.append(layer.register_forward_hook(leave))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str, *_: Any) -> None:
        self._running.add(name)

    def _leave(self, name: str, *_: Any) -> None:
        self._running.discard(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, list | tuple) else (value,):
                name = self._names.get(id(item))
                if name is not None and name not in self._running:
                    self.layers[_suffix(name)] = None
        return func(*args, **(kwargs or {}))


def _suffix(name: str) -> str:
    """The last word of a module's name, with any indices after it."""
    parts = name.split(".")
    words = [i for i, part in enumerate(parts) if not part.isdigit()]
    return ".".join(parts[words[-1] :])


def as_computed(model: Any) -> Any:
    """Autocast, for a model with bf16 weights among others in fp32; without, products would raise.

    Its cache stays empty: copies would outlive weights that ZeRO-3 releases.
    """
    dtypes = {p.dtype for p in model.parameters()}
    is_mixed = {torch.bfloat16, torch.float32} <= dtypes
    kind = model.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=is_mixed, cache_enabled=False)


def is_close(actual: Tensor, expected: Tensor) -> bool:
    """Whether two outputs agree, up to what kernels of their precision differ by."""
    is_half = torch.is_autocast_enabled(expected.device.type)
    is_full_precision = expected.dtype in (torch.float32, torch.float64) and not is_half
    actual, expected = actual.double(), expected.double()
    tolerance = (_TOLERANCE if is_full_precision else _TOLERANCE_IN_HALF) * expected.std()
    return bool((actual - expected).abs().max() <= tolerance + 1e-5 * expected.abs().max())


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Restore every module's mode and the random state on exit."""
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
