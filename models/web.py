"""HTTP for downloads: what is asked for, which answers are believed, and when an attempt is over.

Owns the connections to a hub and to the hosts that it redirects to.  The token goes to the hub alone, and over https
alone (but for this machine); a body is never decompressed, never longer than what was announced, and never waited for
without end.  What may be better at another attempt is a `Transient`; everything else is a `DownloadError`.
"""

from __future__ import annotations

import errno
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

import ms4
from ms4.quant import visible

MOST_REDIRECTS = 8
MOST_JSON = 64 << 20  # bytes of a listing
T = TypeVar("T")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class DownloadError(Exception):
    """The download cannot go on; `hint` says what to type."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(visible.line(reason))
        self.hint = hint


class UnreachableError(DownloadError):
    """The hub does not have it, or does not give it to this user."""


class ChangedError(DownloadError):
    """The bytes are not those that the hub had promised."""


class Transient(Exception):
    """An attempt that failed.  wait: seconds that the server asks for.  offline: there is nobody who could answer."""

    def __init__(self, reason: str, wait: float = 0.0, offline: bool = False) -> None:
        super().__init__(visible.line(reason))
        self.wait = wait
        self.offline = offline


@dataclass(frozen=True)
class Patience:
    """When an attempt is over, and how many may fail one after another without a byte in between.  Seconds.

    At first 6 attempts in 15 s: somebody waits; 2 without a network.  Later 20 in 13 minutes: nobody does, and routers
    are restarted.
    """

    connect: float = 20.0
    silence: float = 30.0  # without a byte
    window: float = 60.0  # in which at least `least` bytes have to come
    least: int = 20_000
    n_first: int = 6
    n_offline: int = 2
    n_attempts: int = 20
    first_wait: float = 0.5  # doubled from attempt to attempt
    longest_wait: float = 60.0

    def wait(self, n_failed: int) -> float:
        """Seconds before the next attempt."""
        return min(self.first_wait * 2 ** min(n_failed - 1, 16), self.longest_wait)


@dataclass
class Body:
    """The bytes of a file from `start` to `end`, as they come.  whole: all of it, though a part was asked for."""

    start: int
    end: int
    whole: bool
    _response: httpx.Response
    _patience: Patience

    def chunks(self) -> Iterator[bytes]:
        """At most as many bytes as there should be.  Transient, if they come too slowly or are cut off."""
        left = self.end - self.start
        begun, n_window = time.monotonic(), 0
        with _as_transient():
            for chunk in self._response.iter_raw():
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return
                n_window += len(chunk)
                if time.monotonic() - begun > self._patience.window:
                    if n_window < self._patience.least:
                        raise Transient(f"only {n_window} bytes came in {self._patience.window:.0f} s")
                    begun, n_window = time.monotonic(), 0


@dataclass
class Target:
    """A file on the hub.  direct: where it was found last, which saves asking the hub again; links expire."""

    url: str
    bytes: int
    sha256: str
    direct: str = ""


@contextmanager
def _as_transient() -> Iterator[None]:
    """What httpx raises, as ours."""
    try:
        yield
    except httpx.UnsupportedProtocol as e:
        raise DownloadError(f"{e}: http and https only") from None
    except httpx.TransportError as e:
        text = str(e) or type(e).__name__
        if "CERTIFICATE" in text.upper():
            raise DownloadError(
                f"the server is not who it says it is: {text}", "SSL_CERT_FILE names other roots"
            ) from e
        if _is_offline(e):
            raise Transient(f"no network, or no such server ({text})", offline=True) from e
        if _caused_by(e, errno.ECONNREFUSED):
            raise Transient(f"nobody answers there ({text})", offline=True) from e
        silent = isinstance(e, httpx.TimeoutException)
        raise Transient("the server is silent" if silent else f"no connection, or it was cut ({text})") from e
    except httpx.InvalidURL as e:
        raise DownloadError(f"not an address: {e}") from None


def _is_offline(error: BaseException) -> bool:
    """Whether no name could be resolved, or no network be reached: the system's own words, below those of httpx."""
    return _caused_by(error, errno.ENETUNREACH, errno.ENETDOWN) or _caused_by(error, kind=socket.gaierror)


