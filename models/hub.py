"""What a hub says of a repository, and the first bytes of its files: enough to decide before a byte of weights is read.

Everything a hub says is the word of a stranger: names must stay inside their folder, sums and commits must be such.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ms4.models import hf_cache
from ms4.models.web import DownloadError, Target, Transient, Web
from ms4.quant.gguf_file import Stamp

OFFICIAL = "https://huggingface.co"
MIB = 1 << 20
MOST_FILES = 10_000
MOST_BYTES = 1 << 44  # of one file
_SAFE_NAME = re.compile(r"(?!/)(?!.*(?:^|/)\.{0,2}(?:/|$))[^\\\0-\x1f\x7f:]{1,400}")


def endpoint() -> str:
    """HF_ENDPOINT, else the hub of Hugging Face.  DownloadError, if that is no address."""
    named = (os.environ.get("HF_ENDPOINT", "").strip() or OFFICIAL).rstrip("/")
    if not re.match(r"https?://[^/]", named):
        raise DownloadError(f"HF_ENDPOINT={named}: not an address such as {OFFICIAL}")
    return named


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The GGUF files of a repository at one commit, by name."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]

    def target(self, name: str) -> Target:
        """Where the bytes of a file are to be had."""
        file = self.files[name]
        return Target(f"{endpoint()}/{self.repo}/resolve/{self.commit}/{quote(name)}", file.bytes, file.sha256)


def read_listing(web: Web, repo: str, revision: str = "main") -> Listing:
    """Asks the hub what is in a repository.  DownloadError."""
    url = f"{endpoint()}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    return web.patiently(lambda: _listing(repo, web.get_json(url)))


def _listing(repo: str, answer: Any) -> Listing:
    if not isinstance(answer, dict) or not isinstance(answer.get("siblings"), list):
        raise Transient(f"the hub does not say what is in {repo}")
    commit = answer.get("sha")
    if not isinstance(commit, str) or not hf_cache.COMMIT.fullmatch(commit):
        raise DownloadError(f"the hub does not say which commit of {repo} it lists")
    if isinstance(answer.get("id"), str) and answer["id"].lower() == repo.lower():
        repo = answer["id"]  # as it is spelled there: the cache has one folder of it
    files = {}
    for sibling in answer["siblings"][:MOST_FILES]:
        name = sibling.get("rfilename") if isinstance(sibling, dict) else None
        if not isinstance(name, str) or not name.lower().endswith(".gguf"):
            continue
        if not _SAFE_NAME.fullmatch(name):
            raise DownloadError(f"the hub lists a file that would lie outside of its folder: {name[:80]}")
        if not isinstance(lfs := sibling.get("lfs"), dict):
            continue  # a small file, of which the hub has no sha256: no model
        n_bytes, digest = lfs.get("size"), lfs.get("sha256")
        if type(n_bytes) is not int or not 0 < n_bytes <= MOST_BYTES:
            raise DownloadError(f"the hub does not say how long {name[:80]} is")
        if not isinstance(digest, str) or not hf_cache.SHA256.fullmatch(digest):
            raise DownloadError(f"the hub does not say the sha256 of {name[:80]}, so it could not be checked")
        files[name] = RemoteFile(name, n_bytes, digest)
    return Listing(repo, commit, files)


class Beginning:
    """The first bytes of a file on the hub, as many as were asked for: a source of `GgufFile`."""

    def __init__(self, web: Web, target: Target, here: bytes = b"") -> None:
        """here: those that have come before."""
        self._web, self._target = web, target
        self.stamp: Stamp = (0, 0, target.bytes, 0)
        self.data = bytearray(here)

    def read(self, n: int, offset: int) -> bytes:
        end = min(offset + n, self._target.bytes)
        while len(self.data) < end:
            self._web.patiently(lambda: self._fetch(end))
        return bytes(self.data[offset:end])

    def _fetch(self, end: int) -> None:
        """Up to `end` at least: twice of what is here, as a header that goes on so far goes on further."""
        end = min(max(end, 2 * len(self.data), MIB), self._target.bytes)
        with self._web.range(self._target, len(self.data), end) as body:
            known = len(self.data) - body.start  # where there are no ranges, what is here comes once more
            for chunk in body.chunks():
                self.data += chunk[known:]
                known = max(0, known - len(chunk))
                if len(self.data) >= end:
                    return
        if len(self.data) < end:
            raise Transient("the server sends less than it was asked for")

    def close(self) -> None: ...
