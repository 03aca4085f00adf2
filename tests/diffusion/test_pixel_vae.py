"""The identity VAE is the identity, also after saving, and stock pipelines run on it."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from entrecipes.diffusion.pixel_vae import build_pixel_vae, is_pixel_vae


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_both_ways_and_reloaded(tmp_path, channels):
    vae = build_pixel_vae(channels, 8)
    image = torch.rand(4, channels, 16, 12) * 3 - 1.5  # beyond the pixel range on purpose
    vae.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path)
    for one in (vae, again):
        torch.testing.assert_close(one.decode(image).sample, image, atol=2e-5, rtol=0)
        posterior = one.encode(image).latent_dist
        torch.testing.assert_close(posterior.mode(), image, atol=2e-5, rtol=0)
        assert posterior.std.max() < 1e-6
        assert is_pixel_vae(one)


def test_other_vaes_are_not_taken_for_it():
    small = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "norm_num_groups": 4}
    assert not is_pixel_vae(AutoencoderKL(in_channels=3, latent_channels=3, block_out_channels=(8,), **small))
    assert not is_pixel_vae(AutoencoderKL(in_channels=3, latent_channels=4, block_out_channels=(8,), **small))
