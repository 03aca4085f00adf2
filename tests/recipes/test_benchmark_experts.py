"""The benchmark of experts: nats, FLOPs and calls are known exactly; what it times is written down turn by turn."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import ConsistencyModelPipeline, DDIMScheduler, UNet2DModel

from entrecipes import ExpertsPipeline, SlimUNet2DModel, TimestepExperts
from entrecipes.evaluation.result import Metric
from entrecipes.information import proxies

NET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1,
}  # fmt: skip
STEPS, IMAGES, BORDER = 4, 1000, -0.5
EXCESS = {"base": {0: 0.5, 1: 0.4}, "tdc": {0: 0.25, 1: 0.5}}
"""How far the errors of each arm and seed lie above the least possible."""
TRAINING = {"base": 5e9, "search": 1e9, "experts": 2e9, "total": 8e9, "budget": 1e10}


def held_out(excess: float) -> dict[str, Any]:
    """The row of a denoiser of Gaussian data whose errors are `excess` too large."""
    log_sigma = np.linspace(-4, 3, 29)
    rate = (1 + excess) / (1 + np.exp(2 * log_sigma))
    gate = 1 / (1 + np.exp(-3 * (log_sigma + 2)))
    nats = float(np.trapezoid(gate * rate, log_sigma))
    row = {"kind": "held_out", "images": IMAGES, "nats": nats, "log_sigma": log_sigma.tolist()}
    return row | {"rate": rate.tolist(), "gate": gate.tolist()}


def write(folder: Path, arm: str, seed: int) -> Path:
    """A finished run of an arm, with a real pipeline."""
    row = held_out(EXCESS[arm][seed])
    about = {"class": "ConsistencyModelPipeline", "num_classes": None, "steps": STEPS, "guidance_scale": 1.0}
    facts: dict[str, Any] = {key: "" for key in ("name", "description", "license", "versions")}
    facts |= {"seed": seed, "images": IMAGES, "pipeline": about, "data": {"name": "gaussian", "held_out_images": 64}}
    values = {
        "heldout_nats": row["nats"],
        "kid_tiny": 1 + EXCESS[arm][seed],
        "recall_tiny": 0.5 - EXCESS[arm][seed] / 2,
    }
    metrics = [
        Metric(name, value, None, {"sampler": "DDIM"}, name.startswith("recall")) for name, value in values.items()
    ]
    facts["metrics"] = [metric.to_json() for metric in metrics]
    scheduler, net = DDIMScheduler(clip_sample=False), UNet2DModel(**NET)
    pipeline = ConsistencyModelPipeline(net, scheduler)
    (folder / "search").mkdir(parents=True)
    if arm == "tdc":
        narrow = SlimUNet2DModel(**NET, widths={"down_blocks.0.resnets.0": 4})
        pipeline = ExpertsPipeline(TimestepExperts([narrow, net], [500.0]), scheduler)
        facts["experts"] = {"costs": {"training_flops": TRAINING}}
        plan = {"boundaries": [500.0], "base_flops": 1.0, "costs": {}, "groups": []}
        for number, ends in enumerate(([BORDER, 3.0], [-4.0, BORDER])):
            plan["groups"].append({"number": number, "log_sigma": ends, "train": ends, "ratio": 1.0, "steps": 0.5})
        (folder / "search" / "plan.json").write_text(json.dumps(plan))
    pipeline.save_pretrained(folder / "pipeline")
    (folder / "recipe.yaml").write_text(json.dumps({"pipeline": {"pretrained": None}}))
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def benchmark(monkeypatch):
    """The script's `main`, called with arguments in this process."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import benchmark_experts

    def call(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["benchmark_experts.py", *map(str, arguments)])
        return benchmark_experts.main()

    verbosity = diffusers.logging.get_verbosity()
    yield call
    diffusers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arms")
    for arm, seeds in EXCESS.items():
        for seed in seeds:
            write(folder / f"{arm}{seed}", arm, seed)
    return folder


