"""Sampling grids from an information profile: which n noise levels a sampler should visit.

Each grid spaces its levels evenly in the cumulative integral of a density over log sigma:

| grid | density per unit log sigma | after |
|---|---|---|
| `infogrid` | gated rate, gate * x0_error / sigma^2 | InfoNoise (Raya et al. 2026, arXiv 2602.18647) |
| `entropic` | rate, x0_error / sigma^2 | Entropic Time Schedulers (arXiv 2504.13612), section 4 |
| `rescaled` | x0_error / sigma | the same, section 5.3 |

The sources leave open whether InfoNoise's own grid is gated; here it is, since the rate of continuous data has no
finite integral at low noise. The rescaled grid is optimal for Gaussian data under first-order solvers, where it is
sigma = c tan of an evenly spaced angle (the same, appendices C-E). Tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entrecipes.information.profile import Histogram, Profile

GRIDS = ("infogrid", "entropic", "rescaled")

UNIFORM_SHARE = 1e-6
"""Of every grid's density is uniform over log sigma, so that levels stay apart where the profile shows nothing."""


def sampling_grid(
    kind: str,
    profile: Profile,
    n: int,
    log_sigma_min: float,
    log_sigma_max: float,
    pivot: float | None = None,
    gate_order: int = 3,
) -> Tensor:
    """The n noise levels of a grid, from the noisiest down; what a sampler goes to after the last one is 0.

    Args:
        kind: One of [`GRIDS`].
        profile: Measured x0 errors; its levels need not be those of the sampler.
        n: Number of levels, which is the number of denoising steps.
        log_sigma_min: The last level.
        log_sigma_max: The first one.
        pivot: Sigma at which the gate of `infogrid` is one half, in units of the data; None: no gate.
        gate_order: Steepness of that gate.

    Returns:
        Strictly decreasing log sigma [n], float64.

    Raises:
        ValueError: For another kind, or a profile without any density (see `Histogram.around`).
    """
    if kind == "infogrid":
        density = profile.density(pivot, gate_order)
    elif kind == "entropic":
        density = profile.density(None)
    elif kind == "rescaled":
        density = Histogram.around(profile.log_sigma, profile.x0_error * torch.exp(-profile.log_sigma))
    else:
        raise ValueError(f"there is no grid '{kind}'; take one of {', '.join(GRIDS)}")
    ends = torch.tensor([log_sigma_min, log_sigma_max], dtype=torch.float64)
    inside = density.edges[(density.edges > log_sigma_min) & (density.edges < log_sigma_max)]
    edges = torch.cat([ends[:1], inside, ends[1:]])
    uniform = Histogram(edges, (edges - ends[0]) / (ends[1] - ends[0]))
    cumulative = density.cdf(edges) - density.cdf(ends[:1])
    if cumulative[-1] > 0:
        uniform = Histogram(edges, cumulative / cumulative[-1]).mix(uniform, UNIFORM_SHARE)
    levels = uniform.quantile(torch.linspace(1, 0, n, dtype=torch.float64))
    levels[-1], levels[0] = ends  # to the last digit; a single level is the noisiest
    return levels
