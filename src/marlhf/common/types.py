"""Records passed between stages, and the names of their axes.

Axes, used as suffixes where a token and a macro version of a quantity meet:

    B  responses in a batch          T  response tokens, right-padded
    P  prompt tokens, left-padded    M  macro actions, right-padded
    V  vocabulary                    H  hidden size
    G  prompts, each with a group    K  responses in each group

Masks are bool and True means "keep". Every record is frozen: a stage makes a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.tokenization import ResponseDecoder, Span, Tokenizer

AllReduceSum = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks."""

REF_LOGPROBS = frozenset({"ref_logprobs"})  # in `requires` of segmenters and token rewards


@dataclass(frozen=True)
class ResponseBatch:
    """Responses for segmenters, without the prompts.

    token_ids      [B,T] int64, the sampled tokens, arbitrary beyond the mask
    response_mask  [B,T] bool, a prefix of True in each row (an empty response has none)
    logprobs       [B,T] log pi(token), nats, or None where the caller has no policy
    ref_logprobs   [B,T] the same under the reference, or None
    entropy        [B,T] nats, of the distribution that each token was drawn from, or None
    row_ids        [B] int64, index of each response in the global batch of this step
    step, seed     with a row id they fix every random draw for that response
    tokenizer      needed by segmenters that read text
    continues      whether each response continues the text of a prompt; None: all do. False for an
                   empty prompt
    eos_ids        tokens left out at the end of `texts`, in addition to the tokenizer's EOS and
                   padding
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
    tokenizer: Tokenizer | None = None
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
        """`row_ids` as a list; 0..B-1 where they are None."""
        if self.row_ids is None:
            return list(range(self.token_ids.shape[0]))
        return self.row_ids.tolist()


@dataclass(frozen=True)
class Generation:
    """Sampled responses.

    prompt_ids     [B,P] int64, left-padded; prompt_mask [B,P] bool
    response_ids   [B,T] int64, right-padded; response_mask [B,T] bool, from the lengths known at
                   generation, never from comparing tokens with the pad id
    finished       [B] bool: by EOS or a stop string rather than by the length limit
    logprobs       [B,T] fp32, nats, under the distribution that the engine sampled from; None if
                   the engine does not report them
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    finished: Tensor
    logprobs: Tensor | None = None

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt, without padding."""
        return unpadded(self.prompt_ids, self.prompt_mask)

    @property
    def responses(self) -> list[list[int]]:
        """The token ids of each response, without padding."""
        return unpadded(self.response_ids, self.response_mask)

    @property
    def lengths(self) -> Tensor:
        """[B] int64, tokens in each response."""
        return self.response_mask.sum(1)


@dataclass(frozen=True)
class Sequences:
    """Prompts concatenated with responses, the models' input.

    input_ids       [B,P+T] int64
    attention_mask  [B,P+T] bool, True on the tokens of prompt and response
    response_mask   [B,T] bool
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    def select(self, index: Tensor) -> Sequences:
        """The sequences at `index`, without columns that are padding in all of them."""
        index = index.to(self.input_ids.device)
        attention, mask = self.attention_mask[index], self.response_mask[index]
        full, response, _ = kept_columns(attention, mask)
        return Sequences(self.input_ids[index][:, full], attention[:, full], mask[:, response])

    @staticmethod
    def of(generation: Generation) -> Sequences:
        """Concatenate prompts and responses."""
        g = generation
        return Sequences(
            torch.cat([g.prompt_ids, g.response_ids], 1),
            torch.cat([g.prompt_mask, g.response_mask], 1),
            g.response_mask,
        )


@dataclass(frozen=True)
class RewardResult:
    """Rewards of a batch of B responses.

    scores   [B] weighted sum of each response's scalar rewards; 0.0 where there is none
    spans    [B] each response's weighted `(end_char, reward)` pairs, for `place_spans`
    by_name  unweighted values of each reward, None where not applicable; rewards inside a
             response are summed
    """

    scores: list[float]
    spans: list[list[tuple[int, float]]]
    by_name: dict[str, list[float | None]]

    @property
    def unscored(self) -> list[int]:
        """Indices of responses to which no reward applied: their score of 0.0 means nothing."""
        columns = list(self.by_name.values())
        return [i for i in range(len(self.scores)) if all(c[i] is None for c in columns)]


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids [B,L] under a mask [B,L], row by row."""
    return [row[kept].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def kept_columns(
    attention_mask: Tensor, response_mask: Tensor, *numbers: Tensor
) -> tuple[slice, slice, list[int]]:
    """Columns with a token in any sequence, of `[B,P+T]` and of `[B,T]` tensors.

    At least one response column is kept.

    numbers   int64, returned as the host's: it waits for a device once to read all
    """
    P = attention_mask.shape[1] - response_mask.shape[1]
    padding = attention_mask[:, :P].any(0).long().argmax()
    longest = response_mask.sum(1).max().clamp(min=1)
    first, T, *others = torch.stack([padding, longest, *numbers]).tolist()
    return slice(first, P + T), slice(T), others
