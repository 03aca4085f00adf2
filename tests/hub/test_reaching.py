"""What is said, and what to do next, when something named on the Hub can't be had; the cache is enough without one."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.file_download
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http
from server import STRANGER, Hub
from tiny import UNET

from entrecipes import reference
from entrecipes.data.hub import load as open_hub
from entrecipes.data.text import TextEncoders
from entrecipes.diffusion.pipelines import load_pipeline
from entrecipes.errors import UserError
from entrecipes.recipe.data import HubData
from entrecipes.recipe.pipeline import Build, Pipeline, TextEncoder
from entrecipes.reference import as_folder, is_local, split

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(hub: Hub, tmp_path: Path) -> Path:
    """A tiny pipeline in a folder, and as me/net on the branch `try`, whose main is another."""
    torch.manual_seed(0)
    api, folder = HfApi(), tmp_path / "net"
    api.create_repo("me/net")
    DDPMPipeline(UNet2DModel(**UNET["config"]), DDPMScheduler()).save_pretrained(folder)
    api.upload_folder(repo_id="me/net", folder_path=folder)
    api.create_branch("me/net", branch="try/one")
    DDPMPipeline(UNet2DModel(**UNET["config"]), DDPMScheduler()).save_pretrained(folder)
    api.upload_folder(repo_id="me/net", folder_path=folder, revision="try/one")
    api.create_tag("me/net", tag="v1.0")
    return folder


@pytest.fixture(autouse=True)
def nobody_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again at once, and keeps what arrived of small files too."""

    class Clock:
        def __getattr__(self, name: str) -> object:
            return (lambda seconds: None) if name == "sleep" else getattr(__import__("time"), name)

    for module in (_http, huggingface_hub.file_download, reference):
        monkeypatch.setattr(module, "time", Clock())
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what arrives is kept by so much


def problem(name: str) -> str:
    with pytest.raises(UserError) as found:
        load_pipeline(name)
    return str(found.value)


def test_names_are_split_and_folders_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split("me/net") == ("me/net", None) and split("me/net", "v1") == ("me/net", "v1")
    assert split("me/net@refs/pr/1") == ("me/net", "refs/pr/1") == split("me/net@refs/pr/1", "refs/pr/1")
    for name in ("./me@home", "/a/b@c", "outputs/me/net@v1", "net@v1"):
        assert split(name) == (name, None)
    (tmp_path / "me" / "net@v1").mkdir(parents=True)
    assert split("me/net@v1") == ("me/net@v1", None) and is_local("me/net@v1") and is_local("me/none")
    assert not is_local("you/net") and is_local("you") and is_local("~/you")
    assert as_folder("me/net@refs/pr/1") == "me--net--refs--pr--1"
    for wrong, message in (("you/net@", "after the @"), ("you/net@a", "say different things")):
        with pytest.raises(UserError, match=message):
            split(wrong, "b")


def test_sections_of_a_recipe_take_them() -> None:
    assert Pipeline(pretrained="a/b@v1") == Pipeline(pretrained="a/b", revision="v1")
    assert HubData(id="a/b@v1").revision == "v1" and TextEncoder(id="a/b@v1").id == "a/b"
    build = {"model": {"class": "UNet2DModel"}, "scheduler": {"class": "DDIMScheduler"}}
    assert Build(**build, vae="a/b@v1").vae_revision == "v1" and Build(**build, vae="a/b").vae_revision is None
    with pytest.raises(ValueError, match="pretrained: 'a/b@v1' and revision 'v2' say different things"):
        Pipeline(pretrained="a/b@v1", revision="v2")


@pytest.mark.filterwarnings("ignore")
def test_a_branch_a_tag_a_commit(hub: Hub, saved: Path) -> None:
    def first(name: str) -> torch.Tensor:
        return next(load_pipeline(name).unet.parameters())

    own = first(str(saved))
    assert torch.equal(first("me/net@try/one"), own) and not torch.equal(first("me/net"), own)
    commit = hub.repository("me/net").resolve("try/one").oid
    assert torch.equal(first(f"me/net@{commit}"), own) and torch.equal(first("me/net@v1.0"), first("me/net@main"))


