"""Getting a model: first a plan, made of the listing and the headers alone, then the files, into the shared cache.

The plan says what the files hold, whether ms4 runs them, how big they are, and whether memory and disk have room; all
of that before the first byte of weights.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ms4
from ms4.models import clock, forecast, hf_cache, hub, repositories, variants
from ms4.models.clock import DISK_ASSUMED, Machine
from ms4.models.download import DigestError, Download, Progress, Throttle
from ms4.models.hf_cache import Cached
from ms4.models.hub import Beginning, Listing, RemoteFile
from ms4.models.part import INCOMPLETE, JOURNAL, Part, beginning, holes, read_journal, tiling
from ms4.models.pixtral import Tower
from ms4.models.variants import Variant, Wanted
from ms4.models.vocabulary import Vocabulary
from ms4.models.web import DownloadError, UnreachableError, Web
from ms4.quant.gguf_file import FileError, GgufFile, Source

GB = 10**9
N_CTX = 32768  # tokens for which the plan wants room beside the weights
ESTIMATE = 2 * GB  # what that takes, with the tower and the buffers, before the header has been read
MOST_HEADER = 32 << 20  # bytes at the front of a file that were fetched before, and need not be fetched to plan again
SPARE = 64 << 20  # bytes of the disk that are left alone
LARGEST_BY_ITSELF = "Q4_K_M"  # a larger one is read more slowly for each token: it is taken by name only
SENSIBLE = 3.0  # tokens a second at the least, for which the larger of two files is taken that fit neither
# Where nobody has measured, a desktop of some years with an NVMe drive: what is said before `ms4 plan` knows better.
ASSUMED = Machine(None, 20 * GB, 0.5e12, DISK_ASSUMED)


@dataclass(frozen=True)
class Here:
    """The machine that a model is wanted for.  vram: bytes of its card that may be taken; card: what that is called."""

    machine: Machine = ASSUMED
    vram: float = 0.0
    card: str = ""


class DoesNotFitError(Exception):
    """There is no room for the model in the memory of this machine; `hint` names what fits."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class Plan:
    """What is to be fetched, and what is known of it.  Sizes in bytes."""

    listing: Listing
    variant: Variant
    files: tuple[RemoteFile, ...]  # the parts of the model, then the tower
    tower: str  # its name; "" for none
    model: str  # what the header calls it
    forecast: forecast.Plan  # with N_CTX tokens, and the tower in memory, too
    n_needed: int  # memory: all of that, or as much as it runs with while experts stay on the disk
    n_memory: int | None  # what this machine has, or may have; None if it does not say
    n_free_memory: int | None
    n_missing: int  # still to be fetched
    n_free_disk: int
    here: Here = field(default_factory=Here)
    revision: str = "main"
    notes: tuple[str, ...] = ()
    beginnings: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # what came of the files already

    @property
    def name(self) -> str:
        return f"{self.listing.repo}:{self.variant.quant}"

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def fits(self) -> bool:
        return self.forecast.fits


def memory() -> tuple[int | None, int | None]:
    """(bytes of memory that this process could have, bytes that it could have now); None if nobody says."""
    got = ms4.allowed()
    total = got.total if got.limit is None else min(got.total or got.limit, got.limit)
    return total or None, got.room


# --- which files


def choose(
    listing: Listing,
    quant: str,
    n_memory: int | None,
    streamed: Callable[[Variant], float] = lambda variant: 0.0,
    on_card: Callable[[Variant], float] = lambda variant: 0.0,
) -> Variant:
    """The model to take: the one that was named, else the largest that fits, but none above LARGEST_BY_ITSELF.

    Where none fits: the largest that writes at a sensible speed while its experts stay on the disk, else the fastest.
    streamed: how many tokens a second that is, at the least; 0: it does not run.  on_card: bytes that a card holds, so
    that they need no memory.
    """
    found = variants.variants(listing.files)
    if not found:
        raise UnreachableError(f"{listing.repo} has no GGUF file of a model", "ms4 pull --list shows repositories")
    if quant:
        chosen = variants.pick(found, quant)
        if chosen is None:
            names = ", ".join(v.quant for v in found)
            raise UnreachableError(f"{listing.repo} has no {quant}", f"it has {names}"[:280])
        return _whole(listing, chosen)
    if len(found) == 1:
        return _whole(listing, found[0])
    limit = variants.pick(found, LARGEST_BY_ITSELF)
    most = size(listing, limit) if limit else 0
    able = [v for v in found if v.is_complete and (not most or size(listing, v) <= most)]
    fitting = [v for v in able if n_memory is None or size(listing, v) - on_card(v) + ESTIMATE <= n_memory]
    speed = {} if fitting else {v: tokens_per_s for v in able if (tokens_per_s := streamed(v)) > 0}
    if speed:
        sensible = [v for v in speed if speed[v] >= SENSIBLE]
        fastest = max(speed, key=lambda v: (speed[v], -size(listing, v)))
        return max(sensible, key=lambda v: size(listing, v)) if sensible else fastest
    if not fitting:
        least = min(able or found, key=lambda v: size(listing, v))
        raise DoesNotFitError(
            f"the smallest there, {least.quant}, has {gigabytes(size(listing, least))}; "
            f"this machine has {gigabytes(n_memory or 0)} of memory",
            f"ms4 pull {listing.repo}:{least.quant} --anyway gets it all the same",
        )
    return _whole(listing, max(fitting, key=lambda v: size(listing, v)))


