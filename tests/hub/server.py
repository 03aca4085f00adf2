"""The Hugging Face Hub on this machine: an HTTP server that huggingface_hub, diffusers and datasets talk to.

What it answers is the Hub's own API as the client uses it: repositories, branches, tags, listings, preupload, LFS,
commits and downloads, with tokens and private repositories. `Hub.fail` makes the next requests of a kind fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from repositories import Commit, Refused, Repository, is_large

TOKEN = "hf_" + "planted" * 5 + "X"
READ_TOKEN = "hf_" + "reading" * 5 + "Y"
STRANGER = "hf_" + "foreign" * 5 + "Z"

REPO = r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)"
RESOLVE = r"/(?:(?P<type>dataset)s/)?(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, re.Pattern[str], str]] = []


@dataclass
class Fault:
    """What goes wrong with requests of a kind: an error's `status`, a cut connection, or a pause.

    `cut`: `upload` closes the connection in the middle of the request's body, `download` in the middle of the answer's,
    `answer` does what was asked and closes it before saying so.
    """

    method: str
    path: str
    status: int | None = None
    cut: Literal["upload", "download", "answer"] | None = None
    delay: float = 0
    skip: int = 0
    times: float = 1
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is one of those; counts it."""
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)) or self.times <= 0:
            return False
        self.skip -= 1
        self.times -= self.skip < 0
        return self.skip < 0


@dataclass(frozen=True)
class Request:
    """A request that was answered (status 0: the connection was cut)."""

    method: str
    path: str
    status: int
    token: str | None
    received: int


class Hub:
    """The server's state: repositories, who may do what, what is to fail, and what was asked.

    `users` maps a token to (name, may write). The paths that `fail` and `asked` match are those of the URL, no query.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.users = {TOKEN: ("me", True), READ_TOKEN: ("me", False), STRANGER: ("somebody", True)}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self.signature = secrets.token_hex(8)
        self.url = ""

    def fail(self, method: str, path: str, **what: Any) -> Fault:
        """Make the next request whose method and path match these patterns fail: see `Fault`."""
        self.faults.append(Fault(method, path, **what))
        return self.faults[-1]

    def add(self, id: str, files: dict[str, bytes], type: str = "model", private: bool = False) -> Repository:
        """A repository that is there already, with these files in a commit."""
        repository = self.repositories[type, id] = Repository(type, id, private)
        repository.put(files)
        return repository

    def repository(self, id: str, type: str = "model") -> Repository:
        """The repository of that name."""
        return self.repositories[type, id]

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests so far whose method and path match these patterns."""
        return [one for one in self.requests if re.fullmatch(method, one.method) and re.search(path, one.path)]

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a process that is to talk to this server has in its environment."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_TOKEN": token or "",
        }

    @contextmanager
    def serve(self) -> Iterator[Hub]:
        """Answer on a free port of this machine until the end of the block."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    @property
    def storage(self) -> str:
        """Where large files are: another host in the client's eyes, so that it must not be shown the token."""
        return self.url.replace("127.0.0.1", "localhost") + "/storage"


def route(method: str, path: str) -> Callable[[Callable], Callable]:
    """Let a method of the handler answer requests of that kind."""

    def add(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(path), function.__name__))
        return function

    return add


