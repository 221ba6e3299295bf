"""Self-contained HTML pages, which load nothing and follow the system's light or dark theme.

Style and scripts are files in `assets/`, inlined into the page.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from marlhf.common.errors import UserError, printable
from marlhf.common.paths import local_path, special_kind, write_atomically
from marlhf.views.terminal import visible

_ASSETS = Path(__file__).parent / "assets"
_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<div id="tip" role="tooltip" hidden></div>
<script>
{script}</script>
</body>
</html>
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HUES = 4  # backgrounds of macro actions, in turn


def page(title: str, body: str) -> str:
    """A complete HTML document around `body`, which is HTML."""
    style, script = ((_ASSETS / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return _TEMPLATE.format(
        title=escape(title), body=body, style=style, script=script, policy=_POLICY
    )


def write_page(path: str | Path, content: str, key: str) -> Path:
    """Write a page atomically, replacing only another page. Raises UserError, naming `key`."""
    target = local_path(path, key)
    if target.is_file() and not _is_page(target):
        raise UserError(f"{key}: {str(path)!r} is a file that is no page; choose another")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if special_kind(target) is None:
            write_atomically(Path(os.path.realpath(target)), content)
        else:  # such as /dev/stdout; a pipe without a reader is an error, not a wait
            descriptor = os.open(target, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: cannot write {str(path)!r}: {reason}") from None
    return target


def _is_page(file: Path) -> bool:
    with file.open("rb") as content:
        start = content.read(15)
    return not start or start.lower() == b"<!doctype html>"


def escape(value: object) -> str:
    """Escape a value as HTML text, without control characters and bidi marks."""
    return html.escape(printable(str(value), "\n\t"))


def tag(name: str, content: str = "", **attributes: Any) -> str:
    """`<name attributes>content</name>`: content is HTML, attribute values are text.

    A trailing underscore is dropped from attribute names (`class_`), others become hyphens; an
    attribute that is None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{content}</{name}>"


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A table that scrolls if too wide. Cells are HTML; `numbers` aligns them right."""
    head = tag("tr", "".join(tag("th", escape(h), scope="col") for h in heads))
    body = "".join(tag("tr", "".join(tag("td", cell) for cell in row)) for row in rows)
    content = tag("thead", head) + tag("tbody", body)
    return tag("div", tag("table", content, class_="numbers" if numbers else None), class_="wide")


def macro_span(content: str, index: int, **attributes: Any) -> str:
    """A macro action on its background; its edge marks its start without colour."""
    return tag("span", content, class_=f"m h{index % HUES}", **attributes)


def visible_html(piece: str) -> str:
    """Text of tokens as HTML; line breaks are marked and kept, control characters marked."""
    return escape(visible(piece, "⏎\n"))


def token_html(piece: str) -> str:
    """`visible_html`, with a mark for empty pieces: special tokens, parts of a character."""
    return visible_html(piece) or "∅"


def json_attribute(value: Any) -> str:
    """Plain data as JSON, for an attribute that a script reads."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
