"""Downloads from a hub that misbehaves: the right bytes in the end, or an error and no file.

What the real hub does could not be tried here.
"""

import hashlib
import json
import os
import threading
import zlib

import bad_hub
import httpx
import pytest
from bad_hub import COMMIT, REPO, Hub

from ms4.models import acquire, hf_cache, hub, part, web
from ms4.models.acquire import Means
from ms4.models.hf_cache import Cached
from ms4.models.part import Part
from ms4.models.web import ChangedError, DownloadError, Patience, Target, Transient, Web

NAME = "Some-Model-Q4_K_M.gguf"
SIZE = 900_001  # not a multiple of anything
QUICK = Patience(connect=2, silence=0.4, window=0.4, n_first=8, n_attempts=8, first_wait=0.01, longest_wait=0.05)


@pytest.fixture
def data(rng):
    return rng.bytes(SIZE)


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """The cache and all that the environment says, for this test alone."""
    for name in [n for n in os.environ if n.startswith("HF_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def fetch(monkeypatch):
    """fetch(server) -> bytes that came over the network; the file is in the cache then."""

    def run(server, means=None, token="", come=b""):
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        connections = Web(server.url, token, QUICK)
        try:
            listing = hub.read_listing(connections, REPO)
            file = listing.files[NAME]
            return acquire.fetch_file(connections, listing, file, means or Means(), lambda p: None, come)
        finally:
            connections.close()

    return run


def blob(data):
    return Cached.of(REPO).blobs / hashlib.sha256(data).hexdigest()


def leftovers():
    blobs = Cached.of(REPO).blobs
    return {p.name.partition(".ms4")[2] for p in blobs.iterdir()} if blobs.is_dir() else set()


# --- servers


@pytest.mark.parametrize("kind", bad_hub.SURVIVED)
def test_the_right_bytes_arrive_in_spite_of(kind, data, fetch, rng):
    with Hub({NAME: data}, kind, seed=int(rng.integers(2**31))) as server:
        n_fetched = fetch(server)
    assert blob(data).read_bytes() == data
    assert leftovers() == {""}
    if kind in ("good", "cuts", "errors", "less", "other etag", "far", "expiring links"):
        assert n_fetched == SIZE  # nothing was read twice


@pytest.mark.parametrize("kind", bad_hub.REFUSED)
def test_no_file_comes_of(kind, data, fetch):
    with Hub({NAME: data}, kind) as server, pytest.raises(DownloadError) as caught:
        fetch(server)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    assert not blob(data).exists()
    if kind in ("changed bytes", "flipped bit"):
        assert leftovers() == set()  # nobody knows which part is wrong, so none is kept
        assert hashlib.sha256(data).hexdigest() in str(caught.value)


def test_after_a_wrong_sum_the_next_attempt_begins_anew(data, fetch):
    with Hub({NAME: data}, "flipped bit") as server:
        with pytest.raises(ChangedError):
            fetch(server)
        server.kind = "good"
        assert fetch(server) == SIZE
    assert blob(data).read_bytes() == data


def test_several_ranges_come_at_once(data, fetch):
    with Hub({NAME: data}, bytes_per_s=2_000_000) as server:
        together, busy = [], threading.Semaphore(0)
        send = bad_hub._Handler.body
        n_now = 0

        def counted(handler, owner, body):
            nonlocal n_now
            n_now += 1
            together.append(n_now)
            busy.release()
            send(handler, owner, body)
            n_now -= 1

        bad_hub._Handler.body = counted
        try:
            fetch(server)
        finally:
            bad_hub._Handler.body = send
    assert max(together) >= 3


def test_what_has_come_with_the_header_is_not_fetched_again(data, fetch):
    with Hub({NAME: data}) as server:
        assert fetch(server, come=data[:300_000]) == SIZE - 300_000
    assert blob(data).read_bytes() == data


def test_a_file_that_is_there_is_not_asked_for(data, fetch):
    with Hub({NAME: data}) as server:
        fetch(server)
        before = server.n_sent
        assert fetch(server) == 0 and server.n_sent == before


# --- the token, redirects


def test_the_token_goes_to_the_hub_alone(data, fetch):
    with Hub({NAME: data}, "far") as server:
        fetch(server, token="hf_secret")
    told = {asked.host: set() for asked in server.asked}
    for asked in server.asked:
        told[asked.host].add(asked.token)
    assert told == {"hub": {"Bearer hf_secret"}, "cdn": {""}}


def streamed(body):
    return httpx.Response(200, content=iter([body]))


def answering(monkeypatch, answer):
    """A Web whose requests are answered by answer(request), without a network; the requests."""
    asked = []

    def handle(request):
        asked.append(request)
        return answer(request)

    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **more: real(transport=httpx.MockTransport(handle), **more))
    return asked


def test_https_never_becomes_http(monkeypatch):
    asked = answering(monkeypatch, lambda r: httpx.Response(302, headers={"Location": "http://cdn.test/f"}))
    target = Target("https://hub.test/f", 10, "0" * 64)
    with pytest.raises(DownloadError, match="from https to http"), Web("https://hub.test", "t").range(target, 0, 10):
        pass
    assert [r.url.scheme for r in asked] == ["https"]


def test_the_token_is_not_said_aloud(monkeypatch):
    asked = answering(monkeypatch, lambda r: streamed(b"{}"))
    for hub_url, told in (
        ("http://hub.test", None),
        ("https://hub.test", "Bearer t"),
        ("http://localhost", "Bearer t"),
    ):
        Web(hub_url, "t").get_json(f"{hub_url}/api/models/x")
        assert asked[-1].headers.get("authorization") == told
        Web(hub_url, "t").get_json("https://elsewhere.test/api")
        assert "authorization" not in asked[-1].headers


def test_the_port_and_the_name_of_a_host_make_it_another(monkeypatch):
    asked = answering(monkeypatch, lambda r: streamed(b"{}"))
    for url in ("https://hub.test:8443/x", "https://hub.test.evil.test/x", "https://evil.test/hub.test"):
        Web("https://hub.test", "t").get_json(url)
        assert "authorization" not in asked[-1].headers


def test_where_the_token_comes_from(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hf_cache.token() == ""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("from-file\n")
    assert hf_cache.token() == "from-file"
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    assert hf_cache.token() == "from-environment"


def test_a_proxy_of_the_environment_is_used(data, fetch, monkeypatch):
    with Hub({NAME: data}) as server, Hub({NAME: data}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        fetch_from = type("Elsewhere", (), {"url": "http://hub.invalid"})
        with pytest.raises(DownloadError):  # the proxy gets whole addresses, which this one does not serve
            fetch(fetch_from)
        assert [a.path for a in proxy.asked] and all(a.path.startswith("http://hub.invalid/") for a in proxy.asked)
        assert not server.asked


# --- what a hub may say

GOOD = {"rfilename": NAME, "lfs": {"sha256": "a" * 64, "size": 5}}


@pytest.mark.parametrize(
    "name",
    [
        "/etc/x.gguf",
        "../x.gguf",
        "a/../../x.gguf",
        "a\\x.gguf",
        "a//x.gguf",
        "./x.gguf",
        "C:x.gguf",
        "a\nb.gguf",
        "\x1b.gguf",
    ],
)
def test_a_name_cannot_leave_its_folder(name, monkeypatch):
    answer = {"sha": COMMIT, "siblings": [{**GOOD, "rfilename": name}]}
    answering(monkeypatch, lambda r: streamed(json.dumps(answer).encode()))
    with pytest.raises(DownloadError, match="outside of its folder"):
        hub.read_listing(Web("https://hub.test"), REPO)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha": "../../x"}, "which commit"),
        ({"sha": None}, "which commit"),
        ({"siblings": [{**GOOD, "lfs": {}}]}, "how long"),
        ({"siblings": [{**GOOD, "lfs": {"sha256": "a" * 64, "size": -5}}]}, "how long"),
        ({"siblings": [{**GOOD, "lfs": {"sha256": "a" * 64, "size": True}}]}, "how long"),
        ({"siblings": [{**GOOD, "lfs": {"sha256": "../../../x", "size": 5}}]}, "sha256"),
        ({"siblings": 7}, "does not say what is in"),
    ],
)
def test_a_listing_that_says_nonsense_is_refused(change, said, monkeypatch):
    answer = {"sha": COMMIT, "siblings": [GOOD], **change}
    answering(monkeypatch, lambda r: streamed(json.dumps(answer).encode()))
    with pytest.raises(DownloadError, match=said):
        hub.read_listing(Web("https://hub.test", patience=QUICK), REPO)


def test_a_repository_is_spelled_as_on_the_hub(monkeypatch):
    said = iter((REPO, "else/where", 7))
    answering(
        monkeypatch, lambda r: streamed(json.dumps({"sha": COMMIT, "siblings": [GOOD], "id": next(said)}).encode())
    )
    asked = Web("https://hub.test")
    assert [hub.read_listing(asked, REPO.lower()).repo for _ in range(3)] == [REPO, REPO.lower(), REPO.lower()]


def test_small_files_without_a_sum_are_no_models(monkeypatch):
    answer = {"sha": COMMIT, "siblings": [GOOD, {"rfilename": "imatrix.gguf", "size": 10}]}
    answering(monkeypatch, lambda r: streamed(json.dumps(answer).encode()))
    assert list(hub.read_listing(Web("https://hub.test"), REPO).files) == [NAME]


def test_an_endless_listing_is_left(monkeypatch):
    monkeypatch.setattr(web, "MOST_JSON", 1000)
    answering(monkeypatch, lambda r: streamed(b"[" * 5000))
    with pytest.raises(DownloadError, match="longer than"):
        hub.read_listing(Web("https://hub.test", patience=QUICK), REPO)


def test_no_network_ends_after_all_attempts(monkeypatch):
    def refuse(request):
        raise httpx.ConnectError("Name or service not known")

    asked = answering(monkeypatch, refuse)
    with pytest.raises(DownloadError, match="Name or service not known.*8 attempts"):
        hub.read_listing(Web("https://hub.test", patience=QUICK), REPO)
    assert len(asked) == 8


def test_the_waits_grow_and_have_an_end():
    waits = [Patience().wait(n) for n in range(1, 10)]
    assert waits[:3] == [0.5, 1.0, 2.0] and waits == sorted(waits) and waits[-1] == 60.0
    assert Patience().wait(10**9) == 60.0


# --- the part and its journal


def opened(folder, data):
    return Part(folder, hashlib.sha256(data).hexdigest(), len(data), {"name": NAME})


def spans(mine):
    """All that is missing and nobody's task."""
    found = []
    while task := mine.take(SIZE):
        found.append((task.start, task.end))
    return found


def test_what_was_written_is_there_after_a_restart(data, tmp_path):
    first = opened(tmp_path, data)
    task = first.take(200_000)
    assert first.put(task, data[:150_000]) and not first.put(task, data[150_000:200_000])
    first.give_back(task)
    first.write(500_000, data[500_000:600_000])
    first.close()
    again = opened(tmp_path, data)
    assert again.n_held == 300_000
    assert spans(again) == [(200_000, 500_000), (600_000, SIZE)]


def test_a_journal_that_was_torn_is_believed_up_to_there(data, tmp_path, rng):
    whole = opened(tmp_path, data)
    for at in range(0, SIZE, 50_000):
        whole.write(at, data[at : at + 50_000])
    whole.close()
    journal = whole.journal.read_bytes()
    begin = journal.index(b"\n") + 1
    for cut in rng.integers(begin, len(journal), 30).tolist():
        whole.journal.write_bytes(journal[:cut])
        again = opened(tmp_path, data)
        assert again.n_held == min((cut - begin) // 20 * 50_000, SIZE)
        at = again.n_held
        again.write(at, data[at : at + 50_000])  # what is written now must not be lost behind the torn end
        again.close()
        assert opened(tmp_path, data).n_held == min(at + 50_000, SIZE)


def test_a_journal_of_another_file_is_not_believed(data, tmp_path):
    mine = opened(tmp_path, data)
    mine.write(0, data[:100_000])
    mine.close()
    head, rest = mine.journal.read_bytes().split(b"\n", 1)
    for change in ({"size": SIZE + 1}, {"sha256": "0" * 64}):
        mine.journal.write_bytes(json.dumps({**json.loads(head), **change}).encode() + b"\n" + rest)
        assert opened(tmp_path, data).n_held == 0
    mine.journal.write_bytes(b"\xff" * 1000)
    assert opened(tmp_path, data).n_held == 0


def test_a_record_beyond_the_bytes_is_not_believed(data, tmp_path):
    mine = opened(tmp_path, data)
    mine.write(0, data[:100_000])
    mine.write(100_000, data[100_000:200_000])
    mine.close()
    os.truncate(mine.path, 150_000)  # as after a crash of the machine
    assert opened(tmp_path, data).n_held == 100_000


def test_bytes_that_rot_before_the_end_are_fetched_again(data, fetch, tmp_path):
    mine = Part(Cached.of(REPO).blobs, hashlib.sha256(data).hexdigest(), SIZE, {})
    for at in range(0, 400_000, 100_000):
        mine.write(at, data[at : at + 100_000])
    mine.close()
    with open(mine.path, "r+b") as file:
        file.seek(250_000)
        file.write(b"rotten")
    with Hub({NAME: data}) as server:
        assert fetch(server) == SIZE - 300_000
    assert blob(data).read_bytes() == data


def test_spans_that_come_anyway_fill_the_holes_alone(data, tmp_path):
    mine = opened(tmp_path, data)
    mine.write(100, data[100:200])
    mine.close()
    mine = opened(tmp_path, data)
    mine.write_missing(50, data[50:300])
    assert mine.n_held == 250 and spans(mine) == [(0, 50), (300, SIZE)]
    assert [mine.record_at(at).bytes for at in (50, 100, 200)] == [50, 100, 100]
    assert mine.record_at(50).crc == zlib.crc32(data[50:100])


def test_the_front_of_a_part_is_known_as_far_as_it_is_right(data, tmp_path):
    mine = opened(tmp_path, data)
    for at in (0, 100_000, 200_000, 400_000):
        mine.write(at, data[at : at + 100_000])
    mine.close()
    digest = hashlib.sha256(data).hexdigest()
    assert part.beginning(tmp_path, digest, SIZE) == data[:300_000]
    assert len(part.beginning(tmp_path, digest, 150_000)) == 200_000
    with open(mine.path, "r+b") as file:
        file.seek(150_000)
        file.write(b"rotten")
    assert part.beginning(tmp_path, digest, SIZE) == data[:100_000]
    (tmp_path / digest).write_bytes(data)
    assert part.beginning(tmp_path, digest, 500) == data[:500]
    assert part.beginning(tmp_path, "0" * 64, 500) == b""


def test_who_has_nothing_to_do_helps_the_slowest(data, tmp_path):
    mine = opened(tmp_path, data)
    fast, slow = mine.take(400_000), mine.take(SIZE)
    mine.put(fast, data[:300_000])
    mine.put(slow, data[400_000:410_000])
    assert mine.take(SIZE) is None  # nobody has been at it for long
    fast.begun -= 10
    slow.begun -= 10
    help = mine.take(SIZE)
    assert (help.start, help.end) == (655_000, SIZE) and (slow.at, slow.end) == (410_000, 655_000)
    assert not mine.put(slow, data[410_000:700_000])  # what came behind its end is not written twice
    assert mine.put(help, data[655_000:656_000])
    for task in (fast, slow, help):
        mine.give_back(task)
    assert spans(mine) == [(300_000, 400_000), (656_000, SIZE)] and mine.n_held == 300_000 + 245_000 + 1_000 + 10_000


def test_bytes_that_could_not_be_written_are_missing_still(data, tmp_path, monkeypatch):
    mine = opened(tmp_path, data)
    task = mine.take(400_000)
    mine.put(task, data[:100_000])

    def full(fd, view, at):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError):
        mine.put(task, data[100_000:200_000])
    mine.give_back(task)
    assert spans(mine) == [(100_000, 200_000), (200_000, 400_000), (400_000, SIZE)]


def test_nothing_is_written_after_the_end(data, tmp_path):
    mine = opened(tmp_path, data)
    mine.close()
    with pytest.raises(part.Closed):
        mine.write(0, data)


# --- disks, and others who fetch


def test_a_full_disk_keeps_what_came_and_says_what_lacks(data, fetch, monkeypatch):
    real, left = os.pwrite, [300_000]

    def pwrite(fd, view, at):
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        n = real(fd, bytes(view[: left[0]]), at)  # a disk that is nearly full takes a part
        left[0] -= n
        return n

    with Hub({NAME: data}) as server:
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(DownloadError, match="the disk is full.* lacks 0.0 GB|the disk is full"):
            fetch(server)
        monkeypatch.setattr(os, "pwrite", real)
        assert not blob(data).exists()
        assert 0 < fetch(server) < SIZE
    assert blob(data).read_bytes() == data


def test_two_who_want_the_same_file_fetch_it_once(data, fetch):
    waited, n_fetched = [], []
    with Hub({NAME: data}, bytes_per_s=2_000_000) as server:
        threads = [
            threading.Thread(target=lambda: n_fetched.append(fetch(server, Means(waiting=waited.append))))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(n_fetched) == [0, 0, SIZE] and waited == [NAME] * 2
    assert blob(data).read_bytes() == data


def test_a_limit_is_kept(data):
    from ms4.models.download import Throttle

    slow = Throttle(1_000_000)
    assert 0.9 < slow.pay(500_000) + slow.pay(500_000) < 1.6
    assert Throttle().pay(10**12) == 0.0


def test_a_transient_failure_names_what_happened():
    assert str(Transient("a\x1b[2Jb")) == "a\\x1b[2Jb"
