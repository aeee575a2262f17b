"""`ms4 pull`, `ls`, `rm`, `verify`, and models by name: the commands against a hub on this machine."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import bad_hub
import pytest
from bad_hub import COMMIT, REPO, Hub
from fixtures import IMAGE, MMPROJ, MODEL

import ms4 as engine
from ms4.cli import expected, measured, pull
from ms4.cli.render import StatusLine
from ms4.models import acquire, calibration, forecast, hf_cache, mistral4, repositories, stored, variants, web
from ms4.models.hf_cache import Cached
from ms4.models.variants import Wanted
from ms4.quant.gguf_file import GgufFile
from ms4.quant.tiny import Tiny, write_tiny

Q4, TOWER = "Some-Model-Q4_K_M.gguf", "mmproj-F16.gguf"
PARTS = [f"UD-Q5_K_XL/Some-Model-UD-Q5_K_XL-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
# What the kernel has received for a process that is killed is lost, and would count: little shall wait there.
COMMAND = [
    sys.executable,
    "-c",
    "import socket, sys; from ms4.cli.start import main; connect = socket.create_connection\n"
    "def small(*args, **more):\n"
    "    made = connect(*args, **more); made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768); return made\n"
    "socket.create_connection = small; sys.exit(main())",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the repository holds: a model in one file, another in three, a tower, and what is none of these."""
    paths = write_tiny(tmp_path_factory.mktemp("tiny") / "split.gguf", Tiny(parts=3))
    found = {name: Path(path).read_bytes() for name, path in zip(PARTS, paths, strict=True)}
    return found | {Q4: MODEL.read_bytes(), TOWER: MMPROJ.read_bytes(), "imatrix.gguf": b"GGUF"}


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith(("HF_", "MS4_")) or n.lower().endswith("_proxy")]:
        if name != "MS4_ISA":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def server(files, monkeypatch):
    with Hub(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def snapshot():
    return hf_cache.root() / "models--someone--Some-Model-GGUF" / "snapshots" / COMMIT


def blob(data):
    return Cached.of(REPO).blobs / hashlib.sha256(data).hexdigest()


# --- pull


def test_a_model_is_fetched_with_its_tower_into_the_shared_layout(ms4, server, files):
    code, out, err = ms4("pull", f"{REPO}:Q4_K_M")
    assert code == 0 and out == f"{snapshot() / Q4}\n"
    assert err.splitlines()[0].startswith(f"ms4: {REPO}:Q4_K_M (") and "mmproj-F16.gguf for images" in err
    assert "runs here" in err and "the sha256 of each file is right" in err
    for name in (Q4, TOWER):
        link = snapshot() / name
        assert os.readlink(link) == f"../../blobs/{hashlib.sha256(files[name]).hexdigest()}"
        assert link.read_bytes() == files[name]
    assert (Cached.of(REPO).folder / "refs" / "main").read_text() == COMMIT
    assert len(os.listdir(Cached.of(REPO).blobs)) == 2  # no part, no journal
    assert server.n_sent == len(files[Q4]) + len(files[TOWER])  # the headers are not read twice


def test_huggingface_hub_finds_what_was_fetched(ms4, server, files):
    library = pytest.importorskip("huggingface_hub")
    ms4("pull", f"{REPO}:Q4_K_M")
    found = library.try_to_load_from_cache(REPO, Q4, cache_dir=hf_cache.root())
    assert Path(found).read_bytes() == files[Q4]
    info = library.scan_cache_dir(hf_cache.root())
    assert not info.warnings and info.size_on_disk == len(files[Q4]) + len(files[TOWER])


def test_what_huggingface_hub_has_fetched_is_found(ms4, server, files):
    """From this very hub, which so is one that the official client takes for a hub."""
    library = pytest.importorskip("huggingface_hub")
    said = library.HfApi(endpoint=server.url).model_info(REPO, revision="main", files_metadata=True)
    sums = {s.rfilename: (s.lfs.sha256, s.lfs.size) for s in said.siblings}
    mine = acquire.hub.read_listing(web.Web(server.url), REPO)
    assert (said.sha, sums) == (mine.commit, {f.name: (f.sha256, f.bytes) for f in mine.files.values()})
    path = library.hf_hub_download(REPO, Q4, endpoint=server.url, cache_dir=hf_cache.root())
    assert stored.resolve(REPO) == path
    assert json.loads(ms4("ls", "--json")[1])[0]["path"] == path
    assert ms4("verify", REPO)[:2] == (0, f"right     {REPO}/{Q4}\n")
    sent = server.n_sent
    assert ms4("pull", f"{REPO}:Q4_K_M", "--no-mmproj")[0] == 0 and server.n_sent == sent


def test_it_runs_by_its_name(ms4, server):
    ms4("pull", f"{REPO}:Q4_K_M", "-q")
    asked = len(server.asked)
    by_path = ms4("run", "-m", snapshot() / Q4, "--greedy", "-n", "3", "-i", IMAGE, "Hi")
    assert by_path[0] == 0
    for name in (REPO, f"{REPO}:q4_k_m", f"hf:{REPO}", "Q4_K_M"):
        assert ms4("run", "-m", name, "--greedy", "-n", "3", "-i", IMAGE, "Hi") == by_path
    assert ms4("info", f"{REPO}:Q4_K_M", "--json")[1] == ms4("info", snapshot() / Q4, "--json")[1]
    assert "bravo" in ms4("info", REPO)[1].lower() or ms4("info", REPO)[0] == 0
    assert len(server.asked) == asked  # what is here needs no network


def test_parts_are_one_model(ms4, server, files):
    code, out, err = ms4("pull", f"{REPO}:UD-Q5_K_XL")
    assert code == 0 and out == f"{snapshot() / PARTS[0]}\n" and "in 3 parts" in err
    assert "the vision tower is left out: mmproj-F16.gguf is of another model" in err
    assert [(snapshot() / name).read_bytes() for name in PARTS] == [files[name] for name in PARTS]
    assert ms4("run", "-m", f"{REPO}:UD-Q5_K_XL", "--greedy", "-n", "2", "Hi")[0] == 0


def test_what_is_here_is_not_asked_for_again(ms4, server):
    ms4("pull", f"{REPO}:Q4_K_M")
    asked = len(server.asked)
    assert ms4("pull", f"{REPO}:Q4_K_M") == (0, f"{snapshot() / Q4}\n", "")
    assert len(server.asked) == asked
    code, _, err = ms4("pull", f"{REPO}:Q4_K_M", "--update")
    assert code == 0 and "all of it was here already" in err and len(server.asked) > asked


def test_offline_is_a_guarantee(ms4, server, monkeypatch):
    code, out, err = ms4("pull", f"{REPO}:Q4_K_M", "--offline")
    assert (code, out) == (5, "") and "the network may not be used" in err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ms4("pull", REPO)[0] == 5 and ms4("pull")[0] == 5
    assert not server.asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    ms4("pull", f"{REPO}:Q4_K_M")
    asked = len(server.asked)
    assert ms4("pull", REPO, "--offline")[:2] == (0, f"{snapshot() / Q4}\n")
    assert len(server.asked) == asked


def test_a_dry_run_reads_headers_alone(ms4, server, files):
    code, out, err = ms4("pull", f"{REPO}:Q4_K_M", "--dry-run")
    assert (code, out) == (0, f"{Q4}\n{TOWER}\n") and "to be read: " in err
    assert not hf_cache.root().exists()
    assert server.n_sent == 3 * acquire.hub.MIB  # of 6, in steps of one


def test_the_answer_can_be_json(ms4, server, files):
    value = json.loads(ms4("pull", f"{REPO}:Q4_K_M", "--json")[1])
    assert value["paths"] == [str(snapshot() / Q4)] and value["mmproj"] == str(snapshot() / TOWER)
    assert value["commit"] == COMMIT and value["sha256"][Q4] == hashlib.sha256(files[Q4]).hexdigest()
    assert json.loads(ms4("pull", f"{REPO}:Q4_K_M", "--json")[1])["paths"] == value["paths"]


def with_memory(monkeypatch, n):
    monkeypatch.setattr(acquire, "memory", lambda: (n, n))


def test_what_does_not_fit_is_refused_with_what_to_type(ms4, server, monkeypatch):
    with_memory(monkeypatch, 1_000_000)
    code, out, err = ms4("pull", f"{REPO}:Q4_K_M")
    assert (code, out) == (6, "") and "--anyway" in err and "this machine has 1.0 MB" in err
    assert not hf_cache.root().exists()
    assert ms4("pull", f"{REPO}:Q4_K_M", "--anyway")[0] == 0


def test_without_a_name_the_largest_that_fits_is_taken(files, server):
    listing = acquire.hub.read_listing(web.Web(server.url), REPO)
    size = {v.quant: acquire.size(listing, v) for v in variants.variants(files)}
    assert size["Q4_K_M"] > size["UD-Q5_K_XL"]
    for n, quant in ((None, "Q4_K_M"), (10**12, "Q4_K_M"), (size["Q4_K_M"] - 1 + acquire.ESTIMATE, "UD-Q5_K_XL")):
        assert acquire.choose(listing, "", n).quant == quant
    with pytest.raises(acquire.DoesNotFitError, match="UD-Q5_K_XL"):
        acquire.choose(listing, "", 1000)


def test_where_none_fits_the_largest_is_taken_that_writes_at_a_sensible_speed(files, server):
    listing = acquire.hub.read_listing(web.Web(server.url), REPO)
    speeds = {"Q4_K_M": acquire.SENSIBLE, "UD-Q5_K_XL": acquire.SENSIBLE + 1}
    assert acquire.choose(listing, "", 1000, lambda v: speeds[v.quant]).quant == "Q4_K_M"
    speeds["Q4_K_M"] -= 0.1
    assert acquire.choose(listing, "", 1000, lambda v: speeds[v.quant]).quant == "UD-Q5_K_XL"
    speeds["UD-Q5_K_XL"] = 0.1
    assert acquire.choose(listing, "", 1000, lambda v: speeds[v.quant]).quant == "Q4_K_M"
    assert acquire.choose(listing, "", 10**12, lambda v: 0.0).quant == "Q4_K_M"


def test_what_is_larger_than_memory_is_fetched_if_its_experts_can_stay_on_the_disk(ms4, server, monkeypatch):
    found = forecast.Model.of(GgufFile.open(MODEL))
    made = acquire.predicted(found, None, acquire.Here())
    with_memory(monkeypatch, int((made.needed + made.needed_whole) / 2 / 0.75) + MMPROJ.stat().st_size)
    code, _, err = ms4("pull", REPO, "--dry-run")
    assert code == 0 and "but it runs: " in err and "the others on the disk; about " in err, err


def test_what_a_card_holds_needs_no_memory(files, server):
    listing = acquire.hub.read_listing(web.Web(server.url), REPO)
    large, small = (next(v for v in variants.variants(files) if v.quant == q) for q in ("Q4_K_M", "UD-Q5_K_XL"))
    n_memory = acquire.size(listing, small) + acquire.ESTIMATE
    assert acquire.choose(listing, "", n_memory) == small
    assert acquire.choose(listing, "", n_memory, on_card=lambda v: n_memory if v == large else 0.0) == large


def test_the_card_of_this_machine_is_part_of_the_plan(ms4, server, monkeypatch):
    def planned(name, vram, memory=None):
        monkeypatch.setattr(expected, "card_here", lambda device: expected.HostCard(name, vram, vram))
        with_memory(monkeypatch, memory)
        return ms4("pull", REPO, "--dry-run")[2]

    known, unknown = "NVIDIA GeForce RTX 4090", "NVIDIA X"
    all_of_it = ": all but experts, and 100 % of those, lie on it"
    err = planned(known, 24 << 30)
    assert re.search(f"{known}{all_of_it}; about [0-9]+ tok/s of writing, .*predicted", err), err
    assert f"{unknown}{all_of_it}; how fast that is, is not known" in planned(unknown, 24 << 30)
    assert f"{known} has too little free memory for it" in planned(known, 1 << 20)
    # With all of it on the card, memory is wanted for the rest alone; half a card, and some stay on the disk.
    whole = forecast.Model.of(GgufFile.open(MODEL))
    least = acquire.predicted(whole, None, acquire.Here(vram=24 << 30))
    assert least.needed_whole == least.kv + least.buffers + least.process


# --- plans of what is elsewhere


@pytest.fixture
def machine():
    """Rates that are known, so that none are measured: by hand, for the models that are served here."""

    def know(path):
        gguf = GgufFile.open(path)
        shape = mistral4.shape_of(gguf)
        key = measured.rates_key(shape, mistral4.tensors_of(gguf, shape), 0)
        measured.keep_rates(key, calibration.Rates(1e9, 1e10))

    return know


@pytest.mark.parametrize("name", [f"hf:{REPO}:Q4_K_M", f"hf:{REPO}", "resolve/main", "blob/main"])
def test_a_plan_of_a_remote_file_is_that_of_the_same_file_here(ms4, server, machine, name):
    machine(MODEL)
    url = name if name.startswith("hf:") else f"{server.url}/{REPO}/{name}/{Q4}?download=true"
    code, out, err = ms4("plan", url, "--ram", "2G", "--ctx", "512", "--json")
    assert code == 0, err
    here = json.loads(ms4("plan", MODEL, "--ram", "2G", "--ctx", "512", "--json")[1])
    there = json.loads(out)
    for field in ("bytes", "fits", "memory", "experts"):
        assert there[field] == here[field]
    assert there["decode"]["warm"] == here["decode"]["warm"] and "assumed" in there["notes"][0]
    assert server.n_sent < len(server.files[Q4]) and not hf_cache.root().exists()  # the header, and nothing is kept


@pytest.mark.parametrize("name", [f"hf:{REPO}:Q4_K_M", "resolve/main"])
def test_what_is_in_a_remote_file_is_told_from_its_header(ms4, server, name):
    url = name if name.startswith("hf:") else f"{server.url}/{REPO}/{name}/{Q4}"
    code, out, err = ms4("info", url, "--json", "--tensors", "--kv")
    assert code == 0, err
    here = json.loads(ms4("info", MODEL, "--json", "--tensors", "--kv")[1])
    there = json.loads(out)
    assert {key: there[key] for key in there if key not in ("paths", "mmproj")} == {
        key: here[key] for key in here if key not in ("paths", "mmproj")
    }
    assert "images" not in ms4("info", url)[1] and server.n_sent < len(server.files[Q4])
    assert ms4("info", "")[0] == 5


@pytest.mark.parametrize("kind", ["cuts", "errors", "no ranges", "page", "less", "far", "other etag"])
def test_a_header_comes_through_from_a_server_that_misbehaves(ms4, files, machine, monkeypatch, tmp_path, kind):
    for name in PARTS:
        (tmp_path / Path(name).name).write_bytes(files[name])
    machine(tmp_path / Path(PARTS[0]).name)
    monkeypatch.setattr(web.Patience, "wait", lambda *_: 0.0)
    with Hub(files, kind, seed=3) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        code, out, err = ms4("plan", f"{server.url}/{REPO}/resolve/main/{PARTS[0]}", "--json")
    assert code == 0 and json.loads(out)["bytes"] == sum(len(files[name]) for name in PARTS), err


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (f"hf:{REPO}:Q9_Z", 5, "has no Q9_Z"),
        ("hf:someone/Other", 5, "the hub does not have it"),
        ("{url}/" + f"{REPO}/resolve/main/none.gguf", 5, "the hub does not have it"),
        ("{url}/index.html", 5, "no address of a GGUF file"),
        ("http://127.0.0.1:1/x.gguf", 1, "attempts failed"),
    ],
)
def test_plans_of_what_is_nowhere(ms4, server, monkeypatch, name, code, said):
    monkeypatch.setattr(web.Patience, "wait", lambda *_: 0.0)
    got = ms4("plan", name.format(url=server.url))
    assert got[:2] == (code, "") and said in got[2], got
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "may not be used" in ms4("plan", name.format(url=server.url))[2]


