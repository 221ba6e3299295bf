"""A plain PPO over macro actions, written from the formulas: loops over unpadded single rows in
float64, a full softmax, and an AdamW of its own. No code of the library.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

EOS = 1
LEARNING_RATE, CRITIC_LEARNING_RATE, EPS = 2e-3, 1e-3, 1e-3
MAX_PROMPT_LENGTH = 16


@dataclass(frozen=True)
class Plain:
    """What the plain PPO computes; the defaults are those of the tests."""

    n: int = 3  # tokens in a macro action
    last_token_alone: bool = False
    estimator: str = "gae"
    copies: int = 1  # responses to each prompt
    temperature: float = 1.0
    min_tokens: int = 0  # before which EOS has no probability
    score_clip: float | None = None
    gamma: float = 0.97
    lam: float = 0.95
    reward: str = "sum"
    discount: str = "per_token"
    whiten: bool = True
    bootstrap: bool = False
    kl_coef: float = 0.2
    kl_in_loss: bool = False
    kl_target: float | None = None
    kl_horizon: float = 10_000
    texts: tuple[tuple[list[int], int], ...] = ()  # to model in every step, from a place on
    ptx_coef: float = 0.0
    entropy_coef: float = 0.0
    positive: float = 1.0  # weight of macro actions with a positive advantage
    drawn: tuple[tuple[tuple[int, ...], ...], ...] = ()  # minibatches: update, epoch, prompt
    target_kl: float | None = None  # ends the policy's steps of an update
    ratio: str = "token"
    value_loss: str = "token"
    epochs: int = 2
    minibatches: int = 2
    clip: float = 0.2
    value_clip: float = 0.2
    critic_coef: float | None = None  # of a critic that is a head on the policy
    offset: float = 0.0  # of the critic
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    schedule: tuple[float, ...] = (1.0, 0.5)  # of the learning rate, a factor an update
    shift_values: int = 0  # mistakes, for the negative controls
    shift_logprobs: int = 0
    micro_batch_denominators: bool = False


@dataclass(frozen=True)
class Row:
    prompt: list[int]
    response: list[int]
    score: float

    @property
    def finished(self) -> bool:
        return self.response[-1] == EOS


def log_softmaxes(lm: Any, row: Row, s: Plain) -> list[torch.Tensor]:
    """Before each response token: the log-probabilities of the whole vocabulary."""
    logits = lm(input_ids=torch.tensor([row.prompt + row.response])).logits[0]
    first = len(row.prompt) - 1 + s.shift_logprobs
    found = []
    for t in range(len(row.response)):
        scaled = logits[min(first + t, len(logits) - 1)] / s.temperature
        if t < s.min_tokens:
            scaled = torch.stack([x - 1e9 if i == EOS else x for i, x in enumerate(scaled)])
        found.append(scaled - scaled.exp().sum().log())
    return found


def logprobs_of(lm: Any, row: Row, s: Plain) -> list[torch.Tensor]:
    return [d[token] for d, token in zip(log_softmaxes(lm, row, s), row.response, strict=True)]


def values_of(classifier: Any, row: Row, s: Plain) -> list[torch.Tensor]:
    """Value before each response token, and after the last."""
    backbone = getattr(classifier, classifier.base_model_prefix)
    hidden = backbone(input_ids=torch.tensor([row.prompt + row.response])).last_hidden_state[0]
    first = len(row.prompt) - 1 + s.shift_values
    places = [min(first + t, len(hidden) - 1) for t in range(len(row.response) + 1)]
    return [(classifier.score.weight[0] * hidden[i]).sum() - s.offset for i in places]


def text_terms(lm: Any, ids: list[int], first: int) -> list[torch.Tensor]:
    """-log p of each token of a text from `first` on."""
    logits = lm(input_ids=torch.tensor([ids])).logits[0]
    return [logits[t - 1].exp().sum().log() - logits[t - 1, ids[t]] for t in range(first, len(ids))]


def macro_actions_of(row: Row, s: Plain) -> list[list[int]]:
    """The tokens of each macro action."""
    found: list[list[int]] = []
    for t in range(len(row.response)):
        if t % s.n == 0 or (s.last_token_alone and t == len(row.response) - 1):
            found.append([])
        found[-1].append(t)
    return found


def mean(numbers: Any) -> Any:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def advantages_and_returns(
    rows: list[Row], old: list[Any], ref: list[Any], values: list[Any], s: Plain
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Of each macro action of each row: advantage, return, value."""
    in_reward = 0.0 if s.kl_in_loss else s.kl_coef
    advantages, returns, macro_values = [], [], []
    for row, old_row, ref_row, values_row in zip(rows, old, ref, values, strict=True):
        score = row.score
        if s.score_clip is not None:
            score = min(max(score, -s.score_clip), s.score_clip)
        kl = [-in_reward * (a - b) for a, b in zip(old_row, ref_row, strict=True)]
        last = len(row.response) - 1
        segments = macro_actions_of(row, s)
        if s.estimator != "gae":
            advantages.append([sum(kl) + score] * len(segments))
            returns.append([])
            macro_values.append([])
            continue
        R, V, discounts = [], [], []
        for tokens in segments:
            task = [score if t == last else 0.0 for t in tokens]
            if s.reward == "sum":
                R.append(sum(s.gamma**i * (kl[t] + task[i]) for i, t in enumerate(tokens)))
            else:
                R.append(mean(kl[t] for t in tokens) + sum(task))
            V.append(mean(values_row[t] for t in tokens))
            discounts.append(s.gamma ** len(tokens) if s.discount == "per_token" else s.gamma)
        bootstrap = values_row[-1] if s.bootstrap and not row.finished else 0.0
        A, following, value = [], 0.0, bootstrap
        for k in reversed(range(len(segments))):
            following = R[k] + discounts[k] * value - V[k] + discounts[k] * s.lam * following
            value = V[k]
            A.insert(0, following)
        advantages.append(A)
        returns.append([a + v for a, v in zip(A, V, strict=True)])
        macro_values.append(V)
    if s.estimator in ("rloo", "grpo"):
        advantages = against_the_group(advantages, s)
    elif s.whiten:
        every = [a for A in advantages for a in A]
        center = mean(every)
        spread = math.sqrt(mean((a - center) ** 2 for a in every) + 1e-8)
        advantages = [[(a - center) / spread for a in A] for A in advantages]
    return advantages, returns, macro_values


