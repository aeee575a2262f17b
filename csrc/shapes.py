"""What a model is like, as the engine takes it: hyperparameters, and where its tensors lie.  SPEC 1 and 3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


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
