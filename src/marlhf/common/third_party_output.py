"""Keeps other libraries' notices, warnings and progress bars off the terminal.

Only the command line does this; a program that imports marlhf keeps its own settings. Python's
`-W` and the libraries' own environment variables take precedence.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress

from marlhf.common.errors import printable

_ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_libraries() -> None:
    """Let libraries show errors only; call it before importing them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # DeepSpeed warns on import that there is no GPU, and sets its own level
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    # on some CPUs it warns on import, PEFT's too, that a kernel that is not used is not installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if logging.getLogRecordFactory() is logging.LogRecord:
        logging.setLogRecordFactory(
            lambda *args, **kwargs: _printable(logging.LogRecord(*args, **kwargs))
        )


def _printable(record: logging.LogRecord) -> logging.LogRecord:
    """Replace control characters in a log record, which may quote foreign text."""
    with suppress(Exception):  # a message that does not fit its arguments: logging reports it
        record.msg, record.args = printable(record.getMessage(), "\n\t"), ()
    return record


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def hide_loading_bars() -> None:
    """Hide progress bars of reading and writing weights; those of downloads stay."""
    import huggingface_hub.utils
    import transformers.utils.logging

    from marlhf.compat.transformers import hide_gguf_bar

    downloads_hidden = huggingface_hub.utils.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    hide_gguf_bar()
    if not downloads_hidden:
        huggingface_hub.utils.enable_progress_bars()
