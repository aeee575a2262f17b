"""The cache that programs for Hugging Face share: where it lies, what is in it, and how files get in and out of it.

    models--USER--NAME/refs/main                     the commit that `main` was
    models--USER--NAME/snapshots/COMMIT/a/b.gguf     a link to
    models--USER--NAME/blobs/SHA256                  the bytes
    .locks/models--USER--NAME/SHA256.lock            held by who writes that blob

What lies there was perhaps put there by others: it is read, and changed only by who asks for that.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ms4.models import atomic, places

SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PART_OF_ID = r"(?!\.)(?!.*(?:\.\.|--))[A-Za-z0-9_.-]{1,96}"
REPO_ID = re.compile(rf"{_PART_OF_ID}/{_PART_OF_ID}")
_FOLDER = re.compile(r"models--(.+?)--(.+)")


def home() -> Path:
    """The folder of Hugging Face: HF_HOME, else huggingface in the user's cache."""
    if named := os.environ.get("HF_HOME"):
        return Path(os.path.expanduser(named))
    return places.folder("CACHE") / "huggingface"


def root() -> Path:
    """Where models lie, by the rules of huggingface_hub."""
    named = os.environ.get("HF_HUB_CACHE")
    return Path(os.path.expanduser(named)) if named else home() / "hub"


@dataclass(frozen=True)
class Cached:
    """One repository in the cache."""

    repo: str
    folder: Path

    @classmethod
    def of(cls, repo: str, where: Path | None = None) -> Cached:
        return cls(repo, (where or root()) / ("models--" + repo.replace("/", "--")))

    @property
    def blobs(self) -> Path:
        return self.folder / "blobs"

    def snapshots(self) -> list[Path]:
        """The newest first; before all others the one that `main` is."""
        try:
            found = [p for p in (self.folder / "snapshots").iterdir() if p.is_dir()]
        except OSError:
            return []
        main = self.main()
        return sorted(found, key=lambda p: (p.name != main, -p.stat().st_mtime, p.name))

    def main(self) -> str:
        try:
            return (self.folder / "refs" / "main").read_text("utf-8", "replace").strip()
        except OSError:
            return ""

    def set_main(self, commit: str) -> None:
        path = self.folder / "refs" / "main"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as file:
            file.write(commit.encode())

    def link(self, commit: str, name: str, sha256: str) -> Path:
        """Makes `name` of a commit lead to a blob; its path."""
        path = self.folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(self.blobs / sha256, path.parent)
        if not (path.is_symlink() and os.readlink(path) == target):
            with atomic.renamed(path) as new:
                os.symlink(target, new)
        return path


def repositories() -> list[Cached]:
    """Every repository of models in the cache, by name."""
    found = []
    try:
        folders = sorted(root().iterdir())
    except OSError:
        return []
    for folder in folders:
        match = _FOLDER.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append(Cached(f"{match[1]}/{match[2]}", folder))
    return found


def files(snapshot: Path, ending: str = ".gguf") -> list[str]:
    """The files of a snapshot by their names in the repository, those included that lead nowhere."""
    found = []
    for folder, _, names in os.walk(snapshot):
        inside = os.path.relpath(folder, snapshot)
        found += [n if inside == "." else f"{inside}/{n}" for n in names if n.lower().endswith(ending)]
    return sorted(found)


def blob_of(path: Path) -> Path | None:
    """The blob that a link in a snapshot leads to; None if the file is none of such a cache, so nothing is known."""
    try:
        target = Path(os.path.normpath(path.parent / os.readlink(path)))
    except OSError:
        return None
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return target if in_cache and SHA256.fullmatch(target.name) else None


@contextmanager
def locked(repo: Cached, sha256: str, waiting: Callable[[], object]) -> Iterator[None]:
    """Holds the lock of a blob, the one of huggingface_hub.  waiting() is called if somebody else has it."""
    folder = repo.folder.parent / ".locks" / repo.folder.name
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / f"{sha256}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)  # which gives the lock back


def pieces(sha256: str) -> Path:
    """Where the journal of a whole file is kept: it tells damaged pieces from good ones, for `ms4 verify`."""
    return places.ours("CACHE") / "pieces" / sha256


def token() -> str:
    """HF_TOKEN, else what `hf auth login` has written; "" if there is none."""
    if named := os.environ.get("HF_TOKEN", "").strip():
        return named
    path = os.environ.get("HF_TOKEN_PATH") or home() / "token"
    try:
        return Path(os.path.expanduser(path)).read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")