def _caused_by(error: BaseException, *numbers: int, kind: type[BaseException] = OSError) -> bool:
    """Whether an error of this kind, with one of these numbers, is behind it; no number: any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, kind) and (not numbers or getattr(cause, "errno", None) in numbers):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class Web:
    """Connections, closed together.  May be used from several threads."""

    def __init__(self, endpoint: str, token: str = "", patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self._hub = _url(endpoint)
        self._token = token
        self.trying_again: Callable[[Transient], None] = lambda reason: None  # is told once that somebody waits
        timeout = httpx.Timeout(self.patience.silence, connect=self.patience.connect, pool=None)
        headers = {"Accept-Encoding": "identity", "User-Agent": f"ms4/{ms4.__version__}"}
        try:
            self._client = httpx.Client(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None))
        except (ImportError, ValueError, OSError) as e:  # a proxy of a kind that httpx cannot use; certificates
            raise DownloadError(f"the proxy or the certificates of the environment cannot be used: {e}") from None

    def close(self) -> None:
        self._client.close()

    def patiently(self, action: Callable[[], T], sleep: Callable[[float], object] = time.sleep) -> T:
        """What action() gives at the first attempt that succeeds.  DownloadError, when n_first have failed."""
        for n_failed in range(1, self.patience.n_first + 1):
            try:
                return action()
            except Transient as e:
                if n_failed >= (self.patience.n_offline if e.offline else self.patience.n_first):
                    raise given_up(e, n_failed) from e
                if n_failed == 1 and not e.offline:
                    self.trying_again(e)
                sleep(max(self.patience.wait(n_failed), min(e.wait, self.patience.longest_wait)))
        raise AssertionError("patience allows no attempt")

    def has_token(self) -> bool:
        return bool(self._token)

    def get_json(self, url: str) -> Any:
        """The object at an address of the hub.  Transient, DownloadError."""
        with self._get(url, {}) as (response, _):
            _check_status(response, on_hub=True, token=self.has_token())
            data = _body(response, MOST_JSON, "the hub's listing is longer than")
        try:
            return json.loads(data)
        except ValueError:
            raise Transient(f"the hub answered {_kind(response)} instead of JSON") from None

    def content(self, url: str, most: int) -> bytes:
        """All that lies at an address, of whichever server.  Transient; DownloadError, also for more than `most`."""
        with self._get(url, {}) as (response, _):
            code = response.status_code
            if code in (408, 425, 429) or code >= 500:
                raise Transient(f"the server answers {code}", _retry_after(response))
            if code != 200:
                raise UnreachableError(f"the server answers {code}")
            return _body(response, most, "more than")

    def length(self, target: Target) -> int:
        """How many bytes a file has of which nobody has said that; its own count is not looked at.  Transient,
        DownloadError."""
        with self._get(target.url, {"Range": "bytes=0-0"}) as (response, final):
            _check_status(response, on_hub=True, token=self.has_token())
            _refuse_encoding(response)
            target.direct = final
            said = response.headers.get("content-length", "")
            if response.status_code == 206:
                said = response.headers.get("content-range", "").rpartition("/")[2]
            elif "html" in response.headers.get("content-type", "").lower():
                raise Transient("the server sends an HTML page instead of the file")
        if not re.fullmatch(r"[1-9]\d{0,14}", said):
            raise DownloadError("the server does not say how long the file is")
        return int(said)

    @contextmanager
    def range(self, target: Target, start: int, end: int) -> Iterator[Body]:
        """The bytes from start to end of a file; from 0 to the end of it, if the server knows no ranges."""
        url, asked_hub = (target.direct, False) if target.direct else (target.url, True)
        with self._get(url, {"Range": f"bytes={start}-{end - 1}"}, target.sha256) as (response, final):
            if response.status_code in (401, 403, 404, 410) and not (asked_hub and final == url):
                target.direct = ""
                raise Transient("the link to the file is not valid any more")
            _check_status(response, on_hub=True, token=self.has_token())
            _refuse_encoding(response)
            if not asked_hub or final != url:
                target.direct = final
            first = _first_byte(response, target, start)
            whole = response.status_code == 200 and (start, end) != (0, target.bytes)
            yield Body(first, target.bytes if whole else end, whole, response, self.patience)

    @contextmanager
    def _get(self, url: str, headers: dict[str, str], sha256: str = "") -> Iterator[tuple[httpx.Response, str]]:
        """The answer after all redirects, and the address that gave it."""
        current = _url(url)
        for _ in range(MOST_REDIRECTS):
            request = self._client.build_request("GET", current, headers={**headers, **self._authorization(current)})
            with _as_transient():
                response = self._client.send(request, stream=True)
            try:
                _check_link(response, sha256)
                if not response.has_redirect_location:
                    yield response, str(current)
                    return
                following = current.join(_url(response.headers["location"]))
            finally:
                response.close()
            if following.scheme not in ("http", "https") or not following.host:
                raise DownloadError(f"the server redirects to {str(following)[:80]}, which is no web address")
            if current.scheme == "https" and following.scheme == "http":
                raise DownloadError(f"the server redirects from https to http ({following.host}): refused")
            current = following
        raise Transient(f"more than {MOST_REDIRECTS} redirects")

    def _authorization(self, url: httpx.URL) -> dict[str, str]:
        same = (url.scheme, url.host, url.port) == (self._hub.scheme, self._hub.host, self._hub.port)
        safe = url.scheme == "https" or url.host in LOOPBACK
        return {"Authorization": f"Bearer {self._token}"} if self._token and same and safe else {}


def given_up(last: Transient, n_attempts: int) -> DownloadError:
    hint = "ms4 ls shows what is here already; " if last.offline else ""
    return DownloadError(f"{last}; {n_attempts} attempts failed", f"{hint}the same command goes on later")


def _url(text: str) -> httpx.URL:
    try:
        return httpx.URL(text)
    except httpx.InvalidURL as e:
        raise DownloadError(f"{text[:80]} is not an address: {e}") from None


def _kind(response: httpx.Response) -> str:
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return "an HTML page" if "html" in kind else kind[:40] or "something"


def _check_status(response: httpx.Response, on_hub: bool, token: bool) -> None:
    """Nothing, if the answer is what was asked for, or may be."""
    code = response.status_code
    if code in (200, 206):
        return
    said = response.headers.get("x-error-message", "")[:120]
    if code in (401, 403):
        hint = "HF_TOKEN has a token that may not read it" if token else "log in, accept the terms there, set HF_TOKEN"
        reason = f"there is no such thing on the hub, or it is not given out ({code}{': ' + said if said else ''})"
        raise UnreachableError(reason, hint)
    if code in (404, 410):
        raise UnreachableError(f"the hub does not have it ({code}{': ' + said if said else ''})")
    if code == 416:
        raise ChangedError("the file on the server is shorter than promised (416)", "ms4 pull again")
    if code in (408, 425, 429) or code >= 500:
        raise Transient(f"the server answers {code}", _retry_after(response))
    raise DownloadError(f"the server answers {code}")


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return min(float(text), 300.0) if re.fullmatch(r"\d{1,6}", text) else 0.0


def _refuse_encoding(response: httpx.Response) -> None:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise DownloadError(f"the server sends {visible.line(encoding[:20])}, compressed, which was not asked for")


def _body(response: httpx.Response, most: int, longer: str) -> bytes:
    """All that comes, as it is.  Transient; DownloadError, which begins with `longer`, for more than `most` bytes."""
    _refuse_encoding(response)
    data = bytearray()
    with _as_transient():
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > most:
                raise DownloadError(f"{longer} {most >> 20} MiB")
    return bytes(data)


def _check_link(response: httpx.Response, sha256: str) -> None:
    """The hub says the checksum of a large file with the link to it: it has to be the promised one."""
    said = response.headers.get("x-linked-etag", "").removeprefix("W/").strip('"').lower()
    if sha256 and re.fullmatch(r"[0-9a-f]{64}", said) and said != sha256:
        response.close()
        raise ChangedError("the file on the hub is another one now", "ms4 pull again")


def _first_byte(response: httpx.Response, target: Target, start: int) -> int:
    """Where the body begins in the file, by what the headers say."""
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", response.headers.get("content-range", ""))
        if not match or int(match[1]) != start:
            raise Transient("the server gives another range than the one asked for")
        if match[3] != "*" and int(match[3]) != target.bytes:
            raise ChangedError(f"the file has {match[3]} bytes, the hub promised {target.bytes}", "ms4 pull again")
        return start
    length = response.headers.get("content-length")
    if length is not None and length != str(target.bytes):
        raise Transient(f"the server sends {_kind(response)} of {length[:20]} bytes instead of the file")
    if "html" in response.headers.get("content-type", "").lower():
        raise Transient("the server sends an HTML page instead of the file")
    return 0
