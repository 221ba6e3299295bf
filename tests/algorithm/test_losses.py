"""Policy and value losses and KL estimators, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracles
from support.loss_inputs import (
    expected_policy_sum,
    logprobs,
    per_macro_advantages,
    policy_inputs,
)
from support.strategies import Ragged, differs, differs_scalar, example, fast, ragged
from torch import Tensor, nn

from marlhf.algorithm import macro
from marlhf.algorithm.advantages import gae, whiten
from marlhf.algorithm.losses import k1, k3, kl_loss, policy_loss, value_loss

RATIOS = ["token", "macro_mean", "macro_product"]
clip_ranges = st.sampled_from([0.05, 0.2, 0.5])


@pytest.mark.parametrize("ratio", RATIOS)
@fast
@given(ragged(), clip_ranges, st.sampled_from([None, 1.0, 37.5]))
def test_policy_loss_is_the_loop(ratio: str, batch: Ragged, clip_range: float, denominator):
    inputs = policy_inputs(batch)
    loss, stats = policy_loss(
        **inputs,
        clip_range=clip_range,
        ratio=ratio,
        segment_ids=batch.ids,
        denominator=denominator,
    )
    assert loss.dtype == batch.dtype
    divisor = sum(batch.lengths) if denominator is None else denominator
    assert not differs_scalar(loss, expected_policy_sum(batch, clip_range, ratio) / divisor)
    assert all(value.dtype == batch.dtype and not value.requires_grad for value in stats.values())


@pytest.mark.parametrize("ratio", RATIOS)
@fast
@given(ragged(), clip_ranges)
def test_policy_stats_are_the_loop(ratio: str, batch: Ragged, clip_range: float):
    _, stats = policy_loss(
        **policy_inputs(batch), clip_range=clip_range, ratio=ratio, segment_ids=batch.ids
    )
    new, old = logprobs(batch)
    each, clipped = [], []
    for b, starts in enumerate(batch.starts):
        advantages = per_macro_advantages(batch)[b]
        if ratio == "macro_product":
            advantages = oracles.reduce(advantages, starts, "first")
        for r, a in zip(oracles.ratios(new[b], old[b], starts, ratio), advantages, strict=True):
            each.append(r)
            clipped.append((a > 0 and r > 1 + clip_range) or (a < 0 and r < 1 - clip_range))
    assert not differs_scalar(stats["ratio_max"], max(each))
    assert not differs_scalar(stats["clip_fraction"], sum(clipped) / len(clipped))
    kl = math.fsum(oracles.k3(1.0, r) for r in each) / len(each)  # old policy against the new
    assert not differs_scalar(stats["approx_kl"], kl)


@pytest.mark.parametrize("ratio", RATIOS)
def test_policy_gradient_is_the_slope_of_the_loop(ratio: str):
    batch = example()
    inputs = policy_inputs(batch)
    x = inputs["logprobs_BT"].requires_grad_()
    policy_loss(**inputs, clip_range=0.2, ratio=ratio, segment_ids=batch.ids)[0].backward()
    assert (x.grad[~batch.mask] == 0).all()
    new, old = logprobs(batch)
    h = 1e-6
    for b, starts in enumerate(batch.starts):
        arguments = (old[b], per_macro_advantages(batch)[b], starts, 0.2, ratio)
        for t in range(len(starts)):
            up, down = list(new[b]), list(new[b])
            up[t] += h
            down[t] -= h
            rise = oracles.policy_loss_sum(up, *arguments)
            rise -= oracles.policy_loss_sum(down, *arguments)
            slope = rise / (2 * h) / sum(batch.lengths)
            assert abs(float(x.grad[b, t]) - slope) < 1e-7


@fast
@given(ragged(), st.sampled_from([None, 0.1, 0.2, 1.0]), st.sampled_from([None, 12.5]))
def test_value_loss_is_the_loop(batch: Ragged, clip_range, denominator):
    names = ("values", "old values", "returns")
    rows = [batch.noise(name) for name in names]
    tensors = [batch.pad(r) for r in rows]
    loss, stats = value_loss(*tensors, batch.mask, clip_range, denominator)
    total = math.fsum(oracles.value_loss_sum(*r, clip_range) for r in zip(*rows, strict=True))
    divisor = sum(batch.lengths) if denominator is None else denominator
    assert loss.dtype == batch.dtype
    assert not differs_scalar(loss, total / divisor)
    flat = [[x for row in r for x in row] for r in rows]
    clipped = 0
    if clip_range is not None:
        for v, old, target in zip(*flat, strict=True):
            near = min(max(v, old - clip_range), old + clip_range)
            clipped += (near - target) ** 2 > (v - target) ** 2
    assert not differs_scalar(stats["value_clip_fraction"], clipped / len(flat[0]))


@fast
@given(ragged(), st.sampled_from([None, 0.2]))
def test_value_loss_works_on_macro_actions(batch: Ragged, clip_range):
    rows = [
        [row[: sum(starts)] for row, starts in zip(batch.noise(name), batch.starts, strict=True)]
        for name in ("values", "old values", "returns")
    ]
    mask = macro.macro_mask(batch.ids)
    loss, _ = value_loss(*(batch.pad_macro(r) for r in rows), mask, clip_range)
    total = math.fsum(oracles.value_loss_sum(*r, clip_range) for r in zip(*rows, strict=True))
    assert not differs_scalar(loss, total / sum(len(row) for row in rows[0]))


# Identities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("value", ["equal", "position", "last", "first"])
@pytest.mark.parametrize("reward", ["sum", "mean"])
@pytest.mark.parametrize("discount", ["per_token", "per_macro"])
def test_token_segmenter_is_plain_token_level_ppo(dtype, ratio, value, reward, discount):
    cut = example(dtype)
    batch = Ragged(tuple((True,) * n for n in cut.lengths), cut.padding, 3, dtype)
    new, old = logprobs(batch)
    kl, values = batch.noise("kl", 0.1), batch.noise("values")
    new_values = [
        [v + s for v, s in zip(*rows, strict=True)]
        for rows in zip(values, batch.noise("value step", 0.3), strict=True)
    ]
    task = [
        [0.0] * (n - 1) + [s] if n else []
        for n, s in zip(batch.lengths, batch.scalars("score"), strict=True)
    ]
    last_values = [v * (b % 2) for b, v in enumerate(batch.scalars("last"))]
    gamma, lam = 0.97, 0.9

    plain = oracles.token_ppo(
        new,
        old,
        [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(kl, task, strict=True)],
        new_values,
        values,
        last_values,
        gamma=gamma,
        lam=lam,
        clip_range=0.2,
        value_clip_range=0.2,
    )

    ids = batch.ids
    advantages, returns = gae(
        macro.reduce(batch.pad(kl), ids, value if reward == "mean" else "sum", gamma)
        + macro.reduce(batch.pad(task), ids, "sum", gamma),
        macro.reduce(batch.pad(values), ids, value),
        macro.macro_mask(ids),
        macro.discounts(ids, gamma, discount),
        lam,
        batch.vector(last_values),
    )
    white = macro.expand(whiten(advantages, macro.macro_mask(ids)), ids)
    x, v = batch.pad(new).requires_grad_(), batch.pad(new_values).requires_grad_()
    policy, _ = policy_loss(x, batch.pad(old), white, batch.mask, 0.2, ratio, ids)
    critic, _ = value_loss(v, batch.pad(values), macro.expand(returns, ids), batch.mask, 0.2)
    (policy + critic).backward()

    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    assert abs(policy.item() - plain["policy_loss"]) < tolerance
    assert abs(critic.item() - plain["value_loss"]) < tolerance
    assert not differs(advantages, plain["advantages"])
    assert not differs(x.grad, plain["policy_grad"])
    assert not differs(v.grad, plain["value_grad"])


@fast
@given(ragged(), clip_ranges)
def test_the_three_ratios_have_one_gradient_at_ratio_1(batch: Ragged, clip_range: float):
    inputs = policy_inputs(batch)
    gradients = []
    for ratio in RATIOS:
        x = inputs["old_logprobs_BT"].clone().requires_grad_()
        loss, stats = policy_loss(
            **(inputs | {"logprobs_BT": x}),
            clip_range=clip_range,
            ratio=ratio,
            segment_ids=batch.ids,
        )
        loss.backward()
        gradients.append(x.grad)
        assert stats["ratio_max"] == 1
        assert stats["clip_fraction"] == stats["approx_kl"] == 0
    tokens = sum(batch.lengths)
    for gradient in gradients:
        assert not differs(
            gradient, [[-a / tokens for a in r] for r in per_macro_advantages(batch)]
        )


def test_the_three_ratios_differ_away_from_ratio_1():
    batch = example()
    losses = [
        policy_loss(**policy_inputs(batch), clip_range=0.2, ratio=r, segment_ids=batch.ids)[0]
        for r in RATIOS
    ]
    for i in range(3):
        assert differs_scalar(losses[i], losses[i - 1].item())


@fast
@given(ragged(), clip_ranges)
def test_one_token_macro_actions_make_the_three_ratios_one(batch: Ragged, clip_range: float):
    tokens = Ragged(
        tuple((True,) * n for n in batch.lengths), batch.padding, batch.seed, batch.dtype
    )
    truth = expected_policy_sum(tokens, clip_range, "token") / sum(batch.lengths)
    for ratio in RATIOS:
        loss, _ = policy_loss(
            **policy_inputs(tokens), clip_range=clip_range, ratio=ratio, segment_ids=tokens.ids
        )
        assert not differs_scalar(loss, truth)


@pytest.mark.parametrize("clip_range", [3e-3, 0.2])
def test_macro_mean_with_one_macro_action_is_gspo(clip_range: float):
    """GSPO (arXiv 2507.18071): ratio (pi / pi_old)^(1/length), clipped once a response."""
    lengths, T = (4, 4, 4), 4
    starts = tuple((True, False, False, False) for _ in lengths)
    batch = Ragged(starts, 2, 5, torch.float64)
    new, old = logprobs(batch)
    responses = []
    for b in range(len(lengths)):
        ratio = (math.exp(math.fsum(new[b])) / math.exp(math.fsum(old[b]))) ** (1 / T)
        responses.append(oracles.clipped(ratio, per_macro_advantages(batch)[b][0], clip_range))
    loss, _ = policy_loss(
        **policy_inputs(batch), clip_range=clip_range, ratio="macro_mean", segment_ids=batch.ids
    )
    assert not differs_scalar(loss, math.fsum(responses) / len(responses))


@fast
@given(ragged(), clip_ranges)
def test_gspo_with_ragged_lengths_weighs_responses_by_tokens(batch: Ragged, clip_range: float):
    whole = Ragged(
        tuple((True, *[False] * (n - 1)) if n else () for n in batch.lengths),
        batch.padding,
        batch.seed,
        batch.dtype,
    )
    new, old = logprobs(whole)
    total = 0.0
    for b, n in enumerate(whole.lengths):
        if n:
            ratio = math.exp((math.fsum(new[b]) - math.fsum(old[b])) / n)
            total += n * oracles.clipped(ratio, per_macro_advantages(whole)[b][0], clip_range)
    loss, _ = policy_loss(
        **policy_inputs(whole), clip_range=clip_range, ratio="macro_mean", segment_ids=whole.ids
    )
    assert not differs_scalar(loss, total / sum(whole.lengths))


def test_macro_product_clips_once_for_each_macro_action():
    """Tokens move by e^0.15 and e^0.15, each inside the clip range, together outside it; and by
    e^0.5 and e^-0.5, each outside, together at 1."""
    ids = torch.tensor([[0, 0, 1, 1]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    new = torch.tensor([[0.15, 0.15, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 4, dtype=torch.float64)
    loss, stats = policy_loss(new, 0 * ones, ones, mask, 0.2, "macro_product", ids)
    loss.backward()
    assert not differs_scalar(loss, (-1.2 - 1.0) / 4)
    assert not differs(new.grad, [[0.0, 0.0, -0.25, -0.25]])
    assert stats["clip_fraction"] == 0.5
    token = policy_loss(new, 0 * ones, ones, mask, 0.2, "token")[1]
    assert token["clip_fraction"] == 0.25


@pytest.mark.parametrize("ratio", RATIOS)
@fast
@given(ragged(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_padding_and_batch_order_do_not_matter(ratio: str, batch: Ragged, extra: int, shuffle):
    order = list(range(len(batch.starts)))
    shuffle.shuffle(order)

    def gradient(width: int, order: list[int]) -> tuple[Tensor, Tensor]:
        def place(x: Tensor) -> Tensor:
            blank = x.new_full((len(order), width), math.nan if x.is_floating_point() else 0)
            return torch.cat([x[order], blank.to(x.dtype)], 1)

        inputs = {name: place(x) for name, x in policy_inputs(batch).items()}
        ids = macro.segment_ids(place(batch.padded_starts), inputs["mask_BT"])
        x = inputs["logprobs_BT"].requires_grad_()
        loss, _ = policy_loss(**inputs, clip_range=0.2, ratio=ratio, segment_ids=ids)
        values = value_loss(
            x, inputs["old_logprobs_BT"], inputs["advantages_BT"], inputs["mask_BT"], 0.2
        )[0]
        (loss + values).backward()
        assert (x.grad[~inputs["mask_BT"]] == 0).all()
        return torch.stack([loss, values]).detach(), x.grad[:, : batch.mask.shape[1]]

    here, there = gradient(0, list(range(len(order)))), gradient(extra, order)
    assert torch.allclose(here[0], there[0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(here[1][order], there[1], rtol=1e-5, atol=1e-6)


# Micro-batches


class TinyModel(nn.Module):
    """Log-probabilities and values of tokens from an embedding of the token before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.policy, self.value = nn.Linear(6, 11), nn.Linear(6, 1)
        self.double()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.embedding(tokens[:, :-1]))
        logits = self.policy(hidden).log_softmax(-1)
        logprobs = logits.gather(-1, tokens[:, 1:, None])[..., 0]
        return logprobs, self.value(hidden)[..., 0]


