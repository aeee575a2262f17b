"""The GGUF files of a repository as people speak of them: by quantization, whole or in parts, and the vision towers.

Works on names alone, of a listing from the hub or of a folder here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ms4.models import hf_cache, repositories

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})", re.DOTALL)
_QUANT = r"(?:UD-)?(?:I?Q\d|TQ\d|BF16|FP?16|FP?32|MXFP4|NVFP4)[A-Z0-9_]*"
_QUANT_AT_END = re.compile(rf"(?:^|[-._/])({_QUANT})$", re.IGNORECASE)
_HUB = re.compile(r"^(?:hf:|(?:https?://)?(?:www\.)?(?:hf|huggingface)\.co/)", re.IGNORECASE)
TOWER_TYPES = ("f16", "bf16", "q8_0", "f32")  # the best first, as where several lie beside a model


@dataclass(frozen=True)
class Variant:
    """One model: its quantization (or the name of the file, if that says none), and its files, part after part.

    n_parts: how many files there should be; fewer are named if some are missing.
    """

    quant: str
    names: tuple[str, ...]
    n_parts: int = 1

    @property
    def is_complete(self) -> bool:
        return len(self.names) == self.n_parts


@dataclass(frozen=True)
class Wanted:
    """What a name asks for.  repo: "" for any; quant: "" for the only one, or for the one that fits."""

    repo: str = ""
    quant: str = ""


def is_tower(name: str) -> bool:
    return "mmproj" in name.rpartition("/")[2].lower()


def variants(names: Iterable[str]) -> list[Variant]:
    """The models among the files of a repository, by name."""
    parts: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(names):
        stem = name[: -len(".gguf")]
        if not name.lower().endswith(".gguf") or is_tower(name) or "imatrix" in stem.rpartition("/")[2].lower():
            continue
        match = _PART.fullmatch(stem)
        key = (match[1], int(match[3])) if match else (stem, 1)
        parts.setdefault(key, {})[int(match[2]) if match else 1] = name
    found = [
        Variant(quant_of(stem), tuple(files[i] for i in sorted(files)), count) for (stem, count), files in parts.items()
    ]
    labels = [v.quant.lower() for v in found]
    stems = [stem.rpartition("/")[2] for stem, _ in parts]
    return [
        Variant(stem, v.names, v.n_parts) if labels.count(v.quant.lower()) > 1 else v
        for v, stem in zip(found, stems, strict=True)
    ]


def quant_of(stem: str) -> str:
    """The quantization that a name without ending and part says, itself or by its folder; else the name."""
    folder, _, base = stem.rpartition("/")
    for text in (base, folder):
        if match := _QUANT_AT_END.search(text):
            return match[1]
    return base


def pick(found: Sequence[Variant], quant: str) -> Variant | None:
    """The one that a quantization names: that very one, or the one with UD- before it."""
    for wanted in (quant.lower(), f"ud-{quant.lower()}"):
        for variant in found:
            if variant.quant.lower() == wanted:
                return variant
    return None


def best_tower(names: Iterable[str]) -> str | None:
    """The vision tower to take among the files of a repository, if there is one."""
    found = sorted((n for n in names if is_tower(n) and n.lower().endswith(".gguf")), key=lambda n: (n.count("/"), n))

    def rank(name: str) -> int:
        said = (i for i, t in enumerate(TOWER_TYPES) if re.search(rf"(?<![a-z0-9]){t}(?![a-z0-9])", name.lower()))
        return next(said, len(TOWER_TYPES))

    return min(found, key=rank, default=None)


def parse(text: str) -> Wanted | None:
    """[hf:]USER/REPO[:QUANT], a name of the table with or without :QUANT, or a quantization; None for anything else.

    hf: may also be the address of the hub, as it stands in a browser or in other programs.
    """
    base, _, quant = _HUB.sub("", text).removesuffix("/").removesuffix("/tree/main").partition(":")
    if ":" in quant or not re.fullmatch(r"[A-Za-z0-9_.-]{0,120}", quant):
        return None
    if hf_cache.REPO_ID.fullmatch(base):
        return Wanted(base, quant)
    if row := repositories.known(base) if base else None:
        return Wanted(row.repo, quant)
    if not quant and re.fullmatch(_QUANT, base, re.IGNORECASE):
        return Wanted("", base)
    return None
