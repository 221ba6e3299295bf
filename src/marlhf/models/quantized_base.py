"""Checks that a base can be held in 4 bits under LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModel

from marlhf.common.errors import UserError
from marlhf.common.extras import require
from marlhf.config import ModelSettings
from marlhf.distributed import quantizable_layers, quantizable_share
from marlhf.models.adapters import check_reads_no_base, is_adapter_of, is_of_quantized_base

_LEAST_SHARE = 0.5  # of weights in 4 bits; below, quantisation gains less than it costs


def check_quantization(
    config: Any, settings: ModelSettings, is_gguf: bool = False, computes: bool = True
) -> None:
    """Check what `model.quantization` needs, before weights are read. Raises UserError.

    computes   whether anything will be, which needs the package bitsandbytes
    """
    if settings.quantization is None:
        return
    prefix = f"model.quantization: given bits={settings.quantization.bits}, but"
    try:
        if computes:
            require("bitsandbytes", "quantization")
    except UserError as error:
        raise UserError(f"model.quantization: {error}") from None
    if is_gguf or getattr(config, "quantization_config", None) is not None:
        kind = "a GGUF file" if is_gguf else "quantised already"
        raise UserError(
            f"{prefix} {settings.path!r} is {kind}; must be a model in full precision, in "
            "safetensors"
        )
    assert settings.lora is not None
    why = "with model.quantization: there the base is in 4 bits"
    check_reads_no_base(settings.lora, why, also=["modules_to_save"])
    try:
        with torch.device("meta"):
            backbone = AutoModel.from_config(config, trust_remote_code=settings.trust_remote_code)
    except Exception:  # of a model's own code; loading reports it
        return
    for entry in settings.lora.extra.get("modules_to_save") or ():
        if any(f".{entry}." in f".{name}." for name in quantizable_layers(backbone)):
            raise UserError(
                f"model.lora.extra.modules_to_save: given {entry!r}, whose weights are in 4 bits "
                "under model.quantization and cannot be trained; target_modules can adapt them"
            )
    share = quantizable_share(backbone)
    if share < _LEAST_SHARE:
        raise UserError(
            f"{prefix} of the weights of a {type(backbone).__name__}, embeddings excluded, only "
            f"{share:.0%} are in linear layers, which alone can be quantised; leave it out"
        )


def base_notes(settings: ModelSettings, paths: Iterable[str]) -> list[str]:
    """A line per reward adapter that was trained on a base of another precision."""
    is_quantized, names = settings.quantization is not None, ("full precision", "4 bits")
    return [
        f"reward.models: the adapter {path!r} was trained on a base in {names[not is_quantized]}; "
        f"here it is in {names[is_quantized]}, and scores differ by that"
        for path in paths
        if is_adapter_of(path, settings.path) and is_of_quantized_base(path) != is_quantized
    ]
