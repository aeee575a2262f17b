"""The commands of ms4 and their options.  Each command checks its options here and is carried out in its own file."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ms4.cli import elsewhere, guide, typed
from ms4.cli import options as opt
from ms4.cli.errors import UsageError
from ms4.models.untrusted import Reading


def spellings(params: Sequence[Any]) -> dict[str, str | None]:
    """The options of a command, as they are typed -> the name of the value; None for a flag."""
    ours: dict[str, str | None] = {}
    for option in params:
        if option.param_type_name == "option":
            value = None if option.is_flag else option.metavar or "TEXT"
            ours |= dict.fromkeys([*option.opts, *option.secondary_opts], value)
    return ours


class Command(TyperCommand):
    """A command that takes each of its options once, unless it is a list, and says what another's option is here."""

    def get_help(self, ctx: Any) -> str:
        """As wide as the terminal; Click has 50 columns at the least, and up to 30 of them for the names."""
        ctx.terminal_width = max(20, min(100, shutil.get_terminal_size().columns - 1))
        formatter = ctx.make_formatter()
        formatter.write_dl = partial(formatter.write_dl, col_max=min(30, formatter.width // 3))
        guide.write(self, ctx, formatter)
        return str(formatter.getvalue().rstrip("\n"))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = spellings(self.get_params(ctx))
        if name := elsewhere.stranger(args, ours):
            hint = elsewhere.option_hint(name, ctx.command_path, ours)
            raise UsageError(f"no such option: {name}", hint)
        typed.refuse_torn(args, ours)
        if "--resume" in ours:
            args = typed.fill_resume(args)
        typed.refuse_missing(args, ours, ctx.command_path)
        if "--template" in ours and "-t" in args:
            from ms4.cli import templates

            args = templates.named(args, ours)
        if {"-i", "-f"} & {*ours} and any(arg.startswith(("-i", "-f", "--i", "--f")) for arg in args):
            from ms4.cli.attachments import spread  # it knows pictures, which takes time to import

            args = spread(args, ours)
        given, extra, order = self.make_parser(ctx).parse_args(args=list(args))
        typed.refuse_extra(extra, ours, ctx.command_path)
        for param in order:
            if order.count(param) > 1 and not getattr(param, "multiple", True):
                raise UsageError(f"{param.opts[-1]} is given twice", f"{ctx.command_path} --help")
        typed.refuse_empty(self.get_params(ctx), given, ctx.command_path)
        if {"--profile", "--model"} <= {*ours} and not {*ctx.help_option_names} & {*args}:
            from ms4.cli import config

            ctx.default_map = config.defaults(ctx.info_name.split()[-1], self.params, given, ctx)
        ctx.meta["typed"] = given
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("save") is not None:
            from ms4.cli import templates

            return templates.save(ctx.params["save"], ctx.meta["typed"], self.params, ctx)
        return super().invoke(ctx)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@cache
def command(name: str) -> TyperCommand:
    """One command alone: to make all of them for the one that is wanted would take longer than to carry it out."""
    (info,) = (info for info in app.registered_commands if info.callback and info.callback.__name__ == name)
    assert info.callback
    info = typer.models.CommandInfo(info.name, cls=info.cls, callback=opt.flattened(info.callback))
    made = typer.main.get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None)
    assert isinstance(made, TyperCommand)
    if any("--model" in param.opts for param in made.params):
        info = typer.models.CommandInfo("profiled", callback=profiled)
        profile = typer.main.get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None).params[0]
        profile.expose_value = False  # heeded before the command is called
        made.params.append(profile)
    return made


def profiled(profile: opt.Profile = None) -> None:
    """The option of every command whose options can be set in files."""


def carry_out(name: str, args: list[str]) -> int:
    """Runs a command and returns its exit code."""
    settings: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    return int(command(name).main(args, prog_name=f"ms4 {name}", standalone_mode=False, **settings) or 0)


