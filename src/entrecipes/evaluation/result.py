"""One measured number together with where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from entrecipes.errors import UserError


def count_tag(count: int) -> str:
    """How many samples, for a metric's name: 1000 -> `1k`, 500 -> `500`, 1500 -> `1500`."""
    return f"{count // 1000}k" if count and count % 1000 == 0 else str(count)


def metric_name(metric: str, tag: str, samples: int) -> str:
    """A name that can't pass for a published number: metric, feature extractor, sample count (`kid_efflite0_1k`)."""
    return f"{metric}_{tag}_{count_tag(samples)}"


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as the Python number it stands for (YAML and JSON know no others)."""
    return value.item() if hasattr(value, "item") else value


def _finite(name: str, what: str, value: Any) -> float:
    number = float(_plain(value))
    if not math.isfinite(number):
        raise UserError(
            f"metric '{name}': the {what} is {number}, which is not reported as a result. Look at the samples and the "
            "training loss: if they diverged, lower optimizer.learning_rate or set training.clip_grad_norm."
        )
    return number


@dataclass(frozen=True)
class Metric:
    """One finite number with its origin.

    Args:
        name: Carries the feature extractor and the sample count (see [`metric_name`]), such as `kid_efflite0_1k`.
        value: The number; scalars of numpy and torch become floats.
        spread: Its standard deviation or error, if known; `origin["spread"]` may say which.
        origin: What the number depends on: extractor and its version, samples, split, sampler, steps, seed...
        higher_is_better: Direction of improvement.

    Raises:
        UserError: For a value or spread that is NaN or infinite.
    """

    name: str
    value: float
    spread: float | None
    origin: dict[str, str | int | float | None]
    higher_is_better: bool

    def __post_init__(self) -> None:
        # frozen: the only way to normalise a field.
        object.__setattr__(self, "value", _finite(self.name, "value", self.value))
        if self.spread is not None:
            object.__setattr__(self, "spread", _finite(self.name, "spread", self.spread))
        object.__setattr__(self, "origin", {key: _plain(value) for key, value in self.origin.items()})

    def to_json(self) -> dict[str, Any]:
        """A mapping that JSON and YAML can hold as it is."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Metric:
        """The metric that [`to_json`] described.

        Raises:
            UserError: If the record isn't one.
        """
        try:
            return cls(**record)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"metric record: {error}; expected what entrecipes wrote, got {record!r:.200}") from None
