"""A shaded figure of capsules on a patterned floor, ray-traced in numpy, with the exact places of its joints."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from entrecipes.data.skeleton import JOINTS
from entrecipes.data.sources.kinematics import Motion

Point = tuple[str, tuple[float, float, float]]

NOSE: Point = ("neck", (0.115, 0.165, 0))
PLACES: dict[str, Point] = {joint: NOSE if joint == "nose" else (joint, (0, 0, 0)) for joint in JOINTS}
"""Where each of the 13 joints is: a link, and a place in its axes in metres."""


def _limbs(side: str, out: int) -> list[tuple[Point, Point, float, str]]:
    """The parts of one side; `out` is 1 where the side is along +z."""
    hip, knee, ankle = ((f"{side}_{name}", (0, 0, 0)) for name in ("hip", "knee", "ankle"))
    shoulder, elbow, wrist = ((f"{side}_{name}", (0, 0, 0)) for name in ("shoulder", "elbow", "wrist"))
    return [
        (hip, knee, 0.082, "trousers"),
        (knee, ankle, 0.064, "trousers"),
        ((f"{side}_ankle", (-0.02, -0.03, 0)), (f"{side}_ankle", (0.13, -0.035, 0)), 0.052, "shoes"),
        (shoulder, elbow, 0.06, "shirt"),
        (elbow, wrist, 0.05, "skin"),
        (wrist, (f"{side}_wrist", (0, -0.06, 0)), 0.056, "skin"),
        (("root", (0, 0.02, out * 0.05)), ("chest", (-0.01, 0.17, out * 0.085)), 0.095, "shirt"),
        (("root", (0, 0, out * 0.07)), ("root", (0, 0.04, out * 0.04)), 0.095, "trousers"),
        (("chest", (-0.02, 0.22, out * 0.04)), ("chest", (-0.024, 0.235, out * 0.15)), 0.065, "shirt"),
    ]


PARTS = [
    *_limbs("right", 1),
    *_limbs("left", -1),
    (("chest", (-0.02, 0.2, 0)), ("neck", (0, 0.08, 0)), 0.046, "skin"),
    (("neck", (0.01, 0.13, 0)), ("neck", (0.005, 0.2, 0)), 0.092, "skin"),
    (("neck", (-0.035, 0.15, 0)), ("neck", (-0.012, 0.225, 0)), 0.095, "hair"),
    (("neck", (0.09, 0.165, 0)), NOSE, 0.018, "skin"),
]
"""(one end, other end, radius in metres, what it is made of)."""
MATERIALS = ("skin", "hair", "shirt", "trousers", "shoes")
SKINS = ((236, 188, 160), (224, 172, 128), (198, 134, 94), (141, 85, 54), (94, 58, 40))
HAIRS = ((30, 24, 20), (80, 50, 28), (190, 150, 80), (130, 60, 30), (150, 150, 150))
MARGIN = 0.04
"""Share of the picture left free at every edge, at least."""
FOV = np.radians(28)
FOLLOW_SECONDS = 0.4
"""Standard deviation of the camera's smoothing of the root's path."""


@dataclass(frozen=True)
class Look:
    """Colours in [0, 1] and a pattern; see [`draw_look`]."""

    materials: np.ndarray
    """[5, 3], in the order of `MATERIALS`."""
    floor: np.ndarray
    """[2, 3], the pattern's two colours."""
    wall: np.ndarray
    """[2, 3], at the horizon and above."""
    pattern: str
    tile: float
    """Side of the pattern's cells in metres."""
    light: np.ndarray
    """[3], unit vector towards the light."""


@dataclass(frozen=True)
class View:
    """A camera that follows the person, and how everything looks."""

    azimuth: float
    """Radians from straight ahead of the person (at the start) towards its right."""
    elevation: float
    """Radians above the horizontal."""
    look: Look


def draw_view(number: int, seed: int = 0) -> View:
    """View `number`, always the same: cameras go round by the golden angle, the rest is drawn from (seed, number)."""
    random = np.random.default_rng([seed, number])
    azimuth = np.radians(35 + 137.508 * number)
    return View(azimuth % (2 * np.pi), np.radians(random.uniform(4, 24)), draw_look(random))


