"""The pictures of a run: sample grids, and curves that stay legible at the width of a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from entrecipes.errors import UserError
from entrecipes.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, FAINT, VEIL, BLUE, ORANGE = "#1f2933", "#7b8794", "#cbd2d9", "#e3e7eb", "#1d5fa8", "#c8641b"
STEPS = ["#b9d3ea", "#7fb0d9", "#4685bd", "#14497f"]
"""From the oldest evaluation shown to the newest."""

STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def sample_grid(images: Any, columns: int, scale: int | None = None, gap: int = 4) -> Image.Image:
    """Lay images out in rows on white.

    Args:
        images: uint8 `[N, C, H, W]` with C = 1 or 3, a torch tensor on any device or an array.
        columns: Images in a row; the last row may be shorter.
        scale: Whole factor of the nearest-neighbour enlargement; null: the least that makes images 48 pixels high.
        gap: Pixels between images and around the grid.
    """
    pixels = np.asarray(images.cpu() if hasattr(images, "cpu") else images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise ValueError(f"a grid needs uint8 [N, 1 or 3, H, W] with N > 0, not {pixels.dtype} {list(pixels.shape)}")
    count, channels, height, width = pixels.shape
    scale = scale or max(1, math.ceil(48 / height))
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = (columns * (width * scale + gap) + gap, rows * (height * scale + gap) + gap)
    grid = Image.new("L" if channels == 1 else "RGB", size, "white")
    for index, image in enumerate(pixels.repeat(scale, axis=2).repeat(scale, axis=3)):
        row, column = divmod(index, columns)
        tile = Image.fromarray(image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
        grid.paste(tile, (gap + column * (width * scale + gap), gap + row * (height * scale + gap)))
    return grid


def save_grid(
    images: Any, path: str | Path, columns: int, scale: int | None = None, texts: list[str] | None = None, gap: int = 4
) -> Path:
    """Write [`sample_grid`] as a PNG, and `texts` beside it, one a line; returns the PNG's path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_grid(images, columns, scale, gap).save(path)
    if texts is not None:
        path.with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def save_moving(frames: Any, path: str | Path, scale: int | None = None, fps: float = 8) -> Path:
    """Write pictures uint8 `[F, 3, H, W]` one after the other, enlarged as a grid is: an endless GIF, or an MP4.

    Raises:
        UserError: When nothing here can write an MP4.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [sample_grid(frame[None], columns=1, scale=scale, gap=0) for frame in frames]
    if path.suffix != ".mp4":
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
        return path
    from diffusers.utils import export_to_video

    try:
        export_to_video(pictures, str(path), fps=fps)
    except (ImportError, AttributeError):
        raise UserError(
            f"{path}: writing an MP4 needs OpenCV: run `pip install 'entrecipes[video]'`, or name a .gif"
        ) from None
    return path


def draw_plots(folder: RunFolder) -> dict[str, Path]:
    """Draw every curve for which the run has records into its `assets/`; returns `{name: path}` of those drawn."""
    train, held_out = folder.metrics("train"), folder.metrics("held_out")
    plots = {
        "loss": (loss_curve, train),
        "held_out_nats": (held_out_curve, held_out),
        "noise_levels": (noise_levels, held_out),
        "throughput": (throughput, train),
    }
    return {
        name: draw(folder.assets / f"{name}.png", plot, records) for name, (plot, records) in plots.items() if records
    }


def loss_curve(axes: Axes, records: list[dict[str, Any]]) -> None:
    """The training loss, raw and smoothed, against images seen."""
    images, loss = _column(records, "images"), _column(records, "loss")
    smoothed = smooth(loss)
    if len(loss) > 2:
        axes.plot(images, loss, color=FAINT, linewidth=0.8, label="as logged")
    axes.plot(images, smoothed, color=BLUE, linewidth=1.8, label="smoothed", **_dots(images))
    log_scale_where_wide(axes, loss)
    axes.set(title="Training loss", ylabel="weighted squared error")
    axes.legend(loc="upper right")


def held_out_curve(axes: Axes, records: list[dict[str, Any]]) -> None:
    """The held-out nats (and those of training images, where measured) against images seen, with one standard error."""
    images = _column(records, "images")
    measured = {"train": "training images", "held_out": "held-out images"}[records[-1].get("split", "held_out")]
    for key, label, color in (("train_nats", "training images", ORANGE), ("nats", measured, BLUE)):
        nats = _column(records, key)
        if np.isfinite(nats).any() and (key == "nats" or label != measured):
            axes.plot(images, nats, color=color, linewidth=1.8, label=label, **_dots(images))
    nats, error = _column(records, "nats"), _column(records, "nats_standard_error")
    axes.fill_between(images, nats - error, nats + error, color=BLUE, alpha=0.15, linewidth=0)
    log_scale_where_wide(axes, nats)
    axes.set(title="Denoising error over all noise levels", ylabel="nats (lower is better)")
    axes.legend(loc="upper right")


def noise_levels(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Where the nats lie: the rate, x0 error / sigma^2, faded by the gate, against log sigma.

    Up to four evaluations, the first and the last among them. The area under a curve is that evaluation's nats; the
    ground is grey where the gate is closed.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    chosen = np.unique(np.linspace(0, len(records) - 1, len(STEPS)).round().astype(int))
    for index, color in zip(chosen, STEPS[-len(chosen) :], strict=True):
        log_sigma, gate, rate = (np.array(records[index][key]) for key in ("log_sigma", "gate", "rate"))
        label = f"{short(records[index]['images'])} images"
        axes.plot(log_sigma, gate * rate, color=color, linewidth=2 if index == chosen[-1] else 1.4, label=label)
    axes.fill_between(log_sigma, gate * rate, color=color, alpha=0.1, linewidth=0)
    top = axes.get_ylim()[1]
    handles = axes.get_legend_handles_labels()[0]
    if gate.min() < 0.99:
        handles += axes.plot(log_sigma, rate, color=color, linewidth=1, linestyle=(0, (1, 2)), label="without the gate")
        handles.append(Patch(color=VEIL, label="gate closed"))
        ground = LinearSegmentedColormap.from_list("gate", [VEIL, "white"])
        columns, rows = np.meshgrid(log_sigma, [0, top])
        axes.pcolormesh(columns, rows, np.stack([gate, gate]), cmap=ground, vmin=0, vmax=1, shading="gouraud", zorder=0)
    axes.legend(handles=handles, loc="upper right")
    axes.set(ylim=(0, top), xlim=(log_sigma[0], log_sigma[-1]))
    axes.set(
        title="Where the error lies", xlabel="log sigma (more noise to the right)", ylabel="nats per unit log sigma"
    )


def throughput(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Images per second against images seen, with the median."""
    images, speed = _column(records, "images"), _column(records, "images_per_second")
    median = float(np.nanmedian(speed)) if np.isfinite(speed).any() else math.nan
    axes.plot(images, speed, color=BLUE, linewidth=1.2, **_dots(images))
    axes.axhline(median, color=MUTED, linewidth=1, linestyle="--", label=f"median {median:,.4g}")
    axes.set(title="Speed", ylabel="images per second", ylim=(0, None))
    axes.legend(loc="lower right")


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fifteenth of the curve, narrowing to its ends so that it neither lags nor shifts.

    NaN are passed over.
    """
    smoothed = []
    for i in range(len(values)):
        reach = min(i, len(values) - 1 - i, len(values) // 30)
        window = values[i - reach : i + reach + 1]
        finite = window[np.isfinite(window)]
        smoothed.append(finite.mean() if len(finite) else math.nan)
    return np.array(smoothed)


def draw(
    path: Path, plot: Callable[..., None], *arguments: Any, panels: int = 1, columns: int = 1, height: float = 3.2
) -> Path:
    """One figure as a PNG, 960 pixels wide, without pyplot's global state.

    Args:
        path: The file, with the folders above it made where they are missing.
        plot: Called with as many axes as there are panels, row by row, and the arguments; without an x label the last x
            axis counts images.
        panels: Axes one above the other, which share their x axis.
        columns: Axes side by side; with more than one all share their y axis, and none an x axis.
        height: In inches, of which the width is 4.8.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, height), dpi=200, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        alone = columns == 1
        every = figure.subplots(panels, columns, sharex=alone, sharey=not alone, squeeze=False).ravel()
        plot(*every, *arguments)
        for axes in every:
            axes.set_title(axes.get_title(), loc="left", fontsize=11, fontweight="bold")
            axes.set_title("")
        figure.align_ylabels()
        if not axes.get_xlabel():
            axes.set_xlabel("images seen")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda images, _: short(images)))
        figure.savefig(path)
    return path


def log_scale_where_wide(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis where the values span more than a factor of three, so that the last differences still show.

    Its ticks are 20, 30, 50, 100 in place of powers of ten, which say little over one or two decades.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() <= 0 or finite.max() <= 3 * finite.min():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    """One key of all records, NaN where it is missing."""
    return np.array([math.nan if record.get(key) is None else record[key] for record in records], dtype=float)


def _dots(images: Sequence[float]) -> dict[str, Any]:
    """Points on short curves, so that one or two measurements show."""
    return {"marker": "o", "markersize": 3} if len(images) <= 25 else {}


def short(images: float) -> str:
    """50000 -> `50k`."""
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(images) >= limit:
            return f"{images / limit:g}{letter}"
    return f"{images:g}"
