"""Optional packages, which extras such as `marlhf[rouge]` install."""

from __future__ import annotations

import importlib
import importlib.util

from marlhf.common.errors import UserError, one_line


def require(module: str, extra: str) -> None:
    """Import an optional package. Raises UserError, naming the extra that installs it."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"needs a package that is not installed: pip install 'marlhf[{extra}]'")
    try:
        importlib.import_module(module)
    except Exception as error:  # of any type: installed, but a library that it needs is not
        raise UserError(f"cannot import {module}: {one_line(error)}") from error