Prompt = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Joined by spaces.")]
System = Annotated[
    str | None, typer.Option("-s", "--system", metavar="TEXT|@FILE", help="System prompt, or @ and a file.")
]
Effort = Annotated[str, opt.choice(("none", "high"), "Reasoning effort.", "-r", "--effort")]
Think = Annotated[str, opt.choice(("auto", "show", "hide"), "Thoughts: auto shows them on a terminal.", "--think")]
Markdown = Annotated[
    bool, typer.Option("--markdown/--plain", help="Render the answer on a colour terminal, or show it as it is.")
]
Format = Annotated[
    str, opt.choice(("auto", "text", "json", "jsonl"), "How the answer is written; auto is text.", "--format")
]
Table = Annotated[str, opt.choice(("md", "csv", "json"), "How the table is written.", "--format")]
MaxTokens = Annotated[
    int | None,
    typer.Option("-n", "--max-tokens", metavar="N", parser=opt.whole(1, opt.MOST_CTX), help="Most tokens written."),
]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before TEXT; may be repeated.")]
Files = Annotated[
    list[str] | None,
    typer.Option(
        "-f", "--file", metavar="PATH[:PAGES]...", help="Texts, images or PDFs (a.pdf:1-3,7); may be repeated."
    ),
]
Pdf = Annotated[
    str, opt.choice(("auto", "text", "image"), "Pages as text, as images, or as images where they need it.", "--pdf")
]
PdfPassword = Annotated[str, typer.Option("--pdf-password", metavar="TEXT", help="Opens a PDF that needs one.")]
Logprobs = Annotated[
    int | None,
    typer.Option(metavar="N", parser=opt.whole(0, 20), help="Log-probabilities of the N likeliest, in JSON."),
]
Stats = Annotated[bool, typer.Option("--stats", help="One line of statistics on stderr.")]


Vram = Annotated[
    int | None,
    typer.Option("--vram", metavar="N", parser=opt.n_bytes(0), help="Bytes of VRAM; else the card's."),
]
Seconds = Annotated[
    float | None,
    typer.Option("--timeout", metavar="S", parser=opt.real(0, 1e6, above=True), help="Exit 3 after S seconds."),
]
Compact = Annotated[
    bool, typer.Option("--compact/--no-compact", help="Summarize older turns by itself when the context is full.")
]
Continue = Annotated[bool, typer.Option("-c", "--continue", help="Go on with the last conversation.")]
Resume = Annotated[
    str | None, typer.Option("--resume", metavar="[ID]", help="Go on with that one; without ID, choose from a list.")
]
NoSession = Annotated[bool, typer.Option("--no-session", help="Leave nothing of it on disk.")]
Messages = Annotated[
    str | None, typer.Option("--messages", metavar="FILE", help="The turns before PROMPT (JSON, as OpenAI has it).")
]
Tools = Annotated[str | None, typer.Option("--tools", metavar="FILE", help="Functions to call (JSON).")]
JsonObject = Annotated[bool, typer.Option("--json-object", help="Some JSON object.")]
Extract = Annotated[bool, typer.Option("-x", "--extract", help="Only the last block of code.")]
Template = Annotated[
    str | None, typer.Option("--template", metavar="NAME", help="Options and a prompt that --save kept; or -t NAME.")
]
Params = Annotated[
    list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="A variable of it; may be repeated.")
]
Save = Annotated[
    str | None, typer.Option("--save", metavar="NAME", help="Keep all that is typed as a template, and stop.")
]
Schema = Annotated[
    str | None,
    typer.Option("--schema", metavar="FILE|FIELDS", help="JSON by a schema, or by fields: 'name, age int'."),
]


@app.command(cls=Command)
def run(
    engine: opt.EngineOptions,
    sampling: Annotated[opt.Sampling, opt.without("effort")],
    prompt: Prompt = None,
    image: opt.Images = None,
    file: Files = None,
    pdf: Pdf = "auto",
    pdf_password: PdfPassword = "",
    encoding: opt.Encoding = "",
    lossy: opt.Lossy = False,
    mmproj: opt.Mmproj = None,
    image_max_tokens: opt.ImageMaxTokens = None,
    system: System = None,
    effort: opt.Level = None,  # type: ignore[assignment]
    think: Think = "auto",
    markdown: Markdown = True,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    prefill: Annotated[str, typer.Option(metavar="TEXT", help="The answer begins with TEXT.")] = "",
    goes_on: Continue = False,
    resume: Resume = None,
    no_session: NoSession = False,
    messages: Messages = None,
    tools: Tools = None,
    schema: Schema = None,
    json_object: JsonObject = False,
    extract: Extract = False,
    timeout: Seconds = None,
    format: Format = "auto",
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE", help="Not to stdout (-).")] = None,
    stats: Stats = False,
    logprobs: Logprobs = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 if --max-tokens cuts the answer.")] = False,
    show_prompt: Annotated[bool, typer.Option("--show-prompt", help="Show the rendered prompt and stop.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Count the prompt's tokens and stop.")] = False,
    no_stdin: Annotated[bool, typer.Option("--no-stdin", help="Leave stdin alone, as in a loop over it.")] = False,
    template: Template = None,
    param: Params = None,
    save: Save = None,
    ctx: opt.Context = opt.N_CTX_DEFAULT,
) -> int:
    """Answer one prompt.  Stdin, if it is a pipe or a file, comes before PROMPT."""
    from ms4.cli import run as one_shot

    sampling = replace(sampling, effort=effort or "none").settled()
    effort = effort and sampling.effort  # None stays None: the messages or the session know
    return one_shot.run(one_shot.Request.of(locals()), sampling, engine)


