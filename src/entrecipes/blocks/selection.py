"""Which blocks may go, and which of them a ranking takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from entrecipes.blocks.stack import Block
from entrecipes.errors import UserError


class Selection:
    """The blocks of a dense model, with those that stay whatever their rank.

    Args:
        blocks: Of the dense model, pinned ones among them.
        keep: More blocks that stay; negative indices count from the end.
        cap: `(size, most)`: of each group of `size` neighbours at most `most` go; None: no cap.

    Raises:
        UserError: For a block to keep that there is not.
    """

    def __init__(self, blocks: Sequence[Block], keep: Collection[int] = (), cap: tuple[int, int] | None = None) -> None:
        self.count = len(blocks)
        self.size, self.most = cap or (self.count, self.count)
        self.protected = {block.index: block.pinned for block in blocks if block.pinned}
        """Why each of these blocks stays."""
        for index in keep:
            if not -self.count <= index < self.count:
                raise UserError(f"keep: there is no block {index}: the model has blocks 0 to {self.count - 1}")
            self.protected.setdefault(index % self.count, "named in keep")

    def target(self, ratio: float) -> int:
        """How many blocks a share of them is.

        Raises:
            UserError: When so many may not go, with the reasons.
        """
        number = max(1, round(ratio * self.count))
        groups = Counter(index // self.size for index in self.free())
        may_go = sum(min(self.most, n) for n in groups.values())
        if number > may_go:
            reasons = "; ".join(f"block {index} stays: {why}" for index, why in sorted(self.protected.items()))
            cap = f"; at most {self.most} of {self.size} neighbours go" if self.most < self.size else ""
            raise UserError(
                f"ratio: {ratio:g} would remove {number} of {self.count} blocks, but only {may_go} may go "
                f"({reasons}{cap}); take a smaller ratio"
            )
        return number

    def free(self, gone: Collection[int] = ()) -> list[int]:
        """Blocks that may go next when these are gone."""
        groups = Counter(index // self.size for index in gone)
        taken = {*gone, *self.protected}
        return [i for i in range(self.count) if i not in taken and groups[i // self.size] < self.most]

    def lowest(self, values: Mapping[int, float], number: int, gone: Collection[int] = ()) -> list[int]:
        """That many blocks of the lowest values, the lowest first, beyond those that are gone."""
        order: list[int] = []
        for _ in range(number):
            order.append(min(self.free([*gone, *order]), key=values.__getitem__))
        return order
