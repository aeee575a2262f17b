"""Recipes that damage a good GGUF file: each is a change to a parsed image of the file, and what the refusal must say.

The image is taken apart and written without any of the project's own code.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
FORMATS = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B"}
FORMATS |= {U64: "<Q", I64: "<q", F64: "<d"}
HUGE = (1 << 63, (1 << 64) - 1)


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pack(kind: int, value: object) -> bytes:
    return text(value) if kind == STR else struct.pack(FORMATS[kind], value)


def array(kind: int, values: list) -> bytes:
    head = struct.pack("<IQ", kind, len(values))
    if kind == STR:
        return head + b"".join(map(text, values))
    return head + struct.pack(f"<{len(values)}{FORMATS[kind][1]}", *values)


@dataclass
class Record:
    """One tensor record; n_dims, if it is not None, is written in the place of the true number of dimensions."""

    name: bytes
    dims: list[int]
    type: int
    offset: int
    n_dims: int | None = None

    def encoded(self) -> bytes:
        n = len(self.dims) if self.n_dims is None else self.n_dims
        dims = struct.pack(f"<{len(self.dims)}Q", *self.dims)
        return text(self.name) + struct.pack("<I", n) + dims + struct.pack("<IQ", self.type, self.offset)


@dataclass
class Image:
    """A GGUF file taken apart."""

    keys: dict[bytes, tuple[int, bytes]]
    records: list[Record]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_records: int | None = None
    alignment: int = 32
    extra: bytes = b""  # stands in the place of further keys
    tail: bytes = b""
    cut: int | None = None  # bytes taken off the end
    keep: Callable[["Image"], int] | None = None  # bytes kept from the start
    raw: bytes | None = None
    arch: str = field(default="mistral4")

    def put(self, key: str, kind: int, value: object) -> None:
        self.keys[key.encode()] = (kind, value if isinstance(value, bytes) and kind == ARR else pack(kind, value))

    def hp(self, key: str, kind: int, value: object) -> None:
        self.put(f"{self.arch}.{key}", kind, value)

    def record(self, name: str) -> Record:
        return next(r for r in self.records if r.name == name.encode())

    def header(self, with_records: bool = True) -> bytes:
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        n_records = len(self.records) if self.n_records is None else self.n_records
        keys = b"".join(text(k) + struct.pack("<I", kind) + raw for k, (kind, raw) in self.keys.items())
        records = b"".join(r.encoded() for r in self.records) if with_records else b""
        return self.magic + struct.pack("<IQQ", self.version, n_records, n_keys) + keys + self.extra + records

    def encoded(self) -> bytes:
        if self.raw is not None:
            return self.raw
        header = self.header()
        whole = header + bytes(-len(header) % self.alignment) + self.data + self.tail
        if self.keep:
            return whole[: self.keep(self)]
        return whole[: len(whole) - (self.cut or 0)]

    def strings(self, key: str) -> list[bytes]:
        raw = self.keys[key.encode()][1]
        at, found = 12, []
        while at < len(raw):
            (n,) = struct.unpack_from("<Q", raw, at)
            found.append(raw[at + 8 : at + 8 + n])
            at += 8 + n
        return found


def take_apart(good: bytes) -> Image:
    """Reads a file that is known to be good."""
    at = 24

    def number(form: str) -> int:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(form, good, at - struct.calcsize(form))[0]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == STR:
            n = number("<Q")
            at += n
        elif kind == ARR:
            inner, n = number("<I"), number("<Q")
            for _ in range(n):
                skip(inner)
        else:
            number(FORMATS[kind])

    def string() -> bytes:
        nonlocal at
        n = number("<Q")
        at += n
        return good[at - n : at]

    n_records, n_keys = struct.unpack_from("<QQ", good, 8)
    keys = {}
    for _ in range(n_keys):
        key, kind, start = string(), number("<I"), at
        skip(kind)
        keys[key] = (kind, good[start:at])
    records = []
    for _ in range(n_records):
        name = string()
        dims = [number("<Q") for _ in range(number("<I"))]
        records.append(Record(name, dims, number("<I"), number("<Q")))
    return Image(keys, records, good[-(-at // 32) * 32 :])


Recipe = tuple[Callable[[Image], object], str]
RECIPES: dict[str, Recipe] = {}
CONTROLS: dict[str, Callable[[Image], object]] = {}
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


def sets(**values: object) -> Callable[[Image], object]:
    return lambda i: [setattr(i, k, v) for k, v in values.items()]


def first(**values: object) -> Callable[[Image], object]:
    return lambda i: [setattr(i.records[0], k, v) for k, v in values.items()]


def extra_key(key: bytes, kind: int = U8, raw: bytes = b"\1") -> Callable[[Image], object]:
    def edit(i: Image) -> None:
        i.extra, i.n_keys = key + struct.pack("<I", kind) + raw, len(i.keys) + 1

    return edit


def hp(key: str, kind: int, value: object) -> Callable[[Image], object]:
    return lambda i: i.hp(key, kind, value)


def put(key: str, kind: int, value: object) -> Callable[[Image], object]:
    return lambda i: i.put(key, kind, value)


def drop(key: str) -> Callable[[Image], object]:
    return lambda i: i.keys.pop(key.encode())


def token(index: int, value: bytes) -> Callable[[Image], object]:
    def edit(i: Image) -> None:
        tokens = i.strings(TOKENS)
        tokens[index] = value
        i.put(TOKENS, ARR, array(STR, tokens))

    return edit


def numbers(key: str, kind: int, value: float, n: int | None = None) -> Callable[[Image], object]:
    return lambda i: i.put(key, ARR, array(kind, [value] * (n or len(i.strings(TOKENS)))))


def container() -> None:
    """Damage that any reader of GGUF must notice."""
    RECIPES.update(
        {
            "empty": (sets(raw=b""), "empty"),
            "one byte": (sets(raw=b"G"), "too short"),
            "twelve bytes": (sets(raw=b"GGUF" + bytes(8)), "too short"),
            "other magic": (sets(magic=b"GGML"), "magic is 'GGML'"),
            "git lfs pointer": (sets(raw=b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
            "html page": (sets(raw=b"<!DOCTYPE html><html></html>"), "HTML"),
            "zip": (sets(raw=b"PK\3\4" + bytes(50)), "zip"),
            "safetensors": (sets(raw=struct.pack("<Q", 2) + b"{}" + bytes(40)), "safetensors"),
            "zeros": (sets(raw=bytes(4096)), "zeros"),
            "version 1": (sets(version=1), "version 1; ms4 reads versions 2 and 3"),
            "version 4": (sets(version=4), "version 4"),
            "big-endian": (sets(version=3 << 24), "big-endian"),
            "key with escape codes": (extra_key(text(b"\x1b[2J\x07\n"), 99), r"\\x1b\[2J"),
            "empty key": (extra_key(text(b"")), "empty or not plain ASCII"),
            "key of 70000 bytes": (extra_key(text(b"k" * 70000)), "at most 65535"),
            "key twice": (extra_key(text("general.architecture"), STR, text("x")), "duplicate metadata key"),
            "value type 13": (extra_key(text("x"), 13), "value type 13"),
            "bool of 2": (extra_key(text("x"), BOOL, b"\2"), "bool with the value 2"),
            "array of bools of 2": (extra_key(text("x"), ARR, struct.pack("<IQ", BOOL, 2) + b"\0\2"), "bools"),
            "array of type 99": (extra_key(text("x"), ARR, struct.pack("<IQ", 99, 1) + bytes(8)), "element type 99"),
            "nested array": (extra_key(text("x"), ARR, struct.pack("<IQ", ARR, 1) * 10000), "nested"),
            "array of 2^61": (extra_key(text("x"), ARR, struct.pack("<IQ", U64, 1 << 61)), "array with a count"),
            "5 million elements": (extra_key(text("x"), ARR, array(U8, [0] * 5_000_000)), "4194304 elements"),
            "strings beyond the end": (extra_key(text("x"), ARR, struct.pack("<IQ", STR, 9) + text("a")), "length"),
            "cut in a value": (sets(keep=lambda i: len(i.header(False)) - 1), "left to the end of the file"),
            "cut in a record": (sets(keep=lambda i: len(i.header()) - 5), "truncated"),
            "cut before the data": (sets(keep=lambda i: len(i.header())), "truncated|overlap|end"),
            "last byte missing": (lambda i: setattr(i, "cut", spare(i) + 1), "truncated"),
            "half of the data missing": (lambda i: setattr(i, "cut", len(i.data) // 2), "truncated"),
        }
    )
    for n in (*HUGE, 1 << 58, 1 << 32, 65_537):
        RECIPES[f"{n} keys"] = (sets(n_keys=n), f"key count of {n} is impossible")
        RECIPES[f"{n} tensors"] = (sets(n_records=n), f"tensor count of {n} is impossible")
    for n in (*HUGE, 1 << 30):
        length = struct.pack("<Q", n) + b"abc"
        RECIPES[f"key of {n} bytes"] = (extra_key(length), f"length of {n}")
        RECIPES[f"string of {n} bytes"] = (extra_key(text("x"), STR, length), f"length of {n}")
    for kind, value in ((U32, 0), (U32, 3), (U32, 1 << 31), (I32, 32), (U64, 32), (STR, "32"), (F32, 32.0)):
        RECIPES[f"alignment {kind} {value}"] = (put("general.alignment", kind, value), "general.alignment")


def spare(image: Image) -> int:
    """Bytes of padding behind the last tensor: its blocks are whole, so its end can be computed from the types used."""
    last = max(image.records, key=lambda r: r.offset)
    block, size = {0: (1, 4), 1: (1, 2), 8: (32, 34), 12: (256, 144)}[last.type]
    return len(image.data) - last.offset - math.prod(last.dims) // block * size


def records() -> None:
    """Damage to the table of tensors."""
    RECIPES.update(
        {
            "no tensors": (lambda i: i.records.clear(), "no tensors"),
            "5 dimensions": (first(dims=[32, 1, 1, 1, 1]), "5 dimensions"),
            "a million dimensions": (first(n_dims=1_000_000), "1000000 dimensions"),
            "no dimensions": (first(dims=[]), "0 dimensions"),
            "dimension of zero": (first(dims=[0, 5]), "dimension of zero"),
            "dimension of 2^63": (first(dims=[1 << 63]), "too large"),
            "product wraps to zero": (first(dims=[1 << 32] * 3), "too large"),
            "product wraps to 4": (first(dims=[4194305, 4194305, 211106198978564]), "too large"),
            "bytes wrap to zero": (first(dims=[1 << 62], type=0), "too large"),
            "type 4": (first(type=4), "type 4"),
            "type 2^32 - 1": (first(type=0xFFFFFFFF), "type 4294967295"),
            "row of 33": (first(type=8, dims=[33, 2]), "not a multiple"),
            "name empty": (first(name=b""), "name of tensor 0"),
            "name of 64": (first(name=b"n" * 64), "1 to 63"),
            "name with escape codes": (first(name=b"\x1b[31m\n"), r"\\x1b"),
            "name not UTF-8": (first(name=b"\xff\xfe"), r"\\xff"),
            "name twice": (lambda i: setattr(i.records[1], "name", i.records[0].name), "duplicate tensor"),
            "offset not aligned": (lambda i: setattr(i.records[1], "offset", i.records[1].offset + 1), "alignment"),
            "offset beyond the end": (lambda i: setattr(i.records[-1], "offset", 1 << 40), "outside the file"),
            "offset 2^64 - 32": (lambda i: setattr(i.records[-1], "offset", (1 << 64) - 32), "outside the file"),
            "two at one place": (lambda i: setattr(i.records[1], "offset", i.records[0].offset), "overlap"),
            "all at the start": (lambda i: [setattr(r, "offset", 0) for r in i.records], "overlap"),
            "a gap": (lambda i: i.records.pop(1), "a gap of"),
            "missing": (lambda i: rename(i, "blk.1.attn_norm.weight", "blk.1.attn_normal.weight"), "missing"),
            "unexpected": (lambda i: unexpected(i, b"blk.0.unknown.weight"), "unexpected tensor"),
            "rope factors": (lambda i: unexpected(i, b"rope_freqs.weight"), "unexpected tensor rope_freqs"),
            "router bias": (lambda i: unexpected(i, b"blk.0.exp_probs_b.bias"), "unexpected tensor"),
            "scale of Q8_0": (lambda i: unexpected(i, b"output.scale"), "unexpected tensor output.scale"),
            "transposed": (lambda i: i.record("blk.0.attn_q_a.weight").dims.reverse(), "shape"),
        }
    )


def rename(image: Image, old: str, new: str) -> None:
    image.record(old).name = new.encode()


def unexpected(image: Image, name: bytes) -> None:
    image.data += bytes(-len(image.data) % 32)
    image.records.append(Record(name, [1], 0, len(image.data)))
    image.tail = bytes(32)


def hyperparameters() -> None:
    """Keys that are missing, of another type, out of range, or that the tensors contradict."""
    RECIPES.update(
        {
            "architecture missing": (drop("general.architecture"), "general.architecture is missing"),
            "architecture a number": (put("general.architecture", U32, 7), "general.architecture has the wrong type"),
            "architecture llama": (put("general.architecture", STR, "llama"), "only Mistral Small 4"),
            "architecture clip": (put("general.architecture", STR, "clip"), "mmproj"),
            "architecture of 1 MiB": (put("general.architecture", STR, "\x1bA" * (1 << 19)), r"'\\x1bA"),
            "no context_length": (drop("mistral4.context_length"), "mistral4.context_length is missing"),
            "heads an array": (hp("attention.head_count", ARR, array(U32, [3])), "head_count has the wrong type"),
            "block_count a fraction": (hp("block_count", F32, 2.5), "block_count has the wrong type"),
            "block_count text": (hp("block_count", STR, "2"), "block_count has the wrong type"),
            "block_count negative": (hp("block_count", I32, -1), "block_count is -1"),
            "router norm a number": (hp("expert_weights_norm", U32, 1), "expert_weights_norm has the wrong type"),
            "more experts used than there are": (hp("expert_used_count", U32, 7), "expert_used_count"),
            "sigmoid router": (hp("expert_gating_func", U32, 2), "expert_gating_func is 2"),
            "expert groups": (hp("expert_group_count", U32, 3), "expert_group_count is 3"),
            "dense layers": (hp("leading_dense_block_count", U32, 1), "ffn_gate.weight is missing"),
            "rope wider than the head": (hp("rope.dimension_count", U32, 64), "rope.dimension_count"),
            "rope of 31": (hp("rope.dimension_count", U32, 31), "rope.dimension_count"),
            "scaling linear": (hp("rope.scaling.type", STR, "linear"), "yarn was expected"),
            "key_length of neither form": (hp("attention.key_length", U32, 100), "key_length is 100"),
            "7 kv heads": (hp("attention.head_count_kv", U32, 7), "head_count_kv is 7"),
        }
    )
    for key, value in (
        *(("block_count", n) for n in (0, 1, 3, 1_000_000)),
        *(("embedding_length", n) for n in (0, 320, 1 << 31)),
        *(("attention.head_count", n) for n in (0, 4, 1 << 31)),
        *(("expert_count", n) for n in (0, 5, 7, 1_000_000)),
        *(("attention.kv_lora_rank", n) for n in (0, 72, 1 << 31)),
        *(("attention.q_lora_rank", n) for n in (0, 128)),
        *(("expert_feed_forward_length", n) for n in (0, 97)),
        *(("attention.key_length_mla", n) for n in (8, 1 << 31)),
        *(("context_length", n) for n in (0, 0xFFFFFFFF)),
        ("vocab_size", 1407),
        ("attention.value_length_mla", 40),
        ("expert_used_count", 0),
        ("rope.scaling.original_context_length", 0),
        ("attention.temperature_length", 0),
    ):
        RECIPES[f"{key} = {value}"] = (hp(key, U32, value), f"{key} is {value}")
    for key in (
        *("rope.freq_base", "rope.scaling.factor", "attention.layer_norm_rms_epsilon", "expert_weights_scale"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_log_multiplier", "attention.temperature_scale"),
    ):
        for value in (math.nan, math.inf, -1.0):
            RECIPES[f"{key} = {value}"] = (hp(key, F32, value), f"{key} is {value:g}; ms4 expects a finite number")
    RECIPES["shared experts"] = (hp("expert_shared_count", U32, 2), "ffn_gate_shexp.weight has the shape")


def vocabulary() -> None:
    """Damage to the tokenizer keys."""
    g = "tokenizer.ggml."
    RECIPES.update(
        {
            "no tokens key": (drop(TOKENS), "tokenizer.ggml.tokens is missing"),
            "tokens of numbers": (put(TOKENS, ARR, array(U32, [1, 2])), "tokens has the wrong type"),
            "tokens one string": (put(TOKENS, STR, "a"), "tokens has the wrong type"),
            "no tokens": (put(TOKENS, ARR, array(STR, [])), "tokens is empty"),
            "five tokens": (put(TOKENS, ARR, array(STR, list("abcde"))), "5 entries"),
            "token twice": (lambda i: token(-1, i.strings(TOKENS)[-2])(i), "duplicate token"),
            "control token twice": (token(5, b"<s>"), "duplicate token"),
            "token and control token the same": (token(-1, b"[INST]"), "duplicate token"),
            "token not UTF-8": (token(-1, b"\xff\xfe"), "GPT-2 spelling"),
            "token cut in a letter": (token(-1, "Ġ".encode()[:1]), "GPT-2 spelling|inside a character"),
            "token with a NUL": (token(-1, b"a\0"), "control character"),
            "token with a foreign letter": (token(-1, "ſ".encode()), "stands for no byte"),
            "token of 1 MiB": (token(-1, b"z" * (1 << 20)), "length of 1048576"),
            "token empty": (token(-1, b""), "is empty"),
            "types short": (numbers(TYPES, I32, 1, 3), "token_type has a length of 3"),
            "types u8": (numbers(TYPES, U8, 1), "token_type has the wrong type"),
            "types 999": (numbers(TYPES, I32, 999), "token_type holds 999"),
            "types missing": (drop(TYPES), "token_type is missing"),
            "bos beyond the end": (put(g + "bos_token_id", U32, 1400), "bos_token_id is 1400, out of range"),
            "eos 2^32 - 1": (put(g + "eos_token_id", U32, 0xFFFFFFFF), "eos_token_id is 4294967295"),
            "eos text": (put(g + "eos_token_id", STR, "</s>"), "eos_token_id has the wrong type"),
            "other model": (put(g + "model", STR, "nosuch"), "model is 'nosuch'"),
            "model a number": (put(g + "model", U32, 2), "model is '2'"),
            "other pre": (put(g + "pre", STR, "llama-bpe"), "pre is 'llama-bpe'"),
            "no merges": (drop(g + "merges"), "merges is missing"),
            "merges of numbers": (put(g + "merges", ARR, array(U32, [1])), "merges has the wrong type"),
            "merge without space": (put(g + "merges", ARR, array(STR, ["ab"])), "one space"),
            "merge with two spaces": (put(g + "merges", ARR, array(STR, ["a b c", "ab"])), "one space"),
            "merge with an empty side": (put(g + "merges", ARR, array(STR, [" a"])), "one space"),
            "merge with a newline": (put(g + "merges", ARR, array(STR, ["a\nb c"])), "one space"),
            "merge of unknown pieces": (put(g + "merges", ARR, array(STR, ["a qqqq"])), "piece 'qqqq' is not a token"),
        }
    )


def splits() -> None:
    """Split keys that nothing stands behind; test_gguf_file.py damages real parts."""
    RECIPES.update(
        {
            "part 1 of 3 alone": (put("split.count", U16, 3), "must end in -00001-of-00003.gguf"),
            "65535 parts": (put("split.count", U16, 65535), "split.count is 65535"),
            "split.count text": (put("split.count", STR, "2"), "split.count has the wrong type"),
            "part 2 given": (lambda i: [put("split.count", U16, 2)(i), put("split.no", U16, 1)(i)], "part 2 of 2"),
        }
    )


def controls() -> None:
    """Odd but right: these must be accepted."""
    CONTROLS.update(
        {
            "as it is": sets(),
            "version 2": sets(version=2),
            "an unknown key": put("x.unknown", U8, 1),
            "norm with a second dimension of 1": lambda i: i.record("output_norm.weight").dims.append(1),
            "an empty string": put("x.empty", STR, ""),
            "an empty array": put("x.empty", ARR, array(U32, [])),
            "an empty array of strings": put("x.empty", ARR, array(STR, [])),
            "four million bytes": put("x.bytes", ARR, struct.pack("<IQ", U8, 4_000_000) + bytes(4_000_000)),
            "strings of 1 MiB": put("x.long", ARR, array(STR, ["a" * (1 << 20)] * 3)),
            "block_count as u8": hp("block_count", U8, 2),
            "context_length as i64": hp("context_length", I64, 2048),
            "no vocab_size": drop("mistral4.vocab_size"),
            "no feed_forward_length": drop("mistral4.feed_forward_length"),
            "key_length of a head": hp("attention.key_length", U32, 48),
            "padding_token_id -1": put("tokenizer.ggml.padding_token_id", I32, -1),
            "padding_token_id text": put("tokenizer.ggml.padding_token_id", STR, "<pad>"),
            "unknown_token_id beyond the end": put("tokenizer.ggml.unknown_token_id", U32, 1400),
            "scores short": numbers("tokenizer.ggml.scores", F32, 0, 3),
            "scores NaN": numbers("tokenizer.ggml.scores", F32, math.nan),
            "scores u8": numbers("tokenizer.ggml.scores", U8, 0),
            "scores of zeros": numbers("tokenizer.ggml.scores", I32, 0),
            "template that is no text": put("tokenizer.chat_template", ARR, array(STR, ["a"])),
            "one part": put("split.count", U16, 1),
            "bytes after the data": sets(tail=bytes(1 << 20)),
        }
    )


for add in (container, records, hyperparameters, vocabulary, splits, controls):
    add()
