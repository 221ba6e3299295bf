"""An intrinsic reward for tokens whose next state a forward model predicts badly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from marlhf.algorithm.experience import Rollout
from marlhf.common.errors import UserError
from marlhf.common.state_files import check_weights, loading_optimizer
from marlhf.common.types import AllReduceSum
from marlhf.rewards.tokens import TokenReward

_TOKENS_PER_PASS = 4096


@dataclass
class Curiosity(TokenReward):
    """Prediction error of a forward model on the policy's hidden states, as in CD-RLHF.

    A network f predicts the state after a token from the state before it and the token's
    embedding; the reward of the token is

        e_t = 0.5 * mean over H of (f(s_t, a_t) - s_(t+1))^2,   normalised,   0 among the top k

    States are the last layer's, scaled to mean 0 and variance 1 over H. The paper's encoder is
    left out: trained on the same error, it could collapse all states to one point. The error is
    normalised by a running mean and standard deviation over all tokens of the previous rollouts,
    on all ranks; the first rollout has no reward. The network gets one Adam step per rollout.

    top_k           no reward for tokens among the policy's k most likely
    learning_rate   of the forward model
    width           of its hidden layer
    memory          decay factor of the running statistics per rollout
    seed            of its initial weights

    Source: Sun et al. 2025 (arXiv 2501.11463); Pathak et al. 2017 (arXiv 1705.05363).
    """

    requires: ClassVar[frozenset[str]] = frozenset(
        {"hidden_states", "token_embeddings", "token_ranks"}
    )

    top_k: int = 1
    learning_rate: float = 1e-4
    width: int = 512
    memory: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise UserError(f"top_k: given {self.top_k}, must be at least 0")
        if self.width < 1:
            raise UserError(f"width: given {self.width}, must be at least 1")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate: given {self.learning_rate}, must be above 0")
        if not 0 <= self.memory < 1:
            raise UserError(f"memory: given {self.memory}, must be at least 0 and below 1")
        self._device = torch.device("cpu")
        self._network: nn.Sequential | None = None
        self._optimizer: torch.optim.Adam | None = None
        self._moments = torch.zeros(3, dtype=torch.float64)  # count, sum, sum of squares of errors

    def __call__(self, rollout: Rollout) -> Tensor:
        count, total, squares = self._moments.tolist()
        if count == 0:
            return torch.zeros(rollout.responses.response_mask.shape)
        mean = total / count
        deviation = max(squares / count - mean**2, 0.0) ** 0.5
        with torch.no_grad():
            normalised = (self._errors(rollout) - mean) / (deviation + 1e-8)
        outside = rollout.extras["token_ranks"] >= self.top_k
        return torch.where(outside, normalised, torch.zeros_like(normalised))

    def update(self, rollout: Rollout, all_reduce: AllReduceSum) -> dict[str, float]:
        """Update the error statistics and take one optimiser step of the forward model."""
        mask = rollout.responses.response_mask
        network, optimizer = self._built(rollout.extras["hidden_states"].shape[-1])
        tokens = float(all_reduce(mask.sum().double()))
        errors = []
        for before, actions, after in _passes(rollout):
            error = _error(network, before, actions, after)
            (error.sum() / tokens).backward()
            errors.append(error.detach().double())
        x = torch.cat(errors)
        moments = torch.stack([torch.ones_like(x), x, x**2]).sum(1)
        moments = all_reduce(moments).cpu()
        self._moments = self.memory * self._moments + moments
        for parameter in network.parameters():
            assert parameter.grad is not None
            parameter.grad = all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        rewarded = mask & (rollout.extras["token_ranks"] >= self.top_k)
        share = float(all_reduce(rewarded.sum().double())) / tokens
        return {"error": float(moments[1]) / tokens, "rewarded_fraction": share}

    def state_dict(self) -> dict[str, Any]:
        """State of the forward model, its optimiser, and the running statistics."""
        network, optimizer = self._network, self._optimizer
        return {
            "moments": self._moments,
            "network": None if network is None else network.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`. Raises UserError."""
        check_weights({"moments": state["moments"]}, {"moments": self._moments.shape})
        self._moments = state["moments"].cpu()
        if state["network"] is not None:
            network, optimizer = self._built(state["network"]["2.weight"].shape[0])
            network.load_state_dict(state["network"])
            with loading_optimizer(optimizer):
                optimizer.load_state_dict(state["optimizer"])

    def to(self, device: Any) -> None:
        """Set the device of the hidden states, for building the forward model there."""
        self._device = torch.device(device)

    def _built(self, H: int) -> tuple[nn.Sequential, torch.optim.Adam]:
        """The forward model and its optimiser, built once the hidden size is known."""
        if self._network is None or self._optimizer is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                network = nn.Sequential(
                    nn.Linear(2 * H, self.width), nn.ReLU(), nn.Linear(self.width, H)
                )
            self._network = network.to(self._device)
            self._optimizer = torch.optim.Adam(self._network.parameters(), self.learning_rate)
        return self._network, self._optimizer

    def _errors(self, rollout: Rollout) -> Tensor:
        """Prediction errors [B,T], 0 outside the mask."""
        mask = rollout.responses.response_mask
        network, _ = self._built(rollout.extras["hidden_states"].shape[-1])
        errors = torch.cat([_error(network, *part) for part in _passes(rollout)])
        return torch.zeros(mask.shape, device=errors.device).masked_scatter(mask, errors)


def _passes(rollout: Rollout) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of states before, embeddings of, and states after response tokens, [N,H] each."""
    mask, extras = rollout.responses.response_mask, rollout.extras
    states = extras["hidden_states"].float()
    states = layer_norm(states, states.shape[-1:])
    embeddings = extras["token_embeddings"].float()
    embeddings = layer_norm(embeddings, embeddings.shape[-1:])
    tensors = (states[:, :-1][mask], embeddings[mask], states[:, 1:][mask])
    return list(zip(*(x.split(_TOKENS_PER_PASS) for x in tensors), strict=True))


def _error(network: nn.Module, before: Tensor, actions: Tensor, after: Tensor) -> Tensor:
    """Prediction errors [N]."""
    predicted = network(torch.cat([before, actions], -1))
    return 0.5 * ((predicted - after) ** 2).mean(-1)
