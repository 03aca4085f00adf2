"""RDTF's dual masks: which frames of a clip are given to the model, and which count in its loss.

In a training loop of one's own, on clips x0 [n, C, F, H, W] of which the first `lengths` frames are there (1: a still):

```python
frames = draw_frames(lengths, frames=8, generator=generator)
x0 = frames.of(x0)  # those frames that are shown, zeros behind them
given = x0 * frames.given[:, None, :, None, None]  # what the model is given beside the noisy frames
text = text * frames.text[:, None, None]
prediction = model(noisy, timesteps, text, given)
counted = frames.counted[:, None, :, None, None].expand_as(x0)
loss = ((prediction - target).square() * counted).flatten(1).sum(1) / counted.flatten(1).sum(1)
loss = (loss * frames.weight).mean()
```

Source: RDTF (arXiv 2503.17735) and its published code. All frames are noised and denoised, the given ones, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from entrecipes.errors import UserError
from entrecipes.recipe.masks import TASKS, DualMasksSection, NoMasksSection

I2V, T2V, IT2V, INTERPOLATION, PRE, POST, UNCOND = range(len(TASKS))


class Random(Protocol):
    """Where the draws come from; `training.randomness.StepRandom` is one."""

    def uniform(self) -> Tensor:
        """Numbers in [0, 1), one a row [n], on the device."""

    def common(self) -> Tensor:
        """One number in [0, 1), the same in every process."""

    def all(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of this process and of all others."""


@dataclass(frozen=True)
class BatchRandom:
    """Random numbers for a batch of n rows from a generator; for `draw: batch` seed it alike in all processes."""

    n: int
    device: torch.device | str = "cpu"
    generator: torch.Generator | None = None
    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    """Concatenates the rows of all processes, such as `accelerator.gather`; only `draw: batch` needs it."""

    def uniform(self) -> Tensor:
        """[n]."""
        return torch.rand(self.n, generator=self.generator, device=self.device)

    def common(self) -> Tensor:
        """A scalar."""
        return torch.rand((), generator=self.generator, device=self.device)

    def all(self, rows: Tensor) -> Tensor:
        """[N, ...]."""
        return self.gather(rows)


