"""What the Hub of the tests answers, one function a kind of request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import yaml
from repositories import Commit, Refused, Repository, is_large

REPO = r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)"
RESOLVE = r"/(?:(?P<type>dataset)s/)?(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, re.Pattern[str], str]] = []


def route(method: str, path: str) -> Callable[[Callable], Callable]:
    """Let a method of the handler answer requests of that kind."""

    def add(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(path), function.__name__))
        return function

    return add


class Routes:
    """The functions that answer; `self` is the connection: `hub`, `body`, `query`, `headers`, `token` are its."""

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

    @route("GET", r"/api/(?P<type>model|dataset)s")
    def listing(self, type: str):
        name, (author,) = self.user()[0], self.query["author"]
        seen = [repo for (kind, _), repo in self.hub.repositories.items() if kind == type]
        ids = [repo.id for repo in seen if repo.id.startswith(f"{author}/") and not (repo.private and author != name)]
        return self.json(
            [{"_id": id, "id": id, "private": False, "tags": [], "downloads": 0, "likes": 0} for id in ids]
        )

    @route("GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?")
    def info(self, type: str, id: str, revision: str = "main"):
        repo = self.repo(type, id)
        commit, card = repo.resolve(revision), repo.card(revision)
        blobs = "blobs" in self.query
        siblings = [{"rfilename": path, **(described(commit, path) if blobs else {})} for path in sorted(commit.files)]
        found = {"_id": id, "id": id, "author": id.split("/")[0], "sha": commit.oid, "private": repo.private}
        found |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": card.get("tags") or []}
        found |= {"library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"), "cardData": card}
        found |= {"createdAt": repo.history()[-1].date, "lastModified": commit.date, "siblings": siblings}
        return self.json(found)

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
