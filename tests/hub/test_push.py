"""`entrecipes push` with the real client: what arrives, what a failure leaves, and that no token is written down."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from push_case import asks, hashes, titles, token_in, trained, weights
from server import READ_TOKEN, STRANGER, TOKEN, Hub
from tiny import DIT, FLOW, tiny

from entrecipes import InfoNoiseScheduler
from entrecipes.cli import main
from entrecipes.errors import UserError
from entrecipes.hub import commit, push
from entrecipes.training.pushing import push_all, push_when_asked

LEARNED = {"type": "infonoise", "warmup": 48, "ramp": 48, "refresh_every": 32, "buffer": 100}
FOREVER = float("inf")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that learned its noise schedule."""
    return trained(tmp_path_factory.mktemp("finished"), tiny(DIT, FLOW, noise=LEARNED, data={"max_images": 100}))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_all_of_it_in_one_commit_that_plain_diffusers_loads(hub: Hub, run: Path) -> None:
    before, pushed = hashes(run), push(run, "me/tiny")
    assert pushed.url == f"{hub.url}/me/tiny" and pushed.changed and hashes(run) == before
    assert len(titles(hub)) == 1 and "160 images" in titles(hub)[0]
    files = hub.repository("me/tiny").files()
    assert {"model_index.json", "README.md", "recipe.yaml", "recipe.source.yaml", "run.json", "metrics.jsonl",
            "report.html", "samples/final.png", "infonoise/scheduler_config.json"} <= files.keys()  # fmt: skip
    assert not [path for path in files if path.startswith(("pipeline/", "checkpoints"))]
    assert torch.equal(weights("me/tiny"), weights(run / "pipeline"))
    assert InfoNoiseScheduler.from_pretrained("me/tiny", subfolder="infonoise").profile is not None

    card = files["README.md"].decode()
    assert 'from_pretrained("me/tiny")' in card and 'from_pretrained("me/tiny", subfolder="infonoise")' in card
    assert "model-index" in card and str(run) not in card and "machine which trained" not in card
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card)
    assert linked and not [path for path in linked if path not in files]

    sent = len(hub.asked("PUT", "/storage/"))
    again = push(run, "me/tiny")
    assert not again.changed and again.commit == pushed.commit and len(titles(hub)) == 1
    assert len(hub.asked("PUT", "/storage/")) == sent, "nothing is sent twice"


