"""Docstrings are plain text: what looks like a tag in them, `masks/<name>.png`, must not become one on a page."""

from __future__ import annotations

import re
from typing import Any

import griffe


class PlainText(griffe.Extension):
    """Escapes < outside of backticks; inside, Markdown does."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for everything that it reads."""
        if obj.docstring:
            parts = re.split(r"(`[^`]*`)", obj.docstring.value)
            obj.docstring.value = "".join(x if x.startswith("`") else x.replace("<", "&lt;") for x in parts)
