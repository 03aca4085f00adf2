"""The Hub of the tests speaks with the real client: what the other tests of this folder stand on."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from server import READ_TOKEN, STRANGER, Hub

SMALL, LARGE = b"few words\n", bytes(range(256)) * 4096


def pushed(api: HfApi, **keys: object) -> str:
    """A commit of one small and one large file; its id."""
    operations = [CommitOperationAdd("a/small.txt", SMALL), CommitOperationAdd("weights.safetensors", LARGE)]
    return api.create_commit("me/net", operations, commit_message="Add", **keys).oid


def test_a_commit_comes_back(hub: Hub) -> None:
    api = HfApi()
    assert api.whoami()["name"] == "me"
    for _ in range(2):
        assert api.create_repo("me/net", exist_ok=True).url == f"{hub.url}/me/net"
    oid = pushed(api)
    assert pushed(api) == oid, "the same files are no commit"
    assert Path(hf_hub_download("me/net", "weights.safetensors")).read_bytes() == LARGE
    folder = Path(snapshot_download("me/net"))
    assert folder.name == oid and (folder / "a" / "small.txt").read_bytes() == SMALL
    assert {one.path for one in api.list_repo_tree("me/net")} == {".gitattributes", "a", "weights.safetensors"}
    assert api.model_info("me/net").sha == oid == api.list_repo_commits("me/net")[0].commit_id
    assert len(hub.asked("PUT", "/storage/")) == 1
    assert {one.token for one in hub.requests if "/storage/" in one.path} == {None}, "no token leaves the Hub"
    assert api.list_repo_files("me/net") == [".gitattributes", "a/small.txt", "weights.safetensors"]


def test_branches_tags_and_deletions(hub: Hub) -> None:
    api = HfApi()
    api.create_repo("me/net")
    first = pushed(api)
    api.create_branch("me/net", branch="other", exist_ok=True)
    api.create_branch("me/net", branch="other", exist_ok=True)
    api.create_tag("me/net", tag="v1")
    deleted = [CommitOperationDelete("a/small.txt")]
    second = api.create_commit("me/net", deleted, commit_message="Remove", revision="other").oid
    refs = api.list_repo_refs("me/net")
    assert {one.name: one.target_commit for one in refs.branches} == {"main": first, "other": second}
    assert refs.tags[0].target_commit == first
    assert "a/small.txt" in api.list_repo_files("me/net")
    assert "a/small.txt" not in api.list_repo_files("me/net", revision="other")
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit("me/net", deleted, commit_message="Again", revision="other")
    with pytest.raises(HfHubHTTPError, match="412"):
        pushed_parent = [CommitOperationAdd("b.txt", b"b")]
        api.create_commit("me/net", pushed_parent, commit_message="Late", revision="other", parent_commit=first)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/net", revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/net", "none.txt")


def test_who_may_do_what(hub: Hub) -> None:
    HfApi().create_repo("me/net", private=True)
    pushed(HfApi())
    for token in (STRANGER, False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("me/net")
    assert HfApi(token=READ_TOKEN).model_info("me/net").private
    for token, message in ((READ_TOKEN, "403"), ("hf_unknown", "401")):
        with pytest.raises(HfHubHTTPError, match=message):
            pushed(HfApi(token=token))
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=STRANGER).create_repo("me/other")


def test_faults(hub: Hub, waits: list[float]) -> None:
    api = HfApi()
    api.create_repo("me/net")
    hub.fail("PUT", "/storage/", status=503)
    hub.fail("PUT", "/storage/", cut="upload")
    pushed(api)
    assert waits == [1, 2] and len(hub.asked("PUT", "/storage/")) == 3

    hub.fail("GET", "/storage/", cut="download")
    assert Path(hf_hub_download("me/net", "weights.safetensors")).read_bytes() == LARGE
    assert [one.status for one in hub.asked("GET", "/storage/")] == [0, 200]

    hub.fail("POST", "/commit/", cut="answer")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.create_commit("me/net", [CommitOperationAdd("b.txt", b"b")], commit_message="Unheard")
    assert hub.repository("me/net").files()["b.txt"] == b"b"
    hub.fail("GET", "/api/models/", status=429, times=2, skip=1)
    api.model_info("me/net")
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="429"):
            api.model_info("me/net")
    api.model_info("me/net")


def test_a_data_set_streams(hub: Hub) -> None:
    import datasets

    rows = b"text,label\nfirst,0\nsecond,1\n"
    hub.add("me/set", {"data/train.csv": rows, "README.md": b"---\nlicense: mit\n---\n"}, type="dataset")
    found = datasets.load_dataset("me/set", split="train", streaming=True)
    assert [row["text"] for row in found] == ["first", "second"]