FAULTS = {
    "token unknown": ("POST", "/api/repos/create", {"status": 401}, "does not know your access token"),
    "token may not": ("POST", "/commit/", {"status": 403}, "may not write there"),
    "gone": ("GET", "/api/models/me/", {"status": 404}, "no such repository"),
    "busy": ("POST", "/commit/", {"status": 409}, "another change is under way"),
    "too many": ("POST", "/preupload/", {"status": 429, "times": FOREVER}, "asks you to wait"),
    "storage fails": ("PUT", "/storage/", {"status": 500, "times": FOREVER, "skip": 3}, r"trouble of its own \(500\)"),
    "commit fails": ("POST", "/commit/", {"status": 503}, r"trouble of its own \(503\)"),
    "refused": ("POST", "/commit/", {"status": 400}, "did not take it"),
    "upload cut": ("PUT", "/storage/", {"cut": "upload", "times": FOREVER, "skip": 3}, "connection to the Hub failed"),
    "answer cut": ("GET", "/api/models/me/", {"cut": "download"}, "connection to the Hub failed"),
    "answer lost": ("POST", "/commit/", {"cut": "answer"}, "connection to the Hub failed"),
    "silent": ("POST", "/commit/", {"delay": 1.5}, "connection to the Hub failed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_says_what_to_do_and_the_same_again_goes_through(
    hub: Hub, run: Path, fault: str, waits: list[float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    method, path, what, message = FAULTS[fault]
    monkeypatch.setattr(commit, "PATIENCE", 0.7)
    injected, before = hub.fail(method, path, message="sent by {token}", **what), hashes(run)
    assert main(["push", str(run), "--repo-id", "me/tiny", "--private"]) == 2
    said = capfd.readouterr()
    assert re.search(message, said.err) and "nothing on this disk has changed" in said.err
    assert "Traceback" not in said.err and "me/tiny" in said.err
    assert TOKEN not in said.out + said.err and hashes(run) == before
    arrived = ("model", "me/tiny") in hub.repositories and len(titles(hub)) == 1
    assert arrived == (fault == "answer lost")
    command = re.search("`(entrecipes push .*)`", said.err)[1]
    injected.times = 0
    sent = [one.path for one in hub.asked("PUT", "/storage/") if one.status == 200]

    assert main(shlex.split(command)[1:]) == 0
    assert len(titles(hub)) == 1 and hub.repository("me/tiny").private
    files = hub.repository("me/tiny").files()
    assert files.items() >= {path.removeprefix("pipeline/"): (run / path).read_bytes() for path in before
                             if path.startswith(("pipeline/transformer", "samples/"))}.items()  # fmt: skip
    assert torch.equal(weights("me/tiny"), weights(run / "pipeline"))
    later = [one.path for one in hub.asked("PUT", "/storage/") if one.status == 200][len(sent) :]
    assert not set(sent) & set(later), "nothing that had arrived is sent again"
    assert not token_in(run, hub)


def test_no_network_offline_no_token_no_right(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=f"{message}.*`entrecipes push {run} --repo-id me/tiny`"):
            push(run, "me/tiny")

    with monkeypatch.context() as changed:
        changed.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        refused("HF_HUB_OFFLINE is set")
    with monkeypatch.context() as changed:
        changed.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        refused("connection to the Hub failed")
    for token, message in (
        ("", "there is no access token.*hf auth login"),
        (READ_TOKEN, "may not write there"),
        (STRANGER, "may not write there"),
        ("hf_unknown", "does not know your access token"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        refused(message)
    assert not hub.repositories


def test_what_can_not_be_pushed(hub: Hub, run: Path) -> None:
    with pytest.raises(UserError, match="--repo-id owner/name, or set hub.repo_id"):
        push(run)
    with pytest.raises(UserError, match="'tiny' is no id of the Hub; write owner/name"):
        push(run, "tiny")
    with pytest.raises(UserError, match="--what adapter: .* has none; it has pipeline, infonoise, samples, report"):
        push(run, "me/tiny", what=["adapter"])
    with pytest.raises(UserError, match="--what sample: no such part; did you mean 'samples'?"):
        push(run, "me/tiny", what=["sample"])
    (run / "metrics.jsonl").open("a").write(f'{{"kind": "note", "images": 1, "text": "{READ_TOKEN}"}}\n')
    with pytest.raises(UserError, match="metrics.jsonl: holds something like an access token") as caught:
        push(run, "me/tiny")
    assert READ_TOKEN not in str(caught.value)
    (run / "run.json").unlink()
    with pytest.raises(UserError, match="has not finished.*`entrecipes run .*recipe.yaml` goes on"):
        push(run, "me/tiny")
    assert not hub.requests


def test_what_is_gone_goes_and_what_others_left_stays(hub: Hub, run: Path, waits: list[float]) -> None:
    push(run, "me/tiny")
    theirs = {"LICENSE": b"theirs", "samples/theirs.png": b"theirs"}
    hub.repository("me/tiny").put(theirs)
    for name in ("report.html", "samples/images-000000000160.png"):
        (run / name).unlink()
    shutil.rmtree(run / "infonoise"), shutil.rmtree(run / "pipeline" / "infonoise")
    unread = hub.fail("HEAD", "/resolve/.*entrecipes", status=500, times=FOREVER)
    with pytest.raises(UserError, match=r"trouble of its own \(500\)"):  # what is ours there is not known
        push(run, "me/tiny")
    unread.times = 0
    hub.fail("POST", "/commit/", do=lambda: hub.repository("me/tiny").put({"meanwhile.txt": b"theirs"}))
    push(run, "me/tiny")
    files = hub.repository("me/tiny").files()
    assert files.items() >= theirs.items() and files["meanwhile.txt"] == b"theirs" and "samples/final.png" in files
    assert not {"report.html", "samples/images-000000000160.png", "infonoise/scheduler_config.json"} & files.keys()
    assert [one.status for one in hub.asked("POST", "/commit/")] == [200, 412, 200]
    assert len(titles(hub)) == 4

    (run / "samples" / "final.png").unlink()
    push(run, "me/tiny", what=["pipeline"])
    assert "samples/final.png" in hub.repository("me/tiny").files(), "of another part"


def test_a_branch_and_the_checkpoints_on_theirs(hub: Hub, run: Path) -> None:
    asks(run, "repo_id=me/tiny", "private=true", "revision=new", "checkpoints=true")
    whole, *each = push_all(run)
    assert whole.url == f"{hub.url}/me/tiny/tree/new" and hub.repository("me/tiny").private
    assert titles(hub) == [] and len(titles(hub, "new")) == 1, "main is left alone"
    assert 'from_pretrained("me/tiny", revision="new")' in hub.repository("me/tiny").files("new")["README.md"].decode()
    names = ["images-000000000144", "images-000000000160"]
    assert [one.url.rsplit("/")[-1] for one in each] == names
    earlier, last = (weights("me/tiny", name) for name in names)
    assert torch.equal(last, weights(run / "pipeline")) and not torch.equal(earlier, last)
    files = hub.repository("me/tiny").files(names[0])
    assert "after 144 of 160 images" in files["README.md"].decode() and "report.html" not in files
    assert not any(one.changed for one in push_all(run))


def test_a_run_pushes_itself_and_ends_well_where_it_can_not(hub: Hub, finished: Path, tmp_path: Path, caplog) -> None:
    hub.fail("POST", "/commit/", status=503, message="sent by {token}")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    recipe = finished.parent / "recipe.yaml"
    push_when_asked(asks(run, "repo_id=me/tiny"), run)
    assert "not pushed: me/tiny: the Hub has trouble of its own (503)" in caplog.text and TOKEN not in caplog.text
    assert f"`entrecipes push {run} --repo-id me/tiny`" in caplog.text

    assert main(["run", str(recipe), f"training.output={run}", "hub.repo_id=me/tiny"]) == 0
    assert len(titles(hub)) == 1 and "pushed to" in caplog.text
    assert torch.equal(weights("me/tiny"), weights(finished / "pipeline"))
    assert not token_in(run, hub)


def test_a_recipe_with_a_token_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny()) + f"hub: {{repo_id: me/tiny}}  # {TOKEN}\n")
    assert main(["validate", str(path)]) == 2
    path.write_text(yaml.safe_dump(tiny()))
    assert main(["show", str(path), f"license={TOKEN}"]) == 2
    said = capsys.readouterr()
    assert said.err.count("access token") == 2 and "hf auth login" in said.err and TOKEN not in said.err + said.out


def test_a_public_repository_is_not_taken_for_a_private_one(run: Path, hub: Hub, capsys) -> None:
    hub.add("me/tiny", {"README.md": b"theirs"})
    assert main(["push", str(run), "--repo-id", "me/tiny", "--private"]) == 2
    assert "is there already, and public" in capsys.readouterr().err and len(titles(hub)) == 1
