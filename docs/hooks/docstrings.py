"""Docstrings name other things as Sphinx does: here that is code like any other."""

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?")


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub("<code>", html)
