"""The header of a model that lies elsewhere: on a hub, or at any address of the web.  No weights are fetched.

    gguf = at_address(web, "https://example.org/model-Q4_K_M.gguf")
    name, gguf = on_hub(web, Wanted("user/repo", "Q4_K_M"))

The first bytes come by ranges, twice as many each time, until the header is whole; of a split model, those of every
part.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from ms4.models import acquire, hub, repositories
from ms4.models.hub import Beginning
from ms4.models.variants import Wanted
from ms4.models.web import Target, UnreachableError, Web
from ms4.quant.gguf_file import GgufFile, Source

_ON_HUB = re.compile(r"/([\w.-]+/[\w.-]+)/(?:blob|resolve|raw)/([^/]+)/(.+)")


def is_address(text: str) -> bool:
    return text.lower().startswith(("https://", "http://"))


def at_address(web: Web, url: str) -> GgufFile:
    """The header of a file.  The address may be that of its page on the hub.  DownloadError, FileError."""
    parts = urlsplit(url)
    path = parts.path
    if match := _ON_HUB.fullmatch(path):
        path = f"/{match[1]}/resolve/{match[2]}/{match[3]}"
    if not unquote(path).lower().endswith(".gguf"):
        raise UnreachableError(
            f"{url[:200]} is no address of a GGUF file", "ms4 plan hf:USER/REPO[:QUANT] asks the hub"
        )
    # Of a split model the name is that of the first part, and an address with a query has no such end.
    query = f"?{parts.query}" if parts.query else ""

    def opened(name: str) -> Source:
        target = Target(f"{name}{query}", 0, "")
        target.bytes = web.patiently(lambda: web.length(target))
        return Beginning(web, target)

    return GgufFile.open(parts._replace(path=path, query="", fragment="").geturl(), opened)


def on_hub(web: Web, wanted: Wanted, here: acquire.Here | None = None) -> tuple[str, GgufFile]:
    """(its name, the header) of a model in a repository; without a quantization, of the one that `ms4 pull` takes."""
    listing = hub.read_listing(web, wanted.repo or repositories.DEFAULT.repo)
    headers = acquire.Headers(web, listing)
    n_memory, _ = acquire.memory()
    variant = headers.chosen(wanted.quant, n_memory, here or acquire.Here())
    return f"{listing.repo}:{variant.quant}", GgufFile.open(headers.shown(variant.names[0]), headers)
