"""Access tokens of the Hub are recognised, so that none is written down: not in recipes, messages or repositories."""

from __future__ import annotations

import re

TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")


def holds_token(text: str) -> bool:
    """Whether something in the text looks like an access token (`hf_...`)."""
    return TOKEN.search(text) is not None


def without_tokens(text: str) -> str:
    """The text with whatever looks like an access token left out."""
    return TOKEN.sub("hf_***", text)