def test_what_is_missing_is_counted(server, files):
    listing = acquire.hub.read_listing(web.Web(server.url), REPO)
    file, repo = listing.files[Q4], Cached.of(REPO)
    assert acquire.missing(repo, file) == file.bytes
    begun = acquire.Part(repo.blobs, file.sha256, file.bytes, {})
    begun.write(1000, bytes(5000))
    begun.close()
    assert acquire.missing(repo, file) == file.bytes - 5000
    begun.path.unlink()  # a journal alone is worth nothing
    assert acquire.missing(repo, file) == file.bytes
    put(REPO, Q4, files[Q4])
    assert acquire.missing(repo, file) == 0


def test_a_disk_without_room_is_said_before_the_weights(ms4, server, monkeypatch):
    monkeypatch.setattr(acquire, "free_disk", lambda: acquire.SPARE + 1_000_000)
    code, out, err = ms4("pull", f"{REPO}:Q4_K_M")
    assert (code, out) == (1, "") and "are missing, 0.0 GB are free in" in err
    assert not blob(server.files[Q4]).exists()


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (f"{REPO}:Q9_Z", 5, r"has no Q9_Z\nhint: it has Q4_K_M, UD-Q5_K_XL\n"),
        ("someone/Other", 5, "the hub does not have it"),
        ("what is this", 2, "names no model"),
        ("../x:Q4_K_M", 2, "names no model"),
        ("leanstral", 5, "no GGUF files"),
    ],
)
def test_names_that_lead_nowhere(ms4, server, name, code, said):
    got = ms4("pull", name)
    assert got[:2] == (code, "") and re.search(said, got[2]), got


