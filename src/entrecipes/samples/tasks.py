"""Which task of RDTF's dual masks each sample gets, from easy to hard: as written, by the loss, by measured difficulty.

In a training loop of one's own, beside `entrecipes.samples.masks`:

```python
curriculum = AdaptiveTasks(AdaptiveTasksSection(), tasks=TASKS[:-1], images=100_000, frames=8, device="cuda")
for x0, lengths, motion in batches:
    frames = draw_frames(lengths, 8, generator, odds=curriculum.odds(seen, len(x0), motion, lengths))
    ...  # the losses [n], squared x0 errors [n] and noise levels log(sigma) [n]
    curriculum.record(frames.task, loss, x0_error, log_sigma)
```

Source: RDTF (arXiv 2503.17735) and its published code, whose function for the adaptive part can't run as it stands:
what is here is a reading of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from entrecipes.errors import UserError
from entrecipes.information.nats import gate
from entrecipes.recipe.curriculum import AdaptiveTasksSection, EntropyTasksSection, LinearTasksSection
from entrecipes.recipe.masks import TASKS, Task
from entrecipes.samples.curriculum import Curriculum
from entrecipes.samples.masks import made_share

KINDS = {"interpolation": "interpolation", "pre_frame_prediction": "prediction", "post_frame_prediction": "prediction"}
"""RDTF's three kinds of tasks; those not named here are generation."""
LINEAR = {"interpolation": 0.5, "prediction": -0.25, "generation": -0.5}
"""LCL: odds = 0.5 + this times cos(2 pi r)."""
STATIC = {"interpolation": (0.9, 0.1), "prediction": (0.7, 0.3), "generation": (0.1, 0.9)}
"""Static weights at the first and the last image (the published middle knot, 0.5 for all, lies on the line)."""
ADAPTIVE = {"interpolation": (0.9, 0.1), "prediction": (0.5, 0.5), "generation": (0.1, 0.9)}
"""Adaptive weights at level 0 and at level 4."""
TOP_LEVEL, MIDDLE_LEVEL, FEWEST_VALUES = 4, 2, 10
"""Levels of the controller, and how many values it ranks among at the least: with fewer, its level is the middle."""

PIVOT = 0.15
"""The sigma at which the gate of measured nats is one half: what is usual for images in [-1, 1]."""
KEPT = 0.99
"""Of what is measured, at every step in which the task occurs."""


