"""What lies at an address of the web that somebody has typed after -i or -f: its bytes, and nothing remembered.

No other text names an address that is fetched: neither a message nor a file of messages, a template or a model.
"""

from __future__ import annotations

from ms4.cli.errors import UnreadableError
from ms4.cli.render import StatusLine
from ms4.models import hf_cache, remote
from ms4.models.untrusted import shown

HINT = "curl -sL ADDRESS | ms4 run -i - ... takes what something else has fetched"


def is_address(text: str) -> bool:
    return remote.is_address(text)


def bytes_at(address: str, most: int, quiet: bool = False) -> bytes:
    """UnreadableError: there is nothing, or more than `most` bytes, or the network may not be used."""
    from ms4.cli.pull import connected
    from ms4.models.web import DownloadError

    if hf_cache.is_offline():
        raise UnreadableError(f"{shown(address)}: HF_HUB_OFFLINE says that the network is not to be used", HINT)
    status = StatusLine(quiet)
    status.show(f"fetching {address}")
    try:
        with connected() as web:
            return web.patiently(lambda: web.content(address, most))
    except DownloadError as error:
        raise UnreadableError(f"{shown(address)}: {error}", HINT) from None
    finally:
        status.clear()
