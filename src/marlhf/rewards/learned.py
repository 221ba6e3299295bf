"""Scalar reward models: sequence classifiers with one label, loaded from a path."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from marlhf.common.chat_templates import render_chat
from marlhf.common.deferred import make_values
from marlhf.common.errors import UserError, one_line, short_repr
from marlhf.common.memory_errors import doing, is_memory_error
from marlhf.common.tokenization import Tokenizer, encode_texts, text_start
from marlhf.config import ModelSettings
from marlhf.distributed import ALONE, Placement, in_use, keep_on_host
from marlhf.models.policy import Critic, length_switch, score_offset

Messages = Sequence[dict[str, Any]]


class RewardModel:
    """Scores a text by a one-label sequence classifier, minus `config.score_offset`, if any.

    The text is retokenised with the model's own tokenizer. A conversation in the column `messages`
    goes through that tokenizer's chat template, where it has one, with the completion as the
    assistant's turn; see `reward_texts` for all others.

    path            a directory of safetensors or a hub name
    batch_size      sequences per forward pass; scores do not depend on it
    max_length      tokens; longer texts lose their start. Default: the model's limit
    trust_remote_code   run code that comes with a hub model

    The constructor loads configuration and tokenizer; `load` or the first call loads the weights
    (fp32). Raises UserError.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 16,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.check_sizes(batch_size=batch_size, max_length=max_length)
        self.path, self.batch_size, self.max_length = path, batch_size, max_length
        self.trust_remote_code = trust_remote_code
        from marlhf.models import loading

        config = loading.load_classifier_config(self._settings, "path")
        tokenizer = loading.load_tokenizer(self._settings, "path")
        vocabulary = config.get_text_config().vocab_size
        if len(tokenizer) > vocabulary:
            raise UserError(
                f"path: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}"
            )
        limit = model_limit(config, tokenizer)
        length = limit if self.max_length is None else self.max_length
        if length is not None and not 1 <= length <= (limit or length):
            raise UserError(f"max_length: given {length}, must be 1 to {limit or 'any length'}")
        switch = length_switch(config)
        self.tokenizer = tokenizer  # the reward model's
        self._limit, self._switch = length, switch
        self._model: Any = None
        self._placement = ALONE
        self._policy_bos: set[str] = set()  # the policy's BOS, where this model has no such token

    @staticmethod
    def check_sizes(*, batch_size: int = 16, max_length: int | None = None, **_: Any) -> None:
        """Check the arguments that are numbers, without the model. Raises UserError."""
        for name, size in {"batch_size": batch_size, "max_length": max_length}.items():
            is_number = isinstance(size, int) and not isinstance(size, bool)
            if not is_number and (name, size) != ("max_length", None):
                raise UserError(f"{name}: given {short_repr(size)}, must be a whole number")
            if size is not None and size < 1:
                raise UserError(f"{name}: given {size}, must be at least 1")

    def strip_bos_of(self, policy: Any) -> None:
        """Strip a policy's BOS from prompts from now on, unless this model has that token.

        policy   its tokenizer
        """
        vocabulary = self.tokenizer.get_vocab()
        names = policy.convert_ids_to_tokens(text_start(policy))
        self._policy_bos.update(name for name in names if name not in vocabulary)

    @property
    def _settings(self) -> ModelSettings:
        return ModelSettings(path=self.path, trust_remote_code=self.trust_remote_code)

    @property
    def model(self) -> Any:
        """The sequence classifier, loaded at first use."""
        self.load()
        return self._model

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are loaded."""
        return self._model is not None

    @doing("loading")
    def load(self) -> RewardModel:
        """Load the weights, unless loaded. Raises UserError."""
        if not self.is_loaded:
            model, self._limit = self._placement.read(self._read)
            # an encoder gives its score itself, and bf16 would round that
            use = "frozen" if isinstance(getattr(model, "score", None), nn.Module) else "trained"
            self._placement.place(model, model.base_model, use)
            self._try_text(model)
            self._model = model
        return self

    def _read(self) -> tuple[Any, int | None]:
        """The model as its files hold it, and the longest input in tokens. Raises UserError."""
        from marlhf.models import loading

        model = loading.read_classifier(self._settings, "path").requires_grad_(False).eval()
        return model, self._longest(model)

    def _try_text(self, model: Any) -> None:
        """Try a short text: some families need a token that their tokenizer may not add."""
        try:
            ids, mask = right_pad(encode_for_reward(self.tokenizer, ["a"], [False]))
            device = self._placement.device
            self._scores(model, ids.to(device), mask.to(device))
        except Exception as error:  # of the model's code
            kind = type(model).__name__
            raise UserError(f"path: {kind} cannot score a text: {one_line(error)}") from error

    def _longest(self, model: Any) -> int | None:
        """Try the longest input on the CPU, where an index out of range raises."""
        limit = self._limit
        if limit is None:
            return None
        longest = longest_input(model, limit, lambda ids, mask: sequence_scores(model, ids, mask))
        if self.max_length is not None and longest < self.max_length:
            raise UserError(f"max_length: given {self.max_length}, must be 1 to {longest}")
        return longest

    def use_placement(self, placement: Placement) -> None:
        """Load the model by `placement`; an adapter on the policy's base is loaded already."""
        self._placement = placement

    def to(self, device: Any) -> RewardModel:
        """Move the model to `device`, now or when it is loaded."""
        self._placement = Placement(device=device)
        if self.is_loaded:
            self._model.to(device)
        return self

    def keep_on_host(self) -> bool:
        """Hold the model in host memory while it does not score.

        False for one on the policy's base, which stays where the policy is.
        """
        is_apart = not isinstance(self.model, Critic)
        if is_apart:
            keep_on_host(self.model, self._placement.device)
        return is_apart

    def share_base(self, policy: Any, base: str) -> None:
        """Score on the policy's frozen PEFT base, if this is an adapter of it."""
        from marlhf.models import adapters, building

        if hasattr(policy, "peft_config") and adapters.is_adapter_of(self.path, base):
            name = f"reward_{len(policy.peft_config)}"
            model = building.classifier_on_shared_base(policy, self.path, name)
            model.head.requires_grad_(False)
            for parameter in adapters.trainable_parameters(policy, name):
                parameter.requires_grad_(False)
            self._model = model

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        model = self.model
        offset = model.offset if isinstance(model, Critic) else score_offset(model.config, "reward")
        prompts = [without_start(prompt, self._policy_bos) for prompt in prompts]
        texts, templated = reward_texts(
            self.tokenizer, prompts, completions, columns.get("messages")
        )
        ids = encode_for_reward(self.tokenizer, texts, templated, self._limit)
        scores = [0.0] * len(ids)
        switch = self._switch or 0
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        short = [i for i in order if len(ids[i]) <= switch]
        parts = (short, order[len(short) :])  # rotary factors depend on a batch's longest sequence
        size = self.batch_size
        with in_use(model):
            for rows in (part[i : i + size] for part in parts for i in range(0, len(part), size)):
                input_ids, mask = (
                    x.to(self._placement.device) for x in right_pad([ids[i] for i in rows])
                )
                values = self._scores(model, input_ids, mask).tolist()
                for row, value in zip(rows, values, strict=True):
                    scores[row] = value - offset
        return scores

    def _scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores at the run's precision, with the head in fp32."""
        is_encoder = not isinstance(model, Critic) and not hasattr(model, "score")
        with nullcontext() if is_encoder else self._placement.autocast():
            return sequence_scores(model, input_ids, attention_mask)


