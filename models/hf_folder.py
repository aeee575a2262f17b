"""A checkpoint in Hugging Face layout, as far as the converter needs it: settings, tensors and vocabulary, checked.

The folder holds config.json, model.safetensors and tekken.json; preprocessor_config.json and chat_template.jinja are
used where they are there.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms4.quant.gguf_file import FileError, shown
from ms4.quant.safetensors_file import Stored, open_safetensors

MAX_JSON_BYTES = 256 << 20
WEIGHTS = "model.safetensors"
NORMAL, CONTROL = 1, 3  # token types
TOWER = ("vision_tower.", "multi_modal_projector.")


class ConvertError(FileError):
    """The folder cannot be converted."""


@dataclass(frozen=True)
class Settings:
    """One object of config.json; `path` names it in errors."""

    path: str
    name: str
    values: Mapping[str, Any]

    def refuse(self, key: str, reason: str) -> ConvertError:
        return ConvertError(self.path, f"{self.name}{key} {reason}")

    def number(self, key: str, least: float = 1, *, whole: bool = True, default: float | None = None) -> Any:
        """A number of at least `least`; an integer unless `whole` is False."""
        value = self.values.get(key, default)
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < float("inf"):
            raise self.refuse(key, f"is {_brief(value)}; a number from {least:g} was expected")
        return value if whole else float(value)

    def section(self, key: str) -> Settings:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.refuse(key, "is missing")
        return Settings(self.path, f"{self.name}{key}.", value)

    def must_be(self, key: str, *allowed: Any) -> Any:
        """The value, which must be one of a few; the first of them where the key is absent."""
        value = self.values.get(key, allowed[0])
        if not any(type(value) is type(a) and value == a for a in allowed):
            wanted = " or ".join(map(_brief, allowed))
            raise self.refuse(key, f"is {_brief(value)}; only {wanted} can be converted")
        return value


def _brief(value: Any) -> str:
    return "missing" if value is None else shown(json.dumps(value, default=str), 40)


@dataclass(frozen=True)
class Vocabulary:
    """tekken.json: the control tokens' names, and the bytes of the ordinary tokens by rank."""

    control: tuple[str, ...]
    ordinary: tuple[bytes, ...]

    def id(self, name: str) -> int | None:
        return self.control.index(name) if name in self.control else None

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Every way to make a token of two others: in the order of the tokens, and then of the two."""
        rank = {token: i for i, token in enumerate(self.ordinary)}
        found = []
        for token in self.ordinary:
            splits = [(token[:i], token[i:]) for i in range(1, len(token))]
            known = [pair for pair in splits if pair[0] in rank and pair[1] in rank]
            found += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
        return found


@dataclass(frozen=True)
class Folder:
    path: Path
    config: Settings
    tensors: dict[str, Stored]  # by their names without the prefixes that differ between checkpoints

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Folder:
        """ConvertError, SafetensorsError or OSError: what is wrong with the folder."""
        path = Path(path)
        if not path.is_dir():
            raise ConvertError(path, "no such folder")
        if not (path / WEIGHTS).exists():
            split = (path / f"{WEIGHTS}.index.json").exists()
            raise ConvertError(
                path / WEIGHTS, "split into parts, which cannot be read yet" if split else "no such file"
            )
        config = Settings(str(path / "config.json"), "", read_json(path / "config.json"))
        tensors = {plain_name(name): stored for name, stored in open_safetensors(path / WEIGHTS).items()}
        return cls(path, config, tensors)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty if it is not there."""
        return read_json(self.path / name) if (self.path / name).exists() else {}

    def tensor(self, name: str, *shape: int) -> Stored:
        """The tensor, which must have this shape."""
        stored = self.tensors.get(name)
        if stored is None:
            raise ConvertError(self.path / WEIGHTS, f"tensor {name} is missing")
        if stored.shape != shape:
            found, wanted = (" x ".join(map(str, dims)) for dims in (stored.shape, shape))
            raise ConvertError(self.path / WEIGHTS, f"tensor {name} has the shape {found}; config.json says {wanted}")
        return stored

    def check_all_used(self, names: set[str], *, tower: bool) -> None:
        """Refuses a tensor (of the tower, or of the text model) that is not among `names`."""
        for name in self.tensors:
            if name not in names and name.startswith(TOWER) == tower:
                raise ConvertError(self.path / WEIGHTS, f"unexpected tensor {shown(name)}")


def plain_name(name: str) -> str:
    """language_model.model.X and model.language_model.X are X; vision_tower.X may stand under model. too."""
    inner = name.removeprefix("model.")
    if inner.startswith(TOWER):
        return inner
    for prefix in ("language_model.model.", "model.language_model.", "language_model."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def read_json(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise ConvertError(path, "no such file") from None
    try:
        value = json.loads(raw) if len(raw) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConvertError(path, "not a JSON object")
    return value


def read_vocabulary(folder: Folder, n_vocab: int) -> Vocabulary:
    """tekken.json, cut to n_vocab tokens."""
    path = folder.path / "tekken.json"
    values = read_json(path)
    config = Settings(str(path), "", values).section("config")
    n_control = config.number("default_num_special_tokens")
    if config.number("default_vocab_size") < n_vocab or n_control >= n_vocab:
        raise ConvertError(path, f"the vocabulary has another size than the model, which has {n_vocab} tokens")
    return Vocabulary(_control(path, values, n_control), _ordinary(path, values, n_vocab - n_control))


def _control(path: Path, values: Mapping[str, Any], n: int) -> tuple[str, ...]:
    names = [f"<SPECIAL_{i}>" for i in range(n)]
    special = values.get("special_tokens")
    for entry in special if isinstance(special, list) else []:
        rank, name = (entry.get("rank"), entry.get("token_str")) if isinstance(entry, dict) else (None, None)
        if type(rank) is not int or not 0 <= rank < n or not isinstance(name, str) or not name:
            raise ConvertError(path, "an entry of special_tokens is damaged")
        names[rank] = name
    if len(set(names)) < n:
        raise ConvertError(path, "two special tokens have the same name")
    return tuple(names)


def _ordinary(path: Path, values: Mapping[str, Any], n: int) -> tuple[bytes, ...]:
    entries = values.get("vocab")
    if not isinstance(entries, list) or len(entries) < n:
        raise ConvertError(path, f"vocab holds fewer than {n} tokens")
    tokens = []
    for rank, entry in enumerate(entries[:n]):
        try:
            tokens.append(base64.b64decode(entry["token_bytes"], validate=True))
            if entry["rank"] != rank or not tokens[-1]:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ConvertError(path, f"entry {rank} of vocab is damaged") from None
    if len(set(tokens)) < n:
        raise ConvertError(path, "two tokens have the same bytes")
    return tuple(tokens)
