"""Training speed: this trainer, a bare hand-written loop, and the usual form of a diffusers training script.

    python scripts/benchmark_training.py --repetitions 7 --steps 30 --json recipes/digits/benchmark.json

All three train the same UNet on the same digits with AdamW, gradient clipping and an average of the weights, in one
process, in turns: each repetition times all three, in a rotating order, so that a machine whose speed drifts slows them
alike. `bare` has the same good habits as the trainer (fused AdamW, one fused average, images on the device, no wait per
step) and nothing else. `usual form` does what `train_unconditional`-type scripts do: a DataLoader that decodes and
normalises each image, AdamW and EMA one tensor at a time, a host read of the loss and a progress bar update every step.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from entrecipes.recipe.load import load
from entrecipes.training.loop import step
from entrecipes.training.run import Run


class Trainer:
    """entrecipes' own loop."""

    def __init__(self, run: Run) -> None:
        self.run, self.batches = run, run.batches()

    def steps(self, count: int) -> None:
        for _ in range(count):
            step(self.run, self.batches)
        self.run.window.sums.tolist()


def fresh_model(run: Run) -> torch.nn.Module:
    """Another model of the run's kind, in the same memory format (a copy would share accelerate's patched forward)."""
    model = type(run.model).from_config(run.model.config).to(run.device)
    return model.to(memory_format=torch.channels_last) if run.recipe.training.channels_last else model


class Bare:
    """The same computation written out by hand: EDM loss, fused AdamW, clipping, one fused average."""

    def __init__(self, run: Run) -> None:
        self.model, self.average = fresh_model(run), fresh_model(run).requires_grad_(False)
        self.autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=run.recipe.training.precision == "bf16")
        self.images, self.labels = run.data.train.tensor.to(run.device), run.data.train.labels.to(run.device)
        self.batch_size, self.device = run.recipe.training.batch_size, run.device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.total = torch.zeros((), device=self.device)

    def steps(self, count: int) -> None:
        for _ in range(count):
            rows = torch.randint(len(self.images), (self.batch_size,), device=self.device)
            x0 = self.images[rows].float() / 127.5 - 1
            sigma = (torch.randn(self.batch_size, 1, 1, 1, device=self.device) * 1.2 - 0.6).exp()
            noisy = x0 + sigma * torch.randn_like(x0)
            norm = (sigma**2 + 0.25).sqrt()
            with self.autocast:
                output = self.model(noisy / norm, sigma.log().flatten() / 4, class_labels=self.labels[rows]).sample
            target = (x0 - 0.25 / norm**2 * noisy) * norm / (0.5 * sigma)
            loss = functional.mse_loss(output.float(), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 0.01)
            self.total += loss.detach()
        self.total.item()


class DecodedDigits(Dataset):
    """Images as files in memory, decoded and normalised one by one, as an image-folder script does."""

    def __init__(self, run: Run) -> None:
        self.labels = run.data.train.labels.tolist()
        self.files = []
        for image in run.data.train.tensor:
            buffer = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(buffer, format="PNG")
            self.files.append(buffer.getvalue())
        self.size = image.shape[-1]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.open(io.BytesIO(self.files[index])).convert("L").resize((self.size, self.size), Image.BILINEAR)
        tensor = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
        return (tensor - 0.5) / 0.5, self.labels[index]


class UsualForm:
    """The shape of diffusers' example scripts on the same model, data, path and batch."""

    def __init__(self, run: Run) -> None:
        self.accelerator = Accelerator(cpu=run.device.type == "cpu", mixed_precision=run.recipe.training.precision)
        model = fresh_model(run)
        self.average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
        self.average.to(self.accelerator.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = DataLoader(DecodedDigits(run), batch_size=run.recipe.training.batch_size, shuffle=True, drop_last=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, 500, 100_000)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, loader, schedule
        )
        self.bar = tqdm(disable=True)
        self.batches = self.forever()

    def forever(self):
        while True:
            yield from self.loader

    def steps(self, count: int) -> None:
        for _ in range(count):
            x0, labels = next(self.batches)
            noise = torch.randn_like(x0)
            sigma = (torch.randn(len(x0), device=x0.device) * 1.2 - 0.6).exp()[:, None, None, None]
            noisy = x0 + sigma * noise
            norm = (sigma**2 + 0.25).sqrt()
            target = (x0 - 0.25 / norm**2 * noisy) * norm / (0.5 * sigma)
            with self.accelerator.accumulate(self.model):
                output = self.model(noisy / norm, sigma.log().flatten() / 4, class_labels=labels).sample
                loss = functional.mse_loss(output.float(), target.float())
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.average.step(self.model.parameters())
            self.bar.update(1)
            self.bar.set_postfix(loss=loss.detach().item(), lr=self.schedule.get_last_lr()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits/demo")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30, help="steps of each contender in one repetition")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()

    run = Run(load(args.recipe, args.overrides).recipe, folder=None)
    contenders = {"trainer": Trainer(run), "bare": Bare(run), "usual form": UsualForm(run)}
    for contender in contenders.values():
        contender.steps(3)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repetition in range(args.repetitions):
        for name in names[repetition % 3 :] + names[: repetition % 3]:
            started = time.perf_counter()
            contenders[name].steps(args.steps)
            seconds[name].append(time.perf_counter() - started)

    images = args.steps * run.recipe.training.batch_size
    rates = {name: [round(images / s, 1) for s in values] for name, values in seconds.items()}
    cost = [t / b - 1 for t, b in zip(seconds["trainer"], seconds["bare"], strict=True)]
    gain = [u / t for t, u in zip(seconds["trainer"], seconds["usual form"], strict=True)]
    where = f"{run.device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    print(f"{args.recipe}, batch {run.recipe.training.batch_size}, {where}; medians of {args.repetitions} repetitions")
    for name, values in rates.items():
        print(f"{name:11} {statistics.median(values):9.1f} images/s ({min(values)} to {max(values)})")
    print(f"trainer's step over the bare loop's: {statistics.median(cost):+.1%} ({min(cost):+.1%} to {max(cost):+.1%})")
    print(f"trainer against the usual form: {statistics.median(gain):.2f}x ({min(gain):.2f} to {max(gain):.2f})")
    if args.json:
        result = {"recipe": args.recipe, "overrides": args.overrides, "steps": args.steps, "where": where}
        result |= {"images_per_second": rates, "cost_over_bare": cost, "gain_over_usual_form": gain}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
