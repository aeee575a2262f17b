"""Whether files in the cache are what their SHA-256 says, which pieces of them are damaged, and their repair.

The name of a blob is its sum.  What tells the pieces apart is the journal that stayed when the file was fetched, or
that an earlier check has written; without one a damaged file has to be read again from its first byte.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ms4.models import acquire, hf_cache, hub
from ms4.models.download import Progress
from ms4.models.hf_cache import Cached
from ms4.models.part import INCOMPLETE, JOURNAL, MOST_UNIT, Record, holes, read_journal, tiling, write_journal
from ms4.models.web import UnreachableError, Web


@dataclass(frozen=True)
class Check:
    """What was found.  digest: of the bytes; damaged: the pieces that are not what they were, None if nobody knows."""

    blob: Path
    bytes: int
    digest: str
    damaged: tuple[Record, ...] | None

    @property
    def right(self) -> bool:
        return self.digest == self.blob.name


def check(blob: Path, progress: Callable[[int, int], object]) -> Check:
    """Reads a blob from its first byte to its last.  OSError.  progress gets bytes done and bytes in all."""
    n_bytes = blob.stat().st_size
    pieces = hf_cache.pieces(blob.name)
    head, records, _ = read_journal(pieces)
    size = head.get("size") if head.get("sha256") == blob.name else None
    known = isinstance(size, int)
    if isinstance(size, int):
        records = tiling(records, size)
        known = not any(holes(records, size))
    plan = [records[i] for i in sorted(records)] if known else list(_even(n_bytes))
    digest, found, damaged = hashlib.sha256(), [], []
    with open(blob, "rb") as file:
        for piece in plan:
            data = file.read(piece.bytes)
            digest.update(data)
            crc = zlib.crc32(data)
            found.append(Record(piece.offset, piece.bytes, crc))
            if known and (len(data) != piece.bytes or crc != piece.crc):
                damaged.append(piece)
            progress(piece.offset + len(data), n_bytes)
        while more := file.read(MOST_UNIT):  # longer than it was
            digest.update(more)
    result = Check(blob, n_bytes, digest.hexdigest(), tuple(damaged) if known else None)
    if result.right and not known:
        with suppress(OSError):
            write_journal(pieces, {"sha256": blob.name, "size": n_bytes}, found)
    return result


def _even(n_bytes: int) -> Iterator[Record]:
    for offset in range(0, n_bytes, MOST_UNIT):
        yield Record(offset, min(MOST_UNIT, n_bytes - offset), 0)


def repair(web: Web, path: Path, found: Check, means: acquire.Means, show: Callable[[Progress], object]) -> int:
    """Fetches the damaged pieces of a file again, or all of it; the bytes that came.  path: its link in the snapshot.

    The file loses its name until it is right: nobody shall open a damaged one, and a repair that is cut off goes on
    like a download that was.
    """
    snapshot = next(p for p in path.parents if p.parent.name == "snapshots")
    repo = Cached(snapshot.parent.parent.name.removeprefix("models--").replace("--", "/", 1), snapshot.parent.parent)
    listing = hub.read_listing(web, repo.repo, snapshot.name)
    name = path.relative_to(snapshot).as_posix()
    file = listing.files.get(name)
    if file is None or file.sha256 != found.blob.name:
        raise UnreachableError(f"{repo.repo} does not have this {name} any more", f"ms4 pull {repo.repo} --update")
    with hf_cache.locked(repo, file.sha256, lambda: means.waiting(name)):
        if found.blob.is_symlink() or found.damaged is None:  # the bytes of others, or nothing to keep
            found.blob.unlink()
        else:
            head, records, _ = read_journal(hf_cache.pieces(file.sha256))
            about = {**head, "repo": repo.repo, "commit": snapshot.name, "name": name}
            journal = repo.blobs / (file.sha256 + JOURNAL)
            write_journal(journal, about, (records[i] for i in sorted(records)))
            os.replace(found.blob, repo.blobs / (file.sha256 + INCOMPLETE))
    return acquire.fetch_file(web, listing, file, means, show)
