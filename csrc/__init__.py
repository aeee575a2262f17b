"""ms4: the engine as Python sees it.  Only this module touches ffi and lib.

An `Engine` is one loaded model; a `Session` is one line of tokens in it.  Both are closed by `with` or `close()`.
What is in a file, and what its shapes mean, is the business of `ms4.models`: here arrive a checked `Shape` and a list
of `Tensor`, and the C core checks once more that every range lies inside its file.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._core import ffi, lib
from .facts import Allowance, Gpu, Limits, Machine, Stats
from .shapes import Shape, Tensor, VisionShape

if TYPE_CHECKING:  # at run time only where arrays are made: `ms4 --version` starts without it
    import numpy as np
    from typing_extensions import Self

__version__ = "0.1.0"
ROW = -1  # in `Session.feed`: this position takes the next row of `rows`
MOST_HIGHEST: int = lib.MS4_MOST_HIGHEST  # of a `Span`
NOT_FINITE = "the model gave a logit that is not a finite number; the file is damaged (compare its checksum)"
LOAD = {"auto": 0, "map": 1, "copy": 2, "stream": 3}
DEVICE = {"cpu": 0, "auto": 1, "cuda": 2, "cuda:safe": 3}

# The roles of tensors, by the GGUF name without "blk.N." and ".weight".
ROLES = {
    name.lower(): getattr(lib, f"MS4_{name}")
    for name in (
        "TOKEN_EMBD OUTPUT_NORM OUTPUT ATTN_NORM ATTN_Q_A ATTN_Q_A_NORM ATTN_Q_B ATTN_KV_A_MQA ATTN_KV_A_NORM "
        "ATTN_K_B ATTN_V_B ATTN_KV_B ATTN_OUTPUT FFN_NORM FFN_GATE FFN_UP FFN_DOWN FFN_GATE_INP FFN_GATE_EXPS "
        "FFN_UP_EXPS FFN_DOWN_EXPS FFN_GATE_UP_EXPS FFN_GATE_SHEXP FFN_UP_SHEXP FFN_DOWN_SHEXP"
    ).split()
}

# The same for a vision tower: "v." and "mm." names without "blk.N." and ".weight".
VISION_ROLES = {
    name: getattr(lib, "MS4_" + name.upper().replace(".", "_"))
    for name in (
        "v.patch_embd v.pre_ln v.ln1 v.ln2 v.attn_q v.attn_k v.attn_v v.attn_out v.ffn_gate v.ffn_up v.ffn_down "
        "mm.input_norm mm.patch_merger mm.1 mm.1_bias mm.2 mm.2_bias"
    ).split()
}


class EngineError(Exception):
    """The engine could not do it; `status` is one of the MS4_ codes."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Canceled(EngineError):
    """A stop flag (or a progress callback that answered True) ended the call."""


class ContextFull(EngineError):
    """The session has no room for so many positions."""


class NotFinite(EngineError):
    """The model gave a number that is not finite."""


class DeviceError(EngineError):
    """There is no GPU that can be used, or it failed."""


def check(status: int) -> None:
    """Raises what the engine's last failure was, unless status is 0."""
    if status:
        raise failure(status, ffi.string(lib.ms4_error()).decode("utf-8", "replace"))


def failure(status: int, message: str) -> Exception:
    """The exception that a status other than 0 stands for."""
    if status == lib.MS4_EARG:
        return ValueError(message)
    if status == lib.MS4_ENOMEM:
        return MemoryError(message)
    kinds = {lib.MS4_ECANCELED: Canceled, lib.MS4_EFULL: ContextFull, lib.MS4_ENUMBER: NotFinite}
    kinds[lib.MS4_EDEVICE] = DeviceError
    return kinds.get(status, EngineError)(message, status)


def probe() -> Machine:
    """The kernel table and the number of threads that this process would use."""
    out = ffi.new("ms4_machine *")
    check(lib.ms4_probe(out))
    return Machine(ffi.string(out.isa).decode(), out.n_threads)