def draw_look(random: np.random.Generator) -> Look:
    """Bright shirt, dark trousers of another hue, pale wall, floor of two tones."""

    def color(hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> tuple[float, float, float]:
        return colorsys.hsv_to_rgb(hue % 1, random.uniform(*saturation), random.uniform(*value))

    shirt = random.random()
    trousers, wall = shirt + random.uniform(0.3, 0.7), shirt + random.uniform(0.3, 0.7)
    shoes = color(random.random(), (0, 0.5), (0.1, 0.95))
    floor = color(random.random(), (0.05, 0.25), (0.75, 0.92))
    above = color(wall, (0.1, 0.35), (0.8, 0.98))
    materials = [
        np.array(SKINS[random.integers(len(SKINS))]) / 255,
        np.array(HAIRS[random.integers(len(HAIRS))]) / 255,
        color(shirt, (0.65, 0.95), (0.6, 0.9)),
        color(trousers, (0.6, 0.9), (0.25, 0.45)),
        shoes,
    ]
    light = np.array([random.uniform(-1, 1), random.uniform(1.2, 2), random.uniform(-1, 1)])
    return Look(
        materials=np.array(materials),
        floor=np.array([floor, np.array(floor) * random.uniform(0.78, 0.88)]),
        wall=np.array([np.array(above) * 0.85, above]),
        pattern=("checks", "stripes", "tiles")[random.integers(3)],
        tile=random.uniform(0.4, 0.7),
        light=light / np.linalg.norm(light),
    )


class Scene:
    """One motion seen by one camera.

    Args:
        motion: Where the links are, T frames.
        fps: Its frames a second.
    """

    def __init__(self, motion: Motion, view: View, fps: float) -> None:
        self.motion, self.look = motion, view.look
        self.first, self.second = (
            np.stack([motion.point(*part[end]) for part in PARTS], axis=1).astype(np.float32) for end in (0, 1)
        )
        self.radii = np.array([part[2] for part in PARTS], np.float32)
        self.colors = view.look.materials[[MATERIALS.index(part[3]) for part in PARTS]].astype(np.float32)
        azimuth, elevation = view.azimuth, view.elevation
        backward = np.array(
            [np.cos(azimuth) * np.cos(elevation), np.sin(elevation), np.sin(azimuth) * np.cos(elevation)]
        )
        right = np.cross([0, 1, 0], backward) / np.cos(elevation)
        self.axes = np.stack([right, np.cross(backward, right), backward]).astype(np.float32)
        """Rows: the camera's right, up and backward in the world."""
        root = motion.positions["root"]
        self.target = gaussian_filter1d(root, FOLLOW_SECONDS * fps, axis=0, mode="nearest").astype(np.float32)
        self.focal = 1 / np.tan(FOV / 2)
        self.distance = self._aim()

    def _aim(self) -> float:
        """Centre the person's reach in the picture; the least distance that keeps it inside the margins throughout."""
        seen = (np.stack([self.first, self.second]) - self.target[:, None]) @ self.axes.T
        extent = seen[..., :2].reshape(-1, 2)
        centre = (extent.min(0) + extent.max(0)) / 2
        self.target = self.target + centre @ self.axes[:2]
        reach = np.abs(seen[..., :2] - centre).max(-1) + self.radii * 1.05
        return float((reach * self.focal / (1 - 2 * MARGIN) + seen[..., 2] + self.radii).max())

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points [T, P, 3] -> picture [T, P, 2]: x to the right, y down, each in [0, 1] inside the picture."""
        seen = (points - self.target[:, None]) @ self.axes.T
        screen = seen[..., :2] * self.focal / (self.distance - seen[..., 2:])
        return (screen * [1, -1] + 1) / 2

    def keypoints(self) -> np.ndarray:
        """float [T, 13, 3]: (x, y, 1) of every joint."""
        places = self.project(np.stack([self.motion.point(*PLACES[joint]) for joint in JOINTS], axis=1))
        return np.concatenate([places, np.ones_like(places[..., :1])], axis=2)

    def render(self, frame: int, size: int, oversample: int = 2) -> np.ndarray:
        """One frame, uint8 [size, size, 3]; each pixel is the mean of `oversample`^2 rays."""
        side = size * oversample
        at = ((np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1) / self.focal
        x, y = np.meshgrid(at, -at)
        rays = np.stack([x, y, -np.ones_like(x)], axis=-1) @ self.axes
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        eye = self.target[frame] + self.axes[2] * self.distance
        picture = self._room(frame, eye, rays)
        box = self._box(frame, side)
        picture[box] = self._body(frame, eye, rays[box], picture[box])
        picture = picture.reshape(size, oversample, size, oversample, 3).mean((1, 3))
        return np.round(picture.clip(0, 1) * 255).astype(np.uint8)

    def _box(self, frame: int, side: int) -> tuple[slice, slice]:
        """The rows and columns that the figure can cover."""
        ends = np.concatenate([self.first[frame], self.second[frame]])
        seen = (ends - self.target[frame]) @ self.axes.T
        depth = (self.distance - seen[:, 2:]) / self.focal
        centre, reach = seen[:, :2] / depth * [1, -1], 1.1 * np.tile(self.radii, 2)[:, None] / depth
        low = np.floor(((centre - reach).min(0) + 1) / 2 * side).astype(int).clip(0)
        high = np.ceil(((centre + reach).max(0) + 1) / 2 * side).astype(int)
        return slice(low[1], high[1]), slice(low[0], high[0])

    def _room(self, frame: int, eye: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Colours [..., 3] of floor and wall along rays from `eye`, with the figure's shadow on the floor."""
        down = rays[..., 1]
        wall, above = self.look.wall
        colors = (wall + (above - wall) * np.clip(down * 4, 0, 1)[..., None]).astype(np.float32)
        hit = down < -1e-3
        far = -eye[1] / down[hit]
        ground = eye[[0, 2]] + far[:, None] * rays[hit][:, [0, 2]]
        cells = np.floor(ground / self.look.tile).astype(int)
        if self.look.pattern == "tiles":
            dark = (np.abs(ground / self.look.tile - cells - 0.5) > 0.44).any(1).astype(np.float32)
        else:
            dark = ((cells.sum(1) if self.look.pattern == "checks" else cells[:, 0]) % 2).astype(np.float32)
        light, shade = self.look.floor
        floor = light + (shade - light) * (0.5 + (dark - 0.5) * np.exp(-((far / 12) ** 2)))[:, None]
        floor = floor * self._shadow(frame, ground)[:, None]
        haze = np.exp(-((far / 16) ** 2))[:, None]  # the pattern fades before it gets finer than a pixel
        colors[hit] = floor * haze + wall * (1 - haze)
        return colors

    def _shadow(self, frame: int, ground: np.ndarray) -> np.ndarray:
        """Brightness [N] of floor points [N, 2]: a soft blot under every part, the softer the higher it is."""
        middle = (self.first[frame] + self.second[frame]) / 2
        spread = (0.1 + 0.35 * np.maximum(middle[:, 1], 0)) ** 2
        x, z = middle[:, 0], middle[:, 2]
        # the logarithm of each blot, a quadratic in the place: one product for all
        blots = np.stack([2 * x, 2 * z, -np.ones_like(x), -(x**2) - z**2]) / (2 * spread)
        blots[3] += np.log((0.02 / spread).clip(0.15, 1))
        places = np.stack([*ground.T, (ground**2).sum(1), np.ones(len(ground))], axis=1)
        return 1 - 0.5 * np.exp((places @ blots).max(1))

    def _body(self, frame: int, eye: np.ndarray, rays: np.ndarray, behind: np.ndarray) -> np.ndarray:
        """Colours [H, W, 3] of the figure over what is `behind` it."""
        flat = rays.reshape(-1, 3)
        a, b = self.first[frame], self.second[frame]
        far = hit_capsules(eye.astype(np.float32), flat, a, b, self.radii)
        part = far.argmin(0)
        far = np.take_along_axis(far, part[None], 0)[0]
        hit = np.isfinite(far)
        part, flat = part[hit], flat[hit]
        a, along = a[part], (b - a)[part]
        place = eye + far[hit][:, None] * flat
        share = ((place - a) * along).sum(1) / np.maximum((along**2).sum(1), 1e-9)
        normal = (place - a - share.clip(0, 1)[:, None] * along) / self.radii[part][:, None]
        lit = np.maximum(normal @ self.look.light, 0)
        facing = np.maximum(-(normal * flat).sum(1), 0)
        colors = behind.reshape(-1, 3).copy()  # darker at the edge, so that limbs stand out against the body
        colors[hit] = self.colors[part] * ((0.5 + 0.6 * lit) * (0.55 + 0.45 * facing))[:, None]
        return colors.reshape(behind.shape)


def hit_capsules(eye: np.ndarray, rays: np.ndarray, a: np.ndarray, b: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """How far along each ray each capsule begins; infinity where it is missed.

    A point of the ray is eye + t ray. On the tube, its distance to the axis is the radius: a quadratic in t, valid
    where the foot of the perpendicular lies between the ends; beyond them the sphere around the nearer end counts.

    Args:
        eye: [3], outside of every capsule.
        rays: [N, 3], unit vectors.
        a: [P, 3], one end of each capsule's axis.
        b: [P, 3], the other end.
        radii: [P].

    Returns:
        [P, N].
    """
    axis, offset, square = b - a, eye - a, (radii**2)[:, None]
    length2 = (axis**2).sum(1)[:, None]
    axis_ray, offset_ray = axis @ rays.T, offset @ rays.T
    axis_offset, offset2 = (axis * offset).sum(1)[:, None], (offset**2).sum(1)[:, None]
    quadratic = np.maximum(length2 - axis_ray**2, 1e-9)
    linear = length2 * offset_ray - axis_offset * axis_ray
    root = linear**2 - quadratic * (length2 * (offset2 - square) - axis_offset**2)
    tube = (-linear - np.sqrt(np.maximum(root, 0))) / quadratic
    foot = axis_offset + tube * axis_ray
    on_tube = (root > 0) & (foot > 0) & (foot < length2)
    # the sphere at the end that the foot lies beyond; a ray that misses the endless tube misses both
    at_b = foot >= length2
    sphere_ray = np.where(at_b, offset_ray - axis_ray, offset_ray)
    sphere2 = np.where(at_b, offset2 - 2 * axis_offset + length2, offset2)
    depth = sphere_ray**2 - (sphere2 - square)
    sphere = -sphere_ray - np.sqrt(np.maximum(depth, 0))
    far = np.where(on_tube, tube, np.where((root >= 0) & (depth > 0), sphere, np.inf))
    return np.where(far > 0, far, np.inf)
