"""scikit-learn's handwritten digits, which travel in its wheel."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from entrecipes.data.images import ImageSet, Splits, fit_image, split_indices
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.data import DigitsData

SOURCE = "1,797 handwritten digits, 8x8 pixels, 17 grey levels: the UCI optical recognition test set in scikit-learn."
LICENSE = "CC BY 4.0"


def load(section: DigitsData, *, image_size: int, channels: int) -> Splits:
    """The digits, uint8 [N, channels, image_size, image_size], white on black; 8 keeps the pixels as they are."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.stack([fit_image(Image.fromarray(image), image_size, channels) for image in pixels])
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    everything = ImageSet(
        name="digits",
        source=SOURCE,
        license=LICENSE,
        label_names=tuple(str(digit) for digit in range(10)),
        labels=labels,
        tensor=torch.from_numpy(images),
        fingerprint=fingerprint("digits", images, labels),
    )
    train, held_out = split_indices(
        len(everything), section.held_out, section.split_seed, max_images=section.max_images, place="data"
    )
    return Splits(everything.subset(train), everything.subset(held_out) if held_out else None)