@app.command(cls=Command)
def chat(
    engine: opt.EngineOptions,
    sampling: Annotated[opt.Sampling, opt.without("effort")],
    files: Annotated[list[str] | None, typer.Argument(metavar="FILE", help="Goes with the first message.")] = None,
    goes_on: Continue = False,
    resume: Resume = None,
    no_session: NoSession = False,
    template: Template = None,
    pdf: Pdf = "auto",
    pdf_password: PdfPassword = "",
    encoding: opt.Encoding = "",
    lossy: opt.Lossy = False,
    mmproj: opt.Mmproj = None,
    image_max_tokens: opt.ImageMaxTokens = None,
    system: System = None,
    effort: opt.Level = None,  # type: ignore[assignment]
    think: Think = "auto",
    markdown: Markdown = True,
    compact: Compact = True,
    max_tokens: MaxTokens = None,
    ctx: opt.Context = opt.N_CTX_DEFAULT,
) -> int:
    """Talk with the model.  /help lists what else can be typed."""
    from ms4.cli import repl

    images = repl.ImageOptions(mmproj, image_max_tokens)
    settings = repl.ChatSettings(
        replace(sampling, effort=effort or "none").settled(),
        system,
        think,
        max_tokens,
        ctx,
        tuple(files or ()),
        pdf,
        images,
        Reading(encoding, lossy, pdf_password),
        "" if goes_on and resume is None else resume,
        no_session,
        markdown,
        compact,
        effort is not None,
    )
    return repl.chat(settings, engine)


@app.command(cls=Command)
def batch(
    engine: opt.EngineOptions,
    sampling: Annotated[opt.Sampling, opt.without("think_seconds")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="Prompts, one a line, or JSON, one object a line.")],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="The answers; what is there already is not asked again."),
    ] = None,
    together: Annotated[
        int, typer.Option("-j", "--jobs", metavar="N", parser=opt.whole(1, 64), help="Most answers at a time.")
    ] = 4,
    encoding: opt.Encoding = "",
    lossy: opt.Lossy = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    schema: Schema = None,
    template: Template = None,
    param: Params = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 if --max-tokens cuts an answer.")] = False,
    ctx: opt.Context = opt.N_CTX_DEFAULT,
) -> int:
    """Answer a file of prompts, several together; the same command goes on after an interruption."""
    from ms4.cli import batch as command

    stops = tuple(stop or ())
    job = command.Job(file, output, sampling.settled(), system, schema, max_tokens, stops, ctx, together, strict)
    job = replace(job, fill=command.Filling.of(template, param))
    return command.batch(job, engine, Reading(encoding, lossy))


@app.command(cls=Command)
def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="USER/REPO:QUANT, USER/REPO or QUANT; else what fits this machine.")
    ] = "",
    list: Annotated[bool, typer.Option("--list", help="List the known repositories, without the network.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched, and if it runs.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Ask the hub even if the model is here.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Even if it is too large for this machine.")] = False,
    no_mmproj: Annotated[bool, typer.Option("--no-mmproj", help="Without the vision tower.")] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", parser=opt.whole(1, 32), help="Connections at a time.")
    ] = 4,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="RATE", parser=opt.rate, help="At most RATE a second, as in 20MB.")
    ] = None,
    revision: Annotated[str, typer.Option("--revision", metavar="REV", help="A branch, tag or commit.")] = "main",
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    quiet: opt.Quiet = None,
) -> int:
    """Get a model; the same command goes on with one that was interrupted.  Prints its path."""
    from ms4.cli import pull as command

    if list:
        return command.listed(json)
    request = command.Request(
        name=name,
        revision=revision,
        update=update,
        tower=not no_mmproj,
        anyway=anyway,
        dry_run=dry_run,
        jobs=jobs,
        limit=limit or 0,
        offline=offline,
        as_json=json,
        quiet=quiet is True,
    )
    return command.pull(request)