def against_the_group(advantages: list[list[float]], s: Plain) -> list[list[float]]:
    found = []
    for i, A in enumerate(advantages):
        first = i - i % s.copies
        group = [advantages[j][0] for j in range(first, first + s.copies)]
        others = [advantages[j][0] for j in range(first, first + s.copies) if j != i]
        if s.estimator == "rloo":
            relative = A[0] - mean(others)
        else:
            variance = sum((x - mean(group)) ** 2 for x in group) / (s.copies - 1)
            relative = (A[0] - mean(group)) / math.sqrt(variance) if variance > 1e-12 else 0.0
        found.append([relative] * len(A))
    return found


def policy_terms(
    new: list[Any], old: list[float], A: list[float], segments: list[list[int]], s: Plain
) -> list[tuple[Any, float, bool]]:
    """`(loss, ratio, clipped)` of each token, or of each macro action for its product."""
    found = []
    for a, tokens in zip(A, segments, strict=True):
        log_ratios = [new[t] - old[t] for t in tokens]
        if s.ratio == "macro_product":
            log_ratios = [sum(log_ratios)]
        for log_ratio in log_ratios:
            r = torch.exp(torch.as_tensor(log_ratio))
            bounded = min(max(float(r), 1 - s.clip), 1 + s.clip)
            free, held = -a * r, -a * bounded
            clipped, weight = held > float(free), s.positive if a > 0 else 1.0
            term = weight * (held + 0.0 * r if clipped else free)
            found.append((term, float(r.detach()), clipped))
    return found


def value_terms(
    new: list[Any], old: list[float], G: list[float], segments: list[list[int]], s: Plain
) -> list[tuple[Any, bool]]:
    """`(loss, clipped)` of each token, or of each macro action."""
    found = []
    for g, tokens in zip(G, segments, strict=True):
        pairs = [(new[t], old[t]) for t in tokens]
        if s.value_loss == "macro":
            pairs = [(mean(new[t] for t in tokens), mean(old[t] for t in tokens))]
        for v, before in pairs:
            near = before + torch.clamp(v - before, -s.value_clip, s.value_clip)
            free, held = (v - g) ** 2, (near - g) ** 2
            clipped = float(abs(v - before)) > s.value_clip and float(held) > float(free)
            found.append((0.5 * torch.maximum(free, held), clipped))
    return found