def test_a_page_instead_of_a_model_is_refused_before_the_rest(ms4, monkeypatch):
    with Hub({Q4: bad_hub.PAGE * 100}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        code, out, err = ms4("pull", f"{REPO}:Q4_K_M")
    assert (code, out) == (5, "") and "an HTML page" in err and f"{REPO}/{Q4}" in err
    assert not hf_cache.root().exists()


def test_a_damaged_download_is_told_from_a_right_one(ms4, server, files):
    server.kind = "flipped bit"
    code, out, err = ms4("pull", f"{REPO}:Q4_K_M")
    assert (code, out) == (5, "") and hashlib.sha256(files[Q4]).hexdigest() in err
    assert not blob(files[Q4]).exists() and not (snapshot() / Q4).exists()


def test_the_list_needs_no_network(ms4, server):
    code, out, err = ms4("pull", "--list")
    assert (code, err) == (0, "") and not server.asked
    for row in repositories.REPOSITORIES:
        assert row.repo in out and all(known.quant in out for known in row.files)
    assert len(json.loads(ms4("pull", "--list", "--json")[1])) == len(repositories.REPOSITORIES)


def test_the_progress_fits_one_line():
    state = acquire.State(72_000_000_000, 30_240_000_000, 29_800_000_000, 30_240_000_000, Q4)
    assert pull.progress(state, 11_300_000) == "42 %  30.2 GB of 72.0 GB  11.3 MB/s  1 h 02 left  29.8 GB checked"
    assert pull.progress(acquire.State(0, 0, 0, 0, Q4), 0) == "0 %  0 bytes of 0 bytes  0 bytes checked"
    assert [pull.duration(s) for s in (0.2, 59, 61, 3600, 90061)] == ["1 s", "1 min", "1 min", "1 h 00", "25 h 01"]


def test_without_a_terminal_the_progress_is_a_note_now_and_then(monkeypatch):
    now, err = [0.0], io.StringIO()
    monkeypatch.setattr("ms4.cli.pull.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", err)
    shown = pull.Shown(StatusLine(), quiet=False)
    for second in range(70):
        now[0] = float(second)
        shown.show(acquire.State(10**9, second * 10**7, second * 10**7, second * 10**7, Q4))
    lines = err.getvalue().splitlines()
    assert [line[:15] for line in lines] == ["ms4: 30 %  300.", "ms4: 60 %  600."]
    assert "10.0 MB/s  1 min left" in lines[0] and "\x1b" not in err.getvalue()


def test_on_a_terminal_it_is_one_line_that_goes_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    status = StatusLine()
    status.enabled = True
    shown = pull.Shown(status, quiet=False)
    shown.show(acquire.State(100, 42, 40, 42, Q4))
    shown.show(acquire.State(100, 43, 40, 43, Q4, trouble="the server answers 503"))
    shown.say("done")
    assert err.getvalue().count("\n") == 1
    assert "43 %  43 bytes of 100 bytes  trying again: the server answers 503" in err.getvalue()
    assert err.getvalue().endswith("\r\x1b[Kms4: done\n")


# --- names


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Mistral-Small-4-119B-2603-Q4_K_M", "Q4_K_M"),
        ("UD-Q4_K_XL/Mistral-Small-4-119B-2603-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("BF16/model", "BF16"),
        ("mistral.q8_0", "q8_0"),
        ("a-UD-IQ2_XXS", "UD-IQ2_XXS"),
        ("a-IQ4_NL", "IQ4_NL"),
        ("a-MXFP4_MOE", "MXFP4_MOE"),
        ("Mistral-Small-4-APEX-I-Balanced", "Mistral-Small-4-APEX-I-Balanced"),
    ],
)
def test_a_quantization_is_read_from_a_name(name, quant):
    assert variants.quant_of(name) == quant