def gpu() -> Gpu:
    """The GPU that `device="cuda"` would take; DeviceError says why there is none."""
    out = ffi.new("ms4_gpu *")
    check(lib.ms4_gpu_probe(out))
    name, bus = (ffi.string(text).decode("utf-8", "replace") for text in (out.name, out.bus))
    driver = f"{out.driver // 1000}.{out.driver % 1000 // 10}"
    return Gpu(name, bus, driver, f"{out.major}.{out.minor}", out.n_multiprocessors, out.total, out.free)


def has_gpu_code() -> bool:
    """Whether this installation has kernels for GPUs."""
    given = os.environ.get("MS4_GPU_CODE")
    return os.path.exists(given or os.path.join(os.path.dirname(__file__), "cuda", "kernels.fatbin"))


def allowed(root: str | os.PathLike[str] = "") -> Allowance:
    """What this process may have now.  root: the folder above proc and sys, for tests."""
    out = ffi.new("ms4_allowance *")
    lib.ms4_allowed(os.fsencode(root), out)
    cpus_file, limit_file = (os.fsdecode(ffi.string(name)) for name in (out.cpus_file, out.limit_file))
    return Allowance(
        n_threads=out.n_threads,
        n_affinity=out.n_affinity,
        cpus=out.cpus if cpus_file else None,
        cpus_file=cpus_file,
        total=out.total,
        available=out.available,
        limit=out.limit if limit_file else None,
        used=out.used,
        limit_file=limit_file,
        room=out.room if out.available or limit_file else None,
    )


def choose_load(
    weights: float,
    streamed: float,
    besides: float,
    room: float | None,
    *,
    reserve: float = 0,
    available: float | None = None,
    cached: float = 0.0,
    limited: bool = False,
) -> str:
    """How weights are loaded where nobody says it: "map", "copy" or "stream".  In bytes.

    streamed: of the weights, what may stay on the disk.  besides: what will be needed beside them.  room: for this
    process, of which reserve is for others (limited: the user's word, so that there is none); None: nobody knows.
    available: of the machine, whatever limits this process has.  cached: the share of weights in the page cache.
    """
    need = ffi.new("ms4_need *")
    need.weights, need.streamed, need.besides, need.reserve = map(int, (weights, streamed, besides, reserve))
    need.room, need.available = int(room or 0), int(available or room or 0)
    need.cached, need.limited = cached, limited
    return load_named(lib.ms4_choose_load(need))


def load_named(code: int) -> str:
    return next(name for name, known in LOAD.items() if known == code)


def tensor_table(tensors: Sequence[Tensor], roles: dict[str, int]) -> tuple[Any, list[Any]]:
    """The C table of the tensors, and what must stay alive while it is used."""
    import numpy as np

    keep: list[Any] = []
    table = ffi.new("ms4_tensor[]", len(tensors))
    for row, t in zip(table, tensors, strict=True):
        row.role, row.layer, row.type, row.file = roles[t.role], t.layer, t.type, t.file
        row.offset, row.bytes, row.dims = t.offset, t.bytes, tuple(t.dims)
        if t.scales is not None:
            keep.append(ffi.from_buffer("float[]", np.ascontiguousarray(t.scales, np.float32)))
            row.scales = keep[-1]
    return table, keep


class StopFlag:
    """Ends what it is given to, once it is set: by any thread, at any time, before or during the call.  Never reset."""

    def __init__(self) -> None:
        self._flag = ffi.new("int32_t *")

    def set(self) -> None:
        lib.ms4_stop(self._flag)  # a plain store would race with whoever looks

    def is_set(self) -> bool:
        return bool(self._flag[0])


def flag_of(stop: StopFlag | None) -> Any:
    return ffi.NULL if stop is None else stop._flag


@dataclass(frozen=True)
class Span:
    """Tokens to be appended to a session in a step: ids int32 [n]; ROW takes the next row of rows float32 [k, d_model].

    The logits of the last n_logits positions are wanted; with n_highest, of their first n_among the highest alone.
    """

    session: Session
    ids: np.ndarray
    rows: np.ndarray | None = None
    n_logits: int = 1
    stop: StopFlag | None = None
    n_highest: int = 0  # at most MOST_HIGHEST
    n_among: int = 0