class Adam:
    """AdamW after clipping the gradient's norm."""

    def __init__(self, parameters: list[torch.Tensor], learning_rate: float, s: Plain) -> None:
        self.parameters, self.learning_rate, self.s = parameters, learning_rate, s
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    def step(self, loss: torch.Tensor, factor: float, taken: bool = True) -> float:
        """One step, if it is taken; returns the norm before clipping."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        some = [torch.zeros(()) if g is None else g for g in gradients]
        norm = math.sqrt(sum(float((g**2).sum()) for g in some))
        if not taken:
            return norm
        scale = min(1.0, self.s.max_grad_norm / (norm + 1e-6))
        rate, (beta1, beta2) = self.learning_rate * factor, self.s.betas
        self.steps += 1
        with torch.no_grad():
            for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
                if g is None:  # torch's optimisers leave what got no gradient alone
                    continue
                p -= rate * self.s.weight_decay * p
                m.copy_(beta1 * m + (1 - beta1) * scale * g)
                v.copy_(beta2 * v + (1 - beta2) * (scale * g) ** 2)
                unbiased = m / (1 - beta1**self.steps)
                p -= rate * unbiased / ((v / (1 - beta2**self.steps)).sqrt() + EPS)
        return norm


class PlainPPO:
    """Policy, reference and critic in float64; `update` returns what the trainer reports."""

    def __init__(self, lm: Any, classifier: Any, s: Plain, ref: Any = None) -> None:
        self.lm, self.ref = copy.deepcopy(lm).double(), copy.deepcopy(ref or lm).double()
        self.classifier = copy.deepcopy(classifier).double()
        self.s, self.updates, self.kl_coef = s, 0, s.kl_coef
        of_policy = list(trained(self.lm).values())
        if s.critic_coef is not None:
            lm = self.lm.get_base_model() if hasattr(self.lm, "peft_config") else self.lm
            self.classifier.model = lm.model
            of_policy.append(self.classifier.score.weight)
        self.of_policy = Adam(of_policy, LEARNING_RATE, s)
        self.of_critic = Adam(list(trained(self.classifier).values()), CRITIC_LEARNING_RATE, s)

    def update(self, rows: list[Row]) -> dict[str, float | None]:
        s, factor = replace(self.s, kl_coef=self.kl_coef), self.s.schedule[self.updates]
        self.updates += 1
        with torch.no_grad():
            distributions = [log_softmaxes(self.lm, row, s) for row in rows]
            old = [[float(x) for x in logprobs_of(self.lm, row, s)] for row in rows]
            ref = [[float(x) for x in logprobs_of(self.ref, row, s)] for row in rows]
            values = [[float(x) for x in values_of(self.classifier, row, s)] for row in rows]
        A, G, V = advantages_and_returns(rows, old, ref, values, s)
        segments = [macro_actions_of(row, s) for row in rows]
        metrics = rollout_metrics(rows, old, ref, segments, s)
        metrics["entropy"] = mean(float(-(d.exp() * d).sum()) for row in distributions for d in row)
        metrics["learning_rate"] = LEARNING_RATE * factor
        if s.kl_target is not None:
            metrics["kl_coef"] = s.kl_coef
            too_far = metrics["kl_mean"] / s.kl_target - 1
            too_far = 0.2 if too_far > 0.2 else -0.2 if too_far < -0.2 else too_far
            self.kl_coef = s.kl_coef + s.kl_coef * too_far * len(rows) / s.kl_horizon

        policy, value, kls, norms, value_norms = [], [], [], [], []
        steps, counted, stopped, modelled, entropies = 0, 0, False, [], []
        for epoch in range(s.epochs):
            prompts = range(len(rows) // s.copies)
            drawn = [p % s.minibatches for p in prompts]
            if s.drawn:
                drawn = s.drawn[self.updates - 1][epoch]
            for i in range(s.minibatches):
                picked = [r for r in range(len(rows)) if drawn[r // s.copies] == i]
                if not stopped:
                    tokens = sum(len(rows[r].response) for r in picked)
                    counted += tokens
                    new = {r: logprobs_of(self.lm, rows[r], s) for r in picked}
                    of_row = {r: policy_terms(new[r], old[r], A[r], segments[r], s) for r in picked}
                    loss = divided({r: [x[0] for x in of_row[r]] for r in picked}, rows, s)
                    policy += [x for r in picked for x in of_row[r]]
                    if s.kl_in_loss:
                        for r in picked:
                            for a, b in zip(new[r], ref[r], strict=True):
                                kls.append(torch.exp(b - a) - 1 - (b - a))
                                loss = loss + s.kl_coef * kls[-1] / tokens
                    if s.entropy_coef:
                        for r in picked:
                            for d in log_softmaxes(self.lm, rows[r], s):
                                entropies.append(-(d.exp() * d).sum())
                                loss = loss - s.entropy_coef * entropies[-1] / tokens
                    if s.critic_coef is not None:
                        value += self._value_terms(picked, rows, values, G, segments)
                        found = value[-sum(len(rows[r].response) for r in picked) :]
                        loss = loss + s.critic_coef * mean(x[0] for x in found)
                    if s.texts:
                        errors = [x for ids, i in s.texts for x in text_terms(self.lm, ids, i)]
                        modelled += errors
                        loss = loss + s.ptx_coef * mean(errors)
                    stopped = approx_kl(x for r in picked for x in of_row[r]) > (
                        s.target_kl or math.inf
                    )
                    norms.append(self.of_policy.step(loss, factor, taken=not stopped))
                    steps += not stopped
                if s.estimator != "gae" or s.critic_coef is not None:
                    continue
                every = self._value_terms(picked, rows, values, G, segments)
                value += every
                value_norms.append(self.of_critic.step(mean(x[0] for x in every), factor))
        metrics["policy_loss"] = (
            sum(float(x[0]) for x in policy)
            + s.kl_coef * sum(float(x) for x in kls)
            - s.entropy_coef * sum(float(x) for x in entropies)
        ) / counted
        if s.positive != 1:
            weights = [
                s.positive if a > 0 else 1.0
                for A_row, row in zip(A, segments, strict=True)
                for a, tokens in zip(A_row, row, strict=True)
                for _ in tokens
            ]
            metrics["loss_weight_mean"] = mean(weights)
        metrics["clip_fraction"] = mean(x[2] for x in policy)
        metrics["ratio_max"] = max(x[1] for x in policy)
        metrics["approx_kl"] = approx_kl(policy)
        if modelled:
            metrics["ptx_loss"] = float(mean(modelled))
        metrics["skipped_steps"] = 0
        if s.target_kl is not None:
            metrics["policy_steps"] = steps
        metrics["grad_norm_policy"] = mean(norms)
        if s.estimator == "gae":
            metrics["value_loss"] = mean(float(x[0]) for x in value)
            metrics["value_clip_fraction"] = mean(x[1] for x in value)
            if s.critic_coef is None:
                metrics["grad_norm_value"] = mean(value_norms)
            metrics["explained_variance"] = explained_variance(G, V)
            before_whitening = [
                g - v for row in zip(G, V, strict=True) for g, v in zip(*row, strict=True)
            ]
            metrics["advantage_std"] = deviation(before_whitening)
        correlation = correlation_of([row.score for row in rows], [len(r.response) for r in rows])
        if correlation is not None:
            metrics["score_length_correlation"] = correlation
        return metrics

    def _value_terms(self, picked: Any, rows: Any, values: Any, G: Any, segments: Any) -> list[Any]:
        return [
            term
            for r in picked
            for term in value_terms(
                values_of(self.classifier, rows[r], self.s), values[r], G[r], segments[r], self.s
            )
        ]


def deviation(x: Any) -> float:
    return math.sqrt(mean((y - mean(x)) ** 2 for y in x))


def correlation_of(x: Any, y: Any) -> float | None:
    spread = deviation(x) * deviation(y)
    if spread == 0:
        return None
    return mean((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y, strict=True)) / spread


def approx_kl(terms: Any) -> float:
    return mean(x[1] - 1 - math.log(x[1]) for x in terms)


def trained(module: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def divided(terms: dict[int, list[Any]], rows: list[Row], s: Plain) -> Any:
    """The sum over the tokens of the whole minibatch."""
    if s.micro_batch_denominators:
        parts = [list(terms)[i : i + 3] for i in range(0, len(terms), 3)]
        means = [
            sum(x for r in part for x in terms[r]) / sum(len(rows[r].response) for r in part)
            for part in parts
        ]
        return mean(means)
    return sum(x for row in terms.values() for x in row) / sum(len(rows[r].response) for r in terms)


def rollout_metrics(
    rows: list[Row], old: list[Any], ref: list[Any], segments: list[Any], s: Plain
) -> dict[str, Any]:
    scores = [row.score for row in rows]
    bound = s.score_clip or math.inf
    log_ratios = [
        [a - b for a, b in zip(*pair, strict=True)] for pair in zip(old, ref, strict=True)
    ]
    kl = [sum(row) for row in log_ratios]
    return {
        "score_mean": mean(scores),
        "score_std": math.sqrt(mean((x - mean(scores)) ** 2 for x in scores)),
        "reward_vowels_mean": mean(scores),
        "kl_mean": mean(kl),
        "kl_k3_mean": mean(sum(math.exp(-x) - 1 + x for x in row) for row in log_ratios),
        "objective_mean": mean(
            min(max(x, -bound), bound) - s.kl_coef * k for x, k in zip(scores, kl, strict=True)
        ),
        "response_length_mean": mean(len(row.response) for row in rows),
        "eos_fraction": mean(row.finished for row in rows),
        "prompt_truncated_fraction": mean(len(row.prompt) == MAX_PROMPT_LENGTH for row in rows),
        "macro_count_mean": mean(len(x) for x in segments),
        "macro_length_mean": mean(len(tokens) for x in segments for tokens in x),
    }


def explained_variance(returns: list[list[float]], values: list[list[float]]) -> float:
    G = [g for row in returns for g in row]
    errors = [
        g - v for pair in zip(returns, values, strict=True) for g, v in zip(*pair, strict=True)
    ]

    def variance(x: list[float]) -> float:
        return mean((y - mean(x)) ** 2 for y in x)

    return 1 - variance(errors) / variance(G)
