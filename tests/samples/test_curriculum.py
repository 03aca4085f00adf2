"""Phases of clip training: which frames, which poses, which weights, and when."""

import pytest
import torch
from torch import nn

from entrecipes.errors import UserError
from entrecipes.recipe.curriculum import NoCurriculumSection, PhasesSection
from entrecipes.samples.curriculum import Phases, WholeSamples

MODEL = nn.ModuleDict({"first": nn.Linear(1, 1), "second": nn.Linear(1, 1)})
PHASES = [
    {"frames": 1, "poses": False},
    {"from_images": 100, "frames": 2},
    {"from_images": 200, "train": ["second.*"]},
]


def phases(*rows) -> Phases:
    return Phases(PhasesSection(phases=rows), MODEL, "clips")


def clips(count: int = 6, frames: int = 4) -> torch.Tensor:
    """Every frame, pose map and reference of every clip has its own grey."""
    shape = (count, 2 * frames + 1)
    return (
        torch.arange(1, 1 + count * shape[1]).reshape(shape)[:, None, :, None, None] + torch.zeros(1, 3, 1, 2, 2)
    ).byte()


def test_a_phase_begins_at_its_image_and_says_so_once():
    schedule = phases(*PHASES)
    assert [len(schedule.advance(images)) for images in (0, 50, 100, 150, 250, 260)] == [1, 0, 1, 0, 1, 0]
    assert schedule.number == 2
    late = phases(*PHASES)  # a resumed run enters in the middle
    assert late.advance(150)[0]["what"] == "phase 2 of 3: 2 frame(s) of each clip, with poses"


def test_frames_are_neighbours_with_their_own_poses_and_the_reference():
    schedule, batch = phases(*PHASES), clips()
    schedule.advance(100)
    uniform = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 0.999])
    cut = schedule.view(batch, lambda: uniform)
    assert cut.shape == (6, 3, 5, 2, 2)
    for row, first in enumerate([0, 0, 1, 1, 2, 2]):  # floor(u * 3)
        wanted = [first, first + 1, 4 + first, 5 + first, 8]
        assert torch.equal(cut[row], batch[row][:, wanted])


def test_without_poses_their_maps_are_black_and_the_rest_is_as_it_was():
    schedule, batch = phases(*PHASES), clips()
    schedule.advance(0)
    cut = schedule.view(batch, lambda: torch.zeros(6))
    assert (cut[:, :, 1] == 0).all() and torch.equal(cut[:, :, [0, 2]], batch[:, :, [0, 8]])
    assert torch.equal(batch, clips())


def test_whole_clips_stay_whole_and_a_longer_cut_than_the_clip_is_the_clip():
    schedule, batch = phases({"frames": 9}), clips()
    schedule.advance(0)
    assert torch.equal(schedule.view(batch, lambda: torch.rand(6)), batch)
    plain = WholeSamples(NoCurriculumSection(), MODEL, "images")
    assert plain.view(batch, None) is batch and plain.eligible("anything") and not plain.advance(0)


def test_only_the_named_weights_are_eligible():
    schedule = phases(*PHASES)
    schedule.advance(0)
    assert schedule.eligible("first.weight")
    schedule.advance(200)
    assert schedule.eligible("second.bias") and not schedule.eligible("first.weight")


def test_wrong_phases_are_named():
    with pytest.raises(UserError, match="curriculum.phases.0.train: 'third.*' matches no parameter; the model has fir"):
        phases({"train": ["third.*"]})
    with pytest.raises(UserError, match="phases cuts clips, and the data are images"):
        Phases(PhasesSection(phases=[{}]), MODEL, "images")
    with pytest.raises(ValueError, match="phases must start at 0 and increase"):
        PhasesSection(phases=[{"from_images": 5}])
