"""Which repositories hold GGUF files that ms4 runs: a table.  A name that people say, the repository, and its files.

The rows come from what model cards and listings said when they were written down (November 2026); nothing here has
been compared with the hub itself.  They serve hints and names alone: what is downloaded, and how big it is, the hub
says at the time.  A size is exact where `exact` says so, else rounded as it was published.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB, GB = 1 << 30, 10**9


@dataclass(frozen=True)
class Known:
    """One quantization in a repository.  bytes: of all its parts, 0 if no source says."""

    quant: str
    bytes: int = 0
    n_parts: int = 0  # 0: not known
    exact: bool = False


@dataclass(frozen=True)
class Repository:
    """name: what people may say instead of `repo`; "" for none.  `model` is the model in words."""

    name: str
    repo: str
    model: str
    files: tuple[Known, ...] = ()
    has_gguf: bool = True


SMALL, LEAN = "Mistral Small 4 119B (2603)", "Leanstral 1.5 119B-A6B"
REPOSITORIES = (
    Repository(
        "mistral-small-4",
        "unsloth/Mistral-Small-4-119B-2603-GGUF",
        SMALL,
        (
            Known("UD-IQ2_XXS"),
            Known("UD-IQ2_M"),
            Known("UD-IQ3_XXS", 42_797_027_008, 1, exact=True),
            Known("UD-IQ3_S", 44_407_639_744, 1, exact=True),
            Known("UD-IQ4_XS", 0, 3),
            Known("UD-Q4_K_S", int(69.30 * GIB)),
            Known("Q4_K_M", int(67.21 * GIB), 2),
            Known("UD-Q4_K_XL", int(73.8 * GB), 3),
            Known("UD-Q5_K_XL"),
            Known("Q8_0", int(117.78 * GIB)),
            Known("BF16", int(221.64 * GIB)),
        ),
    ),
    Repository("", "bartowski/mistralai_Mistral-Small-4-119B-2603-GGUF", SMALL, (Known("Q4_K_M", 0, 2),)),
    # The same architecture; nobody had published a GGUF of it when this was written.
    Repository("leanstral", "mistralai/Leanstral-1.5-119B-A6B", LEAN, has_gguf=False),
    Repository("", "mistralai/Leanstral-2603", "Leanstral (2603)", has_gguf=False),
)
DEFAULT = REPOSITORIES[0]


def known(name: str) -> Repository | None:
    """The row that a name or a repository has."""
    wanted = name.lower()
    return next((row for row in REPOSITORIES if wanted in (row.name, row.repo.lower())), None)
