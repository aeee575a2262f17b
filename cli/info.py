"""`ms4 info`: what is in a model file, and whether ms4 runs it."""

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ms4.cli import errors, render, streams
from ms4.cli.options import EngineOptions, model_path

if TYPE_CHECKING:
    from ms4.models.describe import Description, TensorClass
    from ms4.quant.gguf_file import GgufFile

LONGEST_VALUE = 80  # characters of a metadata value
FIRST_ELEMENTS = 4  # of an array


def info(name: str, *, as_json: bool, tensors: bool, kv: bool) -> int:
    """Prints the description of the file; with its tensors and metadata, if asked for.

    name: of a file or a model here, or an address or hf:USER/REPO[:QUANT], of which the header alone is fetched.
    """
    from ms4.cli import plan

    if not name:
        model_path(name)  # says that there is no such file
    _, gguf = plan.header(plan.Question(EngineOptions(name), None, None, 0), render.StatusLine(as_json))
    is_tower = gguf.metadata.get("general.architecture") == "clip"
    value, rows = described_tower(gguf) if is_tower else described_model(gguf)
    output = streams.Output()
    if as_json:
        if kv:
            value["kv"] = {key: plain(item) for key, item in gguf.metadata.items()}
        if tensors:
            value["tensors"] = [tensor_row(t) for t in gguf.tensors.values()]
        output.write(json.dumps(value) + "\n")
        return errors.OK
    for name, text in rows:
        output.write(f"{name:<13} {errors.escape(text)}\n")
    if kv:
        output.write("\nmetadata\n")
        for key, item in gguf.metadata.items():
            output.write(f"  {errors.escape(key)} = {errors.escape(brief(item))}\n")
    if tensors:
        output.write("\ntensors\n")
        for row in map(tensor_row, gguf.tensors.values()):
            dims = " x ".join(map(str, row["dims"]))
            output.write(f"  {row['name']:<40} {row['type']:<8} {dims:<24} {row['bytes']:>14} bytes\n")
    return errors.OK


def described_model(gguf: "GgufFile") -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A text model as JSON, and as lines of name and text."""
    from ms4.models.describe import describe

    is_here = os.path.exists(gguf.path)
    found = describe(gguf, is_here=is_here)
    rows = summary(found)
    return to_json(found), rows if is_here else [row for row in rows if row[0] != "images"]


def described_tower(gguf: "GgufFile") -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The same for an mmproj file."""
    from ms4.models.image import grid
    from ms4.models.pixtral import Tower

    tower = Tower.of(gguf)
    s, rule = tower.shape, tower.rule
    n_bytes = sum(tower.gguf.sizes)
    weights: dict[str, int] = {}
    for tensor in map(tensor_row, tower.gguf.tensors.values()):
        weights[tensor["type"]] = weights.get(tensor["type"], 0) + tensor["bytes"]
    n_weights = sum(t.n_weights for t in tower.gguf.tensors.values())
    columns, rows = grid(rule.max_side, rule.max_side, None, rule)
    most = (columns + 1) * rows
    value = {
        "path": tower.path,
        "bytes": n_bytes,
        "architecture": "clip",
        "n_weights": n_weights,
        "types": weights,
        "shape": asdict(s),
        "pixels": asdict(rule),
        "most_tokens": most,
    }
    merged = f", {s.merge} x {s.merge} of them to a token" if s.merge > 1 else ""
    lines = [
        ("file", f"{tower.path[-160:]}, {render.gigabytes(n_bytes)}"),
        ("vision tower", f"{s.n_layer} layers of {s.d_model}, {s.n_head} heads, {'GELU' if s.gelu else 'SiLU'}"),
        ("projector", f"to models with a hidden size of {s.d_out}"),
        (
            "weights",
            f"{count(n_weights)}: " + ", ".join(f"{name} {render.gigabytes(n)}" for name, n in weights.items()),
        ),
        ("images", f"up to {rule.max_side} pixels a side, patches of {s.patch_size}{merged}; at most {most} tokens"),
    ]
    return value, lines + [("warning", text) for text in tower.gguf.warnings]


def summary(d: "Description") -> list[tuple[str, str]]:
    """The lines that everybody sees: name and text."""
    from ms4.models.mistral4 import kv_bytes

    s = d.shape
    parts = f" in {len(d.paths)} parts" if len(d.paths) > 1 else ""
    rows = [
        ("file", f"{d.paths[0][-160:]}, {render.gigabytes(d.bytes)}{parts}"),
        ("model", f"{d.name[:80] or 'no name'} ({d.architecture})"),
        ("weights", f"{count(d.n_weights)}, of which a token uses {count(d.n_active)}"),
        ("layers", f"{s.n_layer}, the first {s.n_dense_layer} dense" if s.n_dense_layer else str(s.n_layer)),
        ("experts", f"{s.n_expert} of width {s.d_expert}, {s.n_expert_used} used; shared expert of {s.d_shared}"),
        ("attention", f"{s.n_head} heads, latent of {s.kv_rank}, query rank {s.q_rank}; hidden size {s.d_model}"),
        ("context", f"{s.n_ctx_train} tokens, {render.gigabytes(kv_bytes(s, 32768))} for each 32K of them"),
        ("vocabulary", f"{s.n_vocab} tokens"),
    ]
    rows += [("", f"{c.name:<14} {types(c)}") for c in d.classes]
    rows.append(("images", f"with {d.mmproj[-160:]}" if d.mmproj else "need an mmproj file; none lies beside this one"))
    if d.template_sha256:
        rows.append(("template", f"sha256 {d.template_sha256[:16]}, {d.template_bytes} bytes; not executed"))
    rows += [("warning", text) for text in d.warnings]
    if d.text_problem:
        rows.append(("warning", d.text_problem))
    return rows


def types(c: "TensorClass") -> str:
    shares = ", ".join(f"{name} {100 * n / max(c.bytes, 1):.0f} %" for name, n in c.types)
    return f"{render.gigabytes(c.bytes):>9}  {8 * c.bytes / max(c.n_weights, 1):5.2f} bits  {shares}"


def count(n: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)


def to_json(d: "Description") -> dict[str, Any]:
    value = asdict(d)
    value["paths"] = list(d.paths)
    value["classes"] = [
        {"name": c.name, "weights": c.n_weights, "bytes": c.bytes, "types": dict(c.types)} for c in d.classes
    ]
    return value


def tensor_row(tensor: Any) -> dict[str, Any]:
    from ms4.quant.blocks import BLOCKS

    return {
        "name": tensor.name,
        "type": BLOCKS[tensor.type].name,
        "dims": list(tensor.dims),
        "offset": tensor.offset,
        "bytes": tensor.bytes,
        "file": tensor.file,
    }


def plain(value: Any) -> Any:
    """A metadata value as JSON can hold it: of arrays the length and the first elements."""
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    first = [value[i] for i in range(min(len(value), FIRST_ELEMENTS))]
    shown = [v.decode("utf-8", "backslashreplace") if isinstance(v, bytes) else plain(v.item()) for v in first]
    return {"length": len(value), "first": shown}


def brief(value: Any) -> str:
    value = plain(value)
    if isinstance(value, dict):
        more = ", ..." if value["length"] > len(value["first"]) else ""
        return f"[{', '.join(map(str, value['first']))[:LONGEST_VALUE]}{more}] ({value['length']} elements)"
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text)} characters)"