def _whole(listing: Listing, chosen: Variant) -> Variant:
    if not chosen.is_complete:
        raise UnreachableError(
            f"{listing.repo}:{chosen.quant} has {len(chosen.names)} of its {chosen.n_parts} parts on the hub"
        )
    return chosen


def size(listing: Listing, variant: Variant) -> int:
    return sum(listing.files[name].bytes for name in variant.names)


def gigabytes(n: int) -> str:
    return f"{n / GB:.1f} GB"


# --- the plan


def plan(web: Web, wanted: Wanted, revision: str = "main", with_tower: bool = True, here: Here | None = None) -> Plan:
    """Looks at the listing and the headers.  DownloadError, FileError: it cannot be had, or it does not run."""
    here = here or Here()
    n_memory, n_free = memory()
    listing = hub.read_listing(web, wanted.repo or repositories.DEFAULT.repo, revision)
    headers = Headers(web, listing)
    variant = headers.chosen(wanted.quant, n_memory, here)
    gguf = GgufFile.open(headers.shown(variant.names[0]), headers)
    model = forecast.Model.of(gguf)
    notes = list(gguf.warnings)
    if problem := Vocabulary.from_gguf(gguf).problem:
        notes.append(problem)
    names = list(variant.names)
    tower = _tower(listing, headers, model.shape.d_model, notes) if with_tower else ""
    names += [tower] if tower else []
    files = tuple(listing.files[name] for name in names)
    n_tower = listing.files[tower].bytes if tower else 0
    made = predicted(model, n_memory, here, n_tower)
    title = gguf.metadata.get("general.name")
    return Plan(
        listing=listing,
        variant=variant,
        files=files,
        tower=tower,
        model=title if type(title) is str else "",
        forecast=made,
        n_needed=n_tower + int(made.needed_whole if made.load == "memory" else made.needed),
        n_memory=n_memory,
        n_free_memory=n_free,
        n_missing=sum(missing(Cached.of(listing.repo), file) for file in files),
        n_free_disk=free_disk(),
        here=here,
        revision=revision,
        notes=tuple(notes),
        beginnings={name: bytes(source.data) for name, source in headers.opened.items()},
    )


def predicted(model: forecast.Model, n_memory: int | None, here: Here, n_tower: int = 0) -> forecast.Plan:
    """What a model does in so much memory, of which a tower takes its part."""
    n_ctx = min(N_CTX, model.shape.n_ctx_train)
    ram = None if n_memory is None else max(n_memory - n_tower, 1)
    there = forecast.Resources(here.machine, ram, vram=here.vram)
    return forecast.make(model, there, n_ctx)


def bytes_on_card(model: forecast.Model, vram: float) -> float:
    """Of a model file, how much need not be in memory, as a card has it: all of it, or some experts (forecast.fit)."""
    n = clock.slots(model.sizes, vram, min(N_CTX, model.shape.n_ctx_train))
    return model.bytes_file if n and n >= model.sizes.n_layer * model.sizes.n_expert else n * model.sizes.expert


class Headers:
    """Opens files of a listing for GgufFile, by the name of the repository and theirs."""

    def __init__(self, web: Web, listing: Listing) -> None:
        self._web, self._listing = web, listing
        self._first: forecast.Model | None = None
        self.opened: dict[str, Beginning] = {}

    def shown(self, name: str) -> str:
        return f"{self._listing.repo}/{name}"

    def chosen(self, quant: str, n_memory: int | None, here: Here) -> Variant:
        """The one that was named, else the one that suits the machine; no header is read where sizes tell."""

        def streamed(variant: Variant) -> float:
            made = predicted(self._like(variant), n_memory, here)
            return made.warm.tokens_per_s if made.fits else 0.0

        def on_card(variant: Variant) -> float:
            return bytes_on_card(self._like(variant), here.vram) if here.vram else 0.0

        return choose(self._listing, quant, n_memory, streamed, on_card)

    def _like(self, variant: Variant) -> forecast.Model:
        """By the header of the first that is asked about: the others differ from it in their size."""
        if self._first is None:
            self._first = forecast.Model.of(GgufFile.open(self.shown(variant.names[0]), self))
        return self._first.scaled(size(self._listing, variant))

    def __call__(self, path: str) -> Source:
        name = path.removeprefix(f"{self._listing.repo}/")
        if name not in self._listing.files:
            raise FileNotFoundError(path)
        if name not in self.opened:
            here = beginning(Cached.of(self._listing.repo).blobs, self._listing.files[name].sha256, MOST_HEADER)
            self.opened[name] = Beginning(self._web, self._listing.target(name), here)
        return self.opened[name]


