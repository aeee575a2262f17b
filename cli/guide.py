"""What `ms4 COMMAND --help` says beside its options: examples, and in which groups the options stand.

Owns the texts and the layout; the options themselves are those of `main.py`.  An option that is in no group stands
under OTHERS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

EXAMPLES: dict[str, tuple[str, ...]] = {
    "run": (
        'ms4 run "Explain mixture of experts in three sentences"',
        'git diff | ms4 run "Write a commit message, one line"',
        'ms4 run -i invoice.png "Total and due date?"',
        'ms4 run -f report.pdf:1-3,7 -r high "Which assumptions are weakest?"',
        "ms4 run --schema 'name, age int' -f letter.txt \"Who wrote this?\"",
        'ms4 run -c "And in one sentence?"',
        "ms4 run --save review -r low 'Review this patch: $input'",
        "git diff | ms4 run -t review",
    ),
    "chat": ("ms4 chat", "ms4 chat report.pdf photo.jpg", "ms4 chat -r low", "ms4 chat -c", "ms4 chat --resume"),
    "batch": (
        "ms4 batch prompts.txt -o answers.jsonl",
        "ms4 batch asked.jsonl -o answers.jsonl --seed 1 -j 8",
        "ms4 batch prompts.txt --schema 'name, age int' --greedy",
    ),
    "pull": (
        "ms4 pull",
        "ms4 pull Q4_K_M",
        "ms4 pull USER/REPO:QUANT --limit 20MB",
        "ms4 pull --dry-run",
        "ms4 pull --list",
    ),
    "ls": ("ms4 ls", "ms4 ls --json"),
    "rm": ("ms4 rm Q4_K_M", "ms4 rm --dry-run USER/REPO:QUANT"),
    "verify": ("ms4 verify", "ms4 verify Q4_K_M --repair"),
    "sessions": (
        "ms4 sessions",
        "ms4 sessions show 20260101-120000-abcd",
        "ms4 sessions search invoice total",
        "ms4 sessions export 20260101 > talk.json",
        "ms4 sessions rm 20260101",
    ),
    "templates": ("ms4 templates", "ms4 templates show review", "ms4 templates edit review", "ms4 templates rm review"),
    "config": (
        "ms4 config",
        "ms4 config show --origin",
        "ms4 config set effort high",
        "ms4 config set stop END --profile letters",
        "ms4 config edit",
    ),
    "info": ("ms4 info model.gguf", "ms4 info Q4_K_M --tensors"),
    "doctor": ("ms4 doctor", "ms4 doctor -m model.gguf"),
    "selftest": ("ms4 selftest --gpu", "ms4 selftest --gpu --safe"),
    "bench": ("ms4 bench -m model.gguf", "ms4 bench --depth 0,8k,32k --format csv", "ms4 bench --image 1540x1540"),
    "perplexity": (
        "ms4 perplexity text.txt -m model.gguf",
        "ms4 perplexity text.txt -m Q8_0 --segments 20 --write-ref q8.ref",
        "ms4 perplexity text.txt -m Q4_K_M --segments 20 --ref q8.ref",
    ),
    "tokenize": ('ms4 tokenize "some text"', "ms4 tokenize --count < text.txt", "ms4 tokenize --chat talks.jsonl"),
    "trace": ("ms4 trace prompts.txt -o trace.bin", "ms4 trace --synthetic mid -n 4000 -o trace.bin"),
    "plan": ("ms4 plan model.gguf", "ms4 plan Q4_K_M --ctx 128k", "ms4 plan model.gguf --gpu 4090 --memory DDR5-5600"),
    "simulate": ("ms4 simulate trace.bin", 'ms4 simulate trace.bin --gpu "5070 Ti" --ram 64G'),
    "logits": ("ms4 logits --ids ids.json -o logits.npy", "ms4 logits --ids - -o - < ids.json > logits.npy"),
    "convert": (
        "ms4 convert FOLDER model.gguf",
        "ms4 convert FOLDER model.gguf --type Q8_0 --mmproj model-mmproj.gguf",
    ),
    "completion": ('eval "$(ms4 completion bash)"', "ms4 completion fish | source"),
    "man": ("ms4 man | man -l -", "ms4 man > ~/.local/share/man/man1/ms4.1"),
}
OTHERS = "Options"
# The groups in their order, and the options in them by the name of their parameter.
GROUPS: dict[str, tuple[str, ...]] = {
    "What is asked": (
        *("system", "image", "file", "pdf", "pdf_password", "encoding", "lossy", "mmproj", "image_max_tokens"),
        *("messages", "tools", "prefill", "no_stdin"),
    ),
    "Templates": ("template", "param", "save"),
    "Conversation": ("goes_on", "resume", "no_session", "compact"),
    "Thinking": ("effort", "think", "think_budget", "think_seconds"),
    "How it is written": ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "greedy", "stop"),
    "What comes out": (
        *("schema", "json_object", "extract", "format", "markdown", "output", "stats", "logprobs", "strict", "timeout"),
        *("show_prompt", "count"),
    ),
    "Model and machine": (
        "together",
        "model",
        "ctx",
        "threads",
        "load",
        "ram",
        "device",
        "vram",
        "attn_scale",
        "profile",
    ),
}
FEW = 15  # options that need no groups


def grouped(params: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """The options of a command, group after group, each as (title, parameters)."""
    options = [p for p in params if p.param_type_name == "option" and not p.hidden]
    if len(options) <= FEW:
        return [(OTHERS, options)] if options else []
    found = [(title, [p for name in names for p in options if p.name == name]) for title, names in GROUPS.items()]
    placed = {name for names in GROUPS.values() for name in names}
    found.append((OTHERS, [p for p in options if p.name not in placed]))
    return [(title, members) for title, members in found if members]


def record(param: Any, ctx: Any) -> tuple[str, str]:
    """(how it is typed, what it is)."""
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper(), param.help or ""
    typed, about = param.get_help_record(ctx)
    return str(typed), str(about)


def usage(command: Any, ctx: Any) -> str:
    """What follows the name of the command; what has to be there in no brackets."""
    return re.sub("[{}]", "", " ".join(command.collect_usage_pieces(ctx)))


def write(command: Any, ctx: Any, formatter: Any) -> None:
    """The help of a command: what it does, examples, then what can be typed."""
    from ms4.cli import wrap

    text = str(command.help or "")
    formatter.write_text(f"{ctx.command_path}: {text[:1].lower()}{text[1:]}")
    formatter.write_paragraph()
    for line in EXAMPLES.get(ctx.command_path.removeprefix("ms4 "), ()):
        formatter.write(wrap.reflow(f"  {line}\n", formatter.width))
    formatter.write_paragraph()
    formatter.write_usage(ctx.command_path, usage(command, ctx))
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    sections = [("Arguments", arguments)] if arguments else []
    for title, members in [*sections, *grouped(command.params)]:
        with formatter.section(title):
            formatter.write_dl([record(param, ctx) for param in members])
