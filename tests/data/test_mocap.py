"""Rendered motions: kinematics against cases worked out by hand, projection against the rendered picture."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from entrecipes.cli import main
from entrecipes.data import clips, prepared
from entrecipes.data.skeleton import JOINTS
from entrecipes.data.sources import CATALOGUE, mocap
from entrecipes.data.sources.base import Options
from entrecipes.data.sources.figure import MARGIN, PLACES, Scene, draw_view, hit_capsules
from entrecipes.data.sources.kinematics import CHANNELS, Motion, forward, read_motion, read_offsets
from entrecipes.errors import UserError
from entrecipes.recipe.data import ClipsData, PreparedData

OFFSETS = {
    "root": ("base", (0, 0, 0)),
    "chest": ("root", (0, 0.95, 0)),
    "neck": ("chest", (0, 0.9, 0)),
    **{
        f"{side}_{name}": (f"{side}_{parent}" if parent in ("hip", "knee", "shoulder", "elbow") else parent, offset)
        for side, out in (("right", 1), ("left", -1))
        for name, parent, offset in (
            ("hip", "root", (0, 0, 0.34 * out)),
            ("knee", "hip", (0, -1.7, 0)),
            ("ankle", "knee", (0, -1.6, 0)),
            ("shoulder", "chest", (-0.1, 0.97, 0.73 * out)),
            ("elbow", "shoulder", (0, -1.1, 0)),
            ("wrist", "elbow", (0, -1.0, 0)),
        )
    },
}
"""As the file has them: four units a metre."""
HERE = Path("pybullet.whl")


def urdf() -> bytes:
    rows = "".join(
        f'<joint><parent link="{parent}"/><child link="{link}"/><origin xyz="{x} {y} {z}"/></joint>'
        for link, (parent, (x, y, z)) in OFFSETS.items()
    )
    return f"<robot>{rows}</robot>\n\0".encode()


def frames(count: int, duration: float = 1 / 30, **angles: float) -> list[list[float]]:
    """A walk forward without moving a limb, but for knees or elbows swung up to their `angles`."""
    rows = []
    for number in range(count):
        row = [duration if number < count - 1 else 0.0, number * 0.02, 0.85, 0.0]
        for link, width in CHANNELS.items():
            row += [1.0, 0, 0, 0] if width == 4 else [angles.get(link, 0) * number / max(count - 1, 1)]
        rows.append(row)
    return rows


def posed(**turns: Rotation) -> Motion:
    """One frame with the root at the origin; links turned as said."""
    rotations = {link: turns.get(link, Rotation.identity()) for link in CHANNELS}
    rotations = {link: Rotation.from_quat(turn.as_quat()[None]) for link, turn in rotations.items()}
    return forward(read_offsets(urdf(), HERE), np.zeros((1, 3)), rotations)


def test_at_rest_links_lie_at_the_sum_of_their_offsets() -> None:
    rest = posed()
    assert np.allclose(rest.point("left_ankle"), [[0, -3.3 / 4, -0.34 / 4]])
    assert np.allclose(rest.point("right_wrist"), [[-0.1 / 4, (0.95 + 0.97 - 1.1 - 1.0) / 4, 0.73 / 4]])
    assert np.allclose(rest.point("neck", (0.1, 0.2, 0)), [[0.1, 1.85 / 4 + 0.2, 0]])


def test_turned_links_carry_what_hangs_on_them() -> None:
    bent = posed(right_knee=Rotation.from_euler("z", -90, degrees=True))
    assert np.allclose(bent.point("right_ankle"), [[-1.6 / 4, -1.7 / 4, 0.34 / 4]])  # the shin points backward
    assert np.allclose(bent.point("left_ankle"), posed().point("left_ankle"))
    turned = posed(
        chest=Rotation.from_euler("y", 90, degrees=True), right_elbow=Rotation.from_euler("z", 90, degrees=True)
    )
    shoulder = np.array([0.73, 0.95 + 0.97, 0.1])  # the right side has come to the front
    assert np.allclose(turned.point("right_shoulder"), [shoulder / 4])
    assert np.allclose(turned.point("right_wrist"), [(shoulder + [0, -1.1, -1.0]) / 4])


def test_motions_of_any_rate_come_at_thirty_frames_a_second() -> None:
    content = json.dumps({"Frames": frames(13, 1 / 60, left_knee=-1.2)}).encode()
    root, rotations = read_motion(content, HERE, 30)
    assert len(root) == 7 and np.allclose(root[:, 0], np.arange(7) * 0.04)
    assert np.allclose(rotations["left_knee"].as_euler("xyz")[:, 2], np.linspace(0, -1.2, 7))
    with pytest.raises(UserError, match="not 44 numbers"):
        read_motion(json.dumps({"Frames": [row[:-1] for row in frames(3)]}).encode(), HERE, 30)


@pytest.fixture
def scene() -> Scene:
    content = json.dumps({"Frames": frames(20, right_elbow=1.5, left_knee=-1)}).encode()
    motion = forward(read_offsets(urdf(), HERE), *read_motion(content, HERE, 30))
    return Scene(motion, draw_view(1), 30)


@pytest.mark.parametrize("joint", ["nose", "left_wrist", "right_ankle"])
def test_a_ball_at_a_joint_is_seen_at_its_keypoint(scene: Scene, joint: str) -> None:
    place = scene.motion.point(*PLACES[joint])[:, None].astype(np.float32)
    scene.first, scene.second = place, place
    scene.radii, scene.colors = np.array([0.04], np.float32), np.array([[1, 0, 1]], np.float32)
    picture = scene.render(12, 120).astype(int)
    rows, columns = np.nonzero((picture[..., 1] < 30) & (picture[..., 0] > 30))
    x, y, visibility = scene.keypoints()[12, JOINTS.index(joint)]
    assert visibility == 1 and len(rows) > 8
    assert abs(columns.mean() + 0.5 - x * 120) < 0.5 and abs(rows.mean() + 0.5 - y * 120) < 0.5


def test_the_whole_person_stays_in_the_picture(scene: Scene) -> None:
    keypoints = scene.keypoints()
    assert keypoints.shape == (20, 13, 3)
    assert keypoints[..., :2].min() > MARGIN and keypoints[..., :2].max() < 1 - MARGIN
    assert np.ptp(keypoints[..., 1]) > 0.7  # and fills it
    pictures = np.stack([scene.render(frame, 24) for frame in (0, 10, 19)])
    assert pictures.dtype == np.uint8 and pictures.shape == (3, 24, 24, 3)
    assert np.abs(np.diff(pictures.astype(int), axis=0)).mean() > 1


def test_rays_meet_capsules_on_their_surface() -> None:
    random = np.random.default_rng(0)
    a, b, radii = random.normal(size=(6, 3)), random.normal(size=(6, 3)), random.uniform(0.1, 0.4, 6)
    b[0] = a[0]  # a sphere
    eye = np.array([0, 0, 6.0])
    rays = random.normal(size=(400, 3)) * [0.15, 0.15, 0] - [0, 0, 1]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    far = hit_capsules(eye, rays, a, b, radii)

    def distance(points: np.ndarray) -> np.ndarray:
        """[P, N] from points [P, N, 3] to the surfaces."""
        along = (b - a)[:, None]
        share = ((points - a[:, None]) * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-12)
        return np.linalg.norm(points - a[:, None] - share.clip(0, 1)[..., None] * along, axis=-1) - radii[:, None]

    hit = np.isfinite(far)
    assert 100 < hit.sum() < hit.size - 100
    surface = eye + np.where(hit, far, 0)[..., None] * rays
    assert np.abs(distance(surface)[hit]).max() < 1e-4
    path = np.linspace(2, 10, 1500)
    near = np.min([distance(np.broadcast_to(eye + t * rays, (6, 400, 3))) for t in path], axis=0)
    assert near[~hit].min() > -0.01 and near[hit].max() < 0.01


def test_views_are_always_the_same_and_differ() -> None:
    first, again, other = draw_view(3), draw_view(3), draw_view(4)
    assert first.azimuth == again.azimuth and np.array_equal(first.look.materials, again.look.materials)
    assert first.azimuth != other.azimuth and not np.array_equal(first.look.materials, other.look.materials)


@pytest.fixture
def wheel(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small package in place of the real one: two motions of 18 and 5 frames."""
    monkeypatch.setattr(mocap, "MOTIONS", ("kick", "walk"))
    path = own_home / "downloads" / "pybullet-3.2.7-cp311-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pybullet_data/humanoid/humanoid.urdf", urdf())
        for name, count in (("kick", 18), ("walk", 5)):
            content = json.dumps({"Loop": "none", "Frames": frames(count, right_knee=-1.5)})
            archive.writestr(f"pybullet_data/data/motions/humanoid3d_{name}.txt", content)