def test_experts_against_a_base(runs, tmp_path, capsys, monkeypatch, benchmark):
    monkeypatch.chdir(runs)
    arms = ["--arm", "base=base0,base1", "--arm", "tdc=tdc1,tdc0"]
    assert benchmark(*arms, "--output", tmp_path / "out" / "x", "--batch", 2, "--repeats", 3) == 0
    found, page = (Path(tmp_path / "out" / f"x.{suffix}").read_text() for suffix in ("json", "md"))
    found = json.loads(found)
    base, tdc = found["arms"]["base"]["0"], found["arms"]["tdc"]["0"]

    for run, excess in ((base, 0.5), (tdc, 0.25)):
        row = held_out(excess)
        levels, rate = np.array(row["log_sigma"]), np.array(row["rate"]) * np.array(row["gate"])
        above = np.trapezoid(rate[levels >= BORDER], levels[levels >= BORDER])
        assert run["group_nats"] == pytest.approx([above, row["nats"] - above])

    for name, cls, run in (("base0", ConsistencyModelPipeline, base), ("tdc0", ExpertsPipeline, tdc)):
        pipeline = cls.from_pretrained(f"{name}/pipeline")
        pipeline.set_progress_bar_config(disable=True)
        asked = {"batch_size": 1, "num_inference_steps": STEPS, "output_type": "pt"}
        assert run["sampling_flops"] == proxies.flops(lambda: pipeline(**asked))  # noqa: B023
    assert base["calls"] == [4] and tdc["calls"] == [2, 2], "timesteps 750, 500, 250, 0"
    assert tdc["forward_flops"][0] < tdc["forward_flops"][1] == base["forward_flops"][0]
    assert base["training_flops"] == {"total": 3 * IMAGES * base["forward_flops"][0]}
    assert tdc["training_flops"] == TRAINING

    latency = found["latency"]
    pairs = zip(*latency["seconds_per_image"].values(), strict=True)
    assert latency["ratios"]["tdc"] == [tdc / base for base, tdc in pairs] and len(latency["ratios"]["tdc"]) == 3
    assert latency["ratios"]["base"] == [1, 1, 1] and {"command", "versions", "device", "threads"} <= found.keys()

    assert capsys.readouterr().out.strip() == page.strip()
    gaps = [held_out(EXCESS["tdc"][seed])["nats"] - held_out(EXCESS["base"][seed])["nats"] for seed in (0, 1)]
    assert f"| tdc | {statistics.mean(gaps):+.3g} ({min(gaps):+.3g} to {max(gaps):+.3g}), better in 1 of 2 |" in page
    assert "| base | 1.45 (1.4 to 1.5) | 0.275 (0.25 to 0.3) |" in page, "the metrics of samples"
    assert "| tdc | -0.075 (-0.25 to +0.1), better in 1 of 2 | +0.0375 (-0.05 to +0.125), better in 1 of 2 |" in page
    share = tdc["sampling_flops"] / base["sampling_flops"]
    assert f"| {share:.4g} |" in page and "base 5 GFLOP; search 1 GFLOP; experts 2 GFLOP" in page
    assert "- `kid_tiny`, `recall_tiny`: sampler DDIM." in page and "- Reduced size: compare `kid_tiny`" in page
    assert "group 0: log sigma -0.50 to 3.00" in page and "Groups of noise levels: those of `tdc1`" in page


def test_without_experts_there_are_no_groups(runs, tmp_path, monkeypatch, benchmark):
    monkeypatch.chdir(runs)
    assert benchmark("--arm", "base=base0", "--output", tmp_path / "x.y", "--repeats", 0) == 0
    found = json.loads((tmp_path / "x.y.json").read_text())
    assert (
        found["groups"] == [] and found["latency"] is None and "seed by seed" not in (tmp_path / "x.y.md").read_text()
    )
    groups = ["--groups", "tdc0"]
    assert benchmark("--arm", "base=base0", "--output", tmp_path / "x", "--repeats", 0, *groups) == 0
    assert len(json.loads((tmp_path / "x.json").read_text())["arms"]["base"]["0"]["group_nats"]) == 2


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values) + "\n")


def test_mistakes_are_named(tmp_path, monkeypatch, capsys, benchmark):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "other", "short", "going", "bare", "gone"):
        write(tmp_path / name, "base", 0)
    change(tmp_path / "other" / "metrics.jsonl", gate=[1.0] * 29)
    facts = json.loads((tmp_path / "a" / "run.json").read_text())
    change(tmp_path / "short" / "run.json", pipeline=facts["pipeline"] | {"steps": 3})
    (tmp_path / "going" / "run.json").unlink()
    (tmp_path / "bare" / "metrics.jsonl").write_text("")
    (tmp_path / "gone" / "pipeline" / "model_index.json").unlink()
    mistakes = {
        "a": "--arm a: give a name and run folders",
        "x=nowhere": "nowhere: there is no such folder",
        "x=going": "going: this run of arm x has not finished",
        "x=bare": "bare: this run of arm x measured no held-out nats",
        "x=a,a": "a: arm x already has seed 0",
        "x=other": "other: measured on other held-out images or noise levels than a",
        "x=short": "short: sampled with steps 3, but a with 4",
        "x=gone": "gone: ",
        "base=a": "two arms have the same name",
    }
    for arm, message in mistakes.items():
        assert benchmark("--arm", "base=a", "--arm", arm, "--output", "x", "--repeats", 0) == 2
        assert message in capsys.readouterr().err
    assert benchmark("--arm", "base=a", "--groups", "other", "--output", "x") == 2
    assert "search/plan.json: missing" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))
