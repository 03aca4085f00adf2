"""What a recipe's training would encode first, encoded ahead of it by one process or by several."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence

import torch

from entrecipes.data.opening import open_data, open_images
from entrecipes.diffusion.pipelines import best_device, load_components
from entrecipes.errors import UserError
from entrecipes.recipe.schema import Recipe

logger = logging.getLogger(__name__)


def cache_recipe(recipe: Recipe, helper: Sequence[str] = (), jobs: int = 1, number: int = 0) -> None:
    """Encode the recipe's images to latents and its captions to text features, as far as that is not done yet.

    What is made, where and how is logged; it is what a run of the recipe finds, or makes itself in the same way. Any
    number of these may work at the same time (see `data.making`). On a CPU each computes with one thread, so that the
    bits do not depend on how many there are.

    Args:
        recipe: What is to be trained.
        helper: The command that starts such a process with `number` 1; the number is appended.
        jobs: Processes in all; on several GPUs they take turns.
        number: Of this process; the first one looks for damage in what is there already.

    Raises:
        UserError: When there is nothing to encode, the data is bad, or the disk is full (whole shards stay).
    """
    device = best_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        turn = number + int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device(device.type, turn % torch.accelerator.device_count())
    components = load_components(recipe.pipeline, recipe.training.seed)
    if components.vae is None and components.text is None:
        raise UserError("data cache: the recipe has neither a VAE nor a text encoder, so its training encodes nothing")
    if jobs > 1:
        open_images(recipe.data, components)  # decodes pictures once, before others look for them
    helpers = [subprocess.Popen([*helper, str(job)]) for job in range(1, jobs)]
    try:
        open_data(recipe.data, components, device, thorough=number == 0)
        codes = [process.wait() for process in helpers]
        if any(codes):
            logger.warning("helping processes stopped with codes %s; their part was done without them", codes)
    finally:
        for process in helpers:
            process.terminate()
