"""The models that lie in the cache of Hugging Face: found by name, listed, taken away.

No network, and of files only their names, unless a listing asks what model they hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ms4.models import hf_cache, variants
from ms4.models.hf_cache import Cached, blob_of
from ms4.models.part import INCOMPLETE, JOURNAL, read_journal
from ms4.models.variants import Variant, Wanted

OURS = ("mistral4", "deepseek2")  # as in mistral4.ARCHITECTURES, which takes longer to import


class NotStoredError(Exception):
    """No model of that name is here; `hint` says what to type."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class Stored:
    """A model in the cache.  paths: the links in its snapshot, part after part."""

    repo: Cached
    snapshot: Path
    variant: Variant

    @property
    def name(self) -> str:
        return f"{self.repo.repo}:{self.variant.quant}"

    @property
    def paths(self) -> list[Path]:
        return [self.snapshot / name for name in self.variant.names]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def tower(self) -> Path | None:
        """The vision tower that was taken with it."""
        here = [n for n in hf_cache.files(self.snapshot) if (self.snapshot / n).exists()]
        name = variants.best_tower(here)
        return self.snapshot / name if name else None


def models(repo: Cached) -> Iterator[Stored]:
    """Every whole model of a repository in the cache; of equal ones in several snapshots the newest."""
    seen = set()
    for snapshot in repo.snapshots():
        here = [name for name in hf_cache.files(snapshot) if (snapshot / name).exists()]
        for variant in variants.variants(here):
            if variant.is_complete and variant.quant.lower() not in seen:
                seen.add(variant.quant.lower())
                yield Stored(repo, snapshot, variant)


def is_ours(stored: Stored) -> bool:
    """True if the file says that it holds a model of the kind that ms4 runs."""
    from ms4.quant.gguf_file import GgufError, peek

    try:
        return peek(stored.paths[0], "general.architecture") in OURS
    except GgufError:
        return False


def everything() -> list[Stored]:
    """All models in the cache that ms4 runs."""
    return [stored for repo in hf_cache.repositories() for stored in models(repo) if is_ours(stored)]


def find(name: str) -> Stored:
    """The model that a name means.  NotStoredError, if it is not here, or if there are several."""
    wanted = variants.parse(name)
    if wanted is None:
        raise NotStoredError(
            f"{name[-80:]}: no such file, and no name of a model",
            "-m takes a GGUF file, USER/REPO:QUANT or a name that ms4 ls shows",
        )
    found = _candidates(wanted)
    if wanted.quant:
        picked = [s for s in found if (v := variants.pick([s.variant], wanted.quant)) is not None and v]
        exact = [s for s in picked if s.variant.quant.lower() == wanted.quant.lower()]
        found = exact or picked
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(s.name for s in found[:4])
        raise NotStoredError(f"{name[-80:]} may be any of {len(found)} models here", f"name one: {names}")
    raise NotStoredError(f"{name[-80:]} is not on this machine", f"ms4 pull {name[:120]}   or   ms4 ls")


def _candidates(wanted: Wanted) -> list[Stored]:
    if wanted.repo:
        same = [r for r in hf_cache.repositories() if r.repo.lower() == wanted.repo.lower()]
        return [stored for repo in same for stored in models(repo)]
    return everything()


def resolve(name: str) -> str:
    """The path of a model: `name` itself if there is such a file, else the first part of the model of that name."""
    if os.path.lexists(name):
        return name
    return os.fspath(find(name).paths[0])


@dataclass(frozen=True)
class Unfinished:
    """A model of which a part has been fetched.  bytes: those that are here."""

    repo: Cached
    quant: str
    bytes: int

    @property
    def name(self) -> str:
        return f"{self.repo.repo}:{self.quant}"


def unfinished(repo: Cached) -> list[Unfinished]:
    """What ms4 has begun to fetch of a repository and not ended, by quantization."""
    n_bytes: dict[str, int] = {}
    for journal in sorted(repo.blobs.glob("*" + JOURNAL)):
        if quant := _begun(journal):
            n_bytes[quant] = n_bytes.get(quant, 0) + sum(r.bytes for r in read_journal(journal)[1].values())
    return [Unfinished(repo, quant, n) for quant, n in n_bytes.items()]


@dataclass(frozen=True)
class Removal:
    """What goes when a model goes: links, and the files that nothing leads to then.  bytes: what the disk gets back."""

    links: tuple[Path, ...]
    files: tuple[Path, ...]
    bytes: int


def removal(repo: Cached, quant: str) -> Removal:
    """Of one quantization in all snapshots; the towers go with the last model of the repository."""
    wanted = variants.parse(f"{repo.repo}:{quant}") or Wanted(repo.repo, quant)
    links: list[Path] = []
    others: list[Path] = []
    towers: list[Path] = []
    for snapshot in repo.snapshots():
        names = hf_cache.files(snapshot)
        ours = {n for v in variants.variants(names) if v.quant.lower() == wanted.quant.lower() for n in v.names}
        for name in names:
            kind = links if name in ours else towers if variants.is_tower(name) else others
            kind.append(snapshot / name)
    if not others:
        links, towers = links + towers, []
    kept = {os.path.realpath(path) for path in [*others, *towers]}
    blobs = {target for path in links if (target := blob_of(path)) and os.path.realpath(path) not in kept}
    files = [p for blob in sorted(blobs) for p in (blob, hf_cache.pieces(blob.name)) if os.path.lexists(p)]
    for journal in repo.blobs.glob("*" + JOURNAL):
        if _begun(journal).lower() == wanted.quant.lower():
            files += [journal, journal.with_name(journal.name.removesuffix(JOURNAL) + INCOMPLETE)]
    n_bytes = sum(path.stat().st_blocks * 512 for path in files if path.is_file() and not path.is_symlink())
    return Removal(tuple(links), tuple(files), n_bytes)


def _begun(journal: Path) -> str:
    """The quantization of the file that a journal belongs to; "" for a tower, and if it is not said."""
    name = read_journal(journal)[0].get("name")
    found = variants.variants([name]) if isinstance(name, str) else []
    return found[0].quant if found else ""


def remove(what: Removal) -> None:
    """Links first: what is cut off in the middle leaves files without a name, and no names without a file."""
    for path in (*what.links, *what.files):
        with suppress(FileNotFoundError):
            path.unlink()
    for path in what.links:  # a folder of the snapshot, and the snapshot, if they are empty now
        with suppress(OSError):
            path.parent.rmdir()
            path.parent.parent.rmdir()
