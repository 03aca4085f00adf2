"""Checkpoints come back as they were written, and a broken one says so."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from entrecipes.errors import UserError
from entrecipes.training import checkpoint

STATE = {
    "model": {"weight": torch.randn(3, 4), "count": torch.tensor(7)},
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0)}, 5: {"m": torch.ones(2, dtype=torch.uint8)}},
        "groups": [{"betas": (0.9, 0.99)}],
    },
    "run": {"images": 64, "scaler": None, "seconds": 1.5},
    "noise": {},
}


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_round_trip_keeps_every_type(tmp_path):
    path = checkpoint.save(tmp_path, 64, STATE, keep=2)
    assert_same(checkpoint.load(path), STATE)


def test_rotation_keeps_the_newest(tmp_path):
    for images in (10, 2000, 300):
        checkpoint.save(tmp_path, images, STATE, keep=2)
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["images-000000000300", "images-000000002000"]


def test_shared_tensors_can_be_saved(tmp_path):
    weight = torch.randn(4)
    path = checkpoint.save(tmp_path, 1, {"model": {"a": weight, "b": weight, "row": torch.eye(3)[0]}}, keep=1)
    assert torch.equal(checkpoint.load(path)["model"]["b"], weight)


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(path):
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


BREAKS = {
    "cut short": (truncate, "model.safetensors: damaged"),
    "a flipped bit": (flip_a_bit, "optimizer.safetensors: damaged"),
    "a file gone": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors: missing"),
    "no state": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "broken JSON": (lambda path: (path / "state.json").write_text('{"format": 1, "fil'), "state.json: damaged"),
    "another format": (
        lambda path: (path / "state.json").write_text(json.dumps({"format": 99, "files": {}, "values": {}})),
        "written in format 99",
    ),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_checkpoint_is_refused_by_name_and_an_older_one_is_used(tmp_path, how, caplog):
    older = checkpoint.save(tmp_path, 1, STATE, keep=3)
    path = checkpoint.save(tmp_path, 2, STATE, keep=3)
    damage, message = BREAKS[how]
    damage(path)
    with pytest.raises(UserError, match="images-000000000002") as caught:
        checkpoint.load(path)
    assert message in str(caught.value)
    found, state = checkpoint.newest(tmp_path)
    assert found == older
    assert_same(state, STATE)
    assert "images-000000000002" in caplog.text


def test_nothing_is_started_over_when_every_checkpoint_is_broken(tmp_path):
    truncate(checkpoint.save(tmp_path, 1, STATE, keep=1))
    with pytest.raises(UserError, match="training.resume=never"):
        checkpoint.newest(tmp_path)


def test_a_half_written_folder_is_no_checkpoint(tmp_path):
    (tmp_path / ".writing-images-000000000005").mkdir()
    assert checkpoint.newest(tmp_path) is None


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from entrecipes.training import checkpoint
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"model": {"w": torch.ones(10)}}, keep=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond this: writes fail half-way
try:
    checkpoint.save(folder, 2, {"model": {"w": torch.ones(10)}, "optimizer": {"m": torch.ones(1_000_000)}}, keep=2)
except checkpoint.UserError as error:
    print(error)
    sys.exit(2)
"""


def test_a_write_that_fails_half_way_leaves_the_earlier_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stdout and "images-000000000001 is intact" in done.stdout
    path, state = checkpoint.newest(tmp_path)
    assert path.name == "images-000000000001"
    assert [item.name for item in tmp_path.iterdir()] == [path.name], "nothing half-written may be left"
