"""The options that several commands share: their spelling, their ranges, and the frozen values the commands receive."""

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ms4.cli import typed
from ms4.cli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from ms4.models.sampling import Sampler

N_CTX_DEFAULT = 32768
MOST_CTX = 1 << 20
MOST_THREADS = 1024
MOST_BYTES = 1 << 50
LIST = "list"  # in place of a card or a memory: what the table knows
# The checkpoint that comes with ms4, for those who have no other yet.
DEMO = os.path.join(os.path.dirname(os.path.dirname(__file__)), "models", "demo", "ms4-demo.gguf")
UNITS = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2, "g": 1000**3, "G": 1024**3}
RATE_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


def size(text: str) -> int:
    """32768, 32k (32,000) or 32K (32,768)."""
    match = re.fullmatch(r"([0-9]{1,30})([kKmMgG]?)", text)
    if not match:
        raise ValueError(f"{text!r} is not a whole number such as 32768, 32k or 32K")
    return int(match[1]) * UNITS[match[2]]


def whole(least: int, most: int) -> Callable[[str], int]:
    """A parser of sizes from `least` to `most`."""

    def parse(given: str | int) -> int:
        text = str(given)  # a default passes here too, as a number
        try:
            value = size(text)
        except ValueError as error:
            if re.fullmatch(r"-[0-9]+", text):
                raise typer.BadParameter(f"{text} is outside {least} to {most}") from None
            raise typer.BadParameter(f"{error}, {least} to {most}") from None
        if not least <= value <= most:
            raise typer.BadParameter(f"{text} is outside {least} to {most}")
        return AtMost(value) if isinstance(given, AtMost) else value

    return parse


class AtMost(int):
    """A size that nobody typed for this call: where there is less, it is that."""


def memory_size(text: str) -> int:
    """24G (of 1,024³ bytes), 1.5G, 24GB (of 1,000³), 24GiB, 800000."""
    match = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,9})?) ?(?:([kKmMgGtT])(i?[bB])?|[bB])?", text)
    if not match:
        raise ValueError(f"{text!r} is no size of memory such as 24G, 1.5G or 24GB")
    unit, of = match[2], (match[3] or "").lower()
    base = 1000 if of == "b" or not of and unit in ("k", "m", "g", "t") else 1024
    power = "kmgt".index(unit.lower()) + 1 if unit else 0
    return int((float if "." in match[1] else int)(match[1]) * base**power)