@app.command(cls=Command)
def ls(
    json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> int:
    """List the models that are on this machine, in the cache of Hugging Face."""
    from ms4.cli import library

    return library.ls(as_json=json)


@app.command(cls=Command)
def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As ms4 ls shows it.")],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files that would go.")] = False,
    quiet: opt.Quiet = None,
) -> int:
    """Remove a model from this machine, or what has been fetched of one."""
    from ms4.cli import library

    return library.rm(name, yes=yes, dry_run=dry_run, quiet=quiet is True)


@app.command(cls=Command)
def verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Else all of ms4 ls.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Fetch what is damaged again, and only that.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
    quiet: opt.Quiet = None,
) -> int:
    """Read the files of models and compare their SHA-256 with what the hub had promised."""
    from ms4.cli import library

    return library.verify(names or [], repair=repair, as_json=json, quiet=quiet is True)


@app.command(cls=Command)
def sessions(
    action: Annotated[str, typer.Argument(metavar="ls|show|export|search|rm", help="What to do.")] = "ls",
    names: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="A session; or the words to look for.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="In JSON.")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Remove without asking.")] = False,
) -> int:
    """List, show, export, search and remove conversations."""
    from ms4.cli import session_list as command

    return command.carry_out(action, names or [], as_json=json, yes=yes)


@app.command(cls=Command)
def templates(
    action: Annotated[str, typer.Argument(metavar="ls|show|edit|rm|path", help="What to do.")] = "ls",
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="A template.")] = None,
    json: Annotated[bool, typer.Option("--json", help="In JSON.")] = False,
) -> int:
    """List, show, edit and remove templates: what --save keeps, and --template uses."""
    from ms4.cli import template_list as command

    return command.carry_out(action, names or [], as_json=json)


