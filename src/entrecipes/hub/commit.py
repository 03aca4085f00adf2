"""One commit of many files on the Hub: what changed is sent, what was ours and is gone is removed, the rest stays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from entrecipes.errors import UserError
from entrecipes.hub.refusals import Refused, why_refused
from entrecipes.reference import patient
from entrecipes.tokens import holds_token

MANIFEST = ".entrecipes.json"
"""Of a repository: which files came from here, by part, so that a later push removes those that are gone."""
PATIENCE = 300.0
"""Seconds without a byte after which the Hub counts as out of reach."""
ATTEMPTS = 3
"""At a commit, when others commit at the same time."""
TEXTS = (".md", ".yaml", ".json", ".jsonl", ".html", ".py", ".txt", ".csv")

Files = Mapping[str, Path | bytes]
"""Paths in a repository, each with the file on disk or its content."""


@dataclass(frozen=True)
class Pushed:
    """What a push came to."""

    url: str
    """Of the repository, or of the branch in it."""
    commit: str
    """The commit that holds it all."""
    changed: bool
    """Whether that is a new one."""


def commit_files(
    parts: Mapping[str, Files],
    repo_id: str,
    message: str,
    *,
    kind: str = "model",
    private: bool = False,
    revision: str | None = None,
) -> Pushed:
    """Make a repository hold these files, in one commit; without a new one where it holds them already.

    The repository and the branch are made where they are missing. Of the parts named here, files that an earlier push
    left and that are no longer among them are removed; all others in the repository stay. Large files that were
    uploaded before are not sent again, so that a push that failed goes on where it stopped.

    Args:
        parts: Files by part, such as `{"pipeline": {"model_index.json": path}}`; a part without files is removed.
        repo_id: `owner/name`.
        message: The commit's first line.
        kind: `model` or `dataset`.
        private: Make a new repository private.
        revision: The branch; None: main.

    Raises:
        Refused: When it can't be done, and why; the repository is then as it was, or holds the whole commit.
        UserError: For an id that is none, or a file with an access token in it.
    """
    check_repo_id(repo_id)
    _check_secrets(parts)
    with _explained(repo_id), patient(PATIENCE):
        if get_token() is None:
            raise Refused(f"{repo_id}: there is no access token", "`hf auth login` (or set HF_TOKEN), then")
        api = HfApi(library_name="entrecipes")
        url = api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise Refused(
                f"{repo_id}: is there already, and public",
                "make it private in its settings, or leave --private out, then",
            )
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        commit, changed = _settled(lambda: _commit(api, parts, repo_id, message, kind, revision))
    return Pushed(f"{url}/tree/{revision}" if revision not in (None, "main") else str(url), commit, changed)


def check_repo_id(repo_id: str) -> None:
    """Raises UserError unless it is `owner/name`."""
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError
    except HFValidationError:
        raise UserError(f"'{repo_id}' is no id of the Hub; write owner/name, such as me/digits") from None


def _commit(
    api: HfApi, parts: Mapping[str, Files], repo_id: str, message: str, kind: str, revision: str | None
) -> tuple[str, bool]:
    """One attempt on top of what is there now: the commit, and whether it is new."""
    head = api.repo_info(repo_id, repo_type=kind, revision=revision)
    there = {sibling.rfilename for sibling in head.siblings}
    before = _manifest(repo_id, kind, head.sha) if MANIFEST in there else {}
    listed = {**before, **{part: sorted(files) for part, files in parts.items()}}
    ours = {path for paths in listed.values() for path in paths}
    gone = {path for part in parts for path in before.get(part, ())} - ours
    manifest = json.dumps({"format": 1, "parts": {part: listed[part] for part in sorted(listed) if listed[part]}})
    files = {path: file for part in parts.values() for path, file in part.items()}
    operations = [
        *(CommitOperationDelete(path) for path in sorted(gone & there)),
        *(CommitOperationAdd(path, file) for path, file in sorted(files.items())),
        CommitOperationAdd(MANIFEST, (manifest + "\n").encode()),
    ]
    done = api.create_commit(
        repo_id, operations, commit_message=message, repo_type=kind, revision=revision, parent_commit=head.sha
    )
    return done.oid, done.oid != head.sha


def _manifest(repo_id: str, kind: str, commit: str) -> dict[str, list[str]]:
    path = hf_hub_download(repo_id, MANIFEST, repo_type=kind, revision=commit)
    try:
        parts = json.loads(Path(path).read_text())["parts"]
        return {str(part): [str(path) for path in paths] for part, paths in parts.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}  # somebody else's file of that name: nothing is known to be ours, so nothing is removed


def _settled(attempt: Callable[[], tuple[str, bool]]) -> tuple[str, bool]:
    """What came of it, again from the new commit on when somebody else's came in between."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except HfHubHTTPError as error:
            if error.response.status_code != 412 or number == ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _check_secrets(parts: Mapping[str, Files]) -> None:
    for files in parts.values():
        for path, file in files.items():
            if not path.endswith(TEXTS):
                continue
            text = file.decode(errors="replace") if isinstance(file, bytes) else file.read_text(errors="replace")
            if holds_token(text):
                where = path if isinstance(file, bytes) else file
                raise UserError(f"{where}: holds something like an access token (hf_...), so that nothing was sent")


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turns whatever the client meets into `Refused`; the client's own messages may quote what was sent."""
    try:
        yield
    except Exception as error:
        refused = why_refused(error, repo_id)
        if refused is None:
            raise
    else:
        return
    raise refused from None
