"""InfoNoiseScheduler keeps the conventions of diffusers' schedulers, and its keys ride along through stock ones."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from scheduler_case import STOCK, ours, profile, sample, stock

from entrecipes import InfoNoiseScheduler
from entrecipes.errors import UserError

# As a user would construct one, without any stock scheduler: the stock keys, and what stands for the path.
DIRECT: dict[str, dict[str, Any]] = {
    "plain": {},
    "vp": {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "trained betas": {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.4], "clip_sample": False},
    "edm": {"base_class": "EDMDPMSolverMultistepScheduler", "sigma_max": 20.0, "solver_order": 1},
    "flow": {"base_class": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, "grid": "entropic", "profile": profile()},
}


@pytest.fixture(params=DIRECT)
def keys(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments of a scheduler."""
    return DIRECT[request.param]


def image() -> torch.Tensor:
    """A batch to step."""
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def known(config: Any) -> dict[str, Any]:
    """A config without what diffusers notes for itself."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_infonoise"}


def test_saving_and_loading_changes_nothing(keys: dict[str, Any], tmp_path: Path) -> None:
    scheduler = InfoNoiseScheduler(**keys)
    scheduler.save_pretrained(tmp_path)
    loaded = InfoNoiseScheduler.from_pretrained(tmp_path)
    assert known(loaded.config) == known(scheduler.config)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "InfoNoiseScheduler"
    assert torch.equal(sample(loaded, 4, image()), sample(scheduler, 4, image()))
    assert known(InfoNoiseScheduler.from_config(scheduler.config).config) == known(scheduler.config)


def test_copies_are_equal_and_independent(keys: dict[str, Any]) -> None:
    scheduler = InfoNoiseScheduler(**keys, train_images=1000)
    scheduler.record(image(), image(), image(), scheduler.sample_timesteps(2))
    scheduler.set_timesteps(3)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        other.set_timesteps(4)
        assert len(scheduler.timesteps) == 3
        assert torch.equal(sample(other, 4, image()), sample(copy.copy(scheduler), 4, image()))
        scheduler.set_timesteps(3)


def test_the_attributes_that_pipelines_look_for(keys: dict[str, Any]) -> None:
    scheduler = InfoNoiseScheduler(**keys)
    assert scheduler.order == 1 and len(scheduler) == scheduler.config.num_train_timesteps == len(scheduler.timesteps)
    assert scheduler.init_noise_sigma >= 1 and scheduler.step_index is None and scheduler.begin_index is None
    assert bool((scheduler.timesteps.diff() < 0).all()) and len(scheduler.sigmas) == len(scheduler) + 1
    assert all(isinstance(kind, type) for kind in scheduler.compatibles)
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == 4
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32 and scheduler.sigmas[-1] == 0
    for index, timestep in enumerate(scheduler.timesteps):
        assert scheduler.index_for_timestep(timestep) == index
        assert scheduler.index_for_timestep(timestep.expand(2)) == index  # a batch of equal ones


def test_step_gives_the_same_as_object_and_tuple(keys: dict[str, Any]) -> None:
    scheduler, results = InfoNoiseScheduler(**keys), []
    for return_dict in (True, False):
        scheduler.set_timesteps(3)
        generator = torch.Generator().manual_seed(0)
        timestep = scheduler.timesteps[0]
        given = scheduler.step(0.1 * image(), timestep, image(), eta=0.5, generator=generator, return_dict=return_dict)
        results.append((given.prev_sample, given.pred_original_sample) if return_dict else given)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.shape == image().shape


def test_images_with_a_generator_each(keys: dict[str, Any]) -> None:
    """As stock pipelines pass them: a sample depends on its own generator only."""
    scheduler, results = InfoNoiseScheduler(**keys), []
    for seeds in ((1, 2), (1, 3)):
        scheduler.set_timesteps(3)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        step = scheduler.step(0.1 * image(), scheduler.timesteps[0], image(), eta=1.0, generator=generators)
        results.append(step.prev_sample)
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][1], results[1][1])


def test_noise_is_added_at_one_timestep_or_at_one_each(keys: dict[str, Any]) -> None:
    scheduler, noise = InfoNoiseScheduler(**keys), image().flip(0)
    timesteps = scheduler.timesteps[[1, -1]]
    both = scheduler.add_noise(image(), noise, timesteps)
    for row, timestep in enumerate(timesteps):
        for one in (timestep, timestep[None], timestep.item()):
            torch.testing.assert_close(scheduler.add_noise(image(), noise, one)[row], both[row])
        scaled = scheduler.scale_model_input(both, timesteps)[row]
        torch.testing.assert_close(scheduler.scale_model_input(both, timestep)[row], scaled)
    assert scheduler.add_noise(image().half(), noise.half(), timesteps).dtype == torch.float16


def test_what_stock_schedulers_have_for_pipelines_and_training_scripts() -> None:
    noise = image().flip(0)
    theirs, mine = stock("flow"), ours("flow")
    for at in (theirs.timesteps[[200, 700]], theirs.timesteps[[500]]):
        expected = theirs.scale_noise(image(), at, noise)
        torch.testing.assert_close(mine.scale_noise(image(), at, noise), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.get_velocity(image(), noise, at), noise - image())

    timesteps = torch.tensor([100, 999])
    for prediction_type in ("v_prediction", "epsilon"):  # the velocity, whatever is predicted
        theirs = diffusers.DDIMScheduler(prediction_type=prediction_type)
        velocity = InfoNoiseScheduler.from_config(theirs.config).get_velocity(image(), noise, timesteps)
        expected = theirs.get_velocity(image(), noise, timesteps)
        torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="get_velocity.*target"):
        ours("edm").get_velocity(image(), noise, mine.timesteps[:2])


@pytest.mark.parametrize("name", STOCK)
def test_what_was_learned_rides_through_stock_schedulers(name: str, caplog: Any, tmp_path: Path) -> None:
    first = stock(name)
    mine = InfoNoiseScheduler.from_config(
        first.config, profile=profile(), pivot=0.3, grid="rescaled", learning={"base": {"type": "log_normal"}}
    )
    assert mine.settings["base_class"] == type(first).__name__
    with caplog.at_level(logging.WARNING):
        back = type(first).from_config(mine.config)
        back.save_pretrained(tmp_path)
        loaded = type(first).from_pretrained(tmp_path)
        again = InfoNoiseScheduler.from_config(loaded.config)
    assert not caplog.records, "stock schedulers warn of what they do not know"
    assert {key: back.config[key] for key in known(first.config)} == known(first.config)
    assert known(again.config) == known(mine.config)
    assert known(mine.base.config) == known(first.config)


def test_another_stock_class_takes_over_as_the_base() -> None:
    mine = ours("vp", profile=profile())
    other = diffusers.EulerDiscreteScheduler.from_config(mine.config)
    again = InfoNoiseScheduler.from_config(other.config, grid="base")
    assert again.settings["base_class"] == "EulerDiscreteScheduler" and again.settings["profile"] == profile()
    again.set_timesteps(5)
    other.set_timesteps(5)
    torch.testing.assert_close(again.sigmas, other.sigmas)
    named = InfoNoiseScheduler.from_config(other.config, base_class="DDIMScheduler")
    assert named.settings["base_class"] == "DDIMScheduler"


def test_the_order_of_the_solver_is_the_bases_where_it_has_one() -> None:
    assert InfoNoiseScheduler.from_config(diffusers.DPMSolverMultistepScheduler().config).settings["solver_order"] == 2
    mine = InfoNoiseScheduler.from_config(diffusers.DDIMScheduler().config, solver_order=2)
    assert diffusers.DPMSolverMultistepScheduler.from_config(mine.config).config.solver_order == 2
    mine = InfoNoiseScheduler.from_config(diffusers.DPMSolverMultistepScheduler().config, solver_order=1)
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(mine.config)
    assert theirs.config.solver_order == InfoNoiseScheduler.from_config(theirs.config).settings["solver_order"] == 1


def test_keys_of_other_schedulers_ride_along_silently(caplog: pytest.LogCaptureFixture) -> None:
    config = {**stock("edm").config, "_class_name": "EDMEulerScheduler", "use_karras_sigmas": True}
    with caplog.at_level(logging.WARNING):
        scheduler = InfoNoiseScheduler.from_config(config)
    assert scheduler.config.use_karras_sigmas and not caplog.records
    assert InfoNoiseScheduler.from_config(config, True, unknown=1)[1] == {"unknown": 1}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"beta_schedul": "linear"}, "'beta_schedul'; did you mean 'beta_schedule'"),
        ({"shift": 3.0}, "neither it nor DDIMScheduler takes 'shift'.*base_class"),
        ({"base_class": "DDIMSchedular"}, "'DDIMSchedular' is no diffusers scheduler; did you mean 'DDIMScheduler'"),
        ({"base_class": "CMStochasticIterativeScheduler"}, "is not supported; supported are"),
        ({"solver_order": 3}, "solver_order=2"),
        ({"grid": "inforgid", "profile": profile()}, "no 'inforgid'; did you mean 'infogrid'"),
        ({"grid": "rescaled"}, "rescaled needs a profile"),
        ({"pivot": -1.0}, "pivot: must be above 0, got -1.0"),
        ({"train_images": -5}, "train_images: must be above 0"),
        ({"data_std": -1.0}, "data_std: must be above 0"),
        ({"learning": {"flor": 0.1, "bins": 2}}, r"(?s)learning.bins: .*learning.flor: "),
        ({"learning": {"pivot": 0.1, "onset": 0.1}}, "onset: has no effect with a pivot"),
        ({"objective": {"weighting": "min-snr"}}, "objective.weighting: "),
    ],
)
def test_what_does_not_fit_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InfoNoiseScheduler(**keys)


def test_a_mistyped_change_and_a_nameless_config_are_named() -> None:
    with pytest.raises(UserError, match="'gird'; did you mean 'grid'"):
        InfoNoiseScheduler.from_config(stock("vp").config, gird="base")
    with pytest.raises(UserError, match="does not say whose it is.*base_class"):
        InfoNoiseScheduler.from_config({"num_train_timesteps": 10, "rho": 7.0})


DAMAGED: dict[str, tuple[Any, str]] = {
    "short": ({**profile(), "x0_error": [1.0] * 5}, "log_sigma has 64 values and x0_error 5"),
    "one": ({"log_sigma": [0.0], "x0_error": [1.0]}, "two at least"),
    "nan": ({**profile(), "x0_error": [float("nan"), *profile()["x0_error"][1:]]}, "must be finite"),
    "infinite": ({**profile(), "log_sigma": [float("-inf"), *profile()["log_sigma"][1:]]}, "must be finite"),
    "negative": ({**profile(), "x0_error": [-1.0, *profile()["x0_error"][1:]]}, "positive"),
    "zero": ({**profile(), "x0_error": [0.0] * 64}, "positive"),
    "unsorted": ({**profile(), "log_sigma": profile()["log_sigma"][::-1]}, "rise in even steps"),
    "uneven": ({"log_sigma": [0.0, 1.0, 3.0], "x0_error": [1.0] * 3}, "rise in even steps"),
    "text": ({**profile(), "x0_error": ["much"] * 64}, "of numbers"),
    "missing": ({"log_sigma": [0.0, 1.0]}, "of numbers"),
    "a list": ([1.0, 2.0], "of numbers"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_refused_when_loading(name: str, tmp_path: Path) -> None:
    table, message = DAMAGED[name]
    ours("vp", profile=profile()).save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_infonoise": {**config["_infonoise"], "profile": table}}))
    with pytest.raises(UserError, match=message):
        InfoNoiseScheduler.from_pretrained(tmp_path)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, entrecipes; assert 'InfoNoiseScheduler' in entrecipes._LAZY and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
