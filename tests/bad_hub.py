"""A hub on this machine that misbehaves: listing, redirect, and a host for the bytes behind it.

`Hub(files)` serves them under REPO, or another name, at COMMIT; `kind` names what goes wrong, from KINDS.  What was
asked for, and how many bytes were sent, is written down.
"""

import gzip
import hashlib
import json
import random
import re
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

REPO, COMMIT = "someone/Some-Model-GGUF", "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!doctype html><title>Sign in to this network</title>" + b" " * 5000

# Those at which a download succeeds all the same, and those at which it must end in an error and with nothing done.
SURVIVED = (
    "good",
    "cuts",  # the connection is cut after some bytes
    "errors",  # 500, 502, 503 and 429 now and then
    "no ranges",  # 200 and the whole file, whatever was asked for
    "no length",  # the same, without a length
    "more",  # more bytes than were asked for
    "less",  # fewer, and says so
    "stalls",  # no more bytes, and the connection stays open
    "drips",  # hardly any bytes
    "other range",  # now and then another range than the one asked for
    "page",  # now and then an HTML page with 200 instead of the file
    "expiring links",  # each link to the host of the bytes is good for three requests
    "other etag",  # the ETag is another one each time, the bytes are the same
    "far",  # the bytes come from another host, three redirects away
)
REFUSED = (
    "compressed",  # gzip, though nobody asked for it
    "changed link",  # the hub names another sha256 with the link
    "changed bytes",  # from some request on, another file of equal length
    "changed size",  # the ranges are of a file of another length
    "flipped bit",  # one bit is wrong, each time
    "loop",  # a redirect to itself
    "odd redirect",  # a redirect to an address that is none of the web
    "gone",  # 404
    "gated",  # 403
    "always page",  # an HTML page with 200, each time
)
KINDS = SURVIVED + REFUSED


@dataclass(frozen=True)
class Asked:
    """A request as it arrived.  host: "hub" or "cdn"."""

    host: str
    path: str
    range: tuple[int, int] | None
    token: str


