"""Where the joints of the person in a frame are: a small heat-map network, trained on a data set's real frames.

It measures how well generated people follow the poses asked for, and its own error on real frames that it was not
trained on is the floor below which that measure sees nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from entrecipes.data.images import ImageSet
from entrecipes.data.places import atomic_folder, home
from entrecipes.data.skeleton import JOINTS
from entrecipes.errors import UserError
from entrecipes.evaluation.metrics import Origin
from entrecipes.evaluation.result import Metric, metric_name
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.evaluation import PoseDetection

TAG = "heatmaps"
VERSION = 3
"""Of the network and its training; part of the cache's name."""
LARGEST_SIDE = 64
"""Larger frames are made so large first."""
BATCH = 64
CELL = 2
"""Pixels on a side of a heat-map's cell."""
SPREAD = 1.0
"""Standard deviation of the Gaussian that a joint's heat-map is to be, in cells."""
REACH = 2
"""Cells around the highest one over which a joint's place is averaged."""
VISIBLE = 0.5
"""Joints of a visibility below it are neither learned nor measured."""
PCK_REACH = 0.1
"""Of the figure's extent: a joint found within it counts as correct."""
TURN, ZOOM, SHIFT = math.radians(40), 0.1, 0.1
"""How far training frames are turned (standard deviation), scaled (log of the factor) and shifted (half frames)."""
_OPPOSITE = {"left": "right", "right": "left"}
OTHER_SIDE = [JOINTS.index("_".join(_OPPOSITE.get(word, word) for word in name.split("_"))) for name in JOINTS]
"""Which joint each one is in a mirror."""
FLOOR_CLIPS = 256
"""Real clips on which the detector's own error is measured, at most."""


class _Residual(nn.Sequential):
    def __init__(self, channels: int) -> None:
        half = (nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        other = (nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        super().__init__(*half, *other)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + super().forward(maps)


class HeatMaps(nn.Module):
    """An hourglass: frames in [-1, 1] [n, 3, H, W] -> logits of where each joint is [n, joints, H / 2, W / 2]."""

    def __init__(self, joints: int, widths: tuple[int, ...] = (24, 48, 64, 96)) -> None:
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.stem = nn.Conv2d(3, widths[0], 4, CELL, 1)
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), _Residual(b)) for a, b in pairs)
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.mix = nn.ModuleList(_Residual(a) for a, _ in pairs)
        self.head = nn.Conv2d(widths[0], joints, 1)

    def forward(self, frames: Tensor) -> Tensor:
        maps, skipped = self.stem(frames), []
        for down in self.down:
            skipped.append(maps)
            maps = down(maps)
        for up, mix, skip in reversed(list(zip(self.up, self.mix, skipped, strict=True))):
            maps = mix(skip + F.interpolate(up(maps), size=skip.shape[-2:], mode="bilinear", align_corners=False))
        return self.head(maps)


@dataclass
class PoseDetector:
    """A trained network and what it can do.

    Args:
        network: In eval mode.
        about: What it was trained on, and its `floor_error` and `floor_pck` on real frames, for metrics' origins.
    """

    network: HeatMaps
    about: dict[str, str | int | float]

    @torch.inference_mode()
    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 frames [n, 3, H, W] -> joints float32 [n, joints, 2] on the CPU: x, y in [0, 1] of the frame."""
        device = next(self.network.parameters()).device
        return torch.cat([_places(self.network(_prepared(part.to(device)))).cpu() for part in frames.split(4 * BATCH)])


def _prepared(frames: Tensor) -> Tensor:
    """uint8 [n, 3, H, W] -> float in [-1, 1], no larger than the network's largest side."""
    pixels = frames.float() / 127.5 - 1
    if max(frames.shape[-2:]) > LARGEST_SIDE:
        pixels = F.interpolate(pixels, size=(LARGEST_SIDE, LARGEST_SIDE), mode="bilinear", antialias=True)
    return pixels


def _centres(cells: int, like: Tensor) -> Tensor:
    """Middles of the cells, in [0, 1]."""
    return (torch.arange(cells, device=like.device, dtype=like.dtype) + 0.5) / cells


