"""`ms4 convert`: a folder in the layout of Hugging Face to GGUF files."""

from ms4.cli import errors, render
from ms4.cli.errors import UsageError


def convert(source: str, out: str, kind: str, mmproj: str | None, name: str, quiet: bool) -> int:
    """Writes the text model to `out` in the mixture of types `kind`, and the vision tower to `mmproj`, if given."""
    from ms4.models import convert as converter

    if kind not in converter.PRESETS:
        raise UsageError(f"--type: {kind} is not one of {', '.join(converter.PRESETS)}", "ms4 convert --help")
    status = render.StatusLine(quiet)

    def progress(tensor: str, done: int, total: int) -> None:
        status.show(f"{done + 1} of {total}  {tensor}")

    try:
        converter.convert(source, out, kind, mmproj=mmproj, name=name, progress=progress)
    finally:
        status.clear()
    if not quiet:
        errors.note(f"wrote {' and '.join(filter(None, (out, mmproj)))}")
    return errors.OK