class Cut(Exception):
    """Close the connection without another word."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        """Read, route, record."""
        url = urlsplit(self.path)
        self.route_path, self.query, self.received = url.path, parse_qs(url.query), 0
        self.fault = next((fault for fault in self.hub.faults if fault.strikes(self.command, url.path)), None)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.token = bearer or None
        try:
            self.body = self.read_body()
            if self.fault:
                time.sleep(self.fault.delay)
                if self.fault.status:
                    raise Refused(self.fault.status, self.fault.message, None, **self.fault.headers)
            self.find()
        except Refused as error:
            self.refuse(error)
        except (Cut, BrokenPipeError, ConnectionResetError):
            self.record(0)
            self.close_connection = True
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        parts: list[bytes] = []
        cut = self.fault is not None and self.fault.cut == "upload"
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if cut:
                    break
            else:
                self.rfile.readline()
        else:
            size = int(self.headers.get("Content-Length", 0))
            parts.append(self.rfile.read(size // 2 if cut else size))
        self.received = sum(map(len, parts))
        if cut:
            raise Cut
        return b"".join(parts)

    def find(self) -> None:
        for method, pattern, name in ROUTES:
            found = pattern.fullmatch(self.route_path)
            if found and (self.command == method or (method == "GET" and self.command == "HEAD")):
                parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                with self.hub.lock:
                    status, headers, content = getattr(self, name)(**parts)
                return self.send(status, headers, content)
        raise Refused(404, f"no such page: {self.command} {self.route_path}")

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        if self.fault and self.fault.cut == "answer":
            raise Cut
        cut = self.fault is not None and self.fault.cut == "download"
        if not cut:
            self.record(status)
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(content)),
            "X-Request-Id": secrets.token_hex(8),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            raise Cut
        self.wfile.write(content)

    def record(self, status: int) -> None:
        """Before the client can go on, so that a test sees all that it asked."""
        self.hub.requests.append(Request(self.command, self.route_path, status, self.token, self.received))

    def refuse(self, error: Refused) -> None:
        headers = {
            "X-Error-Message": error.message.replace("{token}", self.token or ""),
            "Content-Type": "application/json",
        }
        if error.code:
            headers["X-Error-Code"] = error.code
        content = {"error": headers["X-Error-Message"], "url": error.more.pop("url", None)}
        try:
            self.send(error.status, headers | error.more, json.dumps(content).encode())
        except (Cut, OSError):
            self.close_connection = True

    def user(self) -> tuple[str | None, bool]:
        """Who asks, and whether they may write anything."""
        if self.token is None:
            return None, False
        if self.token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[self.token]

    def repo(self, type: str, id: str, write: bool = False) -> Repository:
        """The repository, if whoever asks may do that."""
        name, may_write = self.user()
        found = self.hub.repositories.get((type, id))
        owner = name == id.split("/")[0]
        if found is None or (found.private and not owner):
            raise Refused(404 if name else 401, "Repository not found", "RepoNotFound")
        if write and name is None:
            raise Refused(401, "Invalid username or password.")
        if write and not (owner and may_write):
            raise Refused(403, "Forbidden: pass a token with the right permissions")
        return found

    def json(self, value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json"}, json.dumps(value).encode()

    @route("GET", r"/api/whoami-v2")
    def who(self):
        name, may_write = self.user()
        if name is None:
            raise Refused(401, "Invalid username or password.")
        role = {"accessToken": {"displayName": "test", "role": "write" if may_write else "read"}}
        return self.json({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": role})

    @route("POST", r"/api/validate-yaml")
    def validate(self):
        found = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            yaml.safe_load(found[1] if found else "")
        except yaml.YAMLError as error:
            return self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        return self.json({"errors": [], "warnings": warnings})

    @route("POST", r"/api/repos/create")
    def create(self):
        asked = json.loads(self.body)
        name, may_write = self.user()
        if name is None:
            raise Refused(401, "Invalid username or password.")
        owner, type = asked.get("organization") or name, asked.get("type") or "model"
        id = f"{owner}/{asked['name']}"
        url = self.hub.url + ("/" if type == "model" else f"/{type}s/") + id
        if owner != name or not may_write:
            raise Refused(403, f"You don't have the rights to create a {type} under the namespace {owner!r}")
        if (type, id) in self.hub.repositories:
            raise Refused(409, f"You already created this {type} repo: {id}", url=url)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[type, id] = Repository(type, id, bool(private))
        return self.json({"url": url, "name": id, "private": bool(private)})

    @route("GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?")
    def info(self, type: str, id: str, revision: str = "main"):
        repo = self.repo(type, id)
        commit, card = repo.resolve(revision), repo.card(revision)
        blobs = "blobs" in self.query
        siblings = [{"rfilename": path, **(described(commit, path) if blobs else {})} for path in sorted(commit.files)]
        return self.json(
            {
                "_id": id, "id": id, "author": id.split("/")[0], "sha": commit.oid, "private": repo.private,
                "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": card.get("tags") or [],
                "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"), "cardData": card,
                "createdAt": repo.history()[-1].date, "lastModified": commit.date, "siblings": siblings,
            } | ({"modelId": id} if type == "model" else {})
        )  # fmt: skip

    @route("GET", REPO + r"/refs")
    def refs(self, type: str, id: str):
        repo = self.repo(type, id)
        named = {
            kind: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": oid} for name, oid in found.items()]
            for kind, ref, found in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        return self.json({**named, "converts": [], "pullRequests": []})

    @route("GET", REPO + r"/commits/(?P<revision>[^/]+)")
    def commits(self, type: str, id: str, revision: str):
        history = self.repo(type, id).history(revision)
        facts = [{"id": one.oid, "title": one.title, "message": one.message, "date": one.date} for one in history]
        return self.json([fact | {"authors": [{"user": one.author}]} for fact, one in zip(facts, history, strict=True)])

    @route("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, type: str, id: str, revision: str, path: str = ""):
        commit = self.repo(type, id).resolve(revision)
        inside = [name for name in commit.files if not path or name.startswith(path + "/")]
        if path and not inside:
            raise Refused(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        found = {}
        for name in sorted(inside):
            rest = name[len(path) + 1 if path else 0 :].split("/")
            parents = ["/".join(name.split("/")[: -len(rest) + end]) for end in range(1, len(rest))]
            for folder in parents if deep else parents[:1]:
                found[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if deep or len(rest) == 1:
                found[name] = listed(commit, name)
        return self.json(list(found.values()))

    @route("POST", REPO + r"/paths-info/(?P<revision>[^/]+)")
    def paths(self, type: str, id: str, revision: str):
        commit = self.repo(type, id).resolve(revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(self.body)["paths"]
        else:
            asked = parse_qs(self.body.decode()).get("paths", [])
        found = [listed(commit, path) for path in asked if path in commit.files]
        for path in asked:
            if any(name.startswith(path.rstrip("/") + "/") or not path for name in commit.files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return self.json(found)

    @route("POST", REPO + r"/branch/(?P<name>[^/]+)")
    def branch(self, type: str, id: str, name: str):
        repo = self.repo(type, id, write=True)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        if name in repo.branches:
            raise Refused(409, f"Reference refs/heads/{name} already exists")
        repo.branches[name] = repo.resolve(start).oid
        return self.json({})

    @route("POST", REPO + r"/tag/(?P<revision>[^/]+)")
    def tag(self, type: str, id: str, revision: str):
        repo, name = self.repo(type, id, write=True), json.loads(self.body)["tag"]
        if name in repo.tags:
            raise Refused(409, f"Tag {name} already exists")
        repo.tags[name] = repo.resolve(revision).oid
        return self.json({})

    @route("POST", REPO + r"/preupload/(?P<revision>[^/]+)")
    def preupload(self, type: str, id: str, revision: str):
        files = self.repo(type, id, write=True).resolve(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            blob = files.get(asked["path"])
            large = is_large(base64.b64decode(asked["sample"]), asked["size"])
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({"path": asked["path"], **mode, **({"oid": blob.compared} if blob else {})})
        return self.json({"files": answers})

    @route("POST", RESOLVE + r"\.git/info/lfs/objects/batch")
    def batch(self, id: str, type: str = "model"):
        repo, objects = self.repo(type, id, write=True), []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in repo.contents:
                upload = {"href": f"{self.hub.storage}/{type}/{id}/{asked['oid']}?signature={self.hub.signature}"}
                verify = {"href": f"{self.hub.url}/api/{type}s/{id}/verify"}
                asked["actions"] = {"upload": upload, "verify": verify}
            objects.append(asked)
        return self.json({"transfer": "basic", "objects": objects})

    @route("PUT", r"/storage/(?P<type>\w+)/(?P<id>[^/]+/[^/]+)/(?P<sha>[0-9a-f]{64})")
    def upload(self, type: str, id: str, sha: str):
        self.signed()
        if hashlib.sha256(self.body).hexdigest() != sha:
            raise Refused(400, "the content is not what its checksum says")
        self.hub.repository(id, type).contents[sha] = self.body
        return 200, {"ETag": f'"{sha}"'}, b""

    @route("POST", REPO + r"/verify")
    def verify(self, type: str, id: str):
        asked = json.loads(self.body)
        if asked["oid"] not in self.repo(type, id, write=True).contents:
            raise Refused(404, "no such object")
        return self.json({"message": "Object verified"})

    @route("POST", REPO + r"/commit/(?P<revision>[^/]+)")
    def commit(self, type: str, id: str, revision: str):
        repo = self.repo(type, id, write=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        oid = repo.commit(revision, lines, self.user()[0]).oid
        prefix = "" if type == "model" else f"/{type}s"
        url = f"{self.hub.url}{prefix}/{id}/commit/{oid}"
        return self.json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    @route("GET", RESOLVE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def download(self, id: str, revision: str, path: str, type: str = "model"):
        repo = self.repo(type, id)
        commit = repo.resolve(revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.compared}"', "Accept-Ranges": "bytes"}
        if blob.sha256 is None:
            return self.ranged(repo.content(blob), headers)
        place = f"{self.hub.storage}/{type}/{id}/{blob.sha256}?signature={self.hub.signature}"
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"', "Location": place}
        return 302, headers | linked, b""

    @route("GET", r"/storage/(?P<type>\w+)/(?P<id>[^/]+/[^/]+)/(?P<sha>[0-9a-f]{64})")
    def stored(self, type: str, id: str, sha: str):
        self.signed()
        return self.ranged(self.hub.repository(id, type).contents[sha], {"ETag": f'"{sha}"', "Accept-Ranges": "bytes"})

    def signed(self) -> None:
        """The storage knows no users: the link itself says who may."""
        if self.query.get("signature") != [self.hub.signature] or self.token is not None:
            raise Refused(403, "SignatureDoesNotMatch")

    def ranged(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, headers, content
        start, end = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        if start >= len(content):
            raise Refused(416, "out of range", None, **{"Content-Range": f"bytes */{len(content)}"})
        end = min(end, len(content))
        return 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}, content[start:end]


def described(commit: Commit, path: str) -> dict[str, Any]:
    """A file's size and names, as the listing of a repository gives them."""
    blob = commit.files[path]
    lfs = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}
    return {"size": blob.size, "blobId": blob.oid} | ({"lfs": lfs} if blob.sha256 else {})


def listed(commit: Commit, path: str) -> dict[str, Any]:
    """A file in the listing of a folder."""
    blob = commit.files[path]
    lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    found = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
    last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}}
    return found | last | ({"lfs": lfs} if blob.sha256 else {})