@dataclass(frozen=True)
class Frames:
    """Which frames of a batch of clips stand where, which are given, and which count. All on one device."""

    task: Tensor
    """int64 [n], index into `recipe.masks.TASKS`."""
    places: Tensor
    """int64 [n, F]: which frame of the clip stands there."""
    valid: Tensor
    """bool [n, F]; False: padding, where x0 and what is given are zero and nothing is learned."""
    given: Tensor
    """bool [n, F], a part of `valid`."""
    counted: Tensor
    """bool [n, F], a part of `valid`, never empty: the frames that the loss is the mean of."""
    text: Tensor
    """bool [n]: whether the text is given."""
    weight: Tensor
    """float32 [n]: factor of the sample's loss."""

    def of(self, x0: Tensor) -> Tensor:
        """The shown frames of clips [n, C, F, ...], zeros as padding."""
        rows = torch.arange(len(x0), device=x0.device)[:, None]
        shown = x0[rows, :, self.places].transpose(1, 2)  # indexing puts frames before channels
        return shown.masked_fill_(~self.valid.view(len(x0), 1, -1, *[1] * (x0.dim() - 3)), 0)

    def __getitem__(self, rows: slice | Tensor) -> Frames:
        return Frames(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class Everything:
    """In the place of `Frames` for data without frames: all of each sample counts."""

    task = places = valid = given = counted = text = None
    weight = 1.0

    def of(self, x0: Tensor) -> Tensor:
        return x0

    def __getitem__(self, rows: Any) -> Everything:
        return self


EVERYTHING = Everything()


class WholeSamples:
    """Nothing is given but the text; every frame that there is counts.

    Args:
        section: The recipe's keys.
        frames: Frames of a clip; None for data that are no stickers.
    """

    tasks = ("t2v",)

    def __init__(self, section: NoMasksSection, frames: int | None) -> None:
        self.frames = frames

    def draw(self, lengths: Tensor | None, odds: Tensor | None, random: Random) -> Frames | Everything:
        """All frames of clips with `lengths` [n] frames (None: F each); `odds` is not used."""
        if self.frames is None:
            return EVERYTHING
        if lengths is None:
            lengths = torch.full_like(random.uniform(), self.frames).long()
        places = torch.arange(self.frames, device=lengths.device).expand(len(lengths), -1)
        valid = places < lengths[:, None]
        return Frames(
            task=torch.full_like(lengths, T2V),
            places=places,
            valid=valid,
            given=torch.zeros_like(valid),
            counted=valid,
            text=torch.ones_like(lengths, dtype=torch.bool),
            weight=torch.ones_like(lengths, dtype=torch.float32),
        )


class DualMasks:
    """RDTF's masks, for a batch in which each clip has a task of its own (or one for all, as published).

    Args:
        section: The recipe's keys.
        frames: F, frames of a clip.

    Raises:
        UserError: For data that are no stickers, or fewest frames that no clip has.
    """

    def __init__(self, section: DualMasksSection, frames: int | None) -> None:
        if frames is None:
            raise UserError("masks.type: dual masks frames of stickers, which the data are not; take none")
        if section.lengths[0] > frames:
            raise UserError(
                f"masks.lengths: at least {section.lengths[0]} frames, but the clips have {frames}; lower it"
            )
        self.section, self.frames = section, frames
        self.tasks = section.tasks
        self._indices = torch.tensor([TASKS.index(task) for task in section.tasks])

    def draw(self, lengths: Tensor | None, odds: Tensor | None, random: Random) -> Frames:
        """Draw what is shown, asked and given, without waiting for the device.

        Args:
            lengths: Frames that each clip has, int64 [n] in 1..F; None: F each.
            odds: Of each of `tasks`, in proportion to which it is drawn [n, len(tasks)]; None: equal ones. With
                `draw: batch` their mean over the whole batch.
            random: Random numbers for these n rows.
        """
        section = self.section
        draw = random.uniform if section.draw == "sample" else lambda: random.common().expand(len(count))
        u = random.uniform()
        if lengths is None:
            lengths = torch.full_like(u, self.frames).long()
        low, high = section.lengths
        count = torch.minimum(low + (u * (high - low + 1)).long(), lengths)

        if odds is not None and section.draw == "batch":
            odds = random.all(odds).mean(0, keepdim=True)
        task = self._tasks(odds, draw())
        task = task.masked_fill(random.uniform() < section.uncond, UNCOND)
        places, valid = spread(lengths, count, self.frames)
        n = count if section.draw == "sample" else random.all(count).amin().expand_as(count)
        given = given_frames(task, (draw() * choices(task, n)).long(), n, valid)
        counted = valid
        if section.given_frames == "skip":
            made = valid & ~given
            counted = torch.where(made.any(1, keepdim=True), made, valid)
        weight = torch.ones_like(u) if section.normalize == "valid" else counted.float().mean(1)
        return Frames(task, places, valid, given, counted, gives_text(task), weight)

    def _tasks(self, odds: Tensor | None, u: Tensor) -> Tensor:
        """Tasks [n] by their odds, from numbers u [n] in [0, 1)."""
        if odds is None:
            drawn = (u * len(self._indices)).long()
        else:
            below = odds.cumsum(1)
            drawn = (below <= u[:, None] * below[:, -1:]).sum(1).clamp(max=len(self._indices) - 1)
        self._indices = self._indices.to(u.device)  # copied once: each copy would wait for the device
        return self._indices[drawn]


def draw_frames(
    clip_lengths: Tensor, frames: int, generator: torch.Generator | None = None, odds: Tensor | None = None, **keys: Any
) -> Frames:
    """RDTF's masks for a batch, in a training loop of one's own.

    Args:
        clip_lengths: Frames that each clip has, int64 [n] in 1..F.
        frames: F.
        generator: Of the same device; None: the global one.
        odds: Of each task [n, len(tasks)], such as a curriculum of `entrecipes.samples.tasks` gives; None: equal ones.
        keys: As `masks: {type: dual}` has in a recipe: `tasks`, `uncond`, `draw`, `lengths`, `normalize`,
            `given_frames`.
    """
    random = BatchRandom(len(clip_lengths), clip_lengths.device, generator)
    return DualMasks(DualMasksSection(**keys), frames).draw(clip_lengths, odds, random)


def spread(lengths: Tensor, count: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Take `count` frames, spread evenly from the first to the last, of clips with `lengths` frames.

    Args:
        lengths: int64 [n] in 1..F.
        count: int64 [n], no more than `lengths`.
        frames: F.

    Returns:
        Which frame stands where, int64 [n, F] (the last one behind the taken ones), and which are taken, bool [n, F].
    """
    place = torch.arange(frames, device=lengths.device)
    last, count = (lengths - 1)[:, None], count[:, None]
    places = torch.round(place * last / (count - 1).clamp(min=1)).long()
    return torch.minimum(places, last), place < count


def choices(task: Tensor, n: Tensor) -> Tensor:
    """How many equally likely choices a task [n] has of what is given, with n frames [n]; int64 [n]."""
    half, one = n // 2, torch.ones_like(n)
    return torch.stack([n, one, n, 3 * one, half + 1, n - half, one]).gather(0, task[None])[0]


def given_frames(task: Tensor, choice: Tensor, n: Tensor, valid: Tensor) -> Tensor:
    """RDTF's condition masks: which frames are given.

    | task | given |
    |---|---|
    | i2v, it2v | one frame, any |
    | interpolation | 1010..., 0101... or 100100...; nothing of a still, of which nothing would be left to make |
    | pre_frame_prediction | from s to the end, s in 1..n // 2 + 1 (nothing for s = n) |
    | post_frame_prediction | those before e, e in n // 2..n - 1 (nothing for e = 0, which is n = 1) |
    | t2v, uncond | none |

    Args:
        task: int64 [n], index into TASKS.
        choice: Which of its `choices`, int64 [n].
        n: Frames that the choice is made for [n], those of the clip (published: of the shortest clip in the batch).
        valid: Frames of the clip that are there, bool [n, F].

    Returns:
        bool [n, F], a part of `valid`.
    """
    place = torch.arange(valid.shape[1], device=valid.device)
    task, choice, half = task[:, None], choice[:, None], n[:, None] // 2
    pattern = torch.where(choice == 2, place % 3 == 0, place % 2 == choice) & valid[:, 1:].any(1, keepdim=True)
    given = ((task == I2V) | (task == IT2V)) & (place == choice)
    given |= (task == INTERPOLATION) & pattern
    given |= (task == PRE) & (place >= choice + 1)
    given |= (task == POST) & (place < choice + half)
    return given & valid


def made_share(frames: int) -> Tensor:
    """Mean share of a clip's frames that each task leaves to be made, float32 [F + 1, len(TASKS)] by its length
    (row 0 is not used)."""
    numbers = [torch.arange(count) for count in (frames + 1, len(TASKS), frames + 2)]
    n, task, choice = (grid.flatten() for grid in torch.meshgrid(*numbers, indexing="ij"))
    given = given_frames(task, choice, n, torch.arange(frames) < n[:, None]).sum(1)
    share = ((n - given) / n.clamp(min=1) * (choice < choices(task, n))).view(frames + 1, len(TASKS), -1)
    return share.sum(2) / choices(task, n).view_as(share)[..., 0].clamp(min=1)


def gives_text(task: Tensor) -> Tensor:
    """`recipe.masks.follows_text` of each task [n], bool [n]."""
    return (task != I2V) & (task != UNCOND)