@dataclass(frozen=True)
class Highest:
    """The highest logits of each row, float32 [n, n_highest], and their ids, int32: ascending; of equal ones the first.

    With top_k = n_highest, or if it is 1 and the temperature 0, they are all that choosing a token takes.
    """

    logits: np.ndarray
    ids: np.ndarray

    def __getitem__(self, row: int) -> Highest:
        return Highest(self.logits[row], self.ids[row])


class Engine:
    """One loaded model.  Made by `Engine.open`."""

    def __init__(self, handle: Any, shape: Shape) -> None:
        self._handle = handle
        self._children: weakref.WeakSet[Session | Vision] = weakref.WeakSet()
        self._watch: Any = None
        self.shape = shape

    @classmethod
    def open(
        cls,
        shape: Shape,
        tensors: Sequence[Tensor],
        paths: Sequence[str | os.PathLike[str]],
        *,
        threads: int = 0,
        load: str = "auto",
        n_batch: int = 0,
        ram: int = 0,
        device: str = "cpu",
        vram: int = 0,
        patience: int = 0,
        pinned: bool = True,
        code: str = "",
        progress: Callable[[int, int], bool] | None = None,
    ) -> Engine:
        """Opens the files and checks the table.  threads, n_batch, ram: 0 chooses.

        load: "map" uses the file's pages, "copy" copies them; with "stream" experts stay on the disk and are read when
        they are needed, and this process takes at most `ram` bytes of memory.

        device: "cpu"; "cuda", which raises DeviceError where there is no GPU; "auto", a GPU where there is one that can
        do it; "cuda:safe", which waits for every call of it.  vram: bytes of its memory to use, 0: what is free.
        patience: seconds after which a GPU that does not answer has failed; 0: 120.  pinned: False: as where the system
        pins no memory for copies to it.  code: a file with its kernels; "": those that came with ms4.

        progress(bytes done, bytes in all) is called while weights are copied; True ends the opening with Canceled.
        """
        c_shape = ffi.new("ms4_shape *")
        for name, value in shape.__dict__.items():
            if name == "rope_freq":
                c_shape.rope_freq[0 : len(value)] = list(value)
            else:
                setattr(c_shape, name, value)
        table, keep = tensor_table(tensors, ROLES)
        names = [ffi.new("char[]", os.fsencode(p)) for p in paths]
        options = ffi.new("ms4_options *")
        options.n_threads, options.load, options.n_batch, options.ram = threads, LOAD[load], n_batch, ram
        options.device, options.vram, options.patience = DEVICE[device], vram, patience
        options.unpinned = not pinned
        keep.append(ffi.new("char[]", os.fsencode(code or os.path.dirname(__file__))))
        options.code = keep[-1]
        if progress is not None:
            call = ffi.callback("int(uint64_t, uint64_t, void *)", lambda done, total, _: int(progress(done, total)))
            keep.append(call)
            options.progress = call
        out = ffi.new("ms4_engine **")
        check(lib.ms4_engine_open(c_shape, table, len(tensors), ffi.new("char *[]", names), len(names), options, out))
        return cls(out[0], shape)

    def measure(self, most: int) -> Limits:
        """The limits of this machine for this engine; at most so many bytes of its weights are read."""
        out = ffi.new("ms4_limits *")
        check(lib.ms4_measure(self._live(), most, out))
        return Limits(*(getattr(out, limit.name) for limit in fields(Limits)))

    @cached_property
    def n_batch(self) -> int:
        """The most tokens of a step."""
        return self.stats().n_batch

    def step(self, spans: Sequence[Span]) -> list[np.ndarray | Highest | EngineError]:
        """Appends the spans, of different sessions, all at once: at most n_batch tokens together.

        For each its logits, float32 [n_logits, n_vocab], or the highest of them, where it wants no others; or why its
        session is as it was before: Canceled or NotFinite.  Any other failure is raised, and then nothing was appended.
        Ctrl-C does not interrupt it; a stop flag does.
        """
        import numpy as np

        keep: list[Any] = []
        table = ffi.new("ms4_span[]", len(spans))
        n_logits = [0 if span.n_highest else span.n_logits for span in spans]
        out = np.empty((sum(n_logits), self.shape.n_vocab), np.float32)
        rooms: list[np.ndarray | Highest] = [
            room_of(span) if span.n_highest else out[end - n : end]
            for span, end, n in zip(spans, accumulate(n_logits), n_logits, strict=True)
        ]
        for row, span, room in zip(table, spans, rooms, strict=True):
            keep += span_row(row, span, room, self.shape.d_model)
        status = lib.ms4_step(self._live(), table, len(spans))
        alone = (lib.MS4_OK, lib.MS4_ECANCELED, lib.MS4_ENUMBER)
        if any(row.status not in alone for row in table) or status not in alone:
            check(status)
        message = ffi.string(lib.ms4_error()).decode("utf-8", "replace") if status else ""
        said = {lib.MS4_ECANCELED: "canceled", status: message}
        return [
            failure(row.status, said.get(row.status, NOT_FINITE)) if row.status else room  # type: ignore[misc]
            for row, room in zip(table, rooms, strict=True)
        ]

    def watch(self, routed: Callable[[int, np.ndarray | None], None] | None) -> None:
        """routed(layer, ids int32 [n_tokens, n_expert_used]) is told what the router chose, in the thread of the step.

        routed(-1, None): that step has ended well.  It may not call the engine.  None: nobody is told any more.
        """
        import numpy as np

        if routed is None:
            lib.ms4_engine_watch(self._live(), ffi.NULL, ffi.NULL)
            self._watch = None
            return
        k = self.shape.n_expert_used

        def call(layer: int, n: int, ids: Any, _: Any) -> None:
            told = None if layer < 0 else np.frombuffer(ffi.buffer(ids, 4 * n * k), np.int32).reshape(n, k).copy()
            routed(layer, told)

        watch = ffi.callback("void(int32_t, int32_t, const int32_t *, void *)", call)
        lib.ms4_engine_watch(self._live(), watch, ffi.NULL)
        self._watch = watch  # until now a step may have used the one before

    def place_experts(self, place: np.ndarray | None) -> None:
        """For the tests: which experts a second CPU device computes, [n_layer, n_expert] of 0 or 1; None: none."""
        import numpy as np

        if place is None:
            check(lib.ms4_engine_place(self._live(), ffi.NULL))
            return
        place = np.ascontiguousarray(place, np.uint8)
        if place.shape != (self.shape.n_layer, self.shape.n_expert):
            raise ValueError(f"places of {place.shape}; expected {(self.shape.n_layer, self.shape.n_expert)}")
        check(lib.ms4_engine_place(self._live(), ffi.from_buffer("uint8_t[]", place)))

    def uses(self) -> bytes:
        """What has been used of experts that stay on the disk, for `warm` the next time; empty if none stay there."""
        n = lib.ms4_engine_uses(self._live(), ffi.NULL, 0)
        out = ffi.new("uint8_t[]", n)
        lib.ms4_engine_uses(self._live(), out, n)
        return bytes(ffi.buffer(out, n))

    def warm(self, uses: bytes) -> None:
        """Begins to read what was used most, in the background.  EngineError: these are not the uses of this model."""
        check(lib.ms4_engine_warm(self._live(), ffi.from_buffer(uses), len(uses)))

    def fix_slots(self, n_bytes: int) -> None:
        """For the tests: bytes of memory for experts that stay on the disk, at least one expert; 0: what fits."""
        check(lib.ms4_engine_slots(self._live(), n_bytes))

    def fix_rates(self, bus: float = 0, stream_from: int = 0) -> None:
        """For the tests: these rates of a GPU instead of what is measured; 0: as measured."""
        check(lib.ms4_engine_rates(self._live(), bus, stream_from))

    def session(self, n_ctx: int) -> Session:
        """A new, empty line of at most n_ctx tokens."""
        out = ffi.new("ms4_session **")
        check(lib.ms4_session_open(self._live(), n_ctx, out))
        session = Session(out[0], self, n_ctx)
        self._children.add(session)
        return session

    def vision(self, shape: VisionShape, tensors: Sequence[Tensor], path: str | os.PathLike[str]) -> Vision:
        """Opens a vision tower whose features fit this model; roles are keys of VISION_ROLES."""
        c_shape = ffi.new("ms4_vision_shape *", shape.__dict__)
        table, _keep = tensor_table(tensors, VISION_ROLES)
        out = ffi.new("ms4_vision **")
        check(lib.ms4_vision_open(self._live(), c_shape, table, len(tensors), os.fsencode(path), out))
        vision = Vision(out[0], shape)
        self._children.add(vision)
        return vision

    def stats(self) -> Stats:
        s = ffi.new("ms4_stats *")
        lib.ms4_engine_stats(self._live(), s)
        numbers: dict[str, Any] = {f.name: getattr(s, f.name) for f in fields(Stats)}
        load = load_named(s.load)
        words = {name: ffi.string(getattr(s, name)).decode("utf-8", "replace") for name in ("isa", "device", "note")}
        return Stats(**numbers | words | {"load": load})

    @property
    def on_gpu(self) -> bool:
        return self.stats().device != "cpu"

    @property
    def note(self) -> str:
        """That of `stats`, for who looks at it after each step."""
        s = ffi.new("ms4_stats *")
        lib.ms4_engine_stats(self._live(), s)
        return ffi.string(s.note).decode("utf-8", "replace")

    def leave_gpu(self, why: str) -> None:
        """After a failure of the GPU: the CPU computes everything from now on; the note of `stats` says so, and why.

        All sessions have been rewound to 0 before, because what they held lay on the GPU.
        """
        check(lib.ms4_engine_leave_gpu(self._live(), why.encode()))

    def close(self) -> None:
        """Frees the model, and the sessions and vision towers that are still open."""
        for child in list(self._children):
            child.close()
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.ms4_engine_close(handle)

    def _live(self) -> Any:
        if self._handle is None:
            raise ValueError("the engine is closed")
        return self._handle

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def room_of(span: Span) -> Highest:
    import numpy as np

    shape = (span.n_logits, span.n_highest)
    return Highest(np.empty(shape, np.float32), np.empty(shape, np.int32))