class Hub:
    """Two servers: the hub, and the host of the bytes.  A context manager."""

    def __init__(self, files, kind="good", seed=0, bytes_per_s=0, repo=REPO):
        self.files, self.kind, self.repo = dict(files), kind, repo
        self.bytes_per_s = bytes_per_s
        self.random = random.Random(seed)
        self.asked: list[Asked] = []
        self.n_sent = 0  # bytes of files
        self.uses: dict[str, int] = {}
        self.lock = threading.Lock()
        self.listing = {
            "id": self.repo,
            "sha": COMMIT,
            "siblings": [
                {
                    "rfilename": name,
                    "size": len(data),
                    "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135},
                }
                for name, data in self.files.items()
            ],
        }
        self.hub, self.cdn = _Server(self, "hub"), _Server(self, "cdn")

    @property
    def url(self):
        return f"http://127.0.0.1:{self.hub.server_port}"

    def __enter__(self):
        for server in (self.hub, self.cdn):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def chance(self, share):
        with self.lock:
            return self.random.random() < share

    def sent(self, n):
        with self.lock:
            self.n_sent += n


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, owner, role):
        self.owner, self.role = owner, role
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request, client_address):
        """A client that leaves is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        # What was sent and never read would count as read again: little may be on its way.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
        super().setup()

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.server.owner
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        wanted = (int(match[1]), int(match[2]) + 1) if match else None
        path, _, query = self.path.partition("?")
        with hub.lock:
            hub.asked.append(Asked(self.server.role, self.path, wanted, self.headers.get("Authorization", "")))
        if path.startswith(f"/api/models/{hub.repo}/"):
            return self.answer(200, json.dumps(hub.listing).encode(), {"Content-Type": "application/json"})
        match = re.fullmatch(rf"(?:/hop\d)*/{hub.repo}/resolve/(?:main|{COMMIT})/(.+)", unquote(path))
        name = match and match[1]
        if name not in hub.files:
            return self.answer(404, PAGE, {"Content-Type": "text/html"})
        if self.server.role == "hub":
            return self.link(hub, path, name)
        return self.file(hub, name, query, wanted)

    def do_HEAD(self):
        """As huggingface_hub asks before it fetches; ms4 does not."""
        self.do_GET()

    def answer(self, code, body, headers):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def link(self, hub, path, name):
        """The hub's answer: a redirect to the host of the bytes."""
        kind = hub.kind
        if kind in ("gone", "gated"):
            return self.answer(404 if kind == "gone" else 403, b"", {"X-Error-Message": "no such thing for you"})
        digest = hashlib.sha256(hub.files[name]).hexdigest()
        if kind == "changed link":
            digest = digest[::-1]
        hop = path.count("/hop")
        place = f"http://127.0.0.1:{hub.cdn.server_port}{path}"
        if kind == "loop":
            place = path
        elif kind == "odd redirect":
            place = "ftp://127.0.0.1/file"
        elif kind == "far":
            place = f"/hop{hop}{path}" if hop < 2 else f"http://localhost:{hub.cdn.server_port}{path}"
        with hub.lock:
            number = len(hub.uses)
            hub.uses[str(number)] = 0
        said = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(hub.files[name])), "X-Repo-Commit": COMMIT}
        self.answer(302, b"", {"Location": f"{place}?link={number}", **said})

    def file(self, hub, name, query, wanted):
        """The bytes, or what comes instead of them."""
        kind, data = hub.kind, hub.files[name]
        with hub.lock:
            link = query.removeprefix("link=")
            hub.uses[link] = hub.uses.get(link, 0) + 1
            n_uses = hub.uses[link]
        if kind == "expiring links" and n_uses > 3:
            return self.answer(403, b"<Error>Request has expired</Error>", {})
        if kind == "errors" and hub.chance(0.4):
            return self.answer(hub.random.choice((500, 502, 503, 429)), b"", {"Retry-After": "0"})
        if kind == "always page" or (kind == "page" and hub.chance(0.3)):
            return self.answer(200, PAGE, {"Content-Type": "text/html"})
        start, end = wanted or (0, len(data))
        if kind == "flipped bit":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if kind == "changed bytes" and sum(a.host == "cdn" for a in hub.asked) > 3:
            data = bytes(len(data))
        if kind in ("no ranges", "no length") or wanted is None:
            return self.whole(hub, data, kind == "no length")
        if kind == "compressed":
            return self.answer(206, gzip.compress(data[start:end]), {**_range(start, end, data), **GZIP})
        if kind == "other range" and hub.chance(0.3) and start:
            start, end = start - 1, end - 1
        if kind == "less" and end - start > 1 and hub.chance(0.5):
            end = start + (end - start + 1) // 2
        said = {**_range(start, end, data), "ETag": f'"{hub.random.random()}"' if kind == "other etag" else '"etag"'}
        if kind == "changed size":
            said["Content-Range"] = f"bytes {start}-{end - 1}/{len(data) + 1}"
        self.send_response(206)
        for key, value in {**said, "Content-Length": str(end - start + 7777 * (kind == "more"))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.body(hub, data[start:end] + bytes(7777) * (kind == "more"))

    def whole(self, hub, data, nameless):
        self.send_response(200)
        if nameless:
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.body(hub, data)

    def body(self, hub, data):
        """Sends bytes, as fast as the hub may; some kinds stop in the middle."""
        stop = len(data)
        if hub.kind in ("cuts", "stalls", "drips") and hub.chance(0.5):
            stop = hub.random.randrange(len(data) + 1)
        step = 16 << 10
        for at in range(0, stop, step):
            chunk = data[at : min(at + step, stop)]
            self.wfile.write(chunk)
            hub.sent(len(chunk))
            if hub.bytes_per_s:
                time.sleep(len(chunk) / hub.bytes_per_s)
        if stop == len(data):
            return
        self.close_connection = True
        if hub.kind == "cuts":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif hub.kind == "stalls":
            time.sleep(3)
        else:
            for at in range(stop, min(stop + 100, len(data))):
                self.wfile.write(data[at : at + 1])
                hub.sent(1)
                time.sleep(0.05)


GZIP = {"Content-Encoding": "gzip"}


def _range(start, end, data):
    return {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
