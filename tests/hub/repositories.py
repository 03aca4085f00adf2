"""Repositories as the Hub keeps them: files by their content, commits with parents, branches and tags; in memory."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml

LFS_SIZE = 10 * 2**20


class Refused(Exception):
    """An answer that is an error: its status, the Hub's `X-Error-Code` and the message."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass(frozen=True)
class Blob:
    """A file's content: git's SHA-1 (of the pointer where it is stored by LFS), its length, and its SHA-256 if LFS."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def compared(self) -> str:
        """What the client compares with to find out whether its file is new."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A tree with its history."""

    oid: str
    files: dict[str, Blob]
    parent: str | None
    title: str
    message: str
    author: str
    date: str


def git_hash(content: bytes) -> str:
    """Git's name of a file with that content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(sample: bytes, size: int) -> bool:
    """Whether the Hub stores such a file by LFS: large ones, and whatever is no text."""
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 3:  # not only a character that the sample's end cuts in two
            return True
    return size > LFS_SIZE or b"\0" in sample


@dataclass
class Repository:
    """One model or data set, with the commit that the Hub makes itself."""

    type: str
    id: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)  # by git's SHA-1, or by SHA-256 what LFS stores

    def __post_init__(self) -> None:
        first = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self._save("main", {".gitattributes": self._store(first)}, None, "initial commit", "", "hub")

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a (beginning of a) commit id names."""
        oid = self.branches.get(revision) or self.tags.get(revision)
        if oid is None and re.fullmatch("[0-9a-f]{7,40}", revision):
            oid = next((known for known in self.commits if known.startswith(revision)), None)
        if oid is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """Its commits, newest first."""
        found = [self.resolve(revision)]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Every file's content by its path."""
        return {path: self.content(blob) for path, blob in self.resolve(revision).files.items()}

    def content(self, blob: Blob) -> bytes:
        """What is in the file."""
        return self.contents[blob.compared]

    def card(self, revision: str) -> dict[str, Any]:
        """The metadata at the head of README.md."""
        blob = self.resolve(revision).files.get("README.md")
        found = blob and re.match(r"---\n(.*?)\n---", self.content(blob).decode(), re.DOTALL)
        return (found and yaml.safe_load(found[1])) or {}

    def put(self, files: dict[str, bytes], branch: str = "main", title: str = "Add files", author: str = "me") -> str:
        """Commit files by hand, as a test needs them; its id."""
        tree = {path: self._store(content) for path, content in files.items()}
        return self._save(branch, self.resolve(branch).files | tree, self.branches[branch], title, "", author).oid

    def commit(self, branch: str, lines: list[dict[str, Any]], author: str) -> Commit:
        """What the lines of a request to /commit say."""
        if branch not in self.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = self.branches[branch]
        if header.get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.commits[head].files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = self._store(base64.b64decode(value["content"]), large=False)
                case "lfsFile":
                    if value["oid"] not in self.contents:
                        raise Refused(400, "LFS pointer pointed to a file that does not exist")
                    files[value["path"]] = self._large(self.contents[value["oid"]])
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                case "deletedFolder":
                    files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        return self._save(branch, files, head, header["summary"], header.get("description", ""), author)

    def _store(self, content: bytes, large: bool | None = None) -> Blob:
        if is_large(content[:512], len(content)) if large is None else large:
            return self._large(content)
        oid = git_hash(content)
        self.contents[oid] = content
        return Blob(oid, len(content))

    def _large(self, content: bytes) -> Blob:
        sha = hashlib.sha256(content).hexdigest()
        self.contents[sha] = content
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n"
        return Blob(git_hash(pointer.encode()), len(content), sha)

    def _save(
        self, branch: str, files: dict[str, Blob], parent: str | None, title: str, message: str, author: str
    ) -> Commit:
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        text = repr((sorted((path, blob.oid) for path, blob in files.items()), parent, title, message, author, date))
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), files, parent, title, message, author, date)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit
