"""ms4: the engine as Python sees it.  Only this module touches ffi and lib.

An `Engine` is one loaded model; a `Session` is one line of tokens in it.  Both are closed by `with` or `close()`.
What is in a file, and what its shapes mean, is the business of `ms4.models`: here arrive a checked `Shape` and a list
of `Tensor`, and the C core checks once more that every range lies inside its file.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._core import ffi, lib

if TYPE_CHECKING:  # at run time only where arrays are made: `ms4 --version` starts without it
    import numpy as np

__version__ = "0.1.0"
ROW = -1  # in `Session.feed`: this position takes the next row of `rows`
LOAD = {"auto": 0, "map": 1, "copy": 2}

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
    """`Session.cancel` (or a progress callback that answered True) ended the call."""


class ContextFull(EngineError):
    """The session has no room for so many positions."""


class NotFinite(EngineError):
    """The model gave a number that is not finite."""


@dataclass(frozen=True)
class Shape:
    """Hyperparameters as the engine takes them; SPEC 1.2 and 1.3 give their meaning."""

    n_layer: int
    n_dense_layer: int
    n_vocab: int
    n_ctx_train: int
    d_model: int
    d_dense: int
    d_expert: int
    d_shared: int
    n_head: int
    d_nope: int
    d_rope: int
    d_value: int
    q_rank: int
    kv_rank: int
    n_expert: int
    n_expert_used: int
    norm_eps: float
    router_scale: float
    router_norm: bool
    attn_scale: float
    temp_beta: float
    temp_length: int
    rope_freq: tuple[float, ...]  # d_rope / 2 inverse frequencies, YaRN applied


@dataclass(frozen=True)
class Tensor:
    """One tensor: `role` is a key of ROLES, `dims` are (columns, rows, experts or heads)."""

    role: str
    layer: int
    type: int
    file: int
    offset: int
    bytes: int
    dims: tuple[int, int, int]
    scales: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class VisionShape:
    """A vision tower with its projector; SPEC 3.1.  gelu: the tower's activation is GELU, not SiLU."""

    n_layer: int
    d_model: int
    d_ffn: int
    n_head: int
    patch_size: int
    merge: int
    d_out: int
    gelu: bool
    eps: float
    rope_theta: float


@dataclass(frozen=True)
class Machine:
    isa: str
    n_threads: int


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most: bytes read from memory, multiply-adds of 8 bits and of floats, per second."""

    read_bytes_per_s: float
    int8_macs_per_s: float
    float_macs_per_s: float


@dataclass(frozen=True)
class Stats:
    """Counters since the engine opened; times in nanoseconds."""

    tokens_prefill: int
    tokens_decode: int
    ns_prefill: int
    ns_decode: int
    bytes_prefill: int
    bytes_decode: int
    experts_used: int
    bytes_weights: int
    n_threads: int
    load: str
    isa: str


def check(status: int) -> None:
    """Raises what the engine's last failure was, unless status is 0."""
    if status == 0:
        return
    message = ffi.string(lib.ms4_error()).decode("utf-8", "replace")
    if status == lib.MS4_EARG:
        raise ValueError(message)
    if status == lib.MS4_ENOMEM:
        raise MemoryError(message)
    kinds = {lib.MS4_ECANCELED: Canceled, lib.MS4_EFULL: ContextFull, lib.MS4_ENUMBER: NotFinite}
    raise kinds.get(status, EngineError)(message, status)


def probe() -> Machine:
    """The kernel table and the number of threads that this process would use."""
    out = ffi.new("ms4_machine *")
    check(lib.ms4_probe(out))
    return Machine(ffi.string(out.isa).decode(), out.n_threads)


def tensor_table(tensors: Sequence[Tensor], roles: dict[str, int]) -> tuple[Any, list[Any]]:
    """The C table of the tensors, and what must stay alive while it is used."""
    import numpy as np

    keep: list[Any] = []
    table = ffi.new("ms4_tensor[]", len(tensors))
    for row, t in zip(table, tensors, strict=True):
        row.role, row.layer, row.type, row.file = roles[t.role], t.layer, t.type, t.file
        row.offset, row.bytes, row.dims = t.offset, t.bytes, list(t.dims)
        if t.scales is not None:
            keep.append(ffi.from_buffer("float[]", np.ascontiguousarray(t.scales, np.float32)))
            row.scales = keep[-1]
    return table, keep


class Engine:
    """One loaded model.  Made by `Engine.open`."""

    def __init__(self, handle: Any, shape: Shape) -> None:
        self._handle = handle
        self._children: weakref.WeakSet[Session | Vision] = weakref.WeakSet()
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
        progress: Callable[[int, int], bool] | None = None,
    ) -> Engine:
        """Opens the files and checks the table.  threads, n_batch: 0 chooses.

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
        options.n_threads, options.load, options.n_batch = threads, LOAD[load], n_batch
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
        return Limits(out.read_bytes_per_s, out.int8_macs_per_s, out.float_macs_per_s)

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
        load = next(name for name, code in LOAD.items() if code == s.load)
        return Stats(**numbers | {"load": load, "isa": ffi.string(s.isa).decode()})

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


class Session:
    """One line of tokens.  Made by `Engine.session`; its calls may not overlap, except `cancel` and `progress`."""

    def __init__(self, handle: Any, engine: Engine, n_ctx: int) -> None:
        self._handle = handle
        self.engine = engine
        self.n_ctx = n_ctx

    def feed(
        self, ids: Sequence[int] | np.ndarray, rows: np.ndarray | None = None, *, all_logits: bool = False
    ) -> np.ndarray:
        """Appends the tokens and returns float32 logits: of the last position [n_vocab], or of all [n, n_vocab].

        An id of ROW takes the next row of `rows` (float32 [n_rows, d_model]: image features).  Ctrl-C does not
        interrupt it; `cancel`, from another thread, does.  On failure the session is as it was before the call.
        """
        import numpy as np

        tokens = np.ascontiguousarray(ids, np.int32)
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError("feed takes one or more token ids")
        features, n_rows = ffi.NULL, 0
        if rows is not None:
            rows = np.ascontiguousarray(rows, np.float32)
            if rows.ndim != 2 or rows.shape[1] != self.engine.shape.d_model:
                raise ValueError(f"rows of {rows.shape}; expected (n, {self.engine.shape.d_model})")
            features, n_rows = ffi.from_buffer("float[]", rows), rows.shape[0]
        n_vocab = self.engine.shape.n_vocab
        out = np.empty((tokens.size, n_vocab) if all_logits else n_vocab, np.float32)
        c_tokens, c_out = ffi.from_buffer("int32_t[]", tokens), ffi.from_buffer("float[]", out, require_writable=True)
        check(lib.ms4_session_feed(self._live(), c_tokens, tokens.size, features, n_rows, c_out, all_logits))
        return out

    @property
    def length(self) -> int:
        return int(lib.ms4_session_length(self._live()))

    def rewind(self, length: int) -> None:
        """Forgets everything after the first `length` positions."""
        check(lib.ms4_session_rewind(self._live(), length))

    def cancel(self) -> None:
        """Makes a running `feed` raise Canceled.  May be called from any thread at any time."""
        if self._handle is not None:
            lib.ms4_session_cancel(self._handle)

    def progress(self) -> tuple[int, int]:
        """(done, total) of the running `feed`, in layer-tokens.  May be called from any thread."""
        done, total = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        if self._handle is not None:
            lib.ms4_session_progress(self._handle, done, total)
        return done[0], total[0]

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.ms4_session_close(handle)

    def _live(self) -> Any:
        if self._handle is None:
            raise ValueError("the session is closed")
        return self._handle

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Vision:
    """A vision tower of an engine.  Made by `Engine.vision`."""

    def __init__(self, handle: Any, shape: VisionShape) -> None:
        self._handle = handle
        self.shape = shape

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Normalised pixels, float32 [3, height, width], to features, float32 [rows * columns, d_out], raster order.

        Both sides are multiples of patch_size * merge.  Ctrl-C does not interrupt it; `cancel` does.
        """
        import numpy as np

        pixels = np.ascontiguousarray(pixels, np.float32)
        side = self.shape.patch_size * self.shape.merge
        if pixels.ndim != 3 or pixels.shape[0] != 3:
            raise ValueError(f"pixels of {pixels.shape}; expected (3, height, width)")
        _, height, width = pixels.shape
        out = np.empty((height // side * (width // side), self.shape.d_out), np.float32)
        c_out = ffi.from_buffer("float[]", out, require_writable=True)
        check(lib.ms4_vision_encode(self._live(), ffi.from_buffer("float[]", pixels), width, height, c_out))
        return out

    def cancel(self) -> None:
        """Makes a running `encode` raise Canceled.  May be called from any thread at any time."""
        if self._handle is not None:
            lib.ms4_vision_cancel(self._handle)

    def progress(self) -> tuple[int, int]:
        """(layers done, layers) of the running `encode`.  May be called from any thread."""
        done, total = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        if self._handle is not None:
            lib.ms4_vision_progress(self._handle, done, total)
        return done[0], total[0]

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.ms4_vision_close(handle)

    def _live(self) -> Any:
        if self._handle is None:
            raise ValueError("the vision tower is closed")
        return self._handle
