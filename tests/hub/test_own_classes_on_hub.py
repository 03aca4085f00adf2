"""Pipelines of our own classes from the Hub: by name and revision with entrecipes, by the source they bring without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, EulerDiscreteScheduler, UNet2DModel
from huggingface_hub import HfApi
from server import Hub
from tiny import UNET
from tiny_dfgn import tiny_dfgn
from tiny_text import save_tiny_text
from tiny_video import wan

from entrecipes import (
    ExpertsPipeline,
    InfoNoiseScheduler,
    PoseVideoPipeline,
    SequencePipeline,
    SequenceTransformer1DModel,
    StickerPipeline,
    TimestepExperts,
)
from entrecipes.data.text import TextEncoders
from entrecipes.diffusion.pipelines import load_pipeline
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.pipeline import TextEncoder

BRANCH = "images-100"
CLASSES = {
    "sequences": SequencePipeline,
    "poses": PoseVideoPipeline,
    "stickers": StickerPipeline,
    "experts": ExpertsPipeline,
}


def made(kind: str, folder: Path) -> DiffusionPipeline:
    """A tiny pipeline, its weights random."""
    torch.manual_seed(0)
    match kind:
        case "sequences":
            model = SequenceTransformer1DModel(sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=4)
            return SequencePipeline(model, EulerDiscreteScheduler())
        case "poses":
            return PoseVideoPipeline(wan(), EulerDiscreteScheduler())
        case "stickers":
            text = TextEncoders.load([TextEncoder(id=str(save_tiny_text(folder / "bert")), tokens=5)])
            return StickerPipeline(tiny_dfgn(), DDIMScheduler(), **text.components())
        case "experts":
            networks = [UNet2DModel(**UNET["config"]).eval() for _ in range(2)]
            return ExpertsPipeline(TimestepExperts(networks, [500]), DDIMScheduler())
    return DDPMPipeline(UNet2DModel(**UNET["config"]), InfoNoiseScheduler())


def weights(pipeline: DiffusionPipeline) -> str:
    """A hash of all of them."""
    parts = [part for _, part in sorted(pipeline.components.items()) if isinstance(part, torch.nn.Module)]
    return fingerprint(*(value for part in parts for _, value in sorted(part.state_dict().items())))


@pytest.fixture
def pushed(hub: Hub, tmp_path: Path) -> dict[str, DiffusionPipeline]:
    """All of them, each on a branch of a repository whose main holds nothing."""
    api, pipelines = HfApi(), {}
    for kind in (*CLASSES, "scheduler"):
        pipelines[kind] = made(kind, tmp_path)
        pipelines[kind].save_pretrained(tmp_path / kind)
        api.create_repo(f"me/{kind}")
        api.create_branch(f"me/{kind}", branch=BRANCH)
        api.upload_folder(repo_id=f"me/{kind}", folder_path=tmp_path / kind, revision=BRANCH)
    return pipelines


@pytest.mark.filterwarnings("ignore")
def test_they_load_by_name_and_revision(pushed: dict[str, DiffusionPipeline]) -> None:
    for kind, pipeline in pushed.items():
        found = [CLASSES[kind].from_pretrained(f"me/{kind}", revision=BRANCH)] if kind in CLASSES else []
        for loaded in (*found, load_pipeline(f"me/{kind}@{BRANCH}")):
            assert type(loaded) is type(pipeline), kind
            assert weights(loaded) == weights(pipeline), kind
            assert type(loaded.scheduler) is type(pipeline.scheduler)
    model = TimestepExperts.from_pretrained("me/experts", subfolder="denoiser", revision=BRANCH)
    assert fingerprint(*model.state_dict().values()) == fingerprint(*pushed["experts"].denoiser.state_dict().values())


WITHOUT_US = """
import sys
sys.modules["entrecipes"] = None
import torch
from diffusers import DiffusionPipeline

BRANCH = "images-100"
for kind in ("poses", "stickers", "experts"):
    pipeline = DiffusionPipeline.from_pretrained(
        f"me/{kind}", revision=BRANCH, custom_pipeline=f"me/{kind}", custom_revision=BRANCH, trust_remote_code=True
    )
    parts = [part for _, part in sorted(pipeline.components.items()) if isinstance(part, torch.nn.Module)]
    torch.save([part.state_dict() for part in parts], f"{kind}.pt")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_they_load_without_us_by_the_source_they_bring(
    hub: Hub, pushed: dict[str, DiffusionPipeline], tmp_path: Path
) -> None:
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    command = [sys.executable, "-c", WITHOUT_US]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind in ("poses", "stickers", "experts"):
        found = torch.load(tmp_path / f"{kind}.pt")
        assert fingerprint(*(value for state in found for _, value in sorted(state.items()))) == weights(pushed[kind])
