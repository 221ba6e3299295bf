"""Texts as long as a model can read, whatever its configuration says of its positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, randomize
from transformers import AutoConfig, AutoModelForSequenceClassification

from marlhf.common.errors import UserError
from marlhf.rewards import EmbeddingSimilarity, RewardModel

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "num_labels": 1,
}
# family, its pad token's number, how many tokens its 66 positions hold
FAMILIES = [
    ("roberta", 1, 64),
    ("roberta", 7, 58),
    ("xlm-roberta", 1, 64),
    ("camembert", 1, 64),
    ("mpnet", 1, 64),
    ("longformer", 1, 64),
    ("esm", 1, 64),
    ("bert", 0, 66),
    ("albert", 0, 66),
    ("deberta-v2", 0, 66),
]


def saved(folder: Path, family: str, pad: int) -> tuple[str, Any]:
    more = {"longformer": {"attention_window": 8}, "esm": {"token_dropout": False}}
    config = AutoConfig.for_model(
        family, vocab_size=BYTES_VOCAB, pad_token_id=pad, **SIZES, **more.get(family, {})
    )
    model: Any = randomize(AutoModelForSequenceClassification.from_config(config), 0).eval()
    model.save_pretrained(folder)
    byte_tokenizer(bos=None).save_pretrained(folder)
    return str(folder), model


@pytest.mark.parametrize(("family", "pad", "longest"), FAMILIES)
def test_a_text_loses_as_much_as_the_model_cannot_read(
    family: str, pad: int, longest: int, tmp_path: Path
) -> None:
    path, model = saved(tmp_path / "rm", family, pad)
    text = "".join("abcdefgh"[i * i % 7] for i in range(99))
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"][-longest:]])
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].tolist()
    assert RewardModel(path)([""], [text]) == pytest.approx(wanted, abs=1e-5)
    assert RewardModel(path, max_length=longest)([""], [text]) == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(
        UserError, match=rf"max_length: given {longest + 1}, must be 1 to {longest}"
    ):
        RewardModel(path, max_length=longest + 1).load()


@pytest.mark.parametrize(("family", "pad", "longest"), FAMILIES[:1] + FAMILIES[4:8])
def test_embeddings_of_texts_longer_than_the_model(
    family: str, pad: int, longest: int, tmp_path: Path
) -> None:
    path, _ = saved(tmp_path / "rm", family, pad)
    text = "".join("abcdefgh"[i * i % 7] for i in range(99))
    columns = {"summary": [text[:longest], text[1:longest]]}
    long, short = EmbeddingSimilarity(path=path)(["", ""], [text, text], **columns)
    assert long == pytest.approx(1, abs=1e-5)  # its end is cut, as the reference's
    assert short is not None
    assert short < 0.9999
    with pytest.raises(
        UserError, match=rf"max_length: given {longest + 1}, must be 1 to {longest}"
    ):
        EmbeddingSimilarity(path=path, max_length=longest + 1).load()


@pytest.mark.parametrize("eos", [99_999, [7, 9], [99_999, 7], []])
def test_eos_of_the_configuration_that_is_several_or_no_token(eos: Any, tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "rm", "gpt2", 0)
    wanted = RewardModel(path)([""], ["abc"])
    file = tmp_path / "rm" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": eos}))
    assert RewardModel(path)([""], ["abc"]) == wanted
