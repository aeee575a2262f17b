"""`ms4 pull`: gets a model into the cache that programs for Hugging Face share.

stdout has the path of the model, or one JSON object; the plan, the progress and what happened are notes on stderr.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ms4.cli import errors, expected, render, streams
from ms4.cli.errors import MissingError, UsageError
from ms4.cli.render import StatusLine, gigabytes
from ms4.models import hf_cache, repositories, stored, variants
from ms4.models.variants import Wanted

if TYPE_CHECKING:
    from ms4.models import forecast
    from ms4.models.acquire import Plan, State
    from ms4.models.web import Web

SECONDS_BETWEEN_NOTES = 30.0  # where there is no terminal to show the progress on
WINDOW = 20.0  # seconds over which the speed is the mean


@dataclass(frozen=True)
class Request:
    """The options of a pull."""

    name: str
    revision: str = "main"
    update: bool = False
    tower: bool = True
    anyway: bool = False
    dry_run: bool = False
    jobs: int = 4
    limit: int = 0  # bytes a second; 0: none
    offline: bool = False
    as_json: bool = False
    quiet: bool = False


def pull(request: Request) -> int:
    """Plans, says the plan, fetches, and prints where the model is."""
    wanted = variants.parse(request.name) if request.name else Wanted()
    if wanted is None:
        raise UsageError(
            f"{request.name[-80:]} names no model", "ms4 pull USER/REPO:QUANT   or   ms4 pull Q4_K_M   or   ms4 pull"
        )
    wanted = Wanted(wanted.repo or repositories.DEFAULT.repo, wanted.quant)
    row = repositories.known(wanted.repo)
    if row is not None and not row.has_gguf:
        hint = "a GGUF of it that you know of: ms4 pull USER/REPO:QUANT"
        raise MissingError(f"{row.repo} has no GGUF files, and no repository with some was known", hint)
    if here := _here(wanted, request):
        return _report(request, here.name, [os.fspath(p) for p in here.paths], here.tower(), here.bytes)
    if _is_offline(request):
        name = f"{wanted.repo}:{wanted.quant}".rstrip(":")
        raise MissingError(f"{name} is not on this machine, and the network may not be used", "ms4 ls shows what is")
    with connected() as web:
        return _from_hub(web, wanted, request)


def _is_offline(request: Request) -> bool:
    return request.offline or hf_cache.is_offline()


def _here(wanted: Wanted, request: Request) -> stored.Stored | None:
    """The model, if it is here and nothing has to be asked: what is here needs no network."""
    offline = _is_offline(request)
    if request.update or (not wanted.quant and not offline) or request.dry_run:
        return None
    try:
        found = stored.find(f"{wanted.repo}:{wanted.quant}".rstrip(":"))
    except stored.NotStoredError:
        return None
    return found if offline or not request.tower or found.tower() is not None else None


@contextmanager
def connected() -> Iterator[Web]:
    """Connections to the hub of the environment."""
    from ms4.models import hub
    from ms4.models.web import Web

    web = Web(hub.endpoint(), hf_cache.token())
    try:
        yield web
    finally:
        web.close()


def _from_hub(web: Web, wanted: Wanted, request: Request) -> int:
    from ms4.models import acquire

    status = StatusLine(request.quiet)
    status.show(f"asking {wanted.repo}")
    if not request.quiet:
        web.trying_again = lambda reason: errors.note(f"{reason}; trying again")
    try:
        plan = acquire.plan(web, wanted, request.revision, request.tower, expected.this_machine())
    finally:
        status.clear()
    if not request.quiet:
        for line in described(plan):
            errors.note(line)
    if not plan.fits and not request.anyway:
        raise acquire.DoesNotFitError(
            f"{plan.name} needs {gigabytes(plan.n_needed)} of memory, this machine has {gigabytes(plan.n_memory or 0)}",
            f"ms4 pull {plan.listing.repo} takes the largest that fits; --anyway gets this one all the same",
        )
    if request.dry_run:
        return _report(request, plan.name, [file.name for file in plan.files], None, plan.bytes)
    paths = _fetch(web, plan, request, status)
    n = len(plan.variant.names)
    return _report(
        request, plan.name, [os.fspath(p) for p in paths[:n]], paths[n] if plan.tower else None, plan.bytes, plan
    )


def _fetch(web: Web, plan: Plan, request: Request, status: StatusLine) -> list[Path]:
    """The paths of the files, when all of them are here and checked."""
    from ms4.models import acquire
    from ms4.models.download import Throttle

    shown = Shown(status, request.quiet)
    means = acquire.Means(
        jobs=request.jobs,
        throttle=Throttle(request.limit),
        show=shown.show,
        waiting=lambda name: shown.say(f"another process fetches {name}: waiting for it"),
    )
    try:
        paths = acquire.fetch(web, plan, means)
    except KeyboardInterrupt:
        status.clear()
        shown.say(f"stopped; to go on where it was:  ms4 pull {plan.name}")
        raise
    finally:
        status.clear()
    if shown.n_fetched:
        shown.say(f"{gigabytes(shown.n_fetched)} read, the sha256 of each file is right")
    else:
        shown.say("all of it was here already")
    return paths


def _report(
    request: Request, name: str, paths: list[str], tower: Path | None, n_bytes: int, plan: Plan | None = None
) -> int:
    output = streams.Output()
    if not request.as_json:
        output.write("".join(f"{path}\n" for path in (paths if request.dry_run else paths[:1])))
        return errors.OK
    value: dict[str, Any] = {"name": name, "paths": paths, "bytes": n_bytes}
    value["mmproj"] = None if tower is None else os.fspath(tower)
    if plan is not None:
        value |= {"commit": plan.listing.commit, "sha256": {file.name: file.sha256 for file in plan.files}}
    output.write(json.dumps(value) + "\n")
    return errors.OK


def described(plan: Plan) -> list[str]:
    """The plan in lines: what it is, whether it runs here, what is to be fetched."""
    parts = f" in {len(plan.variant.names)} parts" if len(plan.variant.names) > 1 else ""
    model = gigabytes(plan.bytes - sum(f.bytes for f in plan.files if f.name == plan.tower))
    tower = f", and {plan.tower} for images" if plan.tower else ""
    lines = [f"{plan.name} ({plan.model[:60] or 'no name'}): {model}{parts}{tower}"]
    memory = f"runs here: needs {gigabytes(plan.n_needed)} of memory with 32K tokens"
    if plan.n_memory is None:
        memory += ", and the kernel does not say how much there is"
    elif not plan.fits:
        memory = f"too large for this machine: it has {gigabytes(plan.n_memory)} of memory"
    elif plan.forecast.load == "stream":
        memory = on_disk(plan)
    elif plan.n_free_memory is not None and plan.n_needed > plan.n_free_memory:
        memory += f"; only {gigabytes(plan.n_free_memory)} of {gigabytes(plan.n_memory)} are free now"
    else:
        memory += f", there are {gigabytes(plan.n_memory)}"
    lines.append(memory)
    lines += on_card(plan)
    lines += plan.notes
    if plan.n_missing:
        rest = "" if plan.n_missing == plan.bytes else f" of {gigabytes(plan.bytes)}"
        lines.append(f"to be read: {gigabytes(plan.n_missing)}{rest}; {gigabytes(plan.n_free_disk)} of disk are free")
    return lines


def on_card(plan: Plan) -> list[str]:
    """What a card takes of it, in a line; none without one."""
    made, here = plan.forecast, plan.here
    if not made.n_vram:
        return [f"{here.card} has too little free memory for it: the CPU would compute all"] if here.card else []
    share = 100 * made.n_vram // max(made.n_experts, 1)
    where = f"{here.card}: all but experts, and {share} % of those, lie on it"
    if here.machine.card is None:
        return [f"{where}; how fast that is, is not known, as the table of cards does not have it"]
    if made.load == "stream" or not made.fits:  # the line about the disk has said how fast
        return [where]
    return [f"{where}; {speeds(made, 0)}"]


def speeds(made: forecast.Plan, digits: int) -> str:
    slow, usual = (f"{one.tokens_per_s:.{digits}f}" for one in (made.warm, made.usual))
    return f"about {slow} tok/s of writing, in coherent text up to {usual} (predicted; ms4 plan says more)"


def on_disk(plan: Plan) -> str:
    """Of a model whose experts do not all fit into memory: what that means."""
    made = plan.forecast
    share = 100 * made.n_ram // max(made.n_experts, 1)
    others = "the others on the card or on the disk" if made.n_vram else "the others on the disk"
    return (
        f"larger than the {gigabytes(plan.n_memory or 0)} of memory, but it runs: {share} % of the experts in memory, "
        f"{others}; {speeds(made, 1)}"
    )


class Shown:
    """The progress: one line on a terminal, else a note now and then."""

    def __init__(self, status: StatusLine, quiet: bool) -> None:
        self._status, self._quiet = status, quiet
        self._seen: list[tuple[float, int]] = []  # moments of the last seconds, and what had come by then
        self._noted = time.monotonic()
        self.n_fetched = 0

    def say(self, text: str) -> None:
        if not self._quiet:
            self._status.clear()
            errors.note(text)

    def show(self, state: State) -> None:
        now = time.monotonic()
        self.n_fetched = state.n_fetched
        self._seen = [(t, n) for t, n in self._seen if now - t < WINDOW] + [(now, state.n_fetched)]
        first, n_first = self._seen[0]
        speed = (state.n_fetched - n_first) / (now - first) if now - first > 0.5 else 0.0
        text = progress(state, speed)
        if self._status.enabled:
            self._status.show(text)
        elif not self._quiet and now - self._noted >= SECONDS_BETWEEN_NOTES:
            self._noted = now
            errors.note(text)


def progress(state: State, speed: float) -> str:
    """One line, the most important first: a narrow terminal cuts it.  speed: bytes a second."""
    left = state.bytes - state.n_held
    text = f"{100 * state.n_held // max(state.bytes, 1)} %  {gigabytes(state.n_held)} of {gigabytes(state.bytes)}"
    if left and state.trouble:
        return f"{text}  trying again: {state.trouble}"
    if left and speed:
        text += f"  {gigabytes(int(speed))}/s  {duration(left / speed)} left"
    return f"{text}  {gigabytes(state.n_hashed)} checked"


def duration(seconds: float) -> str:
    minutes = int(seconds / 60 + 0.5)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d}"
    return f"{minutes} min" if minutes else f"{int(seconds) + 1} s"


def listed(as_json: bool) -> int:
    """The repositories that are known, from the table: no network."""
    rows = repositories.REPOSITORIES
    output = streams.Output()
    if as_json:
        from dataclasses import asdict

        output.write(json.dumps([asdict(row) for row in rows]) + "\n")
        return errors.OK
    for row in rows:
        output.write(f"{row.repo}{'  (' + row.name + ')' if row.name else ''}: {row.model}\n")
        if not row.has_gguf:
            output.write("  no GGUF known\n")
        for known in row.files:
            about = "" if known.exact or not known.bytes else "about "
            size = f"{about}{render.gigabytes(known.bytes)}" if known.bytes else "size not known"
            parts = f" in {known.n_parts} parts" if known.n_parts > 1 else ""
            output.write(f"  {known.quant:<12} {size}{parts}\n")
    output.write("From model cards, not compared with the hub; ms4 pull --dry-run asks it.\n")
    return errors.OK
