"""Images, files and PDF pages as the commands take them: what is read, said, refused, and computed only once."""

import base64
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from bad_images import samples
from fixtures import bravo, image_references
from make_mmproj import write_mmproj
from PIL import Image as Pillow
from test_vision import MOST_LOGITS
from yardstick import assert_near, errors

from ms4.cli import attachments, loading, remembered, repl
from ms4.cli.image_notes import ImageOptions
from ms4.cli.options import EngineOptions
from ms4.cli.render import StatusLine
from ms4.models import vision
from ms4.models.control import Control
from ms4.models.dialogue import Dialogue
from ms4.models.image import load_image
from ms4.models.model import Model
from ms4.models.scheduler import Scheduler
from ms4.models.vision import ImageInput

DATA = Path(__file__).parent / "data"
MODEL, MMPROJ, IMAGE = (str(DATA / f"bravo-{name}") for name in ("Q4_K_M.gguf", "mmproj-f16.gguf", "image.png"))
PRICE = "140x84 -> 140x84, 18 tokens"
ONE_LINE = re.compile(r"ms4: error: [^\x00-\x1f\x7f]{1,300}\n(hint: [^\x00-\x1f\x7f]{1,300}\n)?")


@pytest.fixture
def run(ms4):
    return lambda *arguments, **more: ms4("run", "-m", MODEL, "--greedy", "-n", "4", *arguments, **more)


@pytest.fixture
def two_pages(tmp_path):
    pages = [Pillow.new("RGB", (60, 80), colour) for colour in ("white", "red")]
    pages[0].save(tmp_path / "two.pdf", save_all=True, append_images=pages[1:])
    return tmp_path / "two.pdf"


def shown_prompt(run, *arguments, **more):
    code, out, _ = run("--show-prompt", *arguments, **more)
    assert code == 0
    return re.sub(r"(\[IMG\]|\[IMG_BREAK\])+\[IMG_END\]", "<image>", out.partition("[INST]")[2].partition("[/INST]")[0])


def test_an_image_is_priced_on_stderr_and_answered_on_stdout(run):
    code, out, err = run("-i", IMAGE, "Total?")
    assert code == 0 and out.endswith("\n") and err == f"ms4: {IMAGE[-80:]} {PRICE}\n"
    assert run("-q", "-i", IMAGE, "Total?") == (0, out, "")
    assert run("-q", "-i", "-", "Total?", stdin=Path(IMAGE).read_bytes()) == (0, out, "")
    assert run("-q", "Total?", stdin=Path(IMAGE).read_bytes()) == (0, out, "")
    assert run("-q", "Total?")[1] != out
    assert run("-i", IMAGE)[0] == 0


def test_images_come_first_then_files_then_texts(run, tmp_path, two_pages):
    note = tmp_path / "note.txt"
    note.write_text("42 EUR\n")
    made = shown_prompt(run, "-f", note, "-i", IMAGE, "-i", IMAGE, "-f", f"{two_pages}:2", "Total?", stdin=b"Hello\n")
    assert made == f"<image><image>{note}:\n42 EUR\n\n{two_pages}, page 2:<image>Hello\n\nTotal?"
    assert shown_prompt(run, "-f", note) == f"{note}:\n42 EUR"
    assert shown_prompt(run, "-f", "-:1", "Sum?", stdin=two_pages.read_bytes()) == "stdin, page 1:<image>Sum?"
    assert shown_prompt(run, "Sum?", stdin=two_pages.read_bytes()).count("<image>") == 2


