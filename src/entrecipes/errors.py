"""The one exception that stands for a user's mistake, and the did-you-mean behind its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that its user can mend: the command line prints the message alone and exits with code 2.

    The message names the place (a file, a recipe key, a folder), what is wrong there, and what to type or change next.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option most like `name`, or `""` where none is close."""
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