def test_models_are_told_from_towers_and_parts_from_wholes():
    names = ["mmproj-F16.gguf", "imatrix_unsloth.gguf", "a-Q8_0.gguf", "b/a-BF16-00002-of-00002.gguf", "README.md"]
    found = {v.quant: v for v in variants.variants(names)}
    assert found.keys() == {"Q8_0", "BF16"} and found["Q8_0"].is_complete and not found["BF16"].is_complete
    twice = variants.variants(["a-Q8_0.gguf", "b-Q8_0.gguf"])
    assert [v.quant for v in twice] == ["a-Q8_0", "b-Q8_0"]  # one label may not mean two models
    assert variants.best_tower(["x/mmproj-F32.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf"]) == "mmproj-F16.gguf"
    assert variants.best_tower(["a.gguf"]) is None


def test_ud_may_be_left_out_unless_there_are_both():
    both = variants.variants(["a-UD-Q4_K_M.gguf", "a-Q4_K_M.gguf", "a-UD-Q2_K.gguf"])
    assert [variants.pick(both, q).quant for q in ("q4_k_m", "UD-Q4_K_M", "Q2_K")] == ["Q4_K_M", "UD-Q4_K_M", "UD-Q2_K"]
    assert variants.pick(both, "Q3_K") is None


def test_what_a_name_asks_for():
    default = repositories.DEFAULT.repo
    for text, wanted in {
        "a/b": Wanted("a/b"),
        "a/b:Q4_K_M": Wanted("a/b", "Q4_K_M"),
        "hf:a/b:Q4_K_M": Wanted("a/b", "Q4_K_M"),
        "Q4_K_M": Wanted("", "Q4_K_M"),
        "mistral-small-4": Wanted(default),
        "Mistral-Small-4:UD-IQ3_S": Wanted(default, "UD-IQ3_S"),
        **dict.fromkeys(("", "a", "a/b/c", "../b", "a/..", "a--b/c", "a/b:../x", "a/b:c:d", "a b/c", "/a/b", "a/.b")),
    }.items():
        assert variants.parse(text) == wanted, text


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert hf_cache.root() == tmp_path / "hub"
    monkeypatch.delenv("HF_HUB_CACHE")
    assert hf_cache.root() == tmp_path / "cache" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hf_cache.root() == tmp_path / "home" / "hub"


