"""The Hugging Face Hub on this machine: an HTTP server that huggingface_hub, diffusers and datasets talk to.

What it answers is the Hub's own API as the client uses it: repositories, branches, tags, listings, preupload, LFS,
commits and downloads, with tokens and private repositories. `Hub.fail` makes the next requests of a kind fail.
"""

from __future__ import annotations

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

from hub_routes import ROUTES, Routes
from repositories import Refused, Repository

TOKEN = "hf_" + "planted" * 5 + "X"
READ_TOKEN = "hf_" + "reading" * 5 + "Y"
STRANGER = "hf_" + "foreign" * 5 + "Z"


@dataclass
class Fault:
    """What goes wrong with requests of a kind: an error's `status`, a cut connection, or a pause.

    `cut`: `upload` closes the connection in the middle of the request's body, `download` in the middle of the answer's,
    `answer` does what was asked and closes it before saying so. `do` is called first, for what others do meanwhile. In
    `message`, "{token}" stands for the token that was sent.
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
    do: Callable[[], object] | None = None

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


class Cut(Exception):
    """Close the connection without another word."""


class Handler(Routes, BaseHTTPRequestHandler):
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
                if self.fault.do:
                    self.fault.do()
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
