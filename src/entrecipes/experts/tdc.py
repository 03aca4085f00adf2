"""TDC Training: which networks serve which noise levels, and what making them costs."""

from __future__ import annotations


class OneNetwork:
    """One network for all noise levels."""


class Member:
    """One expert of several."""


class Tdc:
    """A base, its groups and their experts."""