class TaskCurriculum(Curriculum):
    """Odds of tasks that change with images seen.

    Args:
        section: The recipe's keys.
        tasks: The names that odds are given for, in order.
        images: The run's length, for a recipe that leaves it open.
        frames: F, frames of a clip; None for data that are no stickers.
        device: Of all tensors.

    Raises:
        UserError: For data that are no stickers, or when there is nothing to choose from.
    """

    def __init__(
        self,
        section: Any,
        *,
        tasks: Sequence[Task],
        images: int,
        frames: int | None,
        device: torch.device | str = "cpu",
        **context: Any,
    ) -> None:
        if frames is None:
            raise UserError(f"curriculum.type: {section.type} chooses tasks for stickers, which the data are not")
        if len(tasks) < 2:
            raise UserError(
                f"curriculum.type: {section.type} chooses among the tasks of masks.type: dual; take that and two or "
                "more masks.tasks, or curriculum.type: none"
            )
        self.section, self.tasks, self.frames, self.device = section, tuple(tasks), frames, torch.device(device)
        self.images = section.images or images
        self.indices = torch.tensor([TASKS.index(task) for task in tasks], device=device)
        self.shares: Tensor | None = None  # of the last batch, for the log

    def odds(self, images: int, n: int, motion: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        odds = self.weights(min(images / self.images, 1.0), motion, lengths).expand(n, -1)
        self.shares = (odds / odds.sum(1, keepdim=True)).mean(0)
        return odds

    def weights(self, progress: float, motion: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Odds float32, [len(tasks)] or [n, len(tasks)], at `progress` from 0 to 1."""
        raise NotImplementedError

    def facts(self, mean: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Any]:
        """`odds`: the mean share of each task in the last batch's draws."""
        return {} if self.shares is None else {"odds": self._named(mean(self.shares))}

    def _by_kind(self, values: dict[str, Any]) -> Tensor:
        """A table by kind of task as float32 [..., len(tasks)]."""
        rows = [values[KINDS.get(task, "generation")] for task in self.tasks]
        return torch.tensor(rows, device=self.device).movedim(0, -1)

    def _named(self, values: Tensor) -> dict[str, float | None]:
        """Numbers by task, to four digits."""
        return {
            task: float(f"{value:.4g}") if math.isfinite(value) else None
            for task, value in zip(self.tasks, values.tolist(), strict=True)
        }


class LinearTasks(TaskCurriculum):
    """LCL, RDTF's baseline (table 4): interpolation first, then prediction and generation, by a cosine.

    With r = min(images / S, 0.75): interpolation (1 + cos 2 pi r) / 2, generation (1 - cos 2 pi r) / 2, prediction
    half of that + 1/4. So generation is likeliest at S / 2, and from 0.75 S on all are equal.
    """

    section: LinearTasksSection

    def __init__(self, section: LinearTasksSection, **context: Any) -> None:
        super().__init__(section, **context)
        self.slope = self._by_kind(LINEAR)

    def weights(self, progress: float, motion: Tensor | None, lengths: Tensor | None) -> Tensor:
        odds = 0.5 + self.slope * math.cos(2 * math.pi * min(progress, 0.75))
        return odds.clamp(min=1e-6)  # where all that there are have none, they are equal


class MeasuredTasks(TaskCurriculum):
    """What is known of each task from the model's own x0 errors.

    `nats` is the mean of gate * x0 error / sigma^2 over the noise levels as they are drawn: the gated information rate
    in nats per unit of log sigma, for each number in the frames that count. (The nats of a clip would be its integral
    over log sigma times that many numbers; all tasks see the same noise levels, so that it tells them apart.)
    """

    records = True

    def __init__(self, section: Any, **context: Any) -> None:
        super().__init__(section, **context)
        self.sums = torch.zeros(2, len(self.tasks), dtype=torch.float64, device=self.device)  # of samples and of rates

    @property
    def nats(self) -> Tensor:
        """float64 [len(tasks)]; NaN for a task not seen yet."""
        return self.sums[1] / self.sums[0]

    def record(self, task: Tensor, loss: Tensor, x0_error: Tensor, log_sigma: Tensor) -> None:
        rate = gate(log_sigma.double(), PIVOT) * x0_error.double() * torch.exp(-2 * log_sigma.double())
        member = self._member(task, rate)
        new = torch.stack([member.sum(0).double(), _held(member, rate).sum(0)])
        self.sums = torch.where(member.any(0), KEPT * self.sums + new, self.sums)

    def _member(self, task: Tensor, value: Tensor) -> Tensor:
        """Whose value counts for which task, bool [n, len(tasks)]: not those of other tasks, nor what is no number."""
        return (task[:, None] == self.indices) & value.isfinite()[:, None]

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises ValueError for other tasks or another length of the history."""
        for name, value in state.items():
            if isinstance(value, Tensor):
                if value.shape != getattr(self, name).shape:
                    raise ValueError(f"the curriculum's {name} were saved as {[*value.shape]}")
                value = value.to(self.device, copy=True)
            setattr(self, name, value)

    def facts(self, mean: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Any]:
        """`odds` and `nats` of each task (null: not seen yet)."""
        return super().facts(mean) | {"nats": self._named(self.nats)}


def _held(member: Tensor, value: Tensor) -> Tensor:
    """Each sample's value [n] where its task stands, 0 elsewhere: [n, len(tasks)]."""
    return value[:, None].expand(member.shape).masked_fill(~member, 0)


class AdaptiveTasks(MeasuredTasks):
    """RDTF's difficulty-adaptive curriculum: odds = a static part by images seen + an adaptive part by the loss.

    A PID controller turns the batch's loss L into P = proportional L + integral mean(L) + derivative (L - L before),
    with the mean over its history. q is the share of the history's P that are greater than the present one, and the
    level min(4, floor(5 q)): a low, falling loss asks for harder tasks, a high one for easier ones. L is smoothed, and
    by `scores: task` each sample's loss is first taken relative to the mean and deviation of its task's losses in the
    history, both our own: otherwise the controller reacts to noise and to the mix of tasks that it makes itself.
    The present step counts as a part of the history.
    """

    section: AdaptiveTasksSection

    def __init__(self, section: AdaptiveTasksSection, **context: Any) -> None:
        super().__init__(section, **context)
        self.static, self.adaptive = self._by_kind(STATIC), self._by_kind(ADAPTIVE)
        self.steps = 0
        self.losses, self.values = torch.zeros(2, section.history, dtype=torch.float64, device=self.device)
        # number, sum and sum of squares of each task's losses at each step
        self.moments = torch.zeros(section.history, 3, len(self.tasks), dtype=torch.float64, device=self.device)
        self.level = torch.tensor(MIDDLE_LEVEL, device=self.device)

    def weights(self, progress: float, motion: Tensor | None, lengths: Tensor | None) -> Tensor:
        return torch.lerp(*self.static, progress) + torch.lerp(*self.adaptive, self.level / TOP_LEVEL)

    def record(self, task: Tensor, loss: Tensor, x0_error: Tensor, log_sigma: Tensor) -> None:
        super().record(task, loss, x0_error, log_sigma)
        section, slot = self.section, self.steps % self.section.history
        before = self.losses[slot - 1].clone()
        score = self._score(loss.double(), self._member(task, loss), slot)
        score = torch.where(score.isnan(), before, score)  # no sample of any of the tasks
        if self.steps:
            score = torch.lerp(score, before, section.smoothing)
        else:
            before = score
        self.losses[slot] = score
        self.steps += 1
        filled = min(self.steps, section.history)
        mean = self.losses.sum() / filled
        value = section.proportional * score + section.integral * mean + section.derivative * (score - before)
        self.values[slot] = value
        if filled >= FEWEST_VALUES:
            greater = (self.values[:filled] > value).sum()
            self.level = ((TOP_LEVEL + 1) * greater // filled).clamp(max=TOP_LEVEL)

    def _score(self, loss: Tensor, member: Tensor, slot: int) -> Tensor:
        """The batch's mean loss, of each task relative to itself where asked for; NaN without any sample."""
        if self.section.scores == "raw":
            return _held(member, loss).sum() / member.sum()
        held = _held(member, loss)
        self.moments[slot] = torch.stack([member.sum(0).double(), held.sum(0), held.square().sum(0)])
        count, total, squares = self.moments.sum(0)
        mean, square = total / count, squares / count
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        # a deviation that is all rounding tells nothing; a single loss is 0 from its mean
        relative = (loss[:, None] - mean) / deviation.clamp(min=1e-6 * square.sqrt() + 1e-300)
        return relative.masked_fill(~member, 0).sum() / member.sum()

    def state_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name).clone() for name in ("losses", "values", "moments", "level")}
        return super().state_dict() | kept | {"steps": self.steps}

    def facts(self, mean: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Any]:
        """Also `level`, from 0 (easy) to 4."""
        return super().facts(mean) | {"level": self.level.item()}


class EntropyTasks(MeasuredTasks):
    """Our own: each sample gets the task whose difficulty for it, in [0, 1], fits the moment.

    What is known of the sample is the mean of its motion (its rank), its length (share of F) and the share of its
    frames that the task leaves to be made; what is measured are the model's own nats on the task, from 0 for the
    easiest to 1 for the hardest (0.5 for a task not seen yet). The difficulty d is `static` times the first + (1 -
    static) times the second, and its target t rises from 0 to 1 with images seen. A task's odds are proportional to
    exp(-((d - t) / width)^2 / 2), normalised over the sample's tasks, and mixed with equal ones by `floor`.
    """

    section: EntropyTasksSection

    def __init__(self, section: EntropyTasksSection, **context: Any) -> None:
        super().__init__(section, **context)
        self.made = made_share(self.frames).to(self.device)[:, self.indices]

    def weights(self, progress: float, motion: Tensor | None, lengths: Tensor | None) -> Tensor:
        distance = (self.difficulty(motion, lengths) - progress) / self.section.width
        fitting = torch.softmax(-distance.square() / 2, dim=-1)
        return torch.lerp(fitting, torch.full_like(fitting, 1 / len(self.tasks)), self.section.floor)

    def difficulty(self, motion: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Of each task for each sample, float32 in [0, 1]: [n, len(tasks)], or [1, len(tasks)] where neither the
        motion (then 0.5) nor the lengths (then F) are known; see [`odds`]."""
        motion = torch.full_like(self.made[:1, :1], 0.5) if motion is None else motion.float()[:, None]
        if lengths is None:
            lengths = torch.full_like(self.indices[:1], self.frames)
        known = (motion + lengths[:, None] / self.frames + self.made[lengths]) / 3
        return torch.lerp(self.measured, known, self.section.static)

    @property
    def measured(self) -> Tensor:
        """The nats of each task between the easiest and the hardest, float32 [len(tasks)]."""
        nats = self.nats
        low = nats.nan_to_num(math.inf).amin()
        scaled = (nats - low) / (nats.nan_to_num(-math.inf).amax() - low)
        return scaled.nan_to_num(0.5).float()
