"""`entrecipes pull`: a repository as a folder, whole or not at all, and nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.file_download
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from server import Hub

from entrecipes import reference
from entrecipes.cli import main
from entrecipes.errors import UserError
from entrecipes.hub.pull import chosen, pull

LARGE = bytes(range(256)) * 4096
FILES = {
    "model_index.json": b'{"_class_name": "DDPMPipeline"}',
    "README.md": b"# A pipeline\n",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": LARGE,
}
TWICE = {
    "unet/diffusion_pytorch_model.fp16.safetensors": b"\0",
    "unet/diffusion_pytorch_model.bin": b"\0",
    "all-in-one.safetensors": b"\0",
    "all-in-one.ckpt": b"\0",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, where nobody sleeps."""
    monkeypatch.chdir(tmp_path)

    class Clock:
        def __getattr__(self, name: str) -> object:
            return (lambda seconds: None) if name == "sleep" else getattr(__import__("time"), name)

    for module in (_http, huggingface_hub.file_download, reference):
        monkeypatch.setattr(module, "time", Clock())
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what arrives is kept by so much


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert json.loads(found.pop("pulled.json"))["repo_id"] == "me/net"
    found.pop(".gitattributes")
    return found


def test_all_that_loads_comes_once(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("me/net", FILES | TWICE)
    assert main(["pull", "me/net"]) == 0
    folder = Path("outputs/me--net")
    assert contents(folder) == FILES and [path.name for path in folder.parent.iterdir()] == ["me--net"]
    said = capsys.readouterr().out
    assert "5 files, 1.0 MiB" in said and "a DDPMPipeline" in said and "entrecipes generate outputs/me--net" in said

    asked = len(hub.asked("GET", "/resolve/"))
    assert main(["pull", "me/net"]) == 0 and "there already" in capsys.readouterr().out
    assert len(hub.asked("GET", "/resolve/")) == asked
    (folder / "unet/config.json").unlink()
    with pytest.raises(UserError, match="lacks unet/config.json"):
        pull("me/net")


def test_nothing_is_overwritten(hub: Hub, tmp_path: Path) -> None:
    repository = hub.add("me/net", FILES)
    first, _, _ = pull("me/net")
    old = repository.resolve("main").oid
    repository.put({"model_index.json": b"{}"})
    with pytest.raises(UserError, match=rf"holds me/net@{old[:8]}, and me/net is commit"):
        pull("me/net")
    assert contents(first) == FILES
    assert pull(f"me/net@{old}", first)[2] is False, "the same commit"
    again, pulled, new = pull("me/net@main")
    assert again == Path("outputs/me--net--main") and new and contents(again)["model_index.json"] == b"{}"
    assert pulled.commit == repository.resolve("main").oid
    (tmp_path / "mine").mkdir()
    assert pull("me/net", tmp_path / "mine")[2], "an empty folder is filled"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        pull("me/net", tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("me/net", FILES)
    hub.fail("GET", "/storage/", cut="download", times=99)  # more often than the client tries
    assert main(["pull", "me/net"]) == 2
    said = capsys.readouterr().err
    assert "`entrecipes pull me/net` goes on with what is in outputs/.pulling-me--net" in said, said
    assert not Path("outputs/me--net").exists()
    hub.faults.clear()
    whole = len(hub.asked("GET", "/unet/config.json"))
    assert Path("outputs/.pulling-me--net/unet/config.json").is_file() and whole == 1
    hub.repository("me/net").put({"README.md": b"# Changed\n", "new.txt": b"new"})
    folder, _, _ = pull("me/net")
    assert contents(folder) == FILES | {"README.md": b"# Changed\n", "new.txt": b"new"}
    assert len(hub.asked("GET", "/unet/config.json")) == whole, "what came is not fetched again"

    hub.fail("GET", "/resolve/.*/README.md", status=502)
    hub.fail("GET", "/api/models/", status=503)
    assert contents(pull("me/net", Path("other"))[0])["new.txt"] == b"new", "5xx once is no reason to stop"
    hub.fail("GET", "/resolve/.*/README.md", status=502, times=99)
    with pytest.raises(UserError, match=r"\(502\).*`entrecipes pull me/net -o third` goes on"):
        pull("me/net", Path("third"))


def test_what_can_not_be_pulled(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/net", FILES)
    for name, message in (
        ("me/nte", "did you mean 'me/net'"),
        ("me/net@v1", "no branch, tag or commit 'v1'; there are main"),
        ("net", "write owner/name"),
        ("./net", "write owner/name"),
    ):
        with pytest.raises(UserError, match=message):
            pull(name)
    with pytest.raises(UserError, match="give the name of a folder .* such as me--net"):
        pull("me/net", Path("."))
    assert not Path("outputs").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="make room, or give a folder on another disk"):
        pull("me/net")


def test_weights_are_chosen_as_diffusers_does() -> None:
    assert set(chosen([*FILES, *TWICE])) == set(FILES)
    shards = ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/diffusion_pytorch_model.bin"]
    assert chosen(shards) == shards[:1]
    for alone in (["pytorch_lora_weights.safetensors", "base.json"], ["unet/diffusion_pytorch_model.bin"], ["a.ckpt"]):
        assert chosen(alone) == alone
    experts = ["denoiser/expert_0/diffusion_pytorch_model.safetensors", "denoiser/slim.py", "model_index.json"]
    assert chosen(experts) == experts
