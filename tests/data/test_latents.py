"""Latents kept between runs, and when they are made anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tiny_video import wan, wan_vae

from entrecipes import PoseVideoPipeline
from entrecipes.data.digits import load
from entrecipes.data.folder import load as load_folder
from entrecipes.data.images import ImageSet
from entrecipes.data.latents import cache_latents
from entrecipes.data.loader import batches
from entrecipes.diffusion.space import LatentClipSpace
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.data import DigitsData, FolderData


@pytest.fixture
def vae() -> AutoencoderKL:
    """A random VAE: 16 pixels, two latent channels of 8."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        sample_size=16,
    ).eval()


@pytest.fixture
def images() -> ImageSet:
    return load(DigitsData(held_out=0, max_images=20), image_size=16, channels=3).train


def test_moments_are_the_posteriors(images: ImageSet, vae: AutoencoderKL, own_home: Path) -> None:
    cached = cache_latents(images, vae, vae_id="tiny", batch_size=8, flip=True)
    assert cached.tensor.shape == cached.mirrored.shape == (20, 4, 8, 8) and cached.tensor.dtype == torch.float32
    with torch.no_grad():
        for pixels, moments in ((images.tensor, cached.tensor), (images.tensor.flip(-1), cached.mirrored)):
            posterior = vae.encode(pixels.float() / 127.5 - 1).latent_dist
            assert torch.allclose(moments, torch.cat([posterior.mean, posterior.std], 1), atol=1e-5)
    assert torch.equal(cached.labels, images.labels) and len(cached) == 20
    batch = next(batches(cached, seed=0, batch_size=6, flip=True))
    assert batch.images.shape == (6, 4, 8, 8) and batch.images.dtype == torch.float32


def test_found_again_until_something_changes(
    images: ImageSet, vae: AutoencoderKL, own_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def files() -> int:
        return len(list((own_home / "latents").iterdir()))

    caplog.set_level("INFO", logger="entrecipes")
    first = cache_latents(images, vae, vae_id="tiny")
    assert "latent cache miss" in caplog.text and str(own_home) in caplog.text
    caplog.clear()
    again = cache_latents(images, vae, vae_id="tiny")
    assert "latent cache hit" in caplog.text and torch.equal(first.tensor, again.tensor) and files() == 1
    cache_latents(images, vae, vae_id="tiny", dtype=torch.bfloat16)
    cache_latents(images, vae, vae_id="other")
    cache_latents(images.subset(range(10)), vae, vae_id="tiny")
    with torch.no_grad():
        vae.encoder.conv_out.bias += 1
    changed = cache_latents(images, vae, vae_id="tiny")
    assert files() == 5 and not torch.equal(first.tensor, changed.tensor)


def test_a_damaged_cache_is_made_anew(images: ImageSet, vae: AutoencoderKL, own_home: Path) -> None:
    first = cache_latents(images, vae, vae_id="tiny")
    (path,) = (own_home / "latents").glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(cache_latents(images, vae, vae_id="tiny").tensor, first.tensor)


def test_unreadable_files_are_left_out(pictures: Path, vae: AutoencoderKL) -> None:
    (pictures / "cat" / "2.png").write_bytes(b"")
    section = FolderData(path=str(pictures), on_device="never", held_out=0)
    for _ in range(2):  # encoded, then from the cache
        lazy = load_folder(section, image_size=16, channels=3).train
        cached = cache_latents(lazy, vae, vae_id="tiny", batch_size=5)
        assert len(cached) == len(cached.labels) == 11 and cached.label_counts() == {"cat": 5, "dog": 6}
        assert len(lazy.bad_images) == len(cached.bad_images) == 1 and "2.png" in lazy.bad_images[0]
    strict = load_folder(section.model_copy(update={"max_bad_images": 0}), image_size=16, channels=3).train
    with pytest.raises(UserError, match="2.png"):
        cache_latents(strict, vae, vae_id="tiny")


@torch.no_grad()
def test_clips_keep_their_moments_and_the_latents_of_their_condition(own_home: Path) -> None:
    clips = torch.randint(0, 256, (3, 3, 11, 16, 16), dtype=torch.uint8)
    images = ImageSet("clips", "drawn", "none", fingerprint(clips), tensor=clips, keypoints=torch.zeros(3, 5, 13, 3))
    video_vae = wan_vae()
    cached = cache_latents(images, video_vae, vae_id="tiny", batch_size=2)
    assert cached.tensor.shape == (3, 16, 2, 2, 2) and cached.keypoints is images.keypoints
    pixels = clips.float() / 127.5 - 1
    posterior = video_vae.encode(pixels[:, :, :5]).latent_dist
    mean, std = (torch.tensor(video_vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    space = LatentClipSpace(video_vae)
    torch.testing.assert_close(space.encode(cached.tensor), (posterior.mean - mean) / std)
    drawn = space.encode(cached.tensor, lambda *shape: torch.ones(3, *shape))
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std - mean) / std)
    pipeline = PoseVideoPipeline(wan(in_channels=12, out_channels=4), FlowMatchEulerDiscreteScheduler(), video_vae)
    condition = pipeline.encode_condition(pixels[:, :, 5:10], pixels[:, :, 10])
    torch.testing.assert_close(space.condition(cached.tensor), condition, msg="what training sees, sampling sees")
    again = cache_latents(images, video_vae, vae_id="tiny")
    assert torch.equal(again.tensor, cached.tensor) and len(list((own_home / "latents").iterdir())) == 1
