"""How well clips fit their captions: networks that embed both, so that a clip and its caption lie near each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from entrecipes.evaluation.metrics import Origin
from entrecipes.evaluation.video_features import Frames


class TextJudge:
    """Embeds clips and captions in one space.

    As with images, a number is only comparable with numbers from the same judge.

    Args:
        name: What it is, in words.
        tag: Short and safe for metric names.
        version: Packages, their versions, and a digest of the weights.
        about: What it was trained on and what it can do, for metrics' origins.
    """

    def __init__(self, *, name: str, tag: str, version: str, about: Origin) -> None:
        self.name, self.tag, self.version, self.about = name, tag, version, dict(about)

    def clips(self, clips: Tensor, frames: Frames) -> Tensor:
        """uint8 [N, 3, F, H, W] and the way to the features of their frames [N, F, D] -> float32 [N, d] on the CPU.

        A clip's vector is the mean of vectors of unit length, so that its products with captions are mean cosines.
        """
        raise NotImplementedError

    def captions(self, captions: Sequence[str]) -> Tensor:
        """N captions -> float32 [N, d] of unit length on the CPU."""
        raise NotImplementedError

    def score(self, clips: Tensor, captions: Sequence[str], frames: Frames) -> Tensor:
        """How well each clip fits its own caption: mean cosine [N] in [-1, 1]; see `clips`."""
        return (self.clips(clips, frames) * self.captions(captions)).sum(1)