def test_the_limit_of_tokens_shrinks_images(run, ms4):
    code, out, err = run("--count", "-i", IMAGE, "--image-max-tokens", "6", "Hi")
    plain = run("--count", "Hi")
    assert (code, int(out)) == (0, int(plain[1]) + 6) and "-> 56x56, 6 tokens" in err
    url = "data:image/png;base64," + base64.b64encode(Path(IMAGE).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Hi"}]
    line = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    counts = [
        int(ms4("tokenize", "-m", MODEL, "--chat", "-", "--count", *more, stdin=line)[1])
        for more in ((), ("--image-max-tokens", "6"))
    ]
    assert counts == [int(plain[1]) + 18, int(plain[1]) + 6]


def test_json_says_what_the_tower_saw(run):
    found = json.loads(run("--format", "json", "-i", IMAGE, "Hi")[1])["ms4"]["images"]
    assert found == [{"px": [140, 84], "tokens": 18}]
    assert json.loads(run("--format", "jsonl", "-i", IMAGE, "Hi")[1].splitlines()[0])["images"] == found
    assert "images" not in json.loads(run("--format", "json", "Hi")[1])["ms4"]
    assert "images 0." in run("--stats", "-i", IMAGE, "Hi")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("-i", "absent.png"), 7, "no such file"),
        (("-i", "."), 7, "is a directory"),
        (("-i", "/dev/zero"), 7, "larger than"),
        (("-i", "ftp://host/a.png"), 7, "ms4 fetches from http and https alone\nhint: curl"),
        (("-f", "file://host/etc/passwd"), 7, "ms4 fetches from http and https alone"),
        (("-i", "-"), 7, "stdin: not a PNG"),
        (("-i", "-", "-f", "-"), 2, "only once"),
        (("-i", IMAGE, "--mmproj", "absent"), 5, "absent: no such file"),
        (("-i", IMAGE, "--mmproj", MODEL), 5, "not a vision tower"),
        (("-i", IMAGE, "--ctx", "20"), 3, "the prompt has 42 tokens"),
        (("-i", IMAGE, "--image-max-tokens", "1"), 2, "outside 2 to"),
        (("--pdf", "both"), 2, "not one of auto, text, image"),
    ],
)
def test_what_cannot_be_attached_is_one_line(run, arguments, code, says):
    found, out, err = run("-q", *arguments, "Hi")
    assert (found, out) == (code, "") and says in err and ONE_LINE.fullmatch(err), err