def n_bytes(least: int = 1) -> Callable[[str], int]:
    """A parser of bytes from `least` to MOST_BYTES."""

    def parse(given: str | int) -> int:
        text = str(given)
        try:
            value = memory_size(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if not least <= value <= MOST_BYTES:
            raise typer.BadParameter(f"{text} is outside {least} to {MOST_BYTES} bytes")
        return value

    return parse


def real(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """A parser of numbers from `least` (or above it) to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            between = f"{'above ' if above else ''}{least:g} to {most:g}"
            raise typer.BadParameter(f"{text} is not a number such as 0.7, {between}") from None
        if above and value <= least:
            raise typer.BadParameter(f"{text} is not above {least:g}")
        if not least <= value <= most:
            raise typer.BadParameter(f"{text} is outside {least:g} to {most:g}")
        return value

    return parse


def one_of(words: tuple[str, ...]) -> Callable[[str], str]:
    """A parser that accepts these words only."""

    def parse(text: str) -> str:
        if text not in words:
            raise typer.BadParameter(f"{text} is not one of {', '.join(words)}")
        return text

    return parse


def choice(words: tuple[str, ...], help: str, *names: str) -> Any:
    """An option that takes one of `words`."""
    shown = "|".join(words)
    if len(shown) > 30:  # more than the column of names is wide
        shown, help = "NAME", f"{help}  One of {', '.join(words)}."
    return typer.Option(*names, metavar=shown, parser=one_of(words), help=help)


def depths(text: str) -> list[int]:
    """A list such as 0,8k,32K."""
    return [whole(0, MOST_CTX)(part) for part in text.split(",")]


def picture(text: str) -> tuple[int, int]:
    """Width and height in pixels, such as 1540x1540."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", str(text))
    if not match:
        raise typer.BadParameter(f"{text} is no size such as 1540x1540")
    return int(match[1]), int(match[2])


def rate(text: str) -> int:
    """Bytes a second, such as 20MB/s, 500k or 1.5M."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?([kKmMgG])(?:B|b)?(?:/s)?", str(text))
    if not match or float(match[1]) == 0:
        raise typer.BadParameter(f"{text} is no rate such as 20MB/s")
    return int(float(match[1]) * RATE_UNITS[match[2].lower()])


def in_table(find: str, *others: str) -> Callable[[str], str]:
    """A parser of names in models/cards.toml, however they are written, and of others.  find: of ms4.models.cards."""

    def parse(text: str) -> str:
        if text in (*others, LIST):
            return text
        from ms4.models import cards

        try:
            return str(getattr(cards, find)(text)[0])
        except cards.UnknownError as error:
            near = f"; near it: {', '.join(error.near)}" if error.near else ""
            raise typer.BadParameter(f"{error}{near}; {LIST} shows all") from None

    return parse


def card(help: str, *others: str) -> Any:
    """An option that names a card of the table."""
    parser = in_table("find", *others)
    return typer.Option("--gpu", metavar="CARD", parser=parser, help=f"{help} (4090; {LIST} shows all).")


def memory(help: str, *others: str) -> Any:
    """An option that names a kind of memory."""
    parser = in_table("find_memory", *others)
    return typer.Option("--memory", metavar="MEMORY", parser=parser, help=f"{help} (DDR5-5600; {LIST} shows all).")


def encoding(name: str) -> str:
    """The name of an encoding of text that Python knows."""
    try:
        b"a".decode(name or "utf-8")  # the default passes here too
    except UnicodeError:  # half a character of UTF-16
        pass
    except (LookupError, ValueError):
        raise typer.BadParameter(f"{name} is no encoding such as latin-1, cp1252, utf-16 or shift_jis") from None
    return name


Model = Annotated[
    str | None,
    typer.Option("-m", "--model", metavar="PATH|NAME", envvar="MS4_MODEL", help="A GGUF file, or a name of ms4 ls."),
]
Threads = Annotated[
    int | None,
    typer.Option("-t", "--threads", metavar="N", parser=whole(1, MOST_THREADS), help="Threads; else as many as fit."),
]
Load = Annotated[
    str,
    choice(("auto", "map", "copy", "stream"), "The file's pages, a copy, or experts left on the disk.", "--load"),
]
Ram = Annotated[
    int | None,
    typer.Option("--ram", metavar="BYTES", parser=n_bytes(), help="Memory to use (24G); else what is free."),
]
Scale = Annotated[
    str, choice(("plain", "mscale2"), "Softmax scale: 1/sqrt(d), or that times mscale squared.", "--attn-scale")
]
Device = Annotated[
    str, choice(("auto", "cpu", "cuda", "cuda:safe"), "Who computes: auto takes a GPU if there is one.", "--device")
]
Vram = Annotated[
    int | None,
    typer.Option(
        "--vram", metavar="BYTES", parser=n_bytes(1 << 20), help="Of the GPU, at most (24G); else what is free."
    ),
]
Context = Annotated[
    int, typer.Option("--ctx", metavar="N", parser=whole(1, MOST_CTX), help="Most tokens held (32k, 1K = 1024).")
]
Images = Annotated[
    list[str] | None, typer.Option("-i", "--image", metavar="PATH...", help="Images; - is stdin; may be repeated.")
]
Mmproj = Annotated[
    str | None, typer.Option("--mmproj", metavar="FILE", help="The vision tower; else found beside the model.")
]
ImageMaxTokens = Annotated[
    int | None,
    typer.Option("--image-max-tokens", metavar="N", parser=whole(2, MOST_CTX), help="Most tokens of an image."),
]
Encoding = Annotated[
    str, typer.Option("--encoding", metavar="NAME", parser=encoding, help="Of texts on stdin and in files; else UTF-8.")
]
Lossy = Annotated[bool, typer.Option("--lossy", help="Show what is no text as U+FFFD instead of refusing it.")]
Profile = Annotated[
    str | None, typer.Option("--profile", metavar="NAME", help="Options of [profile.NAME] in the file of ms4 config.")
]
# True: quiet; False: verbose.
Quiet = Annotated[
    bool | None,
    typer.Option("-q/-v", "--quiet/--verbose", help="No progress and no notes on stderr; or more, about file and run."),
]

# The model itself knows none and high; between them, thoughts of high end after so many tokens.
BUDGETS = {"low": 1024, "medium": 4096}
LEVELS = ("none", "low", "medium", "high")
Level = Annotated[
    str,
    choice(
        LEVELS,
        f"Reasoning effort; low and medium think for {' and '.join(map(str, BUDGETS.values()))} tokens.",
        "-r",
        "--effort",
    ),
]


@dataclass(frozen=True)
class EngineOptions:
    """How a model is opened."""

    model: Model = None  # None: the demonstration checkpoint
    threads: Threads = None  # None: as many as this process may use
    load: Load = "auto"
    ram: Ram = None  # bytes; None: what is free
    device: Device = "auto"
    vram: Vram = None  # bytes of the GPU's memory; None: what is free
    attn_scale: Scale = "plain"
    silence: Quiet = None

    def __post_init__(self) -> None:
        if self.ram and self.load in ("map", "copy"):
            raise UsageError(f"--ram cannot limit --load {self.load}", "leave --load out, or use --load stream")

    @property
    def quiet(self) -> bool:
        return self.silence is True

    @property
    def verbose(self) -> bool:
        return self.silence is False

    def require(self) -> str:
        """The model's path; an error with what to type, if there is no such file."""
        if not self.model:
            if os.path.exists(DEMO):
                return DEMO
            raise MissingError("no model is named", "add -m model.gguf   or   export MS4_MODEL=model.gguf")
        return model_path(self.model)


def model_path(name: str) -> str:
    """The path of a model: that of a file, or of what lies under this name in the cache of Hugging Face."""
    if not os.path.lexists(name):
        name = os.path.expanduser(typed.local_path(name))  # as the shell leaves it in --model=~/a.gguf
    if os.path.lexists(name):
        typed.refuse_folder(name)
        return name
    if "://" in name and name.lower().endswith(".gguf"):
        raise MissingError(f"{name[-120:]}: not on this machine", "ms4 plan ADDRESS says what it is, curl gets it")
    if name.lower().endswith(".gguf") or name[:1] in ("", "/", ".", "~"):
        raise MissingError(f"{name[-80:]}: no such file", "-m or MS4_MODEL names a GGUF of Mistral Small 4")
    from ms4.models import stored

    return stored.resolve(name)


def thinking(level: str, budget: int | None = None) -> tuple[str, int | None]:
    """(effort, most tokens of thought) of what was asked for."""
    return ("high", budget or BUDGETS[level]) if level in BUDGETS else (level, budget)


@dataclass(frozen=True)
class Sampling:
    """The options that choose tokens; None leaves a setting to the effort's default."""

    effort: Level = "none"
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False
    temperature: Annotated[
        float | None,
        typer.Option("--temp", metavar="T", parser=real(0, 10), help="Temperature; else 0.3, or 0.7 with -r high."),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", parser=real(0, 1, above=True), help="Keep the likeliest, P in all."),
    ] = None
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", parser=whole(0, MOST_CTX), help="Keep K; 0: all.")
    ] = None
    min_p: Annotated[
        float | None, typer.Option("--min-p", metavar="P", parser=real(0, 1), help="Keep P times the likeliest.")
    ] = None
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", parser=whole(0, 2**64 - 1), help="The same seed gives the same text."),
    ] = None
    think_budget: Annotated[
        int | None,
        typer.Option("--think-budget", metavar="N", parser=whole(1, MOST_CTX), help="Most tokens of thought."),
    ] = None
    think_seconds: Annotated[
        float | None,
        typer.Option(
            "--answer-now-after", metavar="S", parser=real(0, 1e6, above=True), help="Most seconds of thought."
        ),
    ] = None

    def settled(self) -> "Sampling":
        """With an effort that the model knows: low and medium are high with a budget."""
        effort, budget = thinking(self.effort, self.think_budget)
        return replace(self, effort=effort, think_budget=budget)

    def sampler(self, effort: str = "") -> "Sampler":
        """A sampler for this effort, or for another one."""
        from ms4.models.sampling import Sampler, SamplingParams

        return Sampler(
            SamplingParams.for_effort(
                effort or self.effort,
                greedy=self.greedy,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                seed=self.seed,
            )
        )


def without(*names: str) -> frozenset[str]:
    """Behind a dataclass of options in an annotation: the fields that are no options of this command."""
    return frozenset(names)


def flattened(callback: Callable[..., int]) -> Callable[..., int]:
    """A command in the form that Typer takes, with one parameter for each option.

    A parameter whose type is a dataclass stands for the fields of it, which come behind all others.
    """
    params: list[Parameter] = []
    options: list[Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for param in inspect.signature(callback).parameters.values():
        kind, *left_out = get_args(param.annotation) or [param.annotation]
        if not is_dataclass(kind):
            params.append(param)
            continue
        members = [field for field in fields(kind) if not any(field.name in names for names in left_out)]
        options += [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in members]
        groups[param.name] = kind, [field.name for field in members]

    def call(**given: Any) -> int:
        made = {name: kind(**{field: given.pop(field) for field in names}) for name, (kind, names) in groups.items()}
        return callback(**given, **made)

    call.__name__, call.__doc__ = callback.__name__, callback.__doc__
    call.__signature__ = inspect.Signature([*params, *options])  # type: ignore[attr-defined]
    return call
