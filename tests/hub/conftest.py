"""A Hub of this machine, and a process that talks to no other."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import huggingface_hub.hf_api
import pytest
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session
from server import Hub


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """What a run in this process set up ends with the test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A fresh Hub that this process's huggingface_hub, diffusers and datasets talk to, with `TOKEN` in the environment.

    Another process talks to it with `hub.environment(folder)` in its environment.
    """
    home = tmp_path_factory.mktemp("hf-home")
    with Hub().serve() as served:
        for name, value in served.environment(home).items():
            monkeypatch.setenv(name, value)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": served.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", served.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        close_session()
        yield served
        close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited before each new try; it goes on at once."""
    waited: list[float] = []

    class Clock:
        """The module `time`, in which nobody sleeps."""

        def __getattr__(self, name: str) -> object:
            return waited.append if name == "sleep" else getattr(__import__("time"), name)

    monkeypatch.setattr(_http, "time", Clock())
    return waited