@app.command(cls=Command)
def config(
    action: Annotated[str, typer.Argument(metavar="show|get|set|unset|edit|path", help="What to do.")] = "show",
    words: Annotated[list[str] | None, typer.Argument(metavar="KEY VALUE", help="An option's long name.")] = None,
    origin: Annotated[bool, typer.Option("--origin", help="All that can be set, and which layer did.")] = False,
    profile: opt.Profile = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """Show and set what options are where they are not typed."""
    from ms4.cli import config_command

    context = command("run").context_class(command("run"), info_name="run")
    return config_command.carry_out(action, words or [], profile, context, origin=origin, as_json=json)


@app.command(cls=Command)
def info(
    path: Annotated[str, typer.Argument(metavar="PATH|NAME|URL", help="A file, a name, or hf:USER/REPO[:QUANT].")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors.")] = False,
    kv: Annotated[bool, typer.Option("--kv", help="List the metadata.")] = False,
) -> int:
    """Show what is in a model file, and whether ms4 runs it."""
    from ms4.cli import info as command

    return command.info(path, as_json=json, tensors=tensors, kv=kv)


@app.command(cls=Command)
def doctor(
    model: opt.Model = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """Check this machine; each line that is not ok says what to do."""
    from ms4.cli import doctor as command

    return command.doctor(model, as_json=json)


@app.command(cls=Command)
def selftest(
    gpu: Annotated[bool, typer.Option("--gpu", help="Compare the GPU with the CPU, to the bit.")] = False,
    safe: Annotated[bool, typer.Option("--safe", help="Wait for every call, to see which one fails.")] = False,
) -> int:
    """Compute on the GPU what the CPU computes, and compare every bit; the output is meant for an issue."""
    from ms4.cli import selftest as command

    if not gpu:
        raise UsageError("selftest checks a GPU", "ms4 selftest --gpu")
    return command.selftest(safe)


@app.command(cls=Command)
def bench(
    engine: Annotated[opt.EngineOptions, opt.without("attn_scale")],
    pp: Annotated[int, typer.Option("--pp", metavar="N", parser=opt.whole(1, opt.MOST_CTX), help="Tokens read.")] = 512,
    tg: Annotated[
        int, typer.Option("--tg", metavar="N", parser=opt.whole(1, opt.MOST_CTX), help="Tokens written.")
    ] = 32,
    image: Annotated[
        tuple | None,
        typer.Option("--image", metavar="WxH", parser=opt.picture, help="Measure an image of that size instead."),
    ] = None,
    mmproj: opt.Mmproj = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            "-r", "--repeat", metavar="N", parser=opt.whole(1, 1000), help="Times; else 5, or 1 with --image."
        ),
    ] = None,
    depth: Annotated[
        list, typer.Option("--depth", metavar="N,N", parser=opt.depths, help="Tokens held before, e.g. 0,8k.")
    ] = "0",  # type: ignore[assignment]
    format: Table = "md",
) -> int:
    """Measure reading (prefill) and writing (decode), and how near they come to the machine's limits."""
    from ms4.cli import bench as command

    if image:
        from ms4.cli import bench_image

        return bench_image.bench(image, repeat or 1, mmproj, engine, format)
    return command.bench(command.Plan(pp, tg, repeat or 5, tuple(depth)), engine, format)


@app.command(cls=Command)
def perplexity(
    engine: opt.EngineOptions,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A text file in UTF-8; - is stdin.")],
    ctx: Annotated[
        int, typer.Option("--ctx", metavar="N", parser=opt.whole(2, opt.MOST_CTX), help="Tokens per segment.")
    ] = 512,
    segments: Annotated[
        int | None,
        typer.Option("--segments", metavar="N", parser=opt.whole(1, opt.MOST_CTX), help="Only the first N."),
    ] = None,
    ref: Annotated[str | None, typer.Option("--ref", metavar="FILE", help="How far from the model of FILE?")] = None,
    write_ref: Annotated[
        str | None, typer.Option("--write-ref", metavar="FILE", help="Its logits, for --ref of another model.")
    ] = None,
    encoding: opt.Encoding = "",
    lossy: opt.Lossy = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """Measure how well the model predicts a text: lower is better."""
    from ms4.cli import perplexity as command

    question = command.Question(file, ctx, segments, ref, write_ref, json)
    return command.perplexity(question, engine, Reading(encoding, lossy))


@app.command(cls=Command)
def tokenize(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Joined by spaces; without it, the text on stdin.")
    ] = None,
    model: opt.Model = None,
    chat: Annotated[
        str | None,
        typer.Option("--chat", metavar="FILE", help="Conversations, one JSON object a line; - is stdin."),
    ] = None,
    count: Annotated[bool, typer.Option("--count", help="Only how many.")] = False,
    encoding: opt.Encoding = "",
    lossy: opt.Lossy = False,
    image_max_tokens: opt.ImageMaxTokens = None,
) -> int:
    """Turn a text, or conversations, into token ids (JSON)."""
    from ms4.cli import tokenize as command

    typed.refuse_model(words or (), "ms4 tokenize", "text")
    given = " ".join(words) if words else None
    return command.tokenize(opt.EngineOptions(model), given, chat, count, image_max_tokens, Reading(encoding, lossy))


@app.command(cls=Command)
def trace(
    engine: Annotated[opt.EngineOptions, opt.without("device", "vram")],
    prompts: Annotated[str, typer.Argument(metavar="FILE", help="Prompts, one a line; - is stdin.")] = "",
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The trace; - is stdout.")] = ...,  # type: ignore[assignment]
    chat: Annotated[
        str, typer.Option("--chat", metavar="FILE", help="Conversations instead, one JSON object a line; - is stdin.")
    ] = "",
    synthetic: Annotated[
        str | None,
        opt.choice(("uniform", "flat", "mid", "coherent"), "No model: choices drawn with this skew.", "--synthetic"),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            "-n", "--max-tokens", metavar="N", parser=opt.whole(1, opt.MOST_CTX), help="Of an answer, or drawn."
        ),
    ] = 1000,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", parser=opt.whole(0, 2**64 - 1), help="Of the drawn choices.")
    ] = 0,
    effort: Effort = "none",
    ctx: opt.Context = opt.N_CTX_DEFAULT,
    encoding: opt.Encoding = "",
    lossy: opt.Lossy = False,
) -> int:
    """Record which experts the model chooses while it answers: no text, no ids.  For ms4 simulate."""
    from ms4.cli import trace as command

    if synthetic:
        return command.make(synthetic, max_tokens, output, seed, engine.quiet)
    job = command.Job(prompts, chat, output, max_tokens, ctx, effort)
    return command.trace(job, engine, Reading(encoding, lossy))


