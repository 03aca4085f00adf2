"""FSDP2 over two CPU processes, in one launch: as one process, to rounding; resumed as if never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from sharded_runs import main
from tiny import DIT, FLOW, UNET, tiny

from entrecipes.errors import UserError
from entrecipes.recipe.schema import Recipe
from entrecipes.training.sharding import check_sharded

ROOT = Path(__file__).parents[2]
STILL = {**UNET, "config": {**UNET["config"], "dropout": 0.0}}
DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 4}}
LEARNED = {"type": "infonoise", "warmup": 48, "ramp": 48, "refresh_every": 32, "buffer": 100}
STAGES = [  # conv_out has one row: a process without a share of it
    {"from_images": 0, "train": ["up_blocks.*", "conv_out.*"]},
    {"from_images": 64, "train": ["mid_block.*", "conv_norm_out.*", "conv_out.bias"]},
    {"from_images": 112, "train": ["*"]},
]
LINEAR = {"type": "linear", "ratio": 0.5, "draws": {"images": 8, "noise_levels": 4}}
RECIPES = {
    "noise": tiny(STILL, noise=LEARNED, training={"clip_grad_norm": 1.0, "micro_batch_size": 4}),
    "stages": tiny(STILL, blocks={"type": "staged", "stages": STAGES}),
    "lowered": tiny(STILL, training={"precision": "bf16"}),
    "pruned": tiny(DEEP, FLOW, prune=LINEAR, training={"ema": None}),
}


def rows(folder: Path, kind: str) -> list[dict]:
    return [
        row for line in (folder / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["kind"] == kind
    ]


def weights(folder: Path) -> dict[str, str]:
    last = sorted(folder.glob("checkpoints/images-*"))[-1]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.glob("*.safetensors")}


@pytest.fixture(scope="module", params=["stages", pytest.param("noise lowered pruned", marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """The same recipes by one process and by two that share the weights; the stages also in two pieces."""
    names = request.param.split()
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for place in (one, two):
        for name in names:
            (place / f"{name}.yaml").write_text(yaml.safe_dump(RECIPES[name]))
    first = {**RECIPES["stages"], "training": {**RECIPES["stages"]["training"], "images": 96}}
    (two / "again-first.yaml").write_text(yaml.safe_dump(first))
    (two / "again.yaml").write_text(yaml.safe_dump(RECIPES["stages"]))
    main(one, names)
    config = ROOT / "recipes" / "accelerate" / "fsdp.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    again = ["again-first", "again"] if "stages" in names else []
    command = [*launch, Path(__file__).with_name("sharded_runs.py"), two, *names, *again]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return one, two, names


def test_sharded_runs_learn_and_decide_as_one_process_does(runs: tuple[Path, Path, list[str]]) -> None:
    for name in runs[2]:
        one, two = (place / name for place in runs[:2])
        assert rows(two, "start")[0]["world_size"] == 2
        for kind, value in (("train", "loss"), ("train", "x0_error"), ("held_out", "nats")):
            expected, found = ([row[value] for row in rows(folder, kind)] for folder in (one, two))
            # bf16 rounds halves of a batch in another way than the whole
            assert found == pytest.approx(expected, rel=1e-3 if name == "lowered" else 1e-5), (name, value)
        events = [[(row["images"], row["what"]) for row in rows(folder, "event")] for folder in (one, two)]
        assert events[0] == events[1] and bool(events[1]) == (name in ("stages", "pruned")), name


def test_what_sharded_runs_publish_is_whole(runs: tuple[Path, Path, list[str]]) -> None:
    for name in runs[2]:
        one, two = (DiffusionPipeline.from_pretrained(place / name / "pipeline") for place in runs[:2])
        models = [getattr(pipeline, "unet", None) or pipeline.transformer for pipeline in (one, two)]
        configs = [{key: value for key, value in model.config.items() if key != "_name_or_path"} for model in models]
        assert type(models[0]) is type(models[1]) and configs[0] == configs[1]
        expected, found = (model.state_dict() for model in models)
        assert all(type(value) is torch.Tensor for value in found.values())
        if name == "lowered":  # the gradient of a key's bias is nothing but rounding
            expected, found = (
                {key: v for key, v in one.items() if "to_k.bias" not in key} for one in (expected, found)
            )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 if name == "lowered" else 1e-4)


def test_a_sharded_run_resumes_as_if_it_had_never_stopped(runs: tuple[Path, Path, list[str]]) -> None:
    _, two, names = runs
    if "stages" not in names:
        pytest.skip("only the stages are trained in two pieces")
    assert weights(two / "again") == weights(two / "stages")
    assert [row["images"] for row in rows(two / "again", "train")] == [
        row["images"] for row in rows(two / "stages", "train")
    ]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"type": "adamw8bit"}}, "knows no shards; take adamw"),
        ({"prune": {"type": "entpruner"}}, "take prune.type linear"),
        ({"prune": {"type": "one_shot", "score": "taylor"}}, "take loss_rise"),
        ({"prune": {"type": "linear", "distill": {"weight": 0.5}}}, "set it to null"),
    ],
)
def test_what_can_not_be_sharded_is_refused(sections: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_sharded(Recipe.model_validate(tiny(DEEP, FLOW, **sections)))