def sequence_scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`[B]` float32 logits of a one-label sequence classifier for right-padded sequences `[B,L]`.

    A decoder's score is that of the last token under the mask. transformers takes the last non-pad
    token instead, which is wrong where a text ends in a token that is also the pad token. An
    encoder pools by itself, under the mask.
    """
    if isinstance(model, Critic):  # an adapter on the policy's base
        return model(input_ids, attention_mask, attention_mask[:, 1:])[1] + model.offset
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        return model(input_ids=input_ids, attention_mask=attention_mask.long()).logits[:, 0].float()
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False
    ).last_hidden_state
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (positions * attention_mask.long()).argmax(1)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    with torch.autocast(hidden.device.type, enabled=False):  # bf16 would round the score
        dtype = next(head.parameters()).dtype
        return head(hidden[rows, last].to(dtype))[:, 0].float()


def reward_texts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    completions: Sequence[str],
    messages: Sequence[Messages | None] | None = None,
) -> tuple[list[str], list[bool]]:
    """Input texts of a reward model, and whether each is chat-templated.

    Without a conversation: prompt and completion, concatenated. A conversation for a tokenizer
    without a chat template: its messages and the completion, joined by empty lines, because the
    prompt text is in the policy's template, which the model does not know.
    Raises UserError where the template raises.
    """
    texts, templated = [], []
    conversations = messages if messages is not None else [None] * len(prompts)
    for prompt, completion, turns in zip(prompts, completions, conversations, strict=True):
        through_template = turns is not None and bool(tokenizer.chat_template)
        templated.append(through_template)
        if turns is None:
            texts.append(prompt + completion)
            continue
        if through_template:
            completion = _content(tokenizer, turns, completion)
        turns = with_completion(turns, completion)
        if through_template:
            try:
                texts.append(render_chat(tokenizer, turns))
            except Exception as error:  # a template can raise anything
                roles = ", ".join(turn["role"] for turn in turns)
                raise UserError(
                    f"the reward model's chat template refuses a conversation of {roles}: "
                    f"{one_line(error)}"
                ) from error
        else:
            texts.append("\n\n".join(turn["content"] for turn in turns))
    return texts, templated


def _content(tokenizer: Tokenizer, turns: Messages, completion: str) -> str:
    """The completion as the content of a chat message.

    Its first space is dropped where the template writes one after its generation prompt: policies
    trained on such a template write it too.
    """
    if not completion.startswith(" ") or turns[-1]["role"] == "assistant":
        return completion
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected += completion
    for content in (completion, completion[1:]):
        answered = with_completion(turns, content)
        if tokenizer.apply_chat_template(answered, tokenize=False).startswith(expected):
            return content
    return completion


def without_start(text: str, names: Iterable[str]) -> str:
    """A text without any of the token names at its start."""
    while name := next((n for n in names if n and text.startswith(n)), ""):
        text = text.removeprefix(name)
    return text


def with_completion(messages: Messages, completion: str) -> list[dict[str, Any]]:
    """Append the completion as the assistant's turn, or to the end of that turn."""
    turns = list(messages)
    if turns[-1]["role"] == "assistant":
        return [*turns[:-1], {**turns[-1], "content": turns[-1]["content"] + completion}]
    return [*turns, {"role": "assistant", "content": completion}]


