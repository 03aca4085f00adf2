"""VAE latents made once, kept as mean and standard deviation, and found again by what they were made from."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entrecipes.data.images import BadImage, ImageSet, check_bad_images
from entrecipes.data.places import atomic_folder, home
from entrecipes.diffusion.space import clip_parts
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint

logger = logging.getLogger(__name__)


def cache_latents(
    image_set: ImageSet,
    vae: AutoencoderKL | AutoencoderKLWan,
    *,
    vae_id: str,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    flip: bool = False,
) -> ImageSet:
    """The set with every image (or clip) replaced by its posterior under a frozen VAE.

    The result's `tensor` is [N, 2C, h, w] in `dtype`: mean, then standard deviation, before the VAE's scaling factor
    and shift; with `flip`, `mirrored` holds those of the mirrored images. Of clips it is [N, 4C, F', h, w]: mean and
    standard deviation of the frames, then the latents (modes) of the pose maps and of a video that shows the reference
    on every frame. Of stickers it is [N, 2C, F, h, w], frame by frame. The file is keyed by the set's fingerprint
    (pixels and resizing), `vae_id`, the VAE's weights and their dtype, `dtype` and `flip`; whether it was found is
    logged with its path.

    Args:
        image_set: uint8 images whose channels the VAE takes.
        vae: On any device; it computes where and how its weights are, after a move to `device`.
        vae_id: Hub id or folder, with its revision if it has one: for the log and the key.
        batch_size: Images encoded at a time.

    Raises:
        UserError: When more than `max_bad_images` images of a lazy set can't be read, or the set is streamed.
    """
    if not isinstance(image_set, ImageSet):
        raise UserError("data.streaming: a model behind a VAE trains on cached latents; set data.streaming: false.")
    vae = vae.to(device).eval()
    weights = [(name, tensor) for name, tensor in sorted(vae.state_dict().items())]
    key = fingerprint(image_set.fingerprint, vae_id, str(dtype), flip, *(part for pair in weights for part in pair))
    folder = home() / "latents" / key
    cached = _read(folder)
    if cached is None:
        logger.info("latent cache miss: encoding %d images of %s with %s", len(image_set), image_set.name, vae_id)
        stored, bad = _encode(image_set, vae, dtype, batch_size, flip)
        with atomic_folder(folder, keep_existing=True) as scratch:
            save_file(stored, scratch / "latents.safetensors", metadata={"bad": json.dumps(bad)})
        logger.info("latents kept at %s", folder)
    else:
        stored, bad = cached
        image_set.bad_images.extend(name for name in bad if name not in image_set.bad_images)
        check_bad_images(bad, image_set.max_bad_images, image_set.name)
        logger.info("latent cache hit: %d images of %s at %s", len(stored["plain"]), image_set.name, folder)
    kept = stored["kept"]
    kept_set = image_set if len(kept) == len(image_set) else image_set.subset(kept)
    return replace(
        kept_set, tensor=stored["plain"], mirrored=stored.get("mirrored"), rows=None, num_workers=0, fingerprint=key
    )


def _read(folder: Path) -> tuple[dict[str, Tensor], list[str]] | None:
    """What `_encode` gave an earlier run; a damaged file is removed and counts as none."""
    path = folder / "latents.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["bad"])
    except SafetensorError:
        logger.warning("the latent cache %s is damaged and made anew", path)
        path.unlink()
        folder.rmdir()
        return None


@torch.inference_mode()
def _encode(
    image_set: ImageSet, vae: AutoencoderKL | AutoencoderKLWan, dtype: torch.dtype, batch_size: int, flip: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """({plain, mirrored (with `flip`), kept: indices of the readable images}, names of the others)."""
    kept: list[int] = []
    bad: list[str] = []
    parts: dict[str, list[Tensor]] = {"plain": []} | ({"mirrored": []} if flip else {})
    for indices, images in _chunks(image_set, batch_size, bad):
        kept += indices
        pixels = images.to(vae.device, vae.dtype).div(127.5).sub(1.0)
        for name, part in parts.items():
            part.append(_moments(vae, pixels if name == "plain" else pixels.flip(-1)).to("cpu", dtype))
    stored = {name: torch.cat(part).contiguous() for name, part in parts.items()}
    return stored | {"kept": torch.tensor(kept)}, bad


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


def _chunks(image_set: ImageSet, batch_size: int, bad: list[str]) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, uint8 images) in batches; names of unreadable ones go into `bad`."""
    for start in range(0, len(image_set), batch_size):
        chunk = range(start, min(start + batch_size, len(image_set)))
        if image_set.rows is None:
            yield list(chunk), image_set.tensor[chunk.start : chunk.stop]
            continue
        good = {}
        for index in chunk:
            try:
                good[index] = torch.from_numpy(image_set.rows.decode(index))
            except BadImage as error:
                bad.append(str(error))
        image_set.bad_images.extend(name for name in bad if name not in image_set.bad_images)
        check_bad_images(bad, image_set.max_bad_images, image_set.name)
        if good:
            yield list(good), torch.stack(list(good.values()))