@app.command(cls=Command)
def plan(
    path: Annotated[str, typer.Argument(metavar="PATH|NAME|URL", help="A file, a name, or hf:USER/REPO[:QUANT].")] = "",
    model: opt.Model = None,
    ram: opt.Ram = None,
    vram: Vram = None,
    ctx: opt.Context = opt.N_CTX_DEFAULT,
    gpu: Annotated[str, opt.card("What if there were this card", "here", "none")] = "here",
    memory: Annotated[str, opt.memory("What if there were this memory", "measured")] = "measured",
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Measure this machine again.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    threads: opt.Threads = None,
    quiet: opt.Quiet = None,
) -> int:
    """Say what of a model would lie where, whether it fits, and how fast it would be.  No weights are read."""
    from ms4.cli import plan as command

    engine = opt.EngineOptions(path or model, threads, silence=quiet)
    return command.plan(command.Question(engine, ram, vram, ctx, gpu, memory, recalibrate, json))


@app.command(cls=Command)
def simulate(
    path: Annotated[str, typer.Argument(metavar="TRACE", help="What ms4 trace has recorded.")],
    model: opt.Model = None,
    gpu: Annotated[str, opt.card("The card", "none")] = "3090",
    memory: Annotated[str, opt.memory("The host's memory")] = "DDR5-5600",
    vram: Vram = None,
    ram: Annotated[
        int | None,
        typer.Option("--ram", metavar="N", parser=opt.n_bytes(0), help="Bytes of RAM; else enough for all."),
    ] = None,
    disk: Annotated[
        float, typer.Option("--disk", metavar="GB/S", parser=opt.real(0, 1000, above=True), help="Speed of the disk.")
    ] = 6.0,
    policy: Annotated[
        str, opt.choice(("all", "lru", "decayed", "static", "optimum"), "One of them alone.", "--policy")
    ] = "all",
    half_life: Annotated[
        float,
        typer.Option("--half-life", metavar="N", parser=opt.real(0, 1e6), help="Of decayed, in tokens; 0: its own."),
    ] = 0.0,
    ctx: opt.Context = opt.N_CTX_DEFAULT,
    format: Table = "md",
) -> int:
    """Predict how often experts are where they are needed, and how fast a model writes.  Nothing is measured."""
    from ms4.cli import simulate as command

    policies = () if policy == "all" else (policy,)
    question = command.Question(path, model, gpu, memory, vram, ram, 1e9 * disk, ctx, policies, half_life)
    return command.simulate(question, format)


@app.command(cls=Command)
def logits(
    engine: opt.EngineOptions,
    ids: Annotated[str, typer.Option("--ids", metavar="FILE", help="A JSON list of token ids; - is stdin.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The .npy file; - is stdout.")],
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", metavar="N", parser=opt.whole(1, 65536), help="Compute at most N tokens together."),
    ] = None,
    image: opt.Images = None,
    mmproj: opt.Mmproj = None,
    image_max_tokens: opt.ImageMaxTokens = None,
) -> int:
    """Write the logits at every position: float32, positions by vocabulary."""
    from ms4.cli import logits as command

    return command.logits(ids, output, chunk, engine, image or [], command.ImageOptions(mmproj, image_max_tokens))


@app.command(cls=Command)
def convert(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="config.json, model.safetensors and tekken.json.")],
    output: Annotated[str, typer.Argument(metavar="OUT.gguf", help="The text model.")],
    kind: Annotated[str, typer.Option("--type", metavar="TYPE", help="F16, Q8_0, Q6_K, Q4_K_M and others.")] = "Q4_K_M",
    mmproj: Annotated[str | None, typer.Option(metavar="FILE", help="Write the vision tower, too, in F16.")] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="In the files; else that of the folder.")] = "",
    quiet: opt.Quiet = None,
) -> int:
    """Make a GGUF file of a checkpoint in the layout of Hugging Face."""
    from ms4.cli import to_gguf

    return to_gguf.convert(source, output, kind, mmproj, name, quiet is True)


@app.command(cls=Command)
def completion(
    shell: Annotated[
        str,
        typer.Argument(metavar="bash|zsh|fish", parser=opt.one_of(("bash", "zsh", "fish")), help="For which shell."),
    ],
) -> int:
    """Print a script that has a shell complete commands, options, models and sessions."""
    from ms4.cli import completion as command

    return command.completion(shell)


@app.command(cls=Command)
def man() -> int:
    """Print the manual page, made from the help: for man -l, or a file in share/man/man1."""
    from ms4.cli import man as command

    return command.man()
