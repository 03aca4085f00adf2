"""How pipelines and data are named: a folder, or `owner/name` on the Hub with `@revision`; and why one can't be had."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from entrecipes.errors import UserError, nearest
from entrecipes.tokens import without_tokens

Result = TypeVar("Result")
HELP = "run folder, pipeline folder or Hub id (owner/name, owner/name@revision)"
"""Of an argument that names a pipeline."""
PATIENCE = 60.0
"""Seconds after which a Hub that says nothing counts as out of reach."""
ON_HUB = re.compile(r"(\w[\w.-]*/[\w.-]+)@(.*)", re.ASCII)
PAUSES = (1, 5)
"""Seconds before the next tries where the Hub has trouble of its own."""


def split(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """`owner/name@revision` as id and revision (a branch, tag or commit); a folder, or an id without one, as it is.

    Raises:
        UserError: When there is nothing after the @, or `revision` says something else.
    """
    found = ON_HUB.fullmatch(name)
    if found is None or Path(name).is_dir():
        return name, revision
    if not found[2]:
        raise UserError(f"'{name}': a branch, tag or commit comes after the @; leave the @ out for main")
    if revision not in (None, found[2]):
        raise UserError(f"'{name}' and revision '{revision}' say different things; leave one of them out")
    return found[1], found[2]


def is_local(name: str) -> bool:
    """Whether a name without revision is a folder's, there or not: neither `owner/name`, nor is its parent missing."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).is_dir() or Path(name).parent.is_dir()


def shown(name: str, revision: str | None) -> str:
    """Both as one name."""
    return f"{name}@{revision}" if revision else name


def as_folder(name: str) -> str:
    """A name of something on the Hub as that of a folder: `owner--name`, or `owner--name--revision`."""
    return "--".join(re.split("[/@]", name))


@contextmanager
def reaching(name: str, revision: str | None = None, kind: str = "model") -> Iterator[None]:
    """Turns whatever keeps something of the Hub from being read inside into a UserError that says what to do next.

    Args:
        name: Its id.
        revision: Branch, tag or commit; None: main.
        kind: `model` or `dataset`.
    """
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        with patient(PATIENCE):
            yield
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        problem = why_unreachable(error, name, revision, kind)
        if problem is None:
            raise
        raise UserError(problem) from error


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Inside, the Hub's client waits so long for an answer where it would wait for ever."""
    from huggingface_hub import get_session

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            key: seconds if limits.get(key) is None else limits[key] for key in ("connect", "read", "write", "pool")
        }

    client = get_session()
    before = client.event_hooks
    client.event_hooks = before | {"request": [*before["request"], limit]}
    try:
        yield
    finally:
        client.event_hooks = before


def steadily(call: Callable[[], Result]) -> Result:
    """What something that downloads gives, after another try or two when the Hub has trouble of its own (5xx).

    The Hub's client goes on with broken connections itself, but gives up at the first 5xx of a file.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for pause in PAUSES:
        try:
            return call()
        except OSError as error:
            answers = [cause.response for cause in causes_of(error) if isinstance(cause, HfHubHTTPError)]
            if not answers or answers[0].status_code < 500:
                raise
        time.sleep(pause)
    return call()


def causes_of(error: BaseException) -> list[BaseException]:
    """The error, and what it came from, up to the first."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    return causes


def why_unreachable(error: BaseException, name: str, revision: str | None = None, kind: str = "model") -> str | None:
    """What an error of the Hub, or of a library that met one, means for its user; None when it is of another kind."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what, causes = shown(name, revision), causes_of(error)

    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if first(GatedRepoError):
        return f"{what} is gated: ask for access on its page on the Hub, then `hf auth login`"
    if first(RepositoryNotFoundError):
        return (
            f"{what}: neither a folder here nor a {kind} on the Hub that you may see{nearest_id(name, kind)}; check "
            "the spelling; a private one needs `hf auth login`"
        )
    if first(RevisionNotFoundError):
        return f"{what}: {name} has no branch, tag or commit '{revision}'{other_revisions(name, revision, kind)}"
    if first(RemoteEntryNotFoundError):  # a file that not every repository has
        return None
    if found := first(HfHubHTTPError):
        return f"{what}: {_refusal(found.response.status_code)}"
    if first(OfflineModeIsEnabled):
        return f"{what}: not whole in the cache, and HF_HUB_OFFLINE is set: unset it once, or give a folder"
    if found := first(HTTPError) or first(LocalEntryNotFoundError):
        reason = without_tokens((str(found).strip() or type(found).__name__).splitlines()[0])
        return (
            f"{what}: the Hub can't be reached ({reason}), and not all of it is in the cache; what came is kept: try "
            "again, or give a folder"
        )
    if "Consistency check failed" in str(error):
        return f"{what}: the download came damaged; what came is kept, so try again"
    return None


def _refusal(status: int) -> str:
    if status == 401:
        return "the Hub does not know your token (401): `hf auth login` again, or unset HF_TOKEN"
    if status == 403:
        return "the Hub lets you not read it (403): ask its owner for access, then `hf auth login`"
    if status == 429:
        return "the Hub asks you to wait (429): try again in some minutes; what came is kept"
    return f"the Hub has trouble of its own ({status}): try again later; what came is kept"


def nearest_id(name: str, kind: str) -> str:
    """`; did you mean ...` of what the owner has there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    listing = {"model": HfApi().list_models, "dataset": HfApi().list_datasets}[kind]
    try:
        return nearest(name, [found.id for found in listing(author=name.split("/")[0], limit=500)]).rstrip("?")
    except (HTTPError, OSError, ValueError):
        return ""


def other_revisions(name: str, revision: str | None, kind: str) -> str:
    """`; did you mean ...`, or what there is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        refs = HfApi().list_repo_refs(name, repo_type=kind)
    except (HTTPError, OSError, ValueError):
        return "; look for them on its page on the Hub"
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return nearest(revision or "", names) or f"; there are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
