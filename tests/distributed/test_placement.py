"""Where weights live: who reads them, what other ranks get, and how much memory that takes."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.forked_ranks import two_ranks
from support.tiny_models import tiny_causal_lm
from transformers import AutoModelForCausalLM, LlamaConfig

from marlhf.common.cpu_memory import trim_heap
from marlhf.config import ModelSettings
from marlhf.distributed import ALONE, Distributed
from marlhf.models import loading
from marlhf.models.policy import backbone_of


def digest(model: Any) -> str:
    """Of all tensors of a model, buffers included, by name."""
    hashed = hashlib.sha256()
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        hashed.update(f"{name} {x.dtype} {tuple(x.shape)}".encode() + x.detach().numpy().tobytes())
    return hashed.hexdigest()


def read(folder: Path) -> Any:
    """The model in a folder, as its files hold it."""
    settings = ModelSettings(path=str(folder))
    return loading.read_causal_lm(settings, loading.load_model_config(settings))


def test_one_rank_reads_and_both_get_the_same_model(tmp_path: Path) -> None:
    tiny_causal_lm("gemma").bfloat16().save_pretrained(tmp_path)

    def work(rank: int) -> str:
        placement, reads = Distributed().placement(), []
        lm = placement.read(lambda: reads.append(rank) or read(tmp_path))
        held = sum(p.untyped_storage().nbytes() for p in lm.parameters())
        lm.generation_config.eos_token_id = lm.generation_config.eos_token_id or 7
        placement.place(lm, backbone_of(lm))
        tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
        mapped = len(reads) * sum(2 * p.numel() for p in lm.parameters())
        numbers = {"held": held - mapped, "tied": tied, "kind": type(lm).__name__}
        return json.dumps({**numbers, "digest": digest(lm), "reads": len(reads)})

    expected = digest(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    first, second = map(json.loads, two_ranks(work, tmp_path))
    assert (first["reads"], second["reads"]) == (1, 0)
    assert second["held"] == 2 * len(list(tiny_causal_lm("gemma").parameters()))  # a number each
    for outcome in (first, second):
        assert (outcome["kind"], outcome["tied"]) == ("GemmaForCausalLM", True)
        assert outcome["digest"] == expected


def test_what_is_wrong_with_the_weights_is_said_on_both_ranks(tmp_path: Path) -> None:
    tiny_causal_lm("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})

    def work(rank: int) -> str:
        Distributed().placement().read(lambda: read(tmp_path))
        return "read"

    first, second = two_ranks(work, tmp_path)
    assert re.match("UserError: model.path: .* 1 are missing .*layers.1.mlp.up_proj", first)
    assert re.match("PeerError: rank 0 failed: model.path: .*layers.1.mlp.up_proj", second)


def anonymous_mb() -> float:
    """Memory of this process that is not of files."""
    gc.collect()
    trim_heap(torch.device("cpu"))  # else memory that earlier tests freed is used again
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("is_mapped", [True, False])
def test_reading_takes_no_memory(
    tmp_path: Path, is_mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 33 million weights in bf16: 131 MB in fp32; the control is what transformers does."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    if not is_mapped:
        monkeypatch.setattr(loading, "file_dtypes", nullcontext)
    before = anonymous_mb()
    lm = read(tmp_path)
    grown = anonymous_mb() - before
    assert grown < 30 if is_mapped else grown > 100
    ALONE.place(lm, backbone_of(lm))
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert 120 < anonymous_mb() - before < 180