class Site(BaseHTTPRequestHandler):
    """A web server: each of `pages` is (status, headers, body)."""

    pages: dict = {}
    asked: list = []

    def do_GET(self):
        Site.asked.append((self.path, self.headers.get("Authorization")))
        status, headers, body = Site.pages.get(self.path, (404, {}, b"nothing"))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever has enough leaves
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """site(path, body, status, headers...) puts it there and gives its address; bodies come without their length."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    Site.pages, Site.asked = {}, []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def put(path, body=b"", status=200, **headers):
        Site.pages[path] = (status, headers, body)
        return f"http://127.0.0.1:{server.server_port}{path}"

    yield put
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_an_address_is_fetched_and_gives_what_the_file_gives(run, site, two_pages):
    image, text = Path(IMAGE).read_bytes(), b"A text.\n"
    moved = site("/moved", status=302, Location="/a.png")
    for address in (site("/a.png", image), moved):
        assert run("--format", "json", "--count", "-i", address, "Hi")[:2] == run("--count", "-i", IMAGE, "Hi")[:2]
    pdf = site("/a.pdf", Path(two_pages).read_bytes())
    shown = run("--show-prompt", "-f", f"{pdf}:2", "-f", site("/t.txt", text), "Hi")[1]
    assert f"{pdf}" in shown and "t.txt:\nA text.\n\nHi" in shown
    assert {token for _, token in Site.asked} == {None}  # that of the hub is the hub's
    assert [path for path, _ in Site.asked] == ["/a.png", "/moved", "/a.png", "/a.pdf", "/t.txt"]


def test_what_cannot_be_fetched_is_one_line(run, site, monkeypatch):
    monkeypatch.setattr("ms4.models.web.Patience.wait", lambda *_: 0.0)
    monkeypatch.setattr("ms4.cli.attachments.MAX_BYTES", 1 << 20)
    for address, says in (
        (site("/none", status=404), "the server answers 404"),
        (site("/busy", status=503), "the server answers 503; 6 attempts failed"),
        (site("/long.png", bytes(2 << 20)), "more than 1 MiB"),
        (site("/page.png", b"<html>no</html>"), "page.png: not a PNG"),
        (site("/to", status=302, Location="file:///etc/passwd"), "is no web address"),
        ("http://127.0.0.1:1/a.png", "nobody answers there"),
    ):
        code, out, err = run("-q", "-i", address, "Hi")
        assert (code, out) == (7, "") and says in err and ONE_LINE.fullmatch(err), err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    n_asked = len(Site.asked)
    assert "the network is not to be used" in run("-q", "-i", site("/a"), "Hi")[2] and len(Site.asked) == n_asked


def test_a_pdf_given_as_an_image_says_how(run, two_pages):
    code, _, err = run("-i", two_pages, "Hi")
    assert code == 7 and f"hint: a PDF is attached with -f {two_pages}" in err


def test_hostile_images_are_read_or_refused_in_one_line(run, tmp_path):
    several = ("empty", "svg", "bomb-1-bit", "3-rows-of-64", "no-palette", "tiff", "bomb-zTXt", "50000-texts")
    chosen = [sample for sample in samples() if sample.id in several]
    assert len(chosen) == len(several)
    for sample in chosen:
        path = tmp_path / f"{sample.id}.png"
        path.write_bytes(sample.data)
        code, out, err = run("-q", "-i", path, "Hi")
        if sample.says is None:
            assert (code, err) == (0, ""), sample.id
        else:
            assert (code, out) == (7, "") and sample.says in err and ONE_LINE.fullmatch(err), (sample.id, err)


def test_without_a_tower_there_is_advice_and_text_still_works(ms4, tmp_path):
    os.link(MODEL, tmp_path / "m.gguf")
    code, out, err = ms4("run", "-m", tmp_path / "m.gguf", "-n", "1", "-i", IMAGE, "Hi")
    assert (code, out) == (5, "") and "no mmproj file beside the model\nhint: " in err and ONE_LINE.fullmatch(err)
    assert ms4("run", "-m", tmp_path / "m.gguf", "-n", "1", "Hi")[0] == 0
    assert ms4("run", "-m", tmp_path / "m.gguf", "-n", "1", "--mmproj", MMPROJ, "-i", IMAGE, "Hi")[0] == 0
    write_mmproj(tmp_path / "mmproj.gguf", layers=1, width=64, heads=2, out_width=128)
    code, _, err = ms4("run", "-m", tmp_path / "m.gguf", "-q", "-i", IMAGE, "Hi")
    assert code == 5 and "belongs to another model" in err


def test_text_that_speaks_of_a_pdf_is_text(run):
    assert shown_prompt(run, stdin=b"A PDF begins with %PDF-1.7") == "A PDF begins with %PDF-1.7"


# --- logits, bench, info


def logits(ms4, tmp_path, ids, *more):
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    out = tmp_path / "out.npy"
    model = ("-m", bravo("F32"), "--attn-scale", "mscale2")
    result = ms4("logits", *model, "--ids", tmp_path / "ids.json", "-o", out, *more)
    return result, np.load(out) if result[0] == 0 else None


def test_logits_with_an_image_agree_with_transformers(ms4, tmp_path):
    ref = image_references()
    ids = ref["ids"].tolist()
    _, got = logits(ms4, tmp_path, ids, "--mmproj", MMPROJ, "--image", IMAGE)
    assert_near(got[ref["positions"]], ref["logits"], MOST_LOGITS)
    _, parts = logits(ms4, tmp_path, ids, "--image", IMAGE, "--chunk", "5")
    assert np.array_equal(parts, got)
    _, blind = logits(ms4, tmp_path, ids)
    first = ids.index(Control.IMG)
    assert np.array_equal(blind[:first], got[:first]) and errors(blind, got)[first:].min() > 0.1


def test_logits_count_the_places_of_images(ms4, tmp_path):
    (code, out, err), _ = logits(ms4, tmp_path, [1, 10, 10, 13], "--image", IMAGE)
    assert code == 7 and "the ids have 2 [IMG] positions (id 10); the images fill 15" in err and ONE_LINE.fullmatch(err)
    (code, _, err), _ = logits(ms4, tmp_path, [1, -1], "--image", IMAGE)
    assert code == 7 and "0 [IMG] positions" in err
    (code, _, err), _ = logits(ms4, tmp_path, [1, *[10] * 15, -1], "--image", IMAGE)
    assert code == 7 and "id -1 at position 16" in err


def test_bench_measures_an_image(ms4):
    code, out, _ = ms4("bench", "-m", MODEL, "--mmproj", MMPROJ, "--image", "200x100", "--format", "json")
    found = json.loads(out)
    assert code == 0 and (found["width"], found["height"], found["n_tokens"], found["n_patches"]) == (140, 84, 18, 60)
    # By hand: 3 layers of 60 x (4 x 128^2 + 3 x 128 x 256) + 2 x 60^2 x 128, patches 60 x 588 x 128,
    # merger 60 x 128^2, projector 15 x 256 x (128 + 256).
    assert found["macs"] == 3 * (60 * 163_840 + 921_600) + 4_515_840 + 983_040 + 1_474_560
    assert found["gflop_per_s"] == pytest.approx(2 * found["macs"] / found["best_seconds"] / 1e9)
    assert found["share_of_float_peak"] == pytest.approx(found["gflop_per_s"] / found["float_peak_gflop_per_s"])
    assert ms4("bench", "-m", MODEL, "--image", "0x9")[0] == 2
    assert "| 28x28 | 4 | 2 |" in ms4("bench", "-m", MODEL, "--image", "1x1")[1]


def test_info_describes_a_tower_and_names_the_one_beside_a_model(ms4):
    code, out, err = ms4("info", MMPROJ)
    assert (code, err) == (0, "") and "3 layers of 128, 4 heads, SiLU" in out and "at most 30 tokens" in out
    assert "hidden size of 256" in out
    found = json.loads(ms4("info", "--json", "--tensors", "--kv", MMPROJ)[1])
    assert found["architecture"] == "clip" and found["shape"]["n_layer"] == 3 and len(found["tensors"]) == 33
    assert f"with {MMPROJ[-160:]}" in ms4("info", MODEL)[1]


# --- chat


@pytest.fixture
def chat(ms4):
    def run(*messages, options=()):
        stdin = "".join(f"{m}\n" for m in messages).encode()
        return ms4("chat", "-m", MODEL, "--greedy", "-n", "4", *options, stdin=stdin)

    return run


def test_an_image_goes_with_the_next_message_and_stays_with_it(chat, run, monkeypatch):
    first_answer = run("-q", "-i", IMAGE, "Total?")[1]
    n_encoded = []
    encode = vision.ms4.Vision.encode
    monkeypatch.setattr(vision.ms4.Vision, "encode", lambda self, *more: n_encoded.append(1) or encode(self, *more))
    code, out, err = chat(f"/image {IMAGE}", "Total?", "/stats", "And?", "/stats", "/effort high", "So?", "/retry")
    assert code == 0 and out.startswith(first_answer)
    assert err.startswith(f"{IMAGE[-80:]} {PRICE}\n") and len(n_encoded) == 1
    first, second = re.findall(r"read (\d+) tok(?: \((\d+) cached\))?", err)
    assert int(second[1]) == int(first[0]) + 3  # of four written tokens, all but the last


def test_files_can_be_named_at_the_start_or_later(chat, run, two_pages):
    want = run("-q", "-f", f"{two_pages}:1", "Hi")[1]
    assert chat("Hi", options=[f"{two_pages}:1"])[:2] == (0, want)
    assert chat(f"/file '{two_pages}':1", "Hi")[:2] == (0, want)
    assert chat(f"/file {two_pages}", "/drop", "/drop", "Hi")[1] == run("Hi")[1]
    code, out, err = chat("/image absent.png", "Hi")
    assert (code, out) == (7, "") and ONE_LINE.fullmatch(err)
    assert chat("/image -")[0] == chat("/image")[0] == chat(options=["-"])[0] == 2


def test_the_clipboard(chat, run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = chat("/paste")
    assert code == 5 and "install wl-clipboard, xclip or pngpaste" in err and ONE_LINE.fullmatch(err)
    program = tmp_path / "xclip"
    program.write_text(f"#!/bin/sh\nexec /bin/cat '{IMAGE}'\n")
    program.chmod(0o755)
    assert chat("/paste", "Total?")[1] == run("-q", "-i", IMAGE, "Total?")[1]
    program.write_text("#!/bin/sh\nexit 1\n")
    assert "no image on the clipboard" in chat("/paste")[2]


def test_under_wsl_windows_gives_the_image(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, line in (
        ("xclip", "exit 1"),  # no display
        ("powershell.exe", f"for last; do :; done; case $last in *GetImage*) /usr/bin/base64 '{IMAGE}';; esac"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    image = attachments.clipboard_image()
    assert (image.name, image.size, image.digest) == ("clipboard", (140, 84), load_image(IMAGE).digest)


def test_at_a_terminal_a_failure_is_told_and_attachments_wait(monkeypatch, tmp_path, capsys):
    with Model.open(MODEL) as model, Scheduler(model.engine) as scheduler:
        images = ImageInput(MODEL)
        tokenizer = loading.usable(model.vocabulary)
        talk = repl.Talk(
            repl.ChatSettings(repl.Sampling(greedy=True), max_tokens=4),
            Dialogue(tokenizer, None, "none", images.measure),
            scheduler,
            scheduler.open(256),
            repl.streams.Output(),
            StatusLine(True),
            images,
            interactive=True,
            memory=remembered.Memory(EngineOptions(MODEL), ImageOptions(), print, off=True),
        )
        talk.command("/image absent.png")
        assert "absent.png: no such file or directory" in capsys.readouterr().err
        talk.command(f"/image {IMAGE}")
        monkeypatch.setattr(talk.images, "rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        talk.send("Hi")
        assert "stopped; the message is taken back" in capsys.readouterr().err
        assert len(talk.attached) == 1 and not talk.dialogue.turns
        monkeypatch.undo()
        talk.send("Hi")
        assert not talk.attached and len(talk.dialogue.turns) == 1
        talk.send("long " * 300)
        assert "tokens" in capsys.readouterr().err and len(talk.dialogue.turns) == 1
        talk.command(IMAGE)  # a file dropped on the terminal
        assert PRICE in capsys.readouterr().err and len(talk.attached) == 1


def test_a_conversation_knows_the_places_of_its_images():
    tokenizer = loading.open_tokenizer(MODEL)
    talk = Dialogue(tokenizer, "Be kind.", "none", ImageInput(MODEL).measure)
    for _ in range(3):
        prompt = talk.ask(attachments.content([load_image(IMAGE)], "Hi"))
        talk.answered([1500])
    places = np.array(prompt.ids)[prompt.rows]
    assert len(prompt.images) == 3 and len(places) == 45 and (places == Control.IMG).all()
    assert prompt.ids.count(Control.IMG) == 45 and (prompt.keys[prompt.rows] < 0).all()


# --- Ctrl-C


def test_ctrl_c_ends_the_reading_of_an_image(tmp_path):
    write_mmproj(tmp_path / "mmproj.gguf", layers=8, width=256, heads=4, out_width=256)
    Pillow.new("RGB", (1540, 1540), "red").save(tmp_path / "large.png")
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", "import sys; from ms4.cli.start import main; sys.exit(main())"]
    command += ["run", "-m", MODEL, "--mmproj", str(tmp_path / "mmproj.gguf"), "--ctx", "1024"]
    command += ["-t", "1", "--image-max-tokens", "900", "-i", str(tmp_path / "large.png"), "Hi"]
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal, env=environment
    )
    seen = b""
    while b"reading image 1 of 1" not in seen:
        seen += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.stdout.read() == b"" and b"870 tokens" in seen
    os.close(master)
    os.close(terminal)


def test_files_are_named_in_a_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "b c.txt", "d.pdf"):
        (tmp_path / name).write_text("x")
    named = attachments.named
    assert named("compare @a.txt, with @'b c.txt' and @\"b c.txt\"; (pages) @d.pdf:1-3.") == [
        "a.txt",
        "b c.txt",
        "d.pdf:1-3",
    ]
    assert named("@~/a.txt @a.txt @./a.txt") == [f"{tmp_path}/a.txt", "a.txt", "./a.txt"]
    for text in ("me@a.txt", "@nobody and @dataclass", "@", "a @ b", "@.", "@/", "@a.txt\0"):
        assert named(text) == []