def _places(logits: Tensor) -> Tensor:
    """Heat-map logits [n, joints, h, w] -> x, y [n, joints, 2] in [0, 1]: the mean of the cells around the highest."""
    height, width = logits.shape[-2:]
    highest = logits.flatten(2).argmax(2)
    rows = torch.arange(height, device=logits.device).view(1, 1, -1, 1) - (highest // width)[..., None, None]
    columns = torch.arange(width, device=logits.device).view(1, 1, 1, -1) - (highest % width)[..., None, None]
    near = (rows.abs() <= REACH) & (columns.abs() <= REACH)
    share = logits.masked_fill(~near, -torch.inf).flatten(2).softmax(2).unflatten(2, (height, width))
    x = (share.sum(2) * _centres(width, logits)).sum(2)
    y = (share.sum(3) * _centres(height, logits)).sum(2)
    return torch.stack([x, y], 2)


def _targets(keypoints: Tensor, height: int, width: int) -> Tensor:
    """Gaussians around the joints [n, joints, 3], each summing to 1: [n, joints, h * w]."""
    x = (_centres(width, keypoints) - keypoints[..., :1]) * width / SPREAD
    y = (_centres(height, keypoints) - keypoints[..., 1:2]) * height / SPREAD
    maps = torch.exp(-0.5 * (x[:, :, None].square() + y[..., None].square())).flatten(2)
    return maps / maps.sum(2, keepdim=True).clamp(min=1e-8)


def _turned(frames: Tensor, joints: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames turned, mirrored, shifted and scaled at random, with their joints [n, 13, 3]: few motions become many."""
    count = len(frames)
    angle = TURN * torch.randn(count, generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    scale = torch.exp(ZOOM * (2 * torch.rand(count, generator=generator) - 1))
    shift = SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)
    sign = torch.where(mirrored, -1.0, 1.0)
    across, along = torch.cos(angle) / scale, torch.sin(angle) / scale
    # From a place in the new frame to the place in the old one that it shows, both in [-1, 1].
    turn = torch.stack([torch.stack([across * sign, -along], 1), torch.stack([along * sign, across], 1)], 1)
    grid = F.affine_grid(torch.cat([turn, shift[..., None]], 2), list(frames.shape), align_corners=False)
    frames = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    # The inverse of a turn over a scale is its transpose times the scale squared; rows times the turn are that.
    places = ((2 * joints[..., :2] - 1 - shift[:, None]) @ turn * scale[:, None, None].square() + 1) / 2
    inside = ((places > 0) & (places < 1)).all(2, keepdim=True)
    joints = torch.cat([places, joints[..., 2:] * inside], 2)
    return frames, torch.where(mirrored[:, None, None], joints[:, OTHER_SIDE], joints)


def _worn(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames with the faults of generated ones: noise, blur, another brightness, each to a random degree."""
    degree = torch.rand(3, len(frames), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)
    frames = torch.lerp(frames, blurred, degree[0])
    frames = frames * (0.85 + 0.3 * degree[1])
    return frames + 0.15 * degree[2] * torch.randn(frames.shape, generator=generator)


def _trained(section: PoseDetection, clips: Tensor, keypoints: Tensor, device: torch.device | str) -> HeatMaps:
    """Train on frames drawn from uint8 clips [N, 3, F, H, W] with keypoints [N, F, joints, 3]."""
    generator = torch.Generator().manual_seed(section.seed)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(section.seed)
        network = HeatMaps(keypoints.shape[2])
    network.to(device)
    steps = max(1, section.images // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        which = torch.randint(len(clips), (BATCH,), generator=generator)
        when = torch.randint(clips.shape[2], (BATCH,), generator=generator)
        frames, joints = _turned(_prepared(clips[which, :, when]), keypoints[which, when].nan_to_num(), generator)
        logits, joints = network(_worn(frames, generator).to(device)), joints.to(device)
        targets = _targets(joints, *logits.shape[-2:])
        losses = -(targets * logits.flatten(2).log_softmax(2)).sum(2)
        counted = seen(joints)
        loss = (losses * counted).sum() / counted.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def pose_detector(
    section: PoseDetection, train: ImageSet, held_out: ImageSet | None, device: torch.device | str = "cpu"
) -> PoseDetector:
    """The detector of a clip data set, out of the cache or trained now (about a minute at 32 px on one core).

    Args:
        section: How long it is trained, and its seed.
        train: Clips with keypoints; see [`entrecipes.data.clips`].
        held_out: Clips on which its own error is measured; None: on those that it was trained on, and says so.
        device: Where it is trained and used.

    Raises:
        UserError: For data without keypoints.
    """
    if train.keypoints is None:
        raise UserError("evaluation.metrics: 'pose' needs clips with keypoints; use `data.type: clips`")
    floor_set = held_out if held_out is not None else train
    key = fingerprint(train.fingerprint, floor_set.fingerprint, section.model_dump(), VERSION)[:16]
    folder = home() / "detectors" / f"pose-{key}"
    if not folder.is_dir():
        network = _trained(section, frames_of(train), train.keypoints, device)
        clips, keypoints = frames_of(floor_set)[:FLOOR_CLIPS], floor_set.keypoints[:FLOOR_CLIPS]
        detector = PoseDetector(network, {})
        error, correct = pose_errors(_detected(detector, clips), keypoints)
        about = {
            "detector": f"heat-map network {VERSION}, trained on {section.images} real frames",
            "detector_data": train.fingerprint[:12],
            "detector_seed": section.seed,
            "floor_split": "held_out" if held_out is not None else "train",
            "floor_clips": len(clips),
            "floor_error": round(error.mean().item(), 5),
            "floor_pck": round(correct.mean().item(), 5),
        }
        with atomic_folder(folder, keep_existing=True) as scratch:
            save_file(network.state_dict(), scratch / "model.safetensors", {"about": json.dumps(about)})
    with safe_open(folder / "model.safetensors", "pt") as file:
        network = HeatMaps(train.keypoints.shape[2])
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
        return PoseDetector(network.eval().to(device), json.loads(file.metadata()["about"]))


def frames_of(clips: ImageSet) -> Tensor:
    """The video frames [N, 3, F, H, W] of a clip data set, without its pose maps and references."""
    return clips.tensor[:, :, : clips.keypoints.shape[1]]


def _detected(detector: PoseDetector, clips: Tensor) -> Tensor:
    """uint8 [N, 3, F, H, W] -> joints [N, F, joints, 2]."""
    return detector(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))


def seen(keypoints: Tensor) -> Tensor:
    """Which joints [..., 3] are visible and inside the frame, where alone a detector can find them: bool [...]."""
    places = keypoints[..., :2]
    return (keypoints[..., 2] >= VISIBLE) & ((places >= 0) & (places <= 1)).all(-1)


def pose_errors(detected: Tensor, keypoints: Tensor) -> tuple[Tensor, Tensor]:
    """How far detected joints are from those asked for, over the visible ones inside the frame (see [`seen`]).

    The unit is the figure's extent: the longer side of the box around those joints, in the frame of the clip
    where that is longest (so that a figure that rolls up has no other unit than the same figure standing).

    Args:
        detected: x, y [N, F, joints, 2] in [0, 1].
        keypoints: x, y, visibility [N, F, joints, 3].

    Returns:
        Mean distance in extents, and share of joints within a tenth of it, of each clip [N].
    """
    counted, asked = seen(keypoints), keypoints[..., :2].nan_to_num()
    low = asked.masked_fill(~counted[..., None], torch.inf).amin(2)
    high = asked.masked_fill(~counted[..., None], -torch.inf).amax(2)
    extent = (high - low).amax((1, 2)).clamp(min=1e-3)
    distances = (detected - asked).norm(dim=-1) / extent[:, None, None]
    count = counted.sum((1, 2)).clamp(min=1)
    return (distances * counted).sum((1, 2)) / count, ((distances <= PCK_REACH) & counted).sum((1, 2)) / count


def pose_metrics(detector: PoseDetector, fake: Tensor, keypoints: Tensor, origin: Origin) -> list[Metric]:
    """The error and PCK@0.1 of generated clips, and the error of the detector itself.

    Args:
        detector: Of the same data set.
        fake: uint8 [N, 3, F, H, W].
        keypoints: The poses asked for [N, F, joints, 3].
        origin: What the caller knows of the clips.
    """
    error, correct = pose_errors(_detected(detector, fake), keypoints)
    about = {
        **origin,
        **detector.about,
        "unit": "extents of the figure",
        "visible_joints": int(seen(keypoints).sum()),
        "spread": "standard deviation over clips",
    }
    floor = {key: value for key, value in about.items() if key != "spread"} | {"samples": about["floor_clips"]}

    def metric(name: str, values: Tensor, higher_is_better: bool) -> Metric:
        mean, deviation = values.double().mean().item(), values.double().std().item()
        return Metric(metric_name(name, TAG, len(fake)), mean, deviation, about, higher_is_better)

    return [
        metric("pose_error", error, False),
        metric("pose_pck10", correct, True),
        Metric(metric_name("pose_error_real", TAG, about["floor_clips"]), about["floor_error"], None, floor, False),
    ]
