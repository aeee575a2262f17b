"""What is in a model file, for those who only ask: no engine is opened."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import ms4
from ms4.models import companion, mistral4
from ms4.models.vocabulary import Vocabulary
from ms4.quant.blocks import BLOCKS
from ms4.quant.gguf_file import GgufFile, TensorInfo

TEMPLATE = "tokenizer.chat_template"
# Classes of tensors as people speak of them, by how the name of the tensor begins after "blk.N.".
CLASSES = ("embedding", "output", "attention", "router", "experts", "shared expert", "dense", "norms")


@dataclass(frozen=True)
class TensorClass:
    """Tensors that serve one purpose: how many weights, in how many bytes, and which types by their share of bytes."""

    name: str
    n_weights: int
    bytes: int
    types: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Description:
    """What is in a model file."""

    paths: tuple[str, ...]
    bytes: int
    architecture: str
    name: str
    shape: ms4.Shape
    n_weights: int
    n_active: int  # weights that one token is multiplied with
    bytes_weights: int
    classes: tuple[TensorClass, ...]
    text_problem: str | None  # why text cannot be used with this file, if so
    template_sha256: str | None
    template_bytes: int
    mmproj: str | None  # the vision tower that lies beside the model
    warnings: tuple[str, ...]


def class_of(name: str) -> str:
    """The class of a tensor, by its name in the file."""
    base = name.split(".")[2 if name.startswith("blk.") else 0]
    if base.endswith("norm"):
        return "norms"
    if base in ("token_embd", "output"):
        return "embedding" if base == "token_embd" else "output"
    if base.startswith("attn_"):
        return "attention"
    if base == "ffn_gate_inp":
        return "router"
    if base.endswith("_exps"):
        return "experts"
    return "shared expert" if base.endswith("_shexp") else "dense"


def describe(file: str | os.PathLike[str] | GgufFile, *, is_here: bool = True) -> Description:
    """Checks a model file as `Model.open` does, and its vocabulary, without an engine.

    is_here: the file itself, not its header alone; only then is it known what lies beside it.
    """
    gguf = file if isinstance(file, GgufFile) else GgufFile.open(file)
    shape = mistral4.shape_of(gguf)
    mistral4.tensors_of(gguf, shape, is_here=is_here)
    vocabulary = Vocabulary.from_gguf(gguf)
    weights = [t for t in gguf.tensors.values() if t.name.endswith(".weight")]
    n_weights = sum(t.n_weights for t in weights)
    classes = tuple(_summary(name, [t for t in weights if class_of(t.name) == name]) for name in CLASSES)
    n_experts = sum(c.n_weights for c in classes if c.name == "experts")
    n_idle = n_experts * (shape.n_expert - shape.n_expert_used) // shape.n_expert
    n_lookup = shape.n_vocab * shape.d_model if "output.weight" in gguf.tensors else 0
    template = gguf.metadata.get(TEMPLATE)
    name = gguf.metadata.get("general.name")
    beside = companion.choose(gguf.path, gguf) if is_here else companion.Choice()
    return Description(
        paths=gguf.paths,
        bytes=sum(gguf.sizes),
        architecture=mistral4.architecture(gguf),
        name=name if type(name) is str else "",
        shape=shape,
        n_weights=n_weights,
        n_active=n_weights - n_idle - n_lookup,
        bytes_weights=sum(t.bytes for t in weights),
        classes=tuple(c for c in classes if c.n_weights),
        text_problem=vocabulary.problem,
        template_sha256=hashlib.sha256(template.encode()).hexdigest() if type(template) is str else None,
        template_bytes=len(template.encode()) if type(template) is str else 0,
        mmproj=None if beside.path is None else os.fspath(beside.path),
        warnings=(*gguf.warnings, *vocabulary.notes, *filter(None, (beside.doubt, beside.problem))),
    )


def _summary(name: str, tensors: list[TensorInfo]) -> TensorClass:
    types: dict[str, int] = {}
    for t in tensors:
        kind = BLOCKS[t.type].name
        types[kind] = types.get(kind, 0) + t.bytes
    ordered = tuple(sorted(types.items(), key=lambda item: -item[1]))
    return TensorClass(name, sum(t.n_weights for t in tensors), sum(t.bytes for t in tensors), ordered)