def test_from_package_to_clips(wheel: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "prepare", "mocap", "--size", "24", "--views", "2"]) == 0
    assert "46 frames of 4 videos" in capsys.readouterr().out
    noted = prepared.facts(prepared.prepared_folder("mocap"))
    assert noted["options"] == {"size": 24, "views": 2}
    section = ClipsData(image_size=16, frames=4, clip_step=2, held_out_videos=("*/view1",))
    splits = clips.load(section)
    assert splits.train.tensor.shape == (6, 3, 9, 16, 16) and splits.held_out.tensor.shape == (6, 3, 9, 16, 16)
    assert splits.train.keypoints.shape == (6, 4, 13, 3) and splits.train.keypoints[..., 2].min() == 1
    assert len(splits.train.bad_images) == 2 and "walk/view0 frames 0 to 4 (too short: 5" in splits.train.bad_images[0]
    assert clips.load(section).train.fingerprint == splits.train.fingerprint and splits.train.rendered
    assert main(["data", "inspect", "mocap", "-o", str(tmp_path / "strips.png"), "-n", "2"]) == 0
    told = capsys.readouterr().out
    assert "kick/view0: 18 frames, 1 clips" in told and "bad clips  2" in told and (tmp_path / "strips.png").exists()


def test_a_folder_is_named_in_place_of_the_set(wheel: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert main(["data", "prepare", "mocap", "--size", "16", "--views", "2", "--output", str(folder)]) == 0
    assert f"type: clips, name: {folder}" in capsys.readouterr().out
    section = ClipsData(name=str(folder), image_size=16, frames=2, frame_step=1)
    splits = clips.load(section)
    assert splits.train.rendered and splits.train.name == "mocap"
    sides = {len(part.tensor) for part in (splits.train, splits.held_out)}
    assert sides == {2 * 17, 2 * 4}, "each motion, with both its views, on one side"
    with pytest.raises(UserError, match=f"--size 32 --output {folder} --force"):
        clips.load(section.model_copy(update={"image_size": 32}))


def test_frames_are_images_too(wheel: None) -> None:
    prepared.prepare("mocap", Options(size=16, views=3))
    section = PreparedData(name="mocap", label_column=None, held_out=0.3)
    splits = prepared.load(section, image_size=16, channels=3)
    assert len(splits.train) + len(splits.held_out) == 3 * (18 + 5)
    assert any(len(splits.held_out) == 18 * kicks + 5 * walks for kicks in range(4) for walks in range(4))


def test_what_does_not_fit_is_said(wheel: None) -> None:
    with pytest.raises(UserError, match="run `entrecipes data prepare mocap --size 32`"):
        clips.load(ClipsData(image_size=32))
    prepared.prepare("mocap", Options(size=16, views=1))
    with pytest.raises(UserError, match="drawn at 16 px.*--size 32 --force"):
        clips.load(ClipsData(image_size=32))
    with pytest.raises(UserError, match="other options.*views 1"):
        prepared.prepare("mocap", Options(size=16, views=2))
    with pytest.raises(UserError, match="data.videos: .* no video called 'kick/vew0'; did you mean 'kick/view0'"):
        clips.load(ClipsData(image_size=16, videos=("kick/vew0",)))
    with pytest.raises(UserError, match="holds no videos"):
        clips.load(ClipsData(image_size=16, name="mnist"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("mocap", 1010), ("people", 552)])
def test_every_set_of_videos_can_be_prepared(name: str, count: int) -> None:
    """Through the real client: needs pip and a network."""
    if name == "people":
        pytest.importorskip("cv2")
    folder = prepared.prepare(name, Options(size=24, views=1))
    assert prepared.facts(folder)["images"] == count and CATALOGUE[name].clips