def losses_in_micro_batches(
    size: int, ratio: str, shared_denominator: bool
) -> tuple[float, Tensor]:
    """The loss and the gradient of eight responses, accumulated over micro-batches of `size`."""
    widths = ((3, 2), (1,), (), (5, 1, 1), (2, 2, 2), (4,), (1, 1), (7, 2))
    starts = tuple(tuple(i == 0 for w in row for i in range(w)) for row in widths)
    batch = Ragged(starts, 1, 7, torch.float64)
    mask, ids, cut = batch.mask, batch.ids, batch.padded_starts
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (8, mask.shape[1] + 1), generator=generator)
    model = TinyModel()
    with torch.no_grad():
        old_logprobs, old_values = model(tokens)
        old_logprobs = old_logprobs + 0.3 * batch.pad(batch.noise("step"))
        old_values = old_values + 0.3 * batch.pad(batch.noise("value step"))
    advantages = batch.pad(per_macro_advantages(batch))
    returns = batch.pad(batch.noise("returns"))
    reference = batch.pad(batch.noise("reference"))

    count = mask.sum() if shared_denominator else None
    total, parts = 0.0, 8 // size
    for rows in torch.arange(8).split(size):
        now, values = model(tokens[rows])
        part = macro.segment_ids(cut[rows], mask[rows])
        assert torch.equal(part, ids[rows])
        loss = policy_loss(
            now, old_logprobs[rows], advantages[rows], mask[rows], 0.2, ratio, part, count
        )[0]
        loss = loss + value_loss(values, old_values[rows], returns[rows], mask[rows], 0.2, count)[0]
        loss = loss + 0.1 * kl_loss(now, reference[rows], mask[rows], count)
        loss = loss if shared_denominator else loss / parts
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_split_into_micro_batches_does_not_matter(size: int, ratio: str):
    whole, gradient = losses_in_micro_batches(8, ratio, shared_denominator=True)
    loss, accumulated = losses_in_micro_batches(size, ratio, shared_denominator=True)
    assert gradient.abs().max() > 1e-2
    assert abs(loss - whole) < 1e-9
    assert (accumulated - gradient).abs().max() < 1e-9
    # Each micro-batch divided by its own count, then averaged, is another gradient.
    loss, accumulated = losses_in_micro_batches(size, ratio, shared_denominator=False)
    assert abs(loss - whole) > 1e-3
    assert (accumulated - gradient).abs().max() > 1e-3
    own, own_gradient = losses_in_micro_batches(8, ratio, shared_denominator=False)
    assert own == whole
    assert torch.equal(own_gradient, gradient)


