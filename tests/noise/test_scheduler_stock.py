"""What InfoNoiseScheduler tells stock schedulers, so that they sample along its grid."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from scheduler_case import ours, profile, stock

from entrecipes import InfoNoiseScheduler
from entrecipes.errors import UserError

GIVEN = [
    ("EulerDiscreteScheduler", {}, "sigmas"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "sigmas"),
    ("FlowMatchEulerDiscreteScheduler", {}, "sigmas"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "sigmas"),
    (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0},
        "sigmas",
    ),
    ("DDPMScheduler", {}, "timesteps"),
    ("DPMSolverMultistepScheduler", {}, "timesteps"),
    ("DPMSolverSinglestepScheduler", {}, "timesteps"),
    ("HeunDiscreteScheduler", {}, "timesteps"),
]


@pytest.mark.parametrize("steps", [5, 50])
@pytest.mark.parametrize(("class_name", "config", "argument"), GIVEN)
def test_stock_schedulers_are_told_so_that_they_visit_these_levels(
    class_name: str, config: dict[str, Any], argument: str, steps: int
) -> None:
    theirs = getattr(diffusers, class_name)(**config)
    mine = InfoNoiseScheduler.from_config(theirs.config, profile=profile(), grid="rescaled")
    before = theirs.timesteps
    arguments = mine.schedule_for(theirs, steps)
    assert [*arguments] == [argument] and theirs.timesteps is before
    theirs.set_timesteps(**arguments)
    mine.set_timesteps(steps)
    visited = theirs.sigmas[:-1].unique().flip(0) if argument == "sigmas" else theirs.timesteps.unique().flip(0)
    if argument == "sigmas":
        torch.testing.assert_close(visited, mine.sigmas[:-1], rtol=1e-3, atol=0)
    else:  # whole numbers, all different
        assert len(visited) == steps and bool((visited == visited.round()).all())
        assert (visited - mine.timesteps).abs().max() <= (0.51 if steps == 5 else 8)


@pytest.mark.parametrize("mu", [0.4, 1.15])
@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        (
            "UniPCMultistepScheduler",
            {"use_dynamic_shifting": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        ),
    ],
)
def test_a_dynamic_shift_is_undone(class_name: str, config: dict[str, Any], mu: float) -> None:
    theirs = getattr(diffusers, class_name)(**config)
    mine = InfoNoiseScheduler.from_config(theirs.config, profile=profile(), grid="rescaled")
    arguments = mine.schedule_for(theirs, 20, mu=mu)
    assert [*arguments] == ["sigmas"]
    theirs.set_timesteps(**arguments, mu=mu)
    mine.set_timesteps(20)
    torch.testing.assert_close(theirs.sigmas, mine.sigmas, rtol=1e-3, atol=0)
    if "use_dynamic_shifting" in config:
        with pytest.raises(UserError, match=f"{class_name} can't be told.* pass the pipeline's mu"):
            mine.schedule_for(theirs, 20)


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("DDIMScheduler", {}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_a_scheduler_that_bends_its_levels_is_refused(class_name: str, config: dict[str, Any]) -> None:
    theirs = getattr(diffusers, class_name)(**config)
    mine = InfoNoiseScheduler.from_config(theirs.config, profile=profile())
    with pytest.raises(UserError, match=f"{class_name} can't be told"):
        mine.schedule_for(theirs, 10)


def test_a_scheduler_of_another_path_or_with_too_few_timesteps_is_refused() -> None:
    with pytest.raises(UserError, match="another path: flow, not edm"):
        ours("edm", profile=profile()).schedule_for(stock("flow"), 5)
    theirs = diffusers.DDPMScheduler(num_train_timesteps=20)
    mine = InfoNoiseScheduler.from_config(theirs.config, profile=profile())
    assert mine.schedule_for(theirs, 20)["timesteps"].tolist() == list(range(19, -1, -1))
    with pytest.raises(UserError, match="only 20 timesteps"):
        mine.schedule_for(theirs, 21)
