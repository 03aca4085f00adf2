"""InfoNoise in a training loop of one's own: draw noise levels, record what the network predicted, refresh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.path import GaussianPath, expand
from entrecipes.errors import UserError
from entrecipes.noise.base import RunFacts
from entrecipes.noise.infonoise import InfoNoise
from entrecipes.recipe.noise import InfoNoiseSection


class OwnLoop:
    """The training side of [`InfoNoiseScheduler`]. All of it works on the device of the images, and waits for it only
    when a table is rebuilt.

    Attributes:
        path: The noise path.
        learning: Keys of the recipe's `noise: {type: infonoise}`.
        objective: The loss; what `weight_compensation: full` divides by.
        loss_weight: Set this to a function of log sigma [n] that gives the loss's weight on the x0 error [n], where no
            published weighting fits.
    """

    path: GaussianPath
    learning: InfoNoiseSection
    objective: Objective
    loss_weight: Callable[[Tensor], Tensor] | None = None
    settings: Mapping[str, Any]

    _learner: InfoNoise | None = None
    _batch: int | None = None

    def sample_timesteps(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw the noise levels of a batch, in the place of `torch.randint(0, 1000, (n,))`.

        Args:
            n: Samples of this process's batch.
            generator: Source of randomness, on any device; None: the CPU's global one.
            device: Where the images are; None: where `record` saw them last, the CPU before it saw any. A run that
                shall resume exactly on an accelerator needs it, as a loaded state does not say where images are.

        Returns:
            Timesteps float32 [n] (not whole numbers) for `add_noise` and the network, on that device.

        Raises:
            UserError: When the length of the training is not known.
        """
        learner = self._learner_on(torch.empty(0, device=device).device)
        if generator is None or generator.device.type != learner.device.type:
            place = "cpu" if generator is None else generator.device
            seed = torch.randint(2**62, (), generator=generator, device=place).item()
            generator = torch.Generator(learner.device).manual_seed(seed)
        return self.path.timestep(learner.sample(n, generator)[0]).float().to(device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """x = a x0 + b noise at timesteps [n], or one for all; images [n, ...] keep their dtype."""
        return self.path.add_noise(original_samples, noise, self.log_sigma(timesteps, original_samples.device))

    def scale_noise(self, sample: Tensor, timestep: Tensor | float, noise: Tensor) -> Tensor:
        """`add_noise` as diffusers' flow schedulers call it, for their image-to-image and inpainting pipelines."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """The target of v prediction [n, ...], whatever this scheduler predicts: a noise - b x0 (Salimans & Ho 2022),
        for flow noise - x0. As training scripts for diffusers call it, with `sample` x0; better take `target`.

        Raises:
            UserError: For EDM, whose stock schedulers have none either.
        """
        if self.path.name == "edm":
            raise UserError("get_velocity: EDM schedulers have none; take scheduler.target(x0, noise, timesteps)")
        log_sigma = self.log_sigma(timesteps, sample.device)
        if self.path.name == "flow":
            return self.path.target(sample, noise, log_sigma)
        a, b = self.path.coefficients(log_sigma)
        return (expand(a, sample) * noise - expand(b, sample) * sample).to(sample.dtype)

    def target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """What the network should predict [n, ...], by the scheduler's prediction type."""
        return self.path.target(original_samples, noise, self.log_sigma(timesteps, original_samples.device))

    def record(
        self, model_output: Tensor, original_samples: Tensor, noise: Tensor, timesteps: Tensor
    ) -> dict[str, Any] | None:
        """Learn from a batch: call this after every forward pass, in every process.

        The network's raw output is asked for, not a loss: the x0 error is computed here, whatever the prediction type
        and however the loss is weighted. Leave out samples that were masked or given another kind of noise.

        Args:
            model_output: The network's prediction [n, ...] at these timesteps.
            original_samples: x0 [n, ...].
            noise: Standard normal noise [n, ...].
            timesteps: What `add_noise` and the network were given [n].

        Returns:
            Telemetry when the table was rebuilt (see `InfoNoise.telemetry`), else None.

        Raises:
            UserError: When shapes do not fit together.
        """
        shapes = [tuple(tensor.shape) for tensor in (model_output, original_samples, noise)]
        n = len(original_samples)
        if len(set(shapes)) > 1 or len(shapes[0]) < 2 or tuple(timesteps.shape) != (n,):
            raise UserError(
                f"record: model_output, original_samples and noise have shapes {shapes}, timesteps {[*timesteps.shape]}"
                "; give the network's raw output (without a learned variance), x0 and noise, all [n, ...], and "
                "timesteps [n]"
            )
        learner = self._learner_on(original_samples.device)
        log_sigma = self.log_sigma(timesteps, original_samples.device)
        target = self.path.target(original_samples.float(), noise.float(), log_sigma)
        x0_error = self.objective(model_output.detach(), target, log_sigma)[1]
        learner.record(log_sigma.to(learner.device), x0_error.to(learner.device))
        row = learner.refresh(learner.images + self._batch_of_all(n))
        if row is not None:
            self._keep_profile()
        return row

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next draws, for an exact resume; empty before the first one.

        With several processes each has its own: save all of them, or load the first one's everywhere (the table is the
        same in all, only the latest errors differ).
        """
        return {} if self._learner is None else self._learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            UserError: When this scheduler was built with other tables.
        """
        if not state:
            return
        try:
            self._learner_on(torch.device("cpu")).load_state_dict(state)
        except ValueError as error:
            raise UserError(f"load_state_dict: {error}; build the scheduler with the same keys as before") from error
        self._keep_profile()

    def log_sigma(self, timesteps: Tensor | float, device: torch.device | str | None = None) -> Tensor:
        """Noise levels float64 [n] of timesteps [n] or a single one, within the path's range."""
        timesteps = torch.as_tensor(timesteps, device=device).double().reshape(-1)
        return self.path.log_sigma(timesteps).clamp(self.path.log_sigma_min, self.path.log_sigma_max)

    # -- what stands behind it --------------------------------------------------------------------------------------

    def _learner_on(self, device: torch.device) -> InfoNoise:
        """The schedule that is learned; built when first asked for, on that device, and moved with the images, but
        never back to the CPU: draws without a device would take it there and the next images away again."""
        settings, learner = self.settings, self._learner
        if learner is None or device.type != "cpu" and learner.device != device:
            keys = self.learning
            if not settings["train_images"] and not (keys.warmup and keys.refresh_every):
                raise UserError(
                    "InfoNoiseScheduler: warm-up and refreshes are shares of the training: say how long it is, "
                    "InfoNoiseScheduler.from_config(..., train_images=1_000_000), all epochs and processes together"
                )
            facts = RunFacts(
                images=settings["train_images"] or 0,
                data_std=settings["data_std"],
                weight=self._weight,
                reduce=self._sum_over_processes,
            )
            self._learner = InfoNoise(keys, self.path, device, facts)
            if learner is not None:
                self._learner.load_state_dict(learner.state_dict())
        return self._learner

    def _weight(self, log_sigma: Tensor) -> Tensor:
        return (self.loss_weight or self.objective.weight)(log_sigma)

    def _keep_profile(self) -> None:
        """What was learned goes into the config, which is what is saved and what sampling grids are made from."""
        profile = self._learner.profile
        if profile is not None:
            table = {"log_sigma": profile.log_sigma.tolist(), "x0_error": profile.x0_error.tolist()}
            self.register_to_config(_infonoise={**self.settings, "profile": table, "pivot": self._learner.pivot})

    def _batch_of_all(self, n: int) -> int:
        """Samples of a step over all processes; agreed on once, so that all of them refresh at the same step even where
        a last batch is uneven."""
        if not dist.is_initialized():
            return n
        if self._batch is None:
            largest = torch.tensor(n, device=self._learner.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            self._batch = largest.item() * dist.get_world_size()
        return self._batch

    def _sum_over_processes(self, table: Tensor) -> Tensor:
        if not dist.is_initialized():
            return table
        table = table.to(self._learner.device)
        dist.all_reduce(table)
        return table.cpu()