def span_row(row: Any, span: Span, room: np.ndarray | Highest, d_model: int) -> list[Any]:
    """Fills a row of the C table; what must stay alive while it is used."""
    import numpy as np

    ids = np.ascontiguousarray(span.ids, np.int32)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError("a span has one or more token ids")
    row.session, row.stop = span.session._live(), flag_of(span.stop)
    row.tokens, row.n = ffi.from_buffer("int32_t[]", ids), ids.size
    keep = [ids, row.tokens]
    if span.rows is not None:
        rows = np.ascontiguousarray(span.rows, np.float32)
        if rows.ndim != 2 or rows.shape[1] != d_model:
            raise ValueError(f"rows of {rows.shape}; expected (n, {d_model})")
        row.rows, row.n_rows = ffi.from_buffer("float[]", rows), rows.shape[0]
        keep += [rows, row.rows]
    row.n_logits, row.n_highest, row.n_among = span.n_logits, span.n_highest, span.n_among
    logits = room.logits if isinstance(room, Highest) else room
    if len(logits):
        row.logits = ffi.from_buffer("float[]", logits, require_writable=True)
    if len(logits) and isinstance(room, Highest):
        row.ids = ffi.from_buffer("int32_t[]", room.ids, require_writable=True)
    return [*keep, row.logits, row.ids]


