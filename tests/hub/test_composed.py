"""Everything at once on two processes: InfoNoise, EntPruner, 8-bit moments, cached latents; killed, resumed, pushed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline
from push_case import trained
from server import Hub
from tiny import DIT, FLOW, tiny

from entrecipes import InfoNoiseScheduler
from entrecipes.cli import main

ROOT = Path(__file__).parents[2]
DEEP = {**DIT["config"], "num_layers": 4, "in_channels": 4, "out_channels": 4, "num_attention_heads": 4,
        "attention_head_dim": 16, "sample_size": 4}  # fmt: skip
TOGETHER = {
    "noise": {"type": "infonoise", "warmup": 64, "ramp": 64, "refresh_every": 32, "buffer": 100},
    "prune": {"type": "entpruner", "ratio": 0.5, "stages": 2, "until": 0.5, "draws": {"images": 8, "noise_levels": 4},
              "vote": {"samples": 4, "batches": 2, "batch_size": 2}},
    "optimizer": {"type": "adamw8bit", "learning_rate": 1e-3},
    "training": {"images": 640, "checkpoint_every": 32, "log_every": 32},
}  # fmt: skip


def launch(recipe: Path, output: Path) -> subprocess.Popen:
    config = ROOT / "recipes/accelerate/ddp.yaml"
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    command = [*start, ROOT / "scripts/train.py", recipe, f"training.output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([str(word) for word in command], env=environment, start_new_session=True)


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_a_composed_run_is_killed_resumed_published_and_loaded(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTRECIPES_HOME", str(tmp_path / "home"))
    vae = AutoencoderKL(
        1, 1, ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2, [8, 8], latent_channels=4, norm_num_groups=4
    )
    vae.save_pretrained(tmp_path / "vae")
    base = tiny({**DIT, "config": DEEP}, FLOW)
    base["pipeline"]["build"]["vae"] = str(tmp_path / "vae")
    start = trained(tmp_path / "base", base)
    recipe = tmp_path / "together.yaml"
    recipe.write_text(yaml.safe_dump({**tiny(**TOGETHER), "pipeline": {"pretrained": str(start)}}))
    assert main(["data", "cache", str(recipe)]) == 0

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(recipe, whole).wait(400) == 0
    process = launch(recipe, killed)
    while not (killed / "checkpoints/images-000000000352").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert launch(recipe, killed).wait(400) == 0
    assert losses(killed) == losses(whole) and len(losses(whole)) == 20

    assert main(["push", str(killed), "--repo-id", "me/together"]) == 0
    pipeline = DiffusionPipeline.from_pretrained("me/together")
    assert len(pipeline.transformer.transformer_blocks) == 2
    assert pipeline([3], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    assert InfoNoiseScheduler.from_pretrained("me/together", subfolder="infonoise").profile is not None