# KL estimators


def test_k1_and_k3_average_to_the_divergence():
    p, q = [0.5, 0.3, 0.15, 0.05], [0.2, 0.2, 0.2, 0.4]
    kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    weights = torch.tensor(p, dtype=torch.float64)
    log_ratio = weights.log() - torch.tensor(q, dtype=torch.float64).log()
    for estimator, loop in ((k1, oracles.k1), (k3, oracles.k3)):
        each = [loop(a, b) for a, b in zip(p, q, strict=True)]
        assert not differs(estimator(log_ratio)[None], [each])
        assert not differs_scalar((weights * estimator(log_ratio)).sum(), kl)
        assert differs_scalar((weights * estimator(-log_ratio)).sum(), kl)
    assert (k1(log_ratio) < 0).any()
    assert (k3(log_ratio) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_accurate_near_zero(dtype: torch.dtype):
    x = torch.tensor([0.0, 1e-3, -1e-3, 1e-2], dtype=dtype)
    assert torch.allclose(k3(x), x**2 / 2 - x**3 / 6, rtol=1e-3, atol=1e-10)
    assert (k3(x) >= -1e-10).all()


@fast
@given(ragged(), st.sampled_from([None, 9.0]))
def test_kl_loss_is_the_loop(batch: Ragged, denominator):
    policy, reference = logprobs(batch)
    x = batch.pad(policy).requires_grad_()
    loss = kl_loss(x, batch.pad(reference), batch.mask, denominator)
    loss.backward()
    divisor = sum(batch.lengths) if denominator is None else denominator
    pairs = [list(zip(*rows, strict=True)) for rows in zip(policy, reference, strict=True)]
    each = [[oracles.k3(math.exp(a), math.exp(b)) for a, b in row] for row in pairs]
    slopes = [[(1 - math.exp(b - a)) / divisor for a, b in row] for row in pairs]
    assert loss.dtype == batch.dtype
    assert not differs_scalar(loss, math.fsum(math.fsum(row) for row in each) / divisor)
    assert not differs(x.grad, slopes)


# Edges


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (2, 3)])
def test_nothing_but_empty_responses(ratio: str, shape: tuple[int, int]):
    mask = torch.zeros(shape, dtype=torch.bool)
    x = torch.full(shape, math.nan, requires_grad=True)
    ids = macro.segment_ids(mask, mask)
    loss, stats = policy_loss(x, x.detach(), x.detach(), mask, 0.2, ratio, ids)
    critic, _ = value_loss(x, x.detach(), x.detach(), mask, 0.2)
    (loss + critic + kl_loss(x, x.detach(), mask)).backward()
    assert loss == critic == 0
    assert (x.grad == 0).all()
    assert all(value == 0 for value in stats.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_ratio_beyond_the_largest_number_keeps_the_gradient_finite(
    ratio: str, dtype: torch.dtype
):
    """Two tokens that move by e^400 each, with a gain (clipped), no advantage, and none moving."""
    ids = torch.tensor([[0, 0, 1, 1, 2, 2]])
    mask = ids >= 0
    new = torch.tensor([[400.0, 400.0, 400.0, 400.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]], dtype=dtype)
    loss, _ = policy_loss(new, torch.zeros_like(new), advantages, mask, 0.2, ratio, ids)
    loss.backward()
    gains = -1.2 - 1.0 if ratio == "macro_product" else 2 * (-1.2 - 1.0)
    assert not differs_scalar(loss, gains / 6)
    assert not differs(new.grad, [[0.0, 0.0, 0.0, 0.0, -1 / 6, -1 / 6]])


def test_faults_name_themselves():
    batch = example()
    with pytest.raises(ValueError, match="segment_ids"):
        policy_loss(**policy_inputs(batch), clip_range=0.2, ratio="macro_mean")
    with pytest.raises(ValueError, match="'sequence'"):
        policy_loss(**policy_inputs(batch), clip_range=0.2, ratio="sequence", segment_ids=batch.ids)
