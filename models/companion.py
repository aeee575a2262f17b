"""Which mmproj file belongs to a model: what the headers name counts, then the names of the files.

Repositories put several copies of one tower beside the model, or one folder up; people keep towers of several models
in one folder.  A tower of equal width that belongs to another model answers, but wrongly, so a contradiction between
the names is a refusal, and what nothing confirms is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms4.quant.gguf_file import GgufError, GgufFile

AGREE, SILENT, DOUBT, CONTRADICTION = range(4)
TYPES = ((1, "f16"), (32, "bf16"), (7, "q8_0"), (0, "f32"))  # general.file_type and its spelling, the best first
MOST_READ = 64  # headers of candidates: more lie in no folder of a model
# What stands in names and names no model: types, numbers of parts, and words that all of them have.
_TYPE = r"(?:ud[-_.])?(?:i?q\d+|tq\d+)(?:[-_](?:k|nl|[01]|x{0,2}[sl]|m))*|bf16|fp?16|fp?32|fp8|mxfp4|nvfp4|i1|imatrix"
_NO_NAME = re.compile(rf"(?<![a-z0-9])(?:{_TYPE}|\d{{5}}-of-\d{{5}}|mmproj|gguf|ggml|model|vision|clip)(?![a-z0-9])")
_BILLIONS = re.compile(r"\d+(?:\.\d+)?b")


@dataclass(frozen=True)
class Choice:
    """The tower for a model.  `doubt` is a line to say; `problem` why there is none though there are candidates."""

    path: Path | None = None
    doubt: str = ""
    problem: str = ""


@dataclass(frozen=True)
class _Names:
    """What names a model: sets of words, any of which may fit; whether they stand in the header; and its size."""

    words: tuple[frozenset[str], ...]
    in_header: bool
    size: str
    width: object


def find(model: str | os.PathLike[str], gguf: GgufFile | None = None) -> Path | None:
    """The mmproj file that belongs to a model, beside it or one folder up; None if none does."""
    return choose(model, gguf).path


def choose(model: str | os.PathLike[str], gguf: GgufFile | None = None) -> Choice:
    """As find, with what must be said of it.  gguf: the model's header, if it has been read."""
    path = Path(model)
    metadata = gguf.metadata if gguf is not None else _metadata(path)
    ours = _names(path, metadata, f"{metadata.get('general.architecture')}.embedding_length")
    refused = ""
    for folder in (path.absolute().parent, path.absolute().parent.parent):
        if not folder.is_dir():
            break
        ranked = sorted(_ranked(p, ours) for p in _candidates(folder, path))
        # One folder up is not beside the model: there, something must speak for a file, or nothing against it.
        worst = DOUBT if folder == path.absolute().parent else SILENT
        fitting = [r for r in ranked if r.verdict <= worst]
        if fitting:
            return _best(fitting, path)
        if ranked and not refused and (ranked[0].verdict == CONTRADICTION):
            refused = f"{ranked[0].path.name[-80:]} beside the model belongs to another model: {ranked[0].reason}"
    return Choice(problem=refused)


@dataclass(frozen=True, order=True)
class _Ranked:
    """A candidate; the order is that of preference."""

    verdict: int
    n_other: int  # less the words in common
    type: int
    path: Path
    reason: str
    identity: frozenset[str]


def _best(fitting: list[_Ranked], model: Path) -> Choice:
    first = fitting[0]
    rivals = {r.identity for r in fitting if r.verdict == first.verdict}
    if first.verdict != AGREE and len(rivals) > 1:
        names = ", ".join(r.path.name[-60:] for r in fitting[:3])
        return Choice(problem=f"several mmproj files lie beside {model.name[-60:]} and none names it: {names}")
    doubt = ""
    if first.verdict != AGREE:
        why = first.reason or "nothing names it as this model's"
        doubt = f"{first.path.name[-80:]} may belong to another model ({why}); --mmproj FILE names the right one"
    return Choice(first.path, doubt)


def _candidates(folder: Path, model: Path) -> list[Path]:
    try:
        names = sorted(name for name in os.listdir(folder) if "mmproj" in name.lower())
    except OSError:
        return []
    paths = (folder / name for name in names if name.lower().endswith(".gguf") and name != model.name)
    return [path for path in paths if path.is_file()][:MOST_READ]


def _metadata(path: Path) -> Mapping[str, Any]:
    try:
        return GgufFile.open(path).metadata
    except (GgufError, OSError):
        return {}  # the name must do; whoever opens the file says what is wrong with it


def _names(path: Path, metadata: Mapping[str, Any], width: str) -> _Names:
    keys = ["general.name", "general.basename"]
    keys += [key for key in metadata if key.startswith("general.base_model.") and key.endswith(".name")]
    header = [value for key in keys if type(value := metadata.get(key)) is str]
    found = _worded(header)
    size = metadata.get("general.size_label")
    size = size.lower() if type(size) is str else ""
    return _Names(found or _worded([path.stem]), bool(found), size, metadata.get(width))


def _worded(names: Iterable[str]) -> tuple[frozenset[str], ...]:
    split = (frozenset(re.findall(r"[a-z0-9]+", _NO_NAME.sub(" ", name.lower()))) for name in names)
    return tuple(dict.fromkeys(words for words in split if words))


def _ranked(path: Path, ours: _Names) -> _Ranked:
    metadata = _metadata(path)
    theirs = _names(path, metadata, "clip.vision.projection_dim")
    identity = frozenset().union(*theirs.words)
    verdict, n_common = SILENT, 0
    pairs = [(_compared(a, b), len(a & b)) for a in ours.words for b in theirs.words]
    if pairs:
        verdict, n_common = min(pairs, key=lambda pair: (pair[0], -pair[1]))
    reason = ""
    if pairs and verdict != AGREE:
        a, b = (" ".join(sorted(names.words[0]))[:60] for names in (theirs, ours))
        reason = f"it names {a}, the model {b}"
    if verdict == CONTRADICTION and not (ours.in_header and theirs.in_header):
        verdict = DOUBT  # people rename files
    # The label of a tower is that of the model where it is of billions; else it counts the tower's own weights.
    sizes = [label for label in (ours.size, theirs.size) if _BILLIONS.fullmatch(label) and float(label[:-1]) >= 3]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        verdict, reason = CONTRADICTION, f"it is of a model of {sizes[1].upper()}, this one has {sizes[0].upper()}"
    if type(ours.width) is int and type(theirs.width) is int and ours.width != theirs.width:
        verdict, reason = CONTRADICTION, f"it gives {theirs.width} values a token, the model takes {ours.width}"
    return _Ranked(verdict, -n_common, _type_rank(path, metadata), path, reason, identity)


def _compared(a: frozenset[str], b: frozenset[str]) -> int:
    """Whether two names can be of one model: sizes, versions and dates, then the other words."""
    numbers = [frozenset(word for word in words if re.search(r"\d", word)) for words in (a, b)]
    if not (numbers[0] <= numbers[1] or numbers[1] <= numbers[0]):
        return CONTRADICTION
    n_common, n_own = len(a & b), min(len(a - b), len(b - a))
    if n_common <= n_own:  # Mistral Large and Mistral Small
        return CONTRADICTION
    return DOUBT if n_own else AGREE


def _type_rank(path: Path, metadata: Mapping[str, Any]) -> int:
    kind = metadata.get("general.file_type")
    for rank, (number, spelled) in enumerate(TYPES):
        named = re.search(rf"(?<![a-z0-9]){spelled}(?![a-z0-9])", path.stem.lower())
        if kind == number if type(kind) is int else named:
            return rank
    return len(TYPES)