class _Handle:
    """What a C object of an engine has: it is used while it lives, and closed once."""

    NAME = ""

    def __init__(self, handle: Any, close: Callable[[Any], None]) -> None:
        self._handle = handle
        self._close = close

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._close(handle)

    def _live(self) -> Any:
        if self._handle is None:
            raise ValueError(f"the {self.NAME} is closed")
        return self._handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Session(_Handle):
    """One line of tokens.  Made by `Engine.session`; its calls may not overlap, except `progress`."""

    NAME = "session"

    def __init__(self, handle: Any, engine: Engine, n_ctx: int) -> None:
        super().__init__(handle, lib.ms4_session_close)
        self.engine = engine
        self.n_ctx = n_ctx
        self._fed = (0, 0)  # of a running feed: layer-tokens in earlier steps, layer-tokens in all

    def feed(
        self,
        ids: Sequence[int] | np.ndarray,
        rows: np.ndarray | None = None,
        *,
        all_logits: bool = False,
        n_logits: int = 1,
        stop: StopFlag | None = None,
    ) -> np.ndarray:
        """Appends the tokens, in as many steps as it takes, and returns float32 logits.

        [n_vocab]: of the last position; with all_logits [n, n_vocab]; with n_logits == 0 an empty array.  An id of ROW
        takes the next row of `rows` (float32 [n_rows, d_model]: image features).  On failure the session is as it was
        before the call.
        """
        import numpy as np

        tokens = np.ascontiguousarray(ids, np.int32)
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError("feed takes one or more token ids")
        n, n_batch, n_layer, start = tokens.size, self.engine.n_batch, self.engine.shape.n_layer, self.length
        if n > self.n_ctx - start:
            message = f"{n} tokens after {start} do not fit into a context of {self.n_ctx}"
            raise ContextFull(message, lib.MS4_EFULL)
        wanted = n if all_logits else n_logits
        places, n_rows = np.flatnonzero(tokens == ROW), 0 if rows is None else len(rows)
        if len(places) != n_rows:
            raise ValueError(f"{len(places)} positions take a row, but there are {n_rows} rows")
        found = []
        try:
            for at in range(0, n, n_batch):
                end = min(at + n_batch, n)
                part = None if rows is None else rows[slice(*np.searchsorted(places, (at, end)))]
                self._fed = (at * n_layer, n * n_layer)
                span = Span(self, tokens[at:end], part, max(0, min(end - at, end - n + wanted)), stop)
                (logits,) = self.engine.step([span])
                if isinstance(logits, EngineError):
                    raise logits
                assert isinstance(logits, np.ndarray)
                found.append(logits)
        except BaseException:
            if self._handle is not None:
                self.rewind(start)
            raise
        finally:
            self._fed = (0, 0)
        if len(found) > 1:
            found = [np.concatenate(found)]
        return found[0][0] if wanted == 1 and not all_logits else found[0]

    @property
    def length(self) -> int:
        return int(lib.ms4_session_length(self._live()))

    def rewind(self, length: int) -> None:
        """Forgets everything after the first `length` positions."""
        check(lib.ms4_session_rewind(self._live(), length))

    def share(self, other: Session, length: int) -> None:
        """Forgets what it holds and becomes the first `length` positions of another session, without copying them."""
        check(lib.ms4_session_share(self._live(), other._live(), length))

    def save(self, fd: int) -> None:
        """Writes what the session holds to a file descriptor; names, headers and atomicity are the caller's."""
        check(lib.ms4_session_save(self._live(), fd))

    def load(self, fd: int) -> int:
        """Reads what `save` wrote, in place of what the session held; the positions that it now holds.

        EngineError: these bytes are not what `save` wrote with this model.  The session is empty then.
        """
        check(lib.ms4_session_load(self._live(), fd))
        return self.length

    def progress(self) -> tuple[int, int]:
        """(done, total) of the running `feed`, or step, in layer-tokens.  May be called from any thread."""
        done, total = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        before, whole = self._fed
        if self._handle is not None:
            lib.ms4_session_progress(self._handle, done, total)
        return (min(before + done[0], whole), whole) if whole else (done[0], total[0])


