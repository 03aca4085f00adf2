"""Linear heads that bring features of clips and of captions into one space, and how well they find one by the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = 1
"""Of the heads and their training; part of caches' names."""
WIDTH = 128
BATCH = 256
KEPT_BACK, BLOCKS, LEAST_KEPT = 0.1, 40, 8
"""Share of the training pairs that say when to stop, in blocks of the captions' alphabet; fewer texts say nothing."""
CHECK_EVERY = 25
LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 1e-3, 0.1, 0.3
LEAST_DEVIATION, FARTHEST = 1e-3, 4.0
"""A feature that hardly varies in training is not blown up when it does elsewhere."""


class _Head(nn.Module):
    """Features, brought to mean 0 and variance 1, to unit vectors: [n, D] -> [n, WIDTH]."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", features.std(0, correction=0).clamp(min=LEAST_DEVIATION))
        self.linear = nn.Linear(features.shape[1], WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        scaled = ((features - self.mean) / self.deviation).clamp(-FARTHEST, FARTHEST)
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
    texts = {caption for caption, use in zip(captions, kept.tolist(), strict=True) if use}
    return kept if len(texts) >= LEAST_KEPT else torch.zeros_like(kept)


def train_heads(clips: Tensor, texts: Tensor, captions: Sequence[str], *, steps: int, seed: int) -> tuple[Heads, int]:
    """Train heads on pairs of frozen features, for as long as that helped when some of the pairs were kept back.

    Args:
        clips: float32 [N, D] on the CPU.
        texts: float32 [N, E].
        captions: The texts: those that read the same belong to each other's clips.
        steps: The most.
        seed: Of the heads, their dropout, the batches, and the choice of what is kept back.

    Returns:
        The heads in eval mode, trained on all pairs, and the steps that it took.
    """
    own, kept = same(captions).float(), _kept_back(captions, torch.Generator().manual_seed(seed))
    if kept.any():
        losses = {}
        for step, heads in _training(clips[~kept], texts[~kept], own[~kept][:, ~kept], steps, seed):
            if step % CHECK_EVERY == 0 or step == steps:
                heads.eval()
                with torch.no_grad():
                    losses[step] = heads.loss(clips[kept], texts[kept], own[kept][:, kept]).item()
                heads.train()
        steps = min(losses, key=losses.get)
    *_, (_, heads) = _training(clips, texts, own, steps, seed)
    return heads.eval(), steps


def _training(clips: Tensor, texts: Tensor, own: Tensor, steps: int, seed: int) -> Iterator[tuple[int, Heads]]:
    """The heads after each step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        heads = Heads(clips, texts)
        optimizer = torch.optim.AdamW(heads.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for step in range(1, steps + 1):
            batch = torch.randperm(len(clips), generator=generator)[:BATCH]
            optimizer.zero_grad()
            heads.loss(clips[batch], texts[batch], own[batch][:, batch]).backward()
            optimizer.step()
            yield step, heads


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
