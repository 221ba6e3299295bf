"""Records passed between stages, and the names of their axes.

Axes, used as suffixes where a token and a macro version of a quantity meet:

    B  responses in a batch          T  response tokens, right-padded
    P  prompt tokens, left-padded    M  macro actions, right-padded
    V  vocabulary                    H  hidden size

Masks are bool and True means "keep". Every record is frozen: a stage makes a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.tokenization import ResponseDecoder, Span

AllReduceSum = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks."""

REF_LOGPROBS = frozenset({"ref_logprobs"})  # what segmenters and token rewards may require


@dataclass(frozen=True)
class ResponseBatch:
    """Responses as segmenters see them, without the prompts.

    token_ids      [B,T] int64, the sampled tokens, arbitrary beyond the mask
    response_mask  [B,T] bool, a prefix of True in each row (an empty response has none)
    logprobs       [B,T] log pi(token), nats, or None where the caller has no policy
    ref_logprobs   [B,T] the same under the reference, or None
    entropy        [B,T] nats, of the distribution that each token was drawn from, or None
    row_ids        [B] int64, index of each response in the global batch of this step
    step, seed     with a row id they fix every random draw for that response
    tokenizer      needed by segmenters that read text
    continues      for each response: text comes before it; None: before all. False where the prompt
                   is empty, so that the response begins a text
    eos_ids        tokens left out at the end of `texts`, besides the tokenizer's EOS and padding
    skip_special_tokens   leave all special tokens out of `texts`
    """

    token_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    row_ids: Tensor | None = None
    step: int = 0
    seed: int = 0
    tokenizer: Any = None
    continues: Sequence[bool] | None = None
    eos_ids: Sequence[int] = ()
    skip_special_tokens: bool = False

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens in each response."""
        return self.response_mask.sum(1).tolist()

    @cached_property
    def texts(self) -> list[str]:
        """Each response's continuation of its prompt's text, without EOS and padding at its end."""
        rows = zip(self.unpadded, self._continues, strict=True)
        return [self._decoder.text(ids, continues) for ids, continues in rows]

    @cached_property
    def offsets(self) -> list[list[Span]]:
        """Half-open character span of each token in `texts`, per response."""
        rows = zip(self.unpadded, self._continues, strict=True)
        return [self._decoder.with_offsets(ids, continues)[1] for ids, continues in rows]

    @cached_property
    def unpadded(self) -> list[list[int]]:
        """The token ids of each response, without padding."""
        rows = zip(self.token_ids.tolist(), self.lengths, strict=True)
        return [ids[:length] for ids, length in rows]

    @property
    def _continues(self) -> Sequence[bool]:
        return [True] * len(self.token_ids) if self.continues is None else self.continues

    @cached_property
    def _decoder(self) -> ResponseDecoder:
        if self.tokenizer is None:
            raise UserError("this segmenter reads text, but the ResponseBatch has no tokenizer")
        return ResponseDecoder(self.tokenizer, self.eos_ids, self.skip_special_tokens)

    @cached_property
    def rows(self) -> list[int]:
        """`row_ids` as a list; 0..B-1 where none were given."""
        if self.row_ids is None:
            return list(range(self.token_ids.shape[0]))
        return self.row_ids.tolist()


@dataclass(frozen=True)
class Generation:
    """Sampled responses.

    prompt_ids     [B,P] int64, left-padded; prompt_mask [B,P] bool
    response_ids   [B,T] int64, right-padded; response_mask [B,T] bool, from the lengths known at
                   generation, never from comparing tokens with the pad id
    finished       [B] bool: ended by EOS or a stop string rather than by the length limit
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    finished: Tensor

    @property
    def lengths(self) -> Tensor:
        """[B] int64, tokens in each response."""
        return self.response_mask.sum(1)


@dataclass(frozen=True)
class Sequences:
    """Prompts concatenated with responses, the models' input.

    input_ids [B,P+T]; attention_mask [B,P+T] bool, True on the tokens of prompt and response;
    response_mask [B,T].
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    def rows(self, index: Tensor) -> Sequences:
        """The sequences at `index`, without columns that are padding in all of them."""
        index = index.to(self.input_ids.device)
        attention, mask = self.attention_mask[index], self.response_mask[index]
        whole, response = kept_columns(attention, mask)
        return Sequences(self.input_ids[index][:, whole], attention[:, whole], mask[:, response])

    @staticmethod
    def of(generation: Generation) -> Sequences:
        """Concatenate prompts and responses."""
        g = generation
        return Sequences(
            torch.cat([g.prompt_ids, g.response_ids], 1),
            torch.cat([g.prompt_mask, g.response_mask], 1),
            g.response_mask,
        )


def kept_columns(attention_mask: Tensor, response_mask: Tensor) -> tuple[slice, slice]:
    """Columns that are not padding in every sequence, of `[B,P+T]` and of `[B,T]` tensors.

    At least one response column stays.
    """
    P = attention_mask.shape[1] - response_mask.shape[1]
    first = int(attention_mask[:, :P].any(0).long().argmax())
    T = max(1, int(response_mask.sum(1).max()))
    return slice(first, P + T), slice(T)
