"""A VAE and text encoders are on the device only while they work."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tiny import DIT
from tiny_dfgn import CONFIG, tiny_dfgn
from tiny_text import save_tiny_text
from torch import nn
from transformers import BertModel

from entrecipes.data.text import TextEncoders
from entrecipes.diffusion.families import FAMILIES
from entrecipes.diffusion.path import GaussianPath
from entrecipes.diffusion.pipelines import Components
from entrecipes.diffusion.visiting import visiting
from entrecipes.recipe.pipeline import TextEncoder


@pytest.fixture
def moves(monkeypatch):
    """What moves where, written down; all stays on the CPU, since there may be nothing else."""
    found = []

    def recorded(kind):
        to = kind.to
        return lambda self, device: found.append((kind.__name__, str(device))) or to(self, "cpu")

    for kind in (AutoencoderKL, BertModel, nn.Linear):
        monkeypatch.setattr(kind, "to", recorded(kind))
    return found


def test_models_come_and_go_also_when_something_breaks(moves):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(KeyError), visiting("cuda:1", first, second):
        assert moves == [("Linear", "cuda:1")] * 2
        raise KeyError
    assert moves[2:] == [("Linear", "cpu")] * 2
    with visiting(None, first):
        pass
    assert len(moves) == 4


def test_sampling_takes_the_vae_along_and_no_text_encoder(moves, tmp_path):
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(**kinds, block_out_channels=[4, 4], norm_num_groups=2, latent_channels=CONFIG["in_channels"])
    text = TextEncoders.load([TextEncoder(id=str(save_tiny_text(tmp_path)), tokens=4)])
    scheduler, family = DDIMScheduler(), FAMILIES["DFGNModel"]
    parts = Components(tiny_dfgn(), scheduler, vae, "vae", family, GaussianPath.from_scheduler(scheduler), text)
    device = torch.device("cuda", 0)

    embedded = text.encode(["a red cat"], device)
    assert moves == [("BertModel", "cuda:0"), ("BertModel", "cpu")]
    moves.clear()
    with parts.sampling(parts.model, device) as pipeline:
        assert moves == [("AutoencoderKL", "cuda:0")]
        assert pipeline.vae is vae and pipeline.text_encoder is None
        pipeline(prompt_embeds=embedded.float(), num_frames=2, num_inference_steps=1, output_type="pt")
    assert moves == [("AutoencoderKL", "cuda:0"), ("AutoencoderKL", "cpu")]
    assert parts.pipeline().text_encoder is text.models[0], "what is published has it"


def test_a_vae_that_the_pipeline_makes_up_comes_along(moves):
    scheduler, model = DDIMScheduler(), DiTTransformer2DModel(**DIT["config"])
    family = FAMILIES["DiTTransformer2DModel"]
    parts = Components(model, scheduler, None, "", family, GaussianPath.from_scheduler(scheduler))
    with parts.sampling(model, torch.device("cuda", 0)) as pipeline:
        assert isinstance(pipeline, DiTPipeline) and moves == [("AutoencoderKL", "cuda:0")]
