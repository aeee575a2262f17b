"""`ms4 doctor`: what this machine can run, and for each thing that is not right the command that puts it right."""

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass

import ms4
from ms4.cli import card, errors, host, streams

MARKS = {"ok": "ok", "warning": "! ", "bad": "x "}
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One line: level is a key of MARKS; `fix` is what to type, if anything helps."""

    name: str
    level: str
    text: str
    fix: str = ""


def doctor(model: str | None, *, as_json: bool) -> int:
    """Prints every check; exit code 1 if one of them is bad."""
    checks = [
        Check("ms4", "ok", f"{ms4.__version__}, Python {platform.python_version()}, {platform.machine()}"),
        check_kernels(),
        check_gpu(),
        check_threads(),
        check_memory(),
        check_swap(),
        check_huge_pages(),
        check_tokenizer(),
        *check_model(model),
    ]
    output = streams.Output()
    if as_json:
        output.write(json.dumps({"checks": [asdict(check) for check in checks]}) + "\n")
    else:
        for check in checks:
            output.write(f"{MARKS[check.level]} {check.name:<10} {errors.escape(check.text)}\n")
            if check.fix:
                output.write(f"{'':<13} {check.fix}\n")
    return errors.FAILURE if any(check.level == "bad" for check in checks) else errors.OK


def gib(n: int) -> str:
    """In the largest unit of which there is one; nothing is nothing in GiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size or not n:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def check_kernels() -> Check:
    try:
        isa = ms4.probe().isa
    except ValueError as error:  # MS4_ISA names a table that this processor cannot run
        return Check("kernels", "bad", str(error), "unset MS4_ISA")
    text = f"{isa}; {host.processor()} ({' '.join(host.features()) or 'no vector features known'})"
    if isa != "ref":
        return Check("kernels", "ok", text)
    forced = os.environ.get("MS4_ISA") == "ref"
    return Check(
        "kernels",
        "warning",
        f"{text}: plain C, many times slower",
        "unset MS4_ISA" if forced else "use a processor with AVX2, AVX-512 or NEON",
    )


def check_gpu() -> Check:
    try:
        gpu = ms4.gpu()
    except (ms4.EngineError, MemoryError) as error:
        from ms4.cli import gpu_advice

        level = "warning" if gpu_advice.is_wanted(str(error)) else "ok"
        return Check("gpu", level, f"none: {error}; the CPU computes everything", gpu_advice.advice(str(error)))
    link = host.link(gpu.bus)
    version = host.nvidia_driver()
    text = f"{gpu.name}, compute capability {gpu.capability}, driver {f'{version} ' if version else ''}for CUDA "
    text += f"{gpu.driver}, {gib(gpu.free)} free of {gib(gpu.total)}; {link or 'nobody says how fast its bus is'}"
    text += card.remembered(gpu)
    if float(gpu.capability) < 8:
        return Check("gpu", "warning", f"{text}: too old", "ms4 uses cards of compute capability 8.0 and newer")
    from ms4.models import gpu_code

    try:
        text += f"; its kernels {gpu_code.origin(gpu.capability, gpu.driver)}"
    except gpu_code.CompilerError as error:
        return Check("gpu", "warning", f"{text}; {str(error).split('; ')[0]}", gpu_code.INSTALL)
    if link and link.width < link.most:
        return Check("gpu", "warning", f"{text}; its bus could have x{link.most}", "put it into a slot with more lanes")
    return Check("gpu", "ok", text)


def check_threads() -> Check:
    try:
        n = ms4.probe().n_threads
    except ValueError as error:
        return Check("threads", "bad", str(error), "unset MS4_ISA")
    got = ms4.allowed()
    text = f"{n} by default: {os.cpu_count()} processors, {got.n_affinity} allowed by affinity"
    text += f", {got.cpus:g} by {got.cpus_file}" if got.cpus is not None else ", no cgroup limit"
    if got.cpus is not None and got.cpus < 1:
        return Check("threads", "warning", text, "give the container at least one processor")
    return Check("threads", "ok", text)


def check_memory() -> Check:
    got = ms4.allowed()
    if got.room is None:
        return Check("memory", "warning", "the kernel does not say how much there is")
    text = f"{gib(got.room)} available of {gib(got.total)}"
    if got.limit is None:
        return Check("memory", "ok", f"{text}, no cgroup limit")
    return Check("memory", "ok", f"{text}; limit {gib(got.limit)}, {gib(got.used)} used: {got.limit_file}")


def check_swap() -> Check:
    memory = host.memory()
    total, free = memory.get("SwapTotal", 0), memory.get("SwapFree", 0)
    if total == 0:
        return Check("swap", "ok", "none")
    used = total - free
    text = f"{gib(used)} of {gib(total)} used"
    if used > total // 2:
        return Check("swap", "warning", f"{text}: memory is short", "end other programs; --load map needs no swap")
    return Check("swap", "ok", text)


def check_huge_pages() -> Check:
    mode = host.huge_pages()
    if mode in ("always", "madvise"):
        return Check("huge pages", "ok", mode)
    fix = f"echo madvise | sudo tee {host.HUGE_PAGES}" if mode else ""
    return Check("huge pages", "warning", f"{mode or 'unknown'}: --load copy will be slower", fix)


def check_tokenizer() -> Check:
    try:
        import tiktoken
    except ImportError as error:
        return Check(
            "tokenizer", "bad", f"tiktoken cannot be imported: {error}", f"{sys.executable} -m pip install tiktoken"
        )
    return Check("tokenizer", "ok", f"tiktoken {tiktoken.__version__}")


def check_model(path: str | None) -> list[Check]:
    """The file itself, its memory, and whether it is cached."""
    if not path:
        return [Check("model", "warning", "none named, so none checked", "ms4 doctor -m model.gguf")]
    from ms4.cli.options import model_path
    from ms4.models.describe import describe

    try:
        path = model_path(path)
        found = describe(path)
    except Exception as error:
        code, message, hint = errors.describe(error)
        return [Check("model", "bad", message, hint or "ms4 info shows more")]
    size = found.bytes
    checks = [Check("model", "ok", f"{os.path.basename(path)}: {found.architecture}, {gib(size)}")]
    if found.text_problem:
        checks.append(Check("vocabulary", "warning", found.text_problem))
    available = ms4.allowed().room
    if available is not None and size > available:
        fix = "choose a smaller quantization, or free memory"
        there = f"{gib(size)} of weights, {gib(available)} available"
        return [*checks, Check("room", "warning", f"{there}: experts come from the disk, which is slow", fix)]
    share = host.cached_share(path)
    if share is not None:
        level, fix = ("ok", "") if share > 0.95 else ("warning", f"cat {shlex.quote(path)} > /dev/null")
        checks.append(Check("cache", level, f"{100 * share:.0f} % of the file is in memory already", fix))
    return checks
