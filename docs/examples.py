"""How the reference reads `Example:` in a docstring: as code, with or without the prompt `>>>`."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^Example:\n((?:(?: {4}.*)?\n?)+)", re.M)


class Examples(griffe.Extension):
    """Turns every `Example:` into a block of Python before the docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(as_code, obj.docstring.value)


def as_code(section: re.Match[str]) -> str:
    """The section as griffe knows it, its lines fenced."""
    code = textwrap.dedent(section[1]).strip("\n")
    fenced = code if code.startswith(">>>") else f"```python\n{code}\n```"
    return f"Examples:\n{textwrap.indent(fenced, '    ')}\n\n"
