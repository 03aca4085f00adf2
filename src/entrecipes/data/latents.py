"""VAE latents made once, kept as mean and standard deviation, and found again by what they were made from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

from entrecipes.data.images import BadImage, ImageSet
from entrecipes.data.making import Making
from entrecipes.data.places import home
from entrecipes.data.shards import LazyTensor, Shards
from entrecipes.data.tables import IN_MEMORY_BYTES
from entrecipes.diffusion.space import clip_parts
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint

logger = logging.getLogger(__name__)

OnDevice = Literal["auto", "always", "never"]


def cache_latents(
    image_set: ImageSet,
    vae: AutoencoderKL | AutoencoderKLWan,
    *,
    vae_id: str,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    flip: bool = False,
    on_device: OnDevice = "auto",
    thorough: bool = False,
) -> ImageSet:
    """The set with every image (or clip) replaced by its posterior under a frozen VAE.

    The result holds moments [N, 2C, h, w] in `dtype`: mean, then standard deviation, before the VAE's scaling factor
    and shift; with `flip` also those of the mirrored images. Of clips they are [N, 4C, F', h, w]: mean and standard
    deviation of the frames, then the latents (modes) of the pose maps and of a video that shows the reference on every
    frame. Of stickers they are [N, 2C, F, h, w], frame by frame. They are in `tensor` and `mirrored`, or, where they
    stay on disk, behind `rows`.

    The shards (see `data.making`) are keyed by the set's fingerprint (pixels and resizing), `vae_id`, the VAE's weights
    and their dtype, `dtype` and `flip`; whether they were found is logged with their path.

    Args:
        image_set: uint8 images whose channels the VAE takes.
        vae: On any device; it computes where and how its weights are, after a move to `device`.
        vae_id: Hub id or folder, with its revision if it has one: for the log and the key.
        batch_size: Images encoded at a time.
        on_device: `always` reads them into memory, `never` leaves them on disk, `auto` reads those that fit in
            `tables.IN_MEMORY_BYTES`.
        thorough: Look for damage in what is there already by its content, not only by its length.

    Raises:
        UserError: When more than `max_bad_images` images of a lazy set can't be read, the set is streamed, or the disk
            is full.
    """
    if not isinstance(image_set, ImageSet):
        raise UserError("data.streaming: a model behind a VAE trains on cached latents; set data.streaming: false.")
    vae = vae.to(device).eval()
    weights = [(name, tensor) for name, tensor in sorted(vae.state_dict().items())]
    key = fingerprint(image_set.fingerprint, vae_id, str(dtype), flip, *(part for pair in weights for part in pair))
    folder = home() / "latents" / key
    shards = Shards.open(folder, thorough=thorough)
    if shards is None:
        logger.info("latent cache miss: encoding %d images of %s with %s", len(image_set), image_set.name, vae_id)
        shards = _making(image_set, vae, vae_id, dtype, batch_size, flip, folder, thorough).run()
        logger.info("latents kept at %s", shards)
    else:
        logger.info("latent cache hit: %d images of %s at %s", len(shards), image_set.name, shards)
    bad = shards.bad
    image_set.check_bad(bad.values())
    kept = image_set.subset([i for i in range(len(image_set)) if i not in bad]) if bad else image_set
    if on_device == "never" or (on_device == "auto" and shards.bytes > IN_MEMORY_BYTES):
        rows = LatentRows(shards.lazy("plain"), shards.lazy("mirrored"))
        return replace(kept, tensor=None, mirrored=None, rows=rows, fingerprint=key)
    plain, mirrored = shards.read("plain"), shards.read("mirrored")
    return replace(kept, tensor=plain, mirrored=mirrored, rows=None, num_workers=0, fingerprint=key)


def _making(
    image_set: ImageSet,
    vae: AutoencoderKL | AutoencoderKLWan,
    vae_id: str,
    dtype: torch.dtype,
    batch_size: int,
    flip: bool,
    folder: Path,
    thorough: bool,
) -> Making:
    """How the shards of a set are made."""

    @torch.inference_mode()
    def encode(images: Tensor) -> dict[str, Tensor]:
        pixels = images.to(vae.device, vae.dtype).div(127.5).sub(1.0)
        sides = {"plain": pixels} | ({"mirrored": pixels.flip(-1)} if flip else {})
        return {name: _moments(vae, side).to("cpu", dtype) for name, side in sides.items()}

    def make(rows: range) -> tuple[dict[str, Tensor], dict[int, str]]:
        images, bad = read_images(image_set, rows)
        return encode(images) if len(images) else {}, bad

    def row_bytes() -> int:
        return sum(part.nbytes for part in encode(torch.zeros(1, *image_set.shape, dtype=torch.uint8)).values())

    about = {
        "holds": "plain: latents as mean, then standard deviation, before scaling"
        + "; mirrored: of the mirrored" * flip,
        "data": {name: getattr(image_set, name) for name in ("name", "source", "license", "fingerprint")},
        "vae": {"id": vae_id, "class": type(vae).__name__, "dtype": str(vae.dtype).removeprefix("torch.")},
        "labels": image_set.label_names,
    }
    return Making(
        folder,
        len(image_set),
        batch_size,
        make,
        row_bytes,
        about,
        check_bad=lambda bad: image_set.check_bad(bad.values()),
        thorough=thorough,
    )


@dataclass(frozen=True)
class LatentRows:
    """Latents that stay on disk; see `images.Rows`."""

    plain: LazyTensor
    mirrored: LazyTensor | None

    def __len__(self) -> int:
        return len(self.plain)

    @property
    def shape(self) -> torch.Size:
        """Of one image's moments."""
        return self.plain.shape[1:]

    def image(self, index: int, mirrored: bool = False) -> Tensor:
        """Moments [2C, ..., h, w]."""
        return (self.mirrored if mirrored else self.plain)[index]

    def select(self, indices: Sequence[int]) -> LatentRows:
        """Only those rows, in that order."""
        return LatentRows(self.plain.select(indices), self.mirrored and self.mirrored.select(indices))


def _moments(vae: AutoencoderKL | AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """What is kept of images [n, C, H, W], of stickers [n, 3, F, H, W] behind a VAE of images, or of clips with their
    condition [n, 3, 2F + 1, H, W] behind one of videos."""
    if pixels.dim() == 4:
        posterior = vae.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)
    if isinstance(vae, AutoencoderKL):
        frames = _moments(vae, pixels.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(pixels), -1)).transpose(1, 2)
    clips, poses, reference = clip_parts(pixels)
    posterior = vae.encode(clips).latent_dist
    condition = [vae.encode(video).latent_dist.mode() for video in (poses, reference[:, :, None].expand_as(poses))]
    return torch.cat([posterior.mean, posterior.std, *condition], dim=1)


def read_images(image_set: ImageSet, rows: range) -> tuple[Tensor, dict[int, str]]:
    """(uint8 images [n, ...] of those that can be read, {index: name and reason of each other one})."""
    if image_set.rows is None:
        return image_set.tensor[rows.start : rows.stop], {}
    images, bad = [], {}
    for index in rows:
        try:
            images.append(image_set.rows.image(index))
        except BadImage as error:
            bad[index] = str(error)
    return torch.stack(images) if images else torch.empty(0), bad
