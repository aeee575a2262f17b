"""`ms4 ls`, `ms4 rm` and `ms4 verify`: the models in the cache that programs for Hugging Face share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ms4.cli import errors, streams
from ms4.cli.errors import MissingError, UsageError
from ms4.cli.render import StatusLine, gigabytes
from ms4.models import hf_cache, stored, variants
from ms4.models.hf_cache import blob_of
from ms4.models.stored import Stored, Unfinished

if TYPE_CHECKING:
    from ms4.models.verify import Check


# --- ls


def ls(*, as_json: bool) -> int:
    """A line for each model: its name, its size, what else is to be known."""
    rows = [_row(s) for s in stored.everything()]
    rows += [_unfinished_row(u) for repo in hf_cache.repositories() for u in stored.unfinished(repo)]
    output = streams.Output()
    if as_json:
        output.write(json.dumps(rows) + "\n")
        return errors.OK
    if not rows:
        errors.note(f"no model that ms4 runs is in {hf_cache.root()}; to get one:  ms4 pull")
    names = [errors.escape(row["name"]) for row in rows]
    width = max(map(len, names), default=0)
    for name, row in zip(names, rows, strict=True):
        about = [gigabytes(row["bytes"])]
        if not row["complete"]:
            about[0] += f" here, not complete:  ms4 pull {name}"
        if row["parts"] > 1:
            about[0] += f" in {row['parts']} parts"
        if row["complete"]:
            about.append("text and images" if row["mmproj"] else "text")
        output.write(f"{name:<{width}}  {', '.join(about)}\n")
    return errors.OK


def _row(found: Stored) -> dict[str, Any]:
    tower = found.tower()
    return {
        "name": found.name,
        "bytes": found.bytes,
        "complete": True,
        "parts": len(found.paths),
        "path": os.fspath(found.paths[0]),
        "mmproj": None if tower is None else os.fspath(tower),
        "commit": found.snapshot.name,
    }


def _unfinished_row(found: Unfinished) -> dict[str, Any]:
    empty = dict.fromkeys(("path", "mmproj", "commit"))
    return {"name": found.name, "bytes": found.bytes, "complete": False, "parts": 0, **empty}


# --- rm


def rm(name: str, *, yes: bool, dry_run: bool, quiet: bool) -> int:
    """Takes a model away, whole or not, and whatever nothing else leads to."""
    repo, quant = _named(name)
    what = stored.removal(repo, quant)
    title = f"{repo.repo}:{quant}"
    if not what.links and not what.files:
        raise MissingError(f"{title} is not on this machine", "ms4 ls shows what is")
    if dry_run:
        streams.Output().write("".join(f"{path}\n" for path in (*what.links, *what.files)))
        return errors.OK
    if not yes and not _confirmed(f"remove {title} ({gigabytes(what.bytes)})?"):
        errors.note("nothing was removed")
        return errors.FAILURE
    stored.remove(what)
    if not quiet:
        errors.note(f"removed {title}: {gigabytes(what.bytes)}")
    return errors.OK


def _named(name: str) -> tuple[hf_cache.Cached, str]:
    """The repository and the quantization of a model that is here, or of which a part is."""
    if os.path.lexists(name):
        raise UsageError(f"{name[-80:]} is a file: ms4 rm takes a name of ms4 ls", f"rm {name[-80:]}")
    try:
        found = stored.find(name)
        return found.repo, found.variant.quant
    except stored.NotStoredError:
        wanted = variants.parse(name)
        if wanted is None:
            raise
        parts = [u for repo in hf_cache.repositories() for u in stored.unfinished(repo)]
        same = [
            u
            for u in parts
            if wanted.repo.lower() in ("", u.repo.repo.lower()) and wanted.quant.lower() in ("", u.quant.lower())
        ]
        if len(same) != 1:
            raise
        return same[0].repo, same[0].quant


def _confirmed(question: str) -> bool:
    if not (streams.is_terminal(sys.stdin) and streams.is_terminal(sys.stderr)):
        raise UsageError("nobody is there to say yes", "-y removes without a question, --dry-run shows what would go")
    sys.stderr.write(f"ms4: {question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# --- verify


def verify(names: list[str], *, repair: bool, as_json: bool, quiet: bool) -> int:
    """Reads files and compares their SHA-256; 5, if one is wrong and stays so."""
    status = StatusLine(quiet)
    rows = []
    output = streams.Output()
    for title, path in _files(names):
        row = _verified(title, path, status, repair, quiet)
        rows.append(row)
        if not as_json:
            output.write(f"{row['result']:<8}  {errors.escape(title)}{row['text']}\n")
    if as_json:
        output.write(json.dumps([{k: v for k, v in row.items() if k != "text"} for row in rows]) + "\n")
    if not rows:
        errors.note(f"no model is in {hf_cache.root()}")
    return errors.MISSING if any(row["result"] == "wrong" for row in rows) else errors.OK


def _files(names: list[str]) -> Iterator[tuple[str, Path]]:
    """What to call a file, and its path: of the models that were named, or of all that are here; towers once."""
    models = [stored.find(name) for name in names if not os.path.lexists(name)]
    if not names:
        models = stored.everything()
    seen = set()
    for model in models:
        tower = model.tower()
        for path in [*model.paths, *([tower] if tower else [])]:
            if path not in seen:
                seen.add(path)
                yield f"{model.repo.repo}/{path.relative_to(model.snapshot).as_posix()}", path
    for name in names:
        if os.path.lexists(name):
            yield name, Path(name).absolute()


def _verified(title: str, path: Path, status: StatusLine, repair: bool, quiet: bool) -> dict[str, Any]:
    from ms4.models import verify as verifying

    row: dict[str, Any] = {"name": title, "path": os.fspath(path), "sha256": None, "text": ""}
    blob = blob_of(path)
    if blob is None:
        return {**row, "result": "unknown", "text": ": nothing says what its sha256 has to be"}
    try:
        found = verifying.check(blob, _progress(status, f"checking {path.name}"))
    finally:
        status.clear()
    row |= {"sha256": found.digest, "wanted": blob.name, "bytes": found.bytes}
    if found.right:
        return {**row, "result": "right"}
    text = damage(found)
    if not repair:
        return {**row, "result": "wrong", "text": f": {text}; ms4 verify --repair reads it again"}
    if not quiet:
        errors.note(f"{title}: {text}")
    n_fetched = _repair(path, found, status, quiet)
    return {**row, "result": "repaired", "sha256": blob.name, "text": f": {gigabytes(n_fetched)} read again"}


def damage(found: Check) -> str:
    """What is wrong with a file, in words."""
    if found.damaged is None:
        return f"its sha256 is {found.digest}, and nothing tells which part is damaged"
    n_bytes = sum(piece.bytes for piece in found.damaged)
    return f"its sha256 is {found.digest}; {len(found.damaged)} pieces are damaged, {gigabytes(n_bytes)}"


def _repair(path: Path, found: Check, status: StatusLine, quiet: bool) -> int:
    from ms4.cli.pull import connected
    from ms4.models import acquire
    from ms4.models import verify as verifying

    def waiting(name: str) -> None:
        if not quiet:
            errors.note(f"another process fetches {name}: waiting for it")

    with connected() as web:
        try:
            return verifying.repair(
                web,
                path,
                found,
                acquire.Means(waiting=waiting),
                lambda p: status.show(f"repairing {path.name}  {gigabytes(p.n_hashed)} of {gigabytes(p.bytes)} right"),
            )
        finally:
            status.clear()


def _progress(status: StatusLine, text: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        if total:
            status.show(f"{text}  {100 * done // total} %  {gigabytes(done)} of {gigabytes(total)}")

    return show
