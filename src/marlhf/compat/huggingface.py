"""Undocumented parts of datasets and huggingface_hub: working from the cache alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import config
from huggingface_hub import constants

from marlhf.compat import needs


# private: datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE, written
#          (datasets 4.0 to 5.2, huggingface_hub 1.0 to 2.4)
# why: the environment variable is read at import; whether the hub answers is known later
# remove when: load_dataset takes local_files_only
@needs("datasets.config:HF_HUB_OFFLINE", "huggingface_hub.constants:HF_HUB_OFFLINE")
@contextmanager
def offline() -> Iterator[None]:
    """Context in which `datasets` reads from its cache alone."""
    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