def test_what_is_not_there(hub: Hub, saved: Path) -> None:
    assert "neither a folder here nor a model" in problem("me/nte") and "did you mean 'me/net'" in problem("me/nte")
    assert "hf auth login" in problem("nobody/net")
    assert "has no branch, tag or commit 'v1.1'; did you mean 'v1.0'?" in problem("me/net@v1.1")
    assert "there are main, try/one, v1.0" in problem("me/net@zzz")
    hub.add("me/text", {"notes.txt": b"nothing"})
    assert "neither a pipeline (model_index.json) nor an adapter of ours" in problem("me/text")


def test_data_and_text_encoders(hub: Hub) -> None:
    hub.add("me/set", {"data/train.csv": b"text\nfirst\n"}, type="dataset")
    for section, message in (
        (HubData(id="me/sett"), "data.id: 'me/sett' is neither .* that you may see; did you mean 'me/set'. Check"),
        (
            HubData(id="me/set@v1"),
            "data.revision: the data set me/set has no branch, tag or commit 'v1'; there are main",
        ),
    ):
        with pytest.raises(UserError, match=message):
            open_hub(section, image_size=8, channels=1)
    hub.add("me/text", {"notes.txt": b"nothing"})
    for id, message in (
        ("me/texts", r"pipeline.build.text.0: me/texts: neither a folder .*mean 'me/text'"),
        ("me/text@v1", "has no branch, tag or commit 'v1'; there are main"),
    ):
        with pytest.raises(UserError, match=message):
            TextEncoders.load([TextEncoder(id=id)])


def test_what_may_not_be_read(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository("me/net").private = True
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert "a private one needs `hf auth login`" in problem("me/net") and STRANGER not in problem("me/net")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "does not know your token (401): `hf auth login` again" in problem("me/net")
    monkeypatch.delenv("HF_TOKEN")
    assert "a private one needs `hf auth login`" in problem("me/net")
    hub.fail("GET", "/api/models/me/net", status=403, headers={"X-Error-Code": "GatedRepo"})
    assert "me/net is gated: ask for access on its page" in problem("me/net")


@pytest.mark.filterwarnings("ignore")
def test_faults_on_the_way(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("GET", "/resolve/.*json", status=503)
    hub.fail("GET", "/storage/", cut="download")
    hub.fail("GET", "/api/models/", delay=0.5)
    assert load_pipeline("me/net@try/one").unet.config.sample_size == 8
    assert [one.status for one in hub.asked("GET", "/storage/")] == [0, 206], "goes on where it stopped"

    hub.fail("GET", "/storage/", cut="download", times=99)
    assert "can't be reached" in problem("me/net") and "what came is kept" in problem("me/net")
    hub.faults.clear()
    assert load_pipeline("me/net")
    hub.fail("GET", "/api/models/", status=500, times=99)
    assert load_pipeline("me/net"), "the cache is enough"
    assert "has trouble of its own (500)" in problem("me/other")

    monkeypatch.setattr(reference, "PATIENCE", 0.2)
    hub.faults.clear()
    hub.fail("GET", "/api/models/", delay=1, times=99)
    assert "can't be reached (timed out)" in problem("me/other")


@pytest.mark.filterwarnings("ignore")
def test_without_a_network_the_cache_is_enough(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_pipeline("me/net@try/one")
    gone = hub.url.replace(hub.url.split(":")[-1], "9")  # nobody answers there
    monkeypatch.setattr(constants, "ENDPOINT", gone)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", gone)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", gone + "/{repo_id}/resolve/{revision}/{filename}")
    assert load_pipeline("me/net@try/one")
    assert "can't be reached" in problem("me/net") and "give a folder" in problem("me/net")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_pipeline("me/net@try/one")
    assert "HF_HUB_OFFLINE is set" in problem("me/net")
    cached = Path(constants.HF_HUB_CACHE, "models--me--net/snapshots")
    next(cached.glob(f"*/{WEIGHTS}")).unlink()
    assert "not whole in the cache, and HF_HUB_OFFLINE is set" in problem("me/net@try/one")