def encode_for_reward(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    templated: Iterable[bool],
    max_length: int | None = None,
) -> list[list[int]]:
    """Token ids of each text, truncated on the left to `max_length`.

    The tokenizer adds its special tokens, except to a text from a chat template, which has them.
    Truncation keeps those at the start of a text. See `encode_texts`.
    """
    rows = encode_texts(tokenizer, texts, [not t for t in templated], ending=True)
    if max_length is not None:
        rows = [_truncated(ids, max_length, text_start(tokenizer)) for ids in rows]
    return [ids or [_any_token(tokenizer)] for ids in rows]


def _truncated(ids: list[int], max_length: int, start: list[int]) -> list[int]:
    """Truncate a text on the left, keeping the special tokens `start` at its start."""
    room = max_length - len(start)
    if len(ids) <= max_length or room < 1 or ids[: len(start)] != start:
        return ids[-max_length:]
    return start + ids[-room:]


def right_pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """`(input_ids [B,L] int64, attention_mask [B,L] bool)`; padding is token 0, never attended."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
    return ids, mask


def _any_token(tokenizer: Tokenizer) -> int:
    """A token that replaces an empty text: BOS, EOS or pad, else 0."""
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((token for token in tokens if token is not None), 0)


@torch.no_grad()
def longest_input(model: Any, limit: int, run: Callable[[Tensor, Tensor], Any]) -> int:
    """Find the model's maximum input length in tokens, at most `limit`, by trying.

    Some families have fewer positions than their configuration says, as RoBERTa's start after the
    pad token's id. Only a model with a table of positions is tried.

    model   on the CPU
    run     calls it with `(input_ids [1,L], attention_mask [1,L])`

    Raises UserError where not even one token fits.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or limit
    low, high = min(limit, positions), max(limit, positions) + 64
    if not any(low <= size <= high for size in _table_sizes(model)):
        return limit
    make_values(model)
    model.float()  # files may hold halves, and not all operations of a CPU take them
    token = 1 if config.pad_token_id == 0 else 0  # a pad token would have no position
    # encoder-decoders read their score off EOS; a configuration may name several, or no token
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    last = next((i for i in eos if i is not None and 0 <= i < config.vocab_size), token)
    faults: list[Exception] = []

    def is_too_long(length: int) -> bool:
        ids = torch.full((1, length), token)
        ids[0, -1] = last
        try:
            run(ids, torch.ones_like(ids, dtype=torch.bool))
        except Exception as error:  # families raise different errors for an index too high
            if is_memory_error(error):
                raise
            faults.append(error)
            return True
        return False

    if not is_too_long(limit):
        return limit
    longest = bisect_left(range(1, limit), True, key=is_too_long)
    if longest == 0:
        fault = one_line(faults[-1])
        raise UserError(f"path: {type(model).__name__} cannot read a text of one token: {fault}")
    return longest


def _table_sizes(model: Any) -> Iterator[int]:
    """Sizes of possible position tables.

    Embeddings other than the tokens', and tensors with "pos" in their names, may be one.
    """
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            yield module.num_embeddings
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "pos" in name.rpartition(".")[2]:
            yield from tensor.shape


def model_limit(config: Any, tokenizer: Any) -> int | None:
    """The maximum input length in tokens; None where neither model nor tokenizer has one."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (positions, tokenizer.model_max_length) if isinstance(n, int) and n > 0]
    # 1e30 in a tokenizer without a limit
    return min((n for n in limits if n < 10**9), default=None)