def _tower(listing: Listing, headers: Headers, d_model: int, notes: list[str]) -> str:
    """The name of the vision tower that fits the model; "", with a note, if there is none."""
    name = variants.best_tower(listing.files)
    if name is None:
        notes.append(f"{listing.repo} has no vision tower (mmproj): images need one from elsewhere")
        return ""
    try:
        found = Tower.read(headers.shown(name), headers)
    except FileError as error:
        notes.append(f"the vision tower is left out: {error}")
        return ""
    if found.shape.d_out != d_model:
        notes.append(f"the vision tower is left out: {name} is of another model")
        return ""
    return name


def missing(repo: Cached, file: RemoteFile) -> int:
    """Bytes of a file that are not in the cache yet."""
    if is_here(repo, file):
        return 0
    head, records, _ = read_journal(repo.blobs / (file.sha256 + JOURNAL))
    begun = head.get("sha256") == file.sha256 and (repo.blobs / (file.sha256 + INCOMPLETE)).exists()
    return sum(b - a for a, b in holes(tiling(records, file.bytes), file.bytes)) if begun else file.bytes


def is_here(repo: Cached, file: RemoteFile) -> bool:
    try:
        return (repo.blobs / file.sha256).stat().st_size == file.bytes
    except OSError:
        return False


def free_disk() -> int:
    """Bytes that the disk of the cache has left for this user."""
    folder = hf_cache.root()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


# --- the files


@dataclass(frozen=True)
class State:
    """How far a fetch is.  bytes: of all files; the counts as in Progress."""

    bytes: int
    n_held: int
    n_hashed: int
    n_fetched: int
    name: str  # of the file that is fetched now
    trouble: str = ""


@dataclass(frozen=True)
class Means:
    """How to fetch: with how many connections, how fast, and whom to tell."""

    jobs: int = 4
    throttle: Throttle = field(default_factory=Throttle)
    show: Callable[[State], object] = lambda state: None
    waiting: Callable[[str], object] = lambda name: None  # somebody else fetches that file


def fetch(web: Web, plan: Plan, means: Means) -> list[Path]:
    """Gets what is missing; the paths of all files of the plan, in the snapshot.  DownloadError, OSError."""
    room = plan.n_free_disk - SPARE
    if plan.n_missing > room:
        raise DownloadError(
            f"{gigabytes(plan.n_missing)} are missing, {gigabytes(max(room, 0))} are free in {hf_cache.root()}",
            "HF_HUB_CACHE=DIR names a folder on another disk; ms4 ls shows what could go",
        )
    repo = Cached.of(plan.listing.repo)
    (repo.folder / "snapshots" / plan.listing.commit).mkdir(parents=True, exist_ok=True)
    done, n_fetched, paths = 0, 0, []
    for file in plan.files:

        def show(p: Progress, name: str = file.name, done: int = done, fetched: int = n_fetched) -> None:
            means.show(State(plan.bytes, done + p.n_held, done + p.n_hashed, fetched + p.n_fetched, name, p.trouble))

        n_fetched += fetch_file(web, plan.listing, file, means, show, plan.beginnings.get(file.name, b""))
        done += file.bytes
        paths.append(repo.link(plan.listing.commit, file.name, file.sha256))
    if plan.revision == "main":
        repo.set_main(plan.listing.commit)
    return paths


def fetch_file(
    web: Web,
    listing: Listing,
    file: RemoteFile,
    means: Means,
    show: Callable[[Progress], object],
    come: bytes = b"",
) -> int:
    """Makes a blob whole, if it is not; the bytes that came for it.  Who else wants it waits, or is waited for.

    come: its first bytes, if they have come already.
    """
    repo = Cached.of(listing.repo)
    if is_here(repo, file):
        return 0
    with hf_cache.locked(repo, file.sha256, lambda: means.waiting(file.name)):
        if is_here(repo, file):
            return 0
        about = {"repo": listing.repo, "commit": listing.commit, "name": file.name}
        part = Part(repo.blobs, file.sha256, file.bytes, about)
        download = Download(web, listing.target(file.name), part, means.jobs, means.throttle)
        try:
            part.write_missing(0, come)
            download.run(show)
            part.finish(repo.blobs / file.sha256, hf_cache.pieces(file.sha256))
        except DigestError as error:
            part.discard()
            raise DigestError(f"{file.name}: {error}", error.hint) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            lacking = gigabytes(file.bytes - part.n_held)
            raise DownloadError(f"the disk is full: {file.name} lacks {lacking}", "the same command goes on") from None
        finally:
            part.close()
        return download.progress().n_fetched