class Vision(_Handle):
    """A vision tower of an engine.  Made by `Engine.vision`."""

    NAME = "vision tower"

    def __init__(self, handle: Any, shape: VisionShape) -> None:
        super().__init__(handle, lib.ms4_vision_close)
        self.shape = shape

    @property
    def on_gpu(self) -> bool:
        """False: the CPU computes the tower, also where there is a GPU, but no room on it."""
        return bool(lib.ms4_vision_on_gpu(self._live()))

    def encode(self, pixels: np.ndarray, stop: StopFlag | None = None) -> np.ndarray:
        """Normalised pixels, float32 [3, height, width], to features, float32 [rows * columns, d_out], raster order.

        Both sides are multiples of patch_size * merge.  Ctrl-C does not interrupt it; a stop flag does.
        """
        import numpy as np

        pixels = np.ascontiguousarray(pixels, np.float32)
        side = self.shape.patch_size * self.shape.merge
        if pixels.ndim != 3 or pixels.shape[0] != 3:
            raise ValueError(f"pixels of {pixels.shape}; expected (3, height, width)")
        _, height, width = pixels.shape
        out = np.empty((height // side * (width // side), self.shape.d_out), np.float32)
        c_out = ffi.from_buffer("float[]", out, require_writable=True)
        check(
            lib.ms4_vision_encode(self._live(), ffi.from_buffer("float[]", pixels), width, height, c_out, flag_of(stop))
        )
        return out

    def progress(self) -> tuple[int, int]:
        """(layers done, layers) of the running `encode`.  May be called from any thread."""
        done, total = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        if self._handle is not None:
            lib.ms4_vision_progress(self._handle, done, total)
        return done[0], total[0]


@dataclass(frozen=True)
class Sampled:
    """Of n rows: ids int32 [n]; if they were asked for, log-probabilities, float64: of the ids and of the highest."""

    ids: np.ndarray
    logprobs: np.ndarray | None = None  # [n]
    top_ids: np.ndarray | None = None  # int32 [n, n_top], highest first
    top_logprobs: np.ndarray | None = None  # [n, n_top]


def sample(
    logits: np.ndarray,
    uniforms: np.ndarray | None = None,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    n_top: int | None = None,
) -> Sampled:
    """Chooses a token for each row of float32 logits [n, n_vocab], with a random number in [0, 1) for each row.

    temperature 0 takes the highest and needs no random numbers.  n_top: also log-probabilities, those of the model
    itself.  A logit that is not finite raises NotFinite.
    """
    import numpy as np

    logits = np.ascontiguousarray(logits, np.float32)
    n_rows, n_vocab = logits.shape
    numbers = np.zeros(n_rows) if uniforms is None else np.ascontiguousarray(uniforms, np.float64)
    if temperature > 0 and (uniforms is None or numbers.shape != (n_rows,)):
        raise ValueError(f"{n_rows} rows of logits take as many random numbers")
    ids = np.empty(n_rows, np.int32)
    how = ffi.new("ms4_sampling *", {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p})
    c_logits, c_numbers = ffi.from_buffer("float[]", logits), ffi.from_buffer("double[]", numbers)
    c_ids = ffi.from_buffer("int32_t[]", ids, require_writable=True)
    if n_top is None:
        check(lib.ms4_sample(c_logits, n_rows, n_vocab, how, c_numbers, c_ids, 0, ffi.NULL, ffi.NULL))
        return Sampled(ids)
    n_top = min(n_top, n_vocab)
    top_ids, logprobs = np.empty((n_rows, n_top), np.int32), np.empty((n_rows, n_top + 1))
    c_top, c_logprobs = ffi.from_buffer("int32_t[]", top_ids), ffi.from_buffer("double[]", logprobs)
    check(lib.ms4_sample(c_logits, n_rows, n_vocab, how, c_numbers, c_ids, n_top, c_top, c_logprobs))
    return Sampled(ids, logprobs[:, 0], top_ids, logprobs[:, 1:])


class Policy(_Handle):
    """Counts of used experts that fade, rates, and the moves that follow: csrc/policy.h says what they mean.

    Without an engine: a recorded trace drives the very code that an engine's slots ask.  An expert's id is
    layer * n_expert + expert.  0 stands for the default of a setting.
    """

    NAME = "policy"
    RAM, VRAM, BUSY = lib.POLICY_RAM, lib.POLICY_VRAM, lib.POLICY_BUSY

    def __init__(
        self, n_layer: int, n_expert: int, *, half_life: float = 0, margin: float = 0, pay_back: float = 0
    ) -> None:
        options, out = ffi.new("policy_options *", (half_life, margin, pay_back)), ffi.new("policy **")
        check(lib.policy_open(n_layer, n_expert, options, out))
        super().__init__(out[0], lib.policy_close)
        self.n_layer, self.n_expert = n_layer, n_expert
        self._moves = ffi.new("policy_move[]", lib.POLICY_MOVES)

    def count(self, layer: int, experts: np.ndarray, pairs: np.ndarray, n_tokens: int) -> None:
        """n_tokens have passed through the layer, and chose experts[i], int32, pairs[i] times, int32."""
        if n_tokens < 1 or not 0 <= layer < self.n_layer or experts.shape != pairs.shape or experts.ndim != 1:
            raise ValueError(f"{n_tokens} tokens in layer {layer} with experts of {experts.shape}")
        if experts.size and not 0 <= experts.min() <= experts.max() < self.n_expert:
            raise ValueError(f"experts {experts.min()} to {experts.max()} of {self.n_expert}")
        c_experts, c_pairs = ffi.from_buffer("int32_t[]", experts), ffi.from_buffer("int32_t[]", pairs)
        lib.policy_count(self._live(), layer, c_experts, c_pairs, experts.size, n_tokens)

    def value(self, layer: int, expert: int) -> float:
        """Its uses, each halved for every half-life of tokens since."""
        if not (0 <= layer < self.n_layer and 0 <= expert < self.n_expert):
            raise ValueError(f"expert {expert} of layer {layer}")
        return float(lib.policy_value(self._live(), layer, expert))

    def victim(self, ids: np.ndarray) -> int:
        """The index of the id, int32, that is worth least, the first of equals; -1 if there are none."""
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n_layer * self.n_expert:
            raise ValueError(f"ids {ids.min()} to {ids.max()}")
        return int(lib.policy_victim(self._live(), ffi.from_buffer("int32_t[]", ids), ids.size))

    def moves(
        self,
        where: np.ndarray,
        n_free: Sequence[int],
        n_bytes: Sequence[int],
        budget: int,
        *,
        pool: np.ndarray | None = None,
        most: int = lib.POLICY_MOVES,
        exclusive: bool = False,
    ) -> list[tuple[int, int, bool]]:
        """The moves (in, out or -1, down) that are worth it now.

        where: uint8 by id; n_free, n_bytes: by pool; pool: int32 by layer.
        """
        if where.shape != (self.n_layer * self.n_expert,) or len(n_free) != len(n_bytes):
            raise ValueError(f"places of {where.shape}, {len(n_free)} and {len(n_bytes)} pools")
        if not 1 <= len(n_free) <= lib.POLICY_POOLS or (pool is not None and pool.shape != (self.n_layer,)):
            raise ValueError(f"{len(n_free)} pools")
        free, size = ffi.new("int32_t[]", list(n_free)), ffi.new("uint64_t[]", list(n_bytes))
        at = ffi.new("policy_places *")
        at.where = places = ffi.from_buffer("uint8_t[]", where)
        at.pool = pools = ffi.NULL if pool is None else ffi.from_buffer("int32_t[]", pool)
        at.n_free, at.bytes, at.n_pools, at.exclusive = free, size, len(n_free), exclusive
        n = lib.policy_moves(self._live(), at, budget, self._moves, min(most, lib.POLICY_MOVES))
        del places, pools
        return [(m.id, m.out, bool(m.down)) for m in self._moves[0:n]]

    def saw(self, n_bytes: float, ns: float, row_bytes: float | None = None) -> None:
        """The bus brought so many bytes, or with row_bytes the CPU computed experts of so many, in so long."""
        if row_bytes is None:
            lib.policy_saw_bus(self._live(), n_bytes, ns)
        else:
            lib.policy_saw_cpu(self._live(), n_bytes, row_bytes, ns)

    def rates(self) -> tuple[float, int]:
        """The bus in bytes per second, and from how many rows on it brings an expert before the CPU has computed it."""
        return float(lib.policy_bus(self._live())), int(lib.policy_stream_from(self._live()))

    def fix(self, bus: float, stream_from: int = 0) -> None:
        lib.policy_fix(self._live(), bus, stream_from)

    def allow(self, ns_step: float, ns_cpu: float, under_way: int, largest: int) -> int:
        """Bytes that may be asked for after a step; `spend` says what was."""
        return int(lib.policy_allow(self._live(), ns_step, ns_cpu, under_way, largest))

    def spend(self, n_bytes: int) -> None:
        lib.policy_spend(self._live(), n_bytes)

    def pack(self, fingerprint: int) -> bytes:
        """The counts, for a file that warms the next start."""
        out = bytearray(lib.policy_pack_bytes(self._live()))
        lib.policy_pack(self._live(), fingerprint, ffi.from_buffer("uint8_t[]", out))
        return bytes(out)

    def unpack(self, fingerprint: int, data: bytes) -> None:
        """The reverse; EngineError: these bytes are not what `pack` wrote for this model, and nothing has changed."""
        check(lib.policy_unpack(self._live(), fingerprint, ffi.from_buffer("uint8_t[]", data), len(data)))
