"""Linear heads that bring features of clips and of captions into one space, and how well they find one by the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = 1
"""Of the heads and their training; part of caches' names."""
WIDTH = 128
BATCH = 256
KEPT_BACK, BLOCKS, LEAST_KEPT = 0.1, 40, 8
"""Share of the training pairs that say when to stop, in blocks of the captions' alphabet; fewer pairs say nothing."""
CHECK_EVERY = 25
LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 1e-3, 0.1, 0.3
LEAST_DEVIATION = 1e-3


class _Head(nn.Module):
    """Features, brought to mean 0 and variance 1, to unit vectors: [n, D] -> [n, WIDTH]."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", features.std(0, correction=0).clamp(min=LEAST_DEVIATION))
        self.linear = nn.Linear(features.shape[1], WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        scaled = (features - self.mean) / self.deviation
        return F.normalize(self.linear(F.dropout(scaled, DROPOUT, self.training)), dim=1)


class Heads(nn.Module):
    """One linear map for clips and one for captions, with the scale of their products.

    Args:
        clips: Features of the training clips [N, D], for their scale.
        texts: Features of the training captions [N, E].
    """

    def __init__(self, clips: Tensor, texts: Tensor) -> None:
        super().__init__()
        self.clip, self.text = _Head(clips), _Head(texts)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Heads:
        """Those with these weights, in eval mode."""
        heads = cls(*(torch.zeros(1, len(weights[f"{side}.mean"])) for side in ("clip", "text")))
        heads.load_state_dict(weights)
        return heads.eval()

    def loss(self, clips: Tensor, texts: Tensor, own: Tensor) -> Tensor:
        """Symmetric InfoNCE (Radford et al. 2021) of [n, D] and [n, E]; `own` [n, n]: captions that read the same."""
        logits = self.log_scale.exp() * self.clip(clips) @ self.text(texts).T
        targets = own / own.sum(1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _kept_back(captions: Sequence[str], generator: torch.Generator) -> Tensor:
    """Which pairs only say when to stop: bool [N]. Blocks of the alphabet keep the variants of one drawing together."""
    order = torch.tensor(sorted(range(len(captions)), key=lambda number: captions[number]))
    blocks = order.tensor_split(BLOCKS)
    chosen = torch.randperm(BLOCKS, generator=generator)[: round(BLOCKS * KEPT_BACK)].tolist()
    kept = torch.zeros(len(captions), dtype=torch.bool)
    kept[torch.cat([blocks[number] for number in chosen])] = True
    return kept if kept.sum() >= LEAST_KEPT else torch.zeros_like(kept)


def train_heads(clips: Tensor, texts: Tensor, captions: Sequence[str], *, steps: int, seed: int) -> tuple[Heads, int]:
    """Train heads on pairs of frozen features; a few pairs are kept back and say which step's weights are taken.

    Args:
        clips: float32 [N, D] on the CPU.
        texts: float32 [N, E].
        captions: The texts: those that read the same belong to each other's clips.
        steps: The most.
        seed: Of the heads, their dropout, the batches, and the choice of what is kept back.

    Returns:
        The heads in eval mode, and the step that they are of.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = _kept_back(captions, generator)
    learn, judge = (~kept).nonzero()[:, 0], kept.nonzero()[:, 0]
    own = same(captions).float()

    def loss(which: Tensor) -> Tensor:
        return heads.loss(clips[which], texts[which], own[which][:, which])

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        heads = Heads(clips[learn], texts[learn])
        optimizer = torch.optim.AdamW(heads.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        least, best, weights = math.inf, steps, None
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss(learn[torch.randperm(len(learn), generator=generator)[:BATCH]]).backward()
            optimizer.step()
            if len(judge) and (step % CHECK_EVERY == 0 or step == steps):
                heads.eval()
                with torch.no_grad():
                    found = loss(judge).item()
                heads.train()
                if found < least:
                    least, best, weights = found, step, deepcopy(heads.state_dict())
    if weights:
        heads.load_state_dict(weights)
    return heads.eval(), best


def same(captions: Sequence[str]) -> Tensor:
    """Which of N captions read the same: bool [N, N]."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    number = torch.tensor([numbers[caption] for caption in captions])
    return number[:, None] == number


def retrieval(products: Tensor, own: Tensor, first: int) -> tuple[float, float]:
    """Share of clips with an own caption among the `first` captions that fit best, and the share that chance gives.

    Args:
        products: Of clips and captions [N, N].
        own: Which captions are a clip's own, bool [N, N]: at least one a clip.
        first: How many count.
    """
    count = len(products)
    best = products.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    found = ((products > best).sum(1) < first).double().mean().item()
    # Of all draws of `first` captions, those that miss the own ones.
    misses = [math.comb(count - mine, first) / math.comb(count, first) for mine in own.sum(1).tolist()]
    return found, 1 - sum(misses) / count


@torch.no_grad()
def ability(heads: Heads, clips: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float | int]:
    """What heads make of clips [N, D] and their captions' [N, E] that they haven't seen, for metrics' origins."""
    products, own = heads.clip(clips) @ heads.text(texts).T, same(captions)
    found = {"judge_held_out": len(captions), "judge_matched": products.diagonal().mean().item()}
    if not own.all():
        found["judge_mismatched"] = products[~own].mean().item()
    for first in (1, 10):
        if first <= len(captions):
            found[f"judge_r{first}"], found[f"judge_r{first}_chance"] = retrieval(products, own, first)
    return {name: round(value, 4) for name, value in found.items()}
