"""Move the time embedding of an original DiT or SiT into diffusers' `TimestepEmbedding`, which sees other sinusoids.

Both networks pass cos(w t) and sin(w t), at 128 frequencies w, through two linear layers with a SiLU between them. The
original frequencies are 10000^(-i/128); `DiTTransformer2DModel` has 10000^(-i/127), and copied weights would tell the
network times that are 4 to 7 % off at the low frequencies and unrelated ones at the high. SiT besides takes a time of
its own, 1 - timestep / 1000, where 1 is the data. The layers are therefore fitted anew by least squares, in float64, on
whole and half timesteps.
"""

from __future__ import annotations

import copy

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

LAST_TIMESTEP = {"dit": 999.0, "sit": 1000.0}
SINUSOIDS = 256

CUTOFF = 1e-7
"""Directions whose singular value is below this share of the largest are left out: their weights would grow huge."""


def original_embedding(timestep: Tensor, kind: str) -> Tensor:
    """What the original's first layer sees at diffusers' timesteps [n]: float32 [n, 256], cosines first."""
    time = 1 - timestep.double() / 1000 if kind == "sit" else timestep
    return get_timestep_embedding(time, SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)


def diffusers_embedding(timestep: Tensor) -> Tensor:
    """What the first layer in `DiTTransformer2DModel` sees at timesteps [n]: float32 [n, 256], cosines first."""
    return get_timestep_embedding(timestep, SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=1)


@torch.no_grad()
def fit_time_embedding(original: TimestepEmbedding, kind: str) -> tuple[TimestepEmbedding, float]:
    """The layers that give, on diffusers' sinusoids, what the original's give on its own.

    SiT's functions of time are smooth (at most one radian over the whole range), so that the first layer alone can be
    exact (4e-6 in float32, with random weights). DiT's high frequencies are not in the span of diffusers' sinusoids;
    the first layer is copied and the second refitted. With random weights, the hardest case, that is exact up to 3e-5
    at the width 1152 of DiT-XL, 7e-5 at 1024, 6e-4 at 768 and 7e-2 at 384; with the second copied too, 0.8 at each.
    Where low frequencies dominate it is ten to a hundred times as exact. In half precision the refitted layer loses
    more than the original (bfloat16: 1e-2 to 1e-1, not 5e-3); SiT's does not.

    Args:
        original: The original's layers, `[256, width]` and `[width, width]`.
        kind: `dit` or `sit`.

    Returns:
        The new layers, in float32, and the error of their output: its root mean square over the timesteps and channels,
        relative to how much the original's output varies over time.
    """
    timesteps = torch.arange(0, LAST_TIMESTEP[kind] + 0.25, 0.5, dtype=torch.float64)
    ours, theirs = diffusers_embedding(timesteps).double(), original_embedding(timesteps, kind).double()
    original = copy.deepcopy(original).double()
    target = original(theirs)
    fitted = TimestepEmbedding(SINUSOIDS, target.shape[1]).double()
    fitted.load_state_dict(original.state_dict())
    if kind == "sit":
        _fit(fitted.linear_1, ours, original.linear_1(theirs))
    else:
        _fit(fitted.linear_2, fitted.act(fitted.linear_1(ours)), target)
    fitted = fitted.float()
    error = fitted(ours.float()) - target
    return fitted, (error.norm() / (target - target.mean(0)).norm()).item()


def _fit(layer: nn.Linear, inputs: Tensor, outputs: Tensor) -> None:
    """Set the layer to the least weights that take `inputs` [n, i] to `outputs` [n, o] with the least square error."""
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    solution = torch.linalg.lstsq(inputs, outputs, rcond=CUTOFF, driver="gelsd").solution
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])
