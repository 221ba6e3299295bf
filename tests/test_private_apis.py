"""Private names of other libraries: each is there, with the parameters that marlhf relies on."""

import importlib
from pathlib import Path

import peft.tuners.tuners_utils as tuners
import pytest
import torch

import marlhf.compat.deepspeed
import marlhf.compat.huggingface
import marlhf.compat.peft
import marlhf.compat.pydantic
import marlhf.compat.tensorboard
import marlhf.compat.torch
import marlhf.compat.transformers
from marlhf import compat

COMPAT = Path(compat.__file__).parent


def deepspeed_names() -> list[str]:
    """Those of DeepSpeed, which are checked when it is used."""
    before = len(compat.NEEDED)
    marlhf.compat.deepspeed.check_names()
    return compat.NEEDED[before:]


def test_deepspeed_has_every_private_name():
    names = deepspeed_names()
    assert len(names) > 10
    assert all(name.startswith("deepspeed.") for name in names)


@pytest.mark.parametrize("name", [n for n in compat.NEEDED if not n.startswith("deepspeed.")])
def test_a_private_name_is_there(name):
    compat.check(name)


def test_python_has_what_ends_the_sandbox():
    compat.check("atexit:_run_exitfuncs")


def test_every_library_with_a_file_is_checked():
    libraries = {name.removeprefix("marlhf.compat.").partition(".")[0] for name in compat.NEEDED}
    files = {file.stem for file in COMPAT.glob("*.py")} - {"__init__", "huggingface"}
    assert {name.partition(":")[0] for name in libraries} >= files
    assert {"datasets", "huggingface_hub"} <= libraries


def test_onednn_has_packed_linear_layers():
    weight, x = torch.randn(8, 16), torch.randn(3, 16)
    assert marlhf.compat.torch.has_packed_linear(torch.float32)
    packed = marlhf.compat.torch.pack_linear_weight(weight, rows=3)
    torch.testing.assert_close(marlhf.compat.torch.packed_linear(x, packed, None), x @ weight.T)


def test_a_renamed_attribute_is_named(monkeypatch):
    monkeypatch.delattr(tuners.BaseTunerLayer, "_disable_adapters")
    monkeypatch.delattr(tuners.BaseTunerLayer, "enable_adapters")  # which sets it on instances
    with pytest.raises(compat.IncompatibleError, match=r"peft [\d.]+ has no .*_disable_adapters"):
        importlib.reload(marlhf.compat.peft)


def test_a_method_that_others_call_is_not_an_attribute_of_instances(monkeypatch):
    from peft.tuners.lora import Linear

    monkeypatch.delattr(Linear, "get_delta_weight")  # `merge` still calls it
    with pytest.raises(
        compat.IncompatibleError, match=r"peft .* has no .*Linear\.get_delta_weight"
    ):
        compat.check("peft.tuners.lora:Linear.get_delta_weight")


def test_a_changed_signature_is_named():
    with pytest.raises(compat.IncompatibleError, match=r"takes \(self, adapter\), not \(self, x\)"):
        compat.check("peft.tuners.lora:Linear.get_delta_weight(self, x)")


def test_every_function_says_which_name_it_needs_why_and_until_when():
    for file in COMPAT.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        counts = {text.count(f"\n# {word}: ") for word in ("private", "why", "remove when")}
        assert len(counts) == 1, file.name
        assert file.name == "__init__.py" or counts != {0}, file.name
