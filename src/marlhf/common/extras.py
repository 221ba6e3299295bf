"""Optional packages, which extras such as `marlhf[rouge]` install."""

from __future__ import annotations

import importlib.util

from marlhf.common.errors import UserError


def require(module: str, extra: str) -> None:
    """Raise UserError, naming the extra to install, where an optional package is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"needs a package that is not installed: pip install 'marlhf[{extra}]'")