def put(repo, name, data, commit=COMMIT):
    """A file in the cache, as huggingface_hub puts it there."""
    cached = Cached.of(repo)
    cached.blobs.mkdir(parents=True, exist_ok=True)
    (cached.blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
    return cached.link(commit, name, hashlib.sha256(data).hexdigest())


def test_a_name_that_may_be_several_models_is_refused(ms4, files):
    put("a/one", "x-Q4_K_M.gguf", files[Q4])
    put("a/two", "y-Q4_K_M.gguf", files[Q4])
    put("a/two", "y-Q8_0.gguf", files[Q4])
    put("a/other", "z-Q2_K.gguf", b"GGUF" + bytes(100))
    for name in ("Q4_K_M", "a/two"):
        code, out, err = ms4("run", "-m", name, "Hi")
        assert (code, out) == (5, "") and "may be any of 2 models here" in err and "a/two:" in err
    assert stored.resolve("a/two:Q8_0").endswith("y-Q8_0.gguf")
    assert stored.resolve("Q8_0").endswith("y-Q8_0.gguf")
    for name in ("Q2_K", "Q3_K_S", "nobody/nothing"):  # the first is no model that ms4 runs
        code, out, err = ms4("run", "-m", name, "Hi")
        assert (code, out) == (5, "") and "is not on this machine" in err and f"ms4 pull {name}" in err


def test_the_commit_that_is_main_comes_first(files):
    old, new = "a" * 40, "b" * 40
    put("a/one", "x-Q4_K_M.gguf", files[Q4], old)
    time.sleep(0.01)
    put("a/one", "x-Q4_K_M.gguf", files[Q4], new)
    assert new in stored.resolve("a/one")
    Cached.of("a/one").set_main(old)
    assert old in stored.resolve("a/one")
    (Cached.of("a/one").folder / "snapshots" / old / "x-Q4_K_M.gguf").unlink()
    assert new in stored.resolve("a/one")


def test_a_model_without_one_of_its_parts_is_not_found(files):
    for name in PARTS[:2]:
        put("a/one", name, files[name])
    with pytest.raises(stored.NotStoredError):
        stored.find("a/one")
    put("a/one", PARTS[2], files[PARTS[2]])
    assert [p.name for p in stored.find("a/one").paths] == [name.rpartition("/")[2] for name in PARTS]


def test_a_name_is_found_without_what_downloads_need():
    put("a/one", "x-Q4_K_M.gguf", MODEL.read_bytes())
    code = (
        "import sys; sys.argv = ['ms4', 'ls']; from ms4.cli.start import main; main(); "
        "from ms4.cli.options import model_path; model_path('a/one:Q4_K_M'); "
        "print({'httpx', 'rich', 'PIL', 'tiktoken', 'prompt_toolkit'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines() == ["a/one:Q4_K_M  4.7 MB, text", "set()"]


# --- ls, rm


def test_ls_shows_models_and_what_has_been_begun(ms4, server, files, monkeypatch):
    code, out, err = ms4("ls")
    assert (code, out) == (0, "") and "ms4 pull" in err
    put("a/one", PARTS[0], files[PARTS[0]])  # one part of three
    put("a/other", "z-Q2_K.gguf", b"GGUF" + bytes(100))
    ms4("pull", f"{REPO}:Q4_K_M", "-q")
    begun = acquire.Part(Cached.of(REPO).blobs, "c" * 64, 10**6, {"name": "Some-Model-Q8_0.gguf"})
    begun.write(0, bytes(1234))
    begun.close()
    code, out, err = ms4("ls")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 2)
    assert lines[0].startswith(f"{REPO}:Q4_K_M  4.7 MB, text and images")
    assert lines[1].startswith(f"{REPO}:Q8_0") and f"not complete:  ms4 pull {REPO}:Q8_0" in lines[1]
    rows = json.loads(ms4("ls", "--json")[1])
    assert [row["complete"] for row in rows] == [True, False] and rows[0]["path"] == str(snapshot() / Q4)


def everything_under(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir() and ".locks" not in str(p))


def test_rm_takes_a_model_and_what_nothing_else_needs(ms4, server, files):
    ms4("pull", f"{REPO}:Q4_K_M", "-q")
    before = everything_under(hf_cache.root())
    ms4("pull", f"{REPO}:UD-Q5_K_XL", "-q")
    code, out, _ = ms4("rm", f"{REPO}:UD-Q5_K_XL", "--dry-run")
    assert code == 0 and len(out.splitlines()) == 9  # links, blobs, and the checksums of their pieces
    code, out, err = ms4("rm", f"{REPO}:UD-Q5_K_XL")
    assert (code, out) == (2, "") and "-y" in err  # nobody is asked in a script
    code, out, err = ms4("rm", f"{REPO}:UD-Q5_K_XL", "-y")
    assert (code, out) == (0, "") and err.startswith(f"ms4: removed {REPO}:UD-Q5_K_XL: ")
    assert everything_under(hf_cache.root()) == before
    assert ms4("rm", REPO, "-y")[0] == 0  # the last model: the tower goes with it
    assert [p for p in everything_under(hf_cache.root()) if "refs" not in p] == []
    assert ms4("rm", REPO, "-y")[0] == 5


def test_rm_asks_on_a_terminal(ms4, files, monkeypatch):
    put("a/one", "x-Q4_K_M.gguf", files[Q4])
    monkeypatch.setattr("ms4.cli.streams.is_terminal", lambda stream: stream is not sys.stdout)
    code, out, err = ms4("rm", "a/one", stdin=b"\n")
    assert (code, out) == (1, "") and "remove a/one:Q4_K_M (4.7 MB)? [y/N]" in err and "nothing was removed" in err
    assert stored.find("a/one")
    assert ms4("rm", "a/one", stdin=b"y\n")[0] == 0
    with pytest.raises(stored.NotStoredError):
        stored.find("a/one")


def test_rm_keeps_what_another_snapshot_needs(ms4, files):
    put("a/one", "x-Q4_K_M.gguf", files[Q4])
    put("a/one", "same-Q8_0.gguf", files[Q4], "f" * 40)
    ms4("rm", "a/one:Q4_K_M", "-y")
    assert stored.find("a/one").paths[0].read_bytes() == files[Q4]


def test_rm_takes_what_was_begun(ms4):
    begun = acquire.Part(Cached.of(REPO).blobs, "c" * 64, 10**6, {"name": "Some-Model-Q8_0.gguf"})
    begun.write(0, bytes(1234))
    begun.close()
    assert ms4("rm", f"{REPO}:Q8_0", "-y")[0] == 0 and os.listdir(Cached.of(REPO).blobs) == []


def test_rm_leaves_files_alone(ms4, tmp_path):
    (tmp_path / "mine.gguf").write_bytes(b"x")
    code, out, err = ms4("rm", tmp_path / "mine.gguf", "-y")
    assert (code, out) == (2, "") and (tmp_path / "mine.gguf").exists()


# --- verify


def damage(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_verify_says_what_is_right_wrong_and_unknown(ms4, server, files, tmp_path):
    ms4("pull", f"{REPO}:Q4_K_M", "-q")
    code, out, err = ms4("verify")
    assert (code, err) == (0, "") and out == f"right     {REPO}/{Q4}\nright     {REPO}/{TOWER}\n"
    damage(blob(files[Q4]), 3_000_000)
    code, out, err = ms4("verify", REPO)
    assert code == 5 and out.startswith(f"wrong     {REPO}/{Q4}: its sha256 is ") and "1 pieces are damaged" in out
    (tmp_path / "mine.gguf").write_bytes(files[Q4])
    code, out, err = ms4("verify", tmp_path / "mine.gguf", "--json")
    assert code == 0 and json.loads(out)[0]["result"] == "unknown"


@pytest.mark.parametrize("harm", ["flip", "cut", "longer"])
def test_repair_fetches_the_damaged_pieces_alone(ms4, server, files, harm):
    ms4("pull", f"{REPO}:Q4_K_M", "-q")
    path = blob(files[Q4])
    if harm == "flip":
        damage(path, 100_000)
        damage(path, 3_000_000)
    elif harm == "cut":
        os.truncate(path, len(files[Q4]) - 100_000)
    else:
        with open(path, "ab") as file:
            file.write(b"more")
    before = server.n_sent
    code, out, err = ms4("verify", "--repair")
    assert code == 0 and f"repaired  {REPO}/{Q4}" in out, (out, err)
    assert path.read_bytes() == files[Q4]
    assert server.n_sent - before <= 4 * (256 << 10)
    assert ms4("verify")[0] == 0 and len(os.listdir(path.parent)) == 2


def test_a_file_of_others_is_repaired_in_full_or_in_part(ms4, server, files):
    """Fetched by another program: its pieces are known only after a check that found it right."""
    link = put(REPO, Q4, files[Q4])
    damage(blob(files[Q4]), 1_000_000)
    code, out, _ = ms4("verify", REPO)
    assert code == 5 and "nothing tells which part is damaged" in out
    assert ms4("verify", REPO, "--repair")[0] == 0 and server.n_sent == len(files[Q4])
    assert link.read_bytes() == files[Q4]
    other = put("a/one", "x-Q4_K_M.gguf", files[Q4])
    assert ms4("verify", "a/one")[0] == 0
    damage(other, 1_000_000)
    assert "1 pieces are damaged" in ms4("verify", "a/one")[1]


def test_bytes_that_several_repositories_share_are_not_written_to(ms4, server, files):
    """As huggingface_hub 2.4 may lay them: the blob is a link into a store, under a name that is no SHA-256 of it."""
    link = put(REPO, Q4, files[Q4])
    shared = hf_cache.root() / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    os.replace(blob(files[Q4]), shared)
    blob(files[Q4]).symlink_to(os.path.relpath(shared, blob(files[Q4]).parent))
    assert stored.resolve(REPO) == str(link) and ms4("verify", REPO)[0] == 0
    damage(shared, 1_000_000)
    rotten = shared.read_bytes()
    assert ms4("verify", REPO)[0] == 5
    assert ms4("verify", REPO, "--repair")[0] == 0 and link.read_bytes() == files[Q4]
    assert shared.read_bytes() == rotten and not blob(files[Q4]).is_symlink()
    blob(files[Q4]).unlink()
    blob(files[Q4]).symlink_to(os.path.relpath(shared, blob(files[Q4]).parent))
    assert ms4("rm", REPO, "-y")[0] == 0
    assert shared.read_bytes() == rotten and not os.path.lexists(blob(files[Q4]))


def test_a_repair_that_fails_leaves_no_damaged_file_under_its_name(ms4, server, files):
    ms4("pull", f"{REPO}:Q4_K_M", "-q")
    damage(blob(files[Q4]), 3_000_000)
    server.kind = "gone"
    code, out, err = ms4("verify", "--repair", REPO)
    assert code == 5 and not (snapshot() / Q4).exists()
    server.kind = "good"
    before = server.n_sent
    assert ms4("pull", f"{REPO}:Q4_K_M", "-q")[0] == 0
    assert (snapshot() / Q4).read_bytes() == files[Q4]
    assert server.n_sent - before <= 256 << 10  # the damaged piece; headers that are here are not read again


# --- killed


def killed_and_resumed(server, moments, environment):
    """Starts the pull again and again, kills it after so many bytes, and lets the last one end."""
    for n in moments:
        process = subprocess.Popen(
            [*COMMAND, "pull", f"{REPO}:Q4_K_M"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while server.n_sent < n and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run([*COMMAND, "pull", f"{REPO}:Q4_K_M"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def test_a_pull_that_is_killed_goes_on_where_it_was(files, rng):
    """Few bytes, so what is on the way at the end weighs more than the 2 % that hold for real files."""
    with Hub({Q4: files[Q4]}, bytes_per_s=3_000_000) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url}
        path = killed_and_resumed(server, sorted(rng.integers(2_200_000, 4_500_000, 1).tolist()), environment)
    assert Path(path).read_bytes() == files[Q4]
    assert server.n_sent < len(files[Q4]) + 4 * (200 << 10)


DEMO = Path(engine.__file__).parents[1] / "models" / "demo" / "ms4-demo.gguf"


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("kind", bad_hub.SURVIVED)
def test_a_pull_killed_at_random_moments_reads_hardly_anything_twice(kind, rng):
    """50 kills in all.  A server without ranges has to send everything again; from the others, at most 2 % comes twice.

    Counted is what the server has sent: what was on its way at the kill is lost, too.  The kills come after the plan,
    whose header (1 MiB, more than 2 % of this file) is in memory alone until the download begins.
    """
    data = DEMO.read_bytes()
    again = []
    for _ in range(4):
        with Hub({Q4: data}, kind, seed=int(rng.integers(2**31)), bytes_per_s=8_000_000) as server:
            environment = {**os.environ, "HF_ENDPOINT": server.url}
            path = killed_and_resumed(server, [int(rng.integers(2 * acquire.hub.MIB, len(data)))], environment)
            again.append(server.n_sent - len(data))
        assert Path(path).read_bytes() == data
        Path(path).unlink()
        blob(data).unlink()
    print(kind, "read again:", [f"{100 * n / len(data):.2f} %" for n in again])
    if kind not in ("no ranges", "no length", "more", "other range"):  # the last two send what nobody asked for
        assert max(again) <= 0.02 * len(data)


def test_ctrl_c_says_how_to_go_on(files):
    with Hub({Q4: files[Q4]}, bytes_per_s=1_000_000) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url}
        process = subprocess.Popen(
            [*COMMAND, "pull", f"{REPO}:Q4_K_M"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while server.n_sent < 3_000_000:  # the header is there
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b""
    assert err.decode().splitlines()[-1] == f"ms4: stopped; to go on where it was:  ms4 pull {REPO}:Q4_K_M"
