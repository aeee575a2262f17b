"""Bare `ms4`: in a script the help, at a terminal a chat or one screen.  Terminals are real ptys that pyte reads."""

import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pexpect
import pyte
import pytest
from bad_hub import Hub

from ms4.cli import first_run, measured
from ms4.models import acquire, cards, repositories, small_4
from ms4.models.acquire import ASSUMED, Here
from ms4.models.clock import SMALL_4

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo" / "ms4-demo.gguf"
GB = 10**9
RATES = {"ram": 20e9, "flops": 0.5e12}
KNOWN = {file.quant: file.bytes for file in repositories.DEFAULT.files}


class Bare:
    """`ms4` without a word, at a terminal of so many columns."""

    def __init__(self, folder, width=80, height=40, rates=RATES, **environment):
        unset = ("NO_COLOR", "MS4_MODEL", "MS4_DEBUG", "HF_HOME", "HF_HUB_OFFLINE")
        env = {k: v for k, v in os.environ.items() if k not in unset}
        env |= {f"XDG_{kind}_HOME": str(folder / kind) for kind in ("CACHE", "STATE", "DATA")}
        env |= {"TERM": "xterm", "HF_HUB_CACHE": str(folder / "hub"), "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        if rates:
            path = folder / "CACHE" / "ms4" / "machine.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({measured.rates_key(small_4.SHAPE, small_4.tensors(), 0): rates}))
        self.screen = pyte.Screen(width, height)
        self.stream = pyte.ByteStream(self.screen)
        code = "import sys; sys.argv = ['ms4']; from ms4.cli.start import main; sys.exit(main())"
        self.process = pexpect.spawn(sys.executable, ["-c", code], env=env, dimensions=(height, width), timeout=60)

    def sees(self, wanted):
        end = time.monotonic() + 60
        while not re.search(wanted, text := "\n".join(row.rstrip() for row in self.screen.display).rstrip(), re.DOTALL):
            assert time.monotonic() < end and "internal error" not in text, text
            try:
                self.stream.feed(self.process.read_nonblocking(65536, 1))
            except (pexpect.TIMEOUT, pexpect.EOF):
                pass
        return text

    def ends(self):
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus


@pytest.fixture
def bare(tmp_path):
    started = []

    def start(**more):
        started.append(Bare(tmp_path, **more))
        return started[-1]

    yield start
    for one in started:
        one.process.close(force=True)


def store(folder, quant):
    """A model in the cache, of that name."""
    snapshot = folder / "hub" / "models--unsloth--Mistral-Small-4-119B-2603-GGUF" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / f"Model-{quant}.gguf").symlink_to(DEMO)


# --- a terminal
def test_the_screen_names_a_file_its_size_and_its_speed_and_one_key_leaves(bare):
    one = bare()
    shown = one.sees(r"tok/s written.*(p, )?d, h or q\?$")
    assert re.search(r"file +[\w-]+, \d+\.\d GB: ", shown) and "predicted, not measured" in shown
    assert "download it" in shown or "not now" in shown
    one.process.send("xq")  # not a key, as a paste
    one.process.send("Q")
    assert one.ends() == 0


@pytest.mark.slow
def test_a_key_counts_before_the_machine_is_measured(bare):
    one = bare(rates=None)
    one.sees(r"\?  \(measuring")
    one.process.send("h")
    one.sees("exit codes:")
    assert one.ends() == 0


@pytest.mark.slow
def test_ctrl_c_leaves_with_130_and_the_terminal_as_it_was(bare):
    import termios

    one = bare()
    one.sees(r"q\?$")
    one.process.send("\x03")
    one.process.expect(pexpect.EOF)
    assert termios.tcgetattr(one.process.child_fd)[3] & termios.ECHO
    one.process.close()
    assert one.process.exitstatus == 130


@pytest.mark.slow
@pytest.mark.parametrize("width", [20, 40, 200])
def test_no_line_is_torn_on_a_terminal_of_any_width(bare, width):
    one = bare(width=width, height=100)
    shown = one.sees(r"\?$")
    words = {word for line in shown.splitlines() for word in line.split()}
    assert {"machine", "file", "demonstration,", "leave"} <= words


@pytest.mark.slow
def test_the_demonstration_talks(bare):
    one = bare()
    one.sees(r"q\?$")
    one.process.send("d")
    one.sees(r"leaves.*> ?$")
    one.process.send("Reverse the word planet.\r")
    one.sees("tenalp")
    one.process.send("\x04")
    assert one.ends() == 0


@pytest.mark.slow
def test_one_key_downloads_and_then_the_model_talks(bare):
    quant = first_run.suited(acquire.memory()[0]).name.rpartition(":")[2]
    with Hub({f"Model-{quant}.gguf": DEMO.read_bytes()}, repo=repositories.DEFAULT.repo) as hub:
        one = bare(HF_ENDPOINT=hub.url)
        if "p, d" not in one.sees(r"q\?$"):
            pytest.skip("no room on this disk for the real one")
        one.process.send("p")
        one.sees(r"leaves.*> ?$")
        one.process.send("\x04")
        assert one.ends() == 0
    assert "leaves" in bare().sees(r"leaves.*> ?$")  # now bare ms4 is a chat


@pytest.mark.slow
def test_of_several_models_one_is_chosen(bare, tmp_path):
    store(tmp_path, "Q4_K_M")
    store(tmp_path, "Q8_0")
    one = bare()
    one.sees(r"1  chat with \S+:Q4_K_M.*2  chat with \S+:Q8_0.*1, 2 or q\?$")
    one.process.send("2")
    one.sees(r"leaves.*> ?$")


@pytest.mark.slow
def test_a_model_of_the_environment_is_taken(bare):
    bare(MS4_MODEL=str(DEMO)).sees(r"leaves.*> ?$")


@pytest.mark.slow
def test_a_model_of_the_configuration_is_taken(bare, tmp_path):
    path = tmp_path / "config" / "ms4" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(f'model = "{DEMO}"\n')
    bare(XDG_CONFIG_HOME=str(tmp_path / "config")).sees(r"leaves.*> ?$")


# --- a script
@pytest.mark.parametrize("terminal", [(), ("stdin",), ("stdout",), ("stdout", "stderr")])
def test_in_a_script_it_is_the_help_and_exit_code_2(ms4, terminal):
    code, out, err = ms4(terminal=terminal)
    assert (code, out) == (2, "") and "usage: ms4 COMMAND" in err


# --- what is chosen
@pytest.mark.parametrize(
    ("memory", "quant", "fits"),
    [(8, "UD-IQ3_XXS", False), (46, "UD-IQ3_XXS", True), (47, "UD-IQ3_S", True), (200, "Q4_K_M", True)],
)
def test_the_largest_that_fits_is_proposed(memory, quant, fits, monkeypatch):
    monkeypatch.setattr(first_run.hf_cache, "repositories", lambda: [])
    choice = first_run.suited(memory * GB)
    assert choice == first_run.Choice(f"{repositories.DEFAULT.repo}:{quant}", KNOWN[quant], 0, fits)


@pytest.mark.parametrize(
    ("memory", "vram", "quant", "fits"),
    [(8, 24, "UD-IQ3_XXS", False), (32, 24, "UD-IQ3_S", True), (64, 24, "Q4_K_M", True), (16, 96, "Q4_K_M", True)],
)
def test_with_a_card_the_largest_that_fits_into_both_is(memory, vram, quant, fits, monkeypatch):
    monkeypatch.setattr(first_run.hf_cache, "repositories", lambda: [])
    choice = first_run.suited(memory * GB, vram << 30)
    assert (choice.name.rpartition(":")[2], choice.fits) == (quant, fits)
    here = Here(ASSUMED, vram << 30, "NVIDIA X")
    made = first_run.planned(choice, memory * GB, here)
    assert made.load == ("memory" if fits else "stream") and made.n_vram > 0
    lines = "\n".join(first_run.described(choice, memory * GB, memory * GB, 500 * GB, here))
    assert "card     NVIDIA X, " in lines and f"on the card all but experts and {100 * made.n_vram // 4608} %" in lines


def test_what_was_begun_goes_on(monkeypatch):
    class Repo:
        repo = repositories.DEFAULT.repo

    begun = first_run.stored.Unfinished(Repo(), "Q8_0", 3 * GB)
    monkeypatch.setattr(first_run.hf_cache, "repositories", lambda: [Repo()])
    monkeypatch.setattr(first_run.stored, "unfinished", lambda repo: [begun])
    choice = first_run.suited(200 * GB)
    assert (choice.name, choice.bytes, choice.n_here) == (f"{Repo.repo}:Q8_0", KNOWN["Q8_0"], 3 * GB)
    assert "3.0 GB of 126.5 GB are here" in "\n".join(first_run.described(choice, 200 * GB, 200 * GB, 500 * GB, Here()))


def test_what_the_disk_has_no_room_for_is_not_offered():
    lines = first_run.described(first_run.Choice("a/b:Q4_K_M", 72 * GB), 128 * GB, 100 * GB, 20 * GB, Here())
    assert "   p  not now: 72.0 GB are to be fetched; HF_HUB_CACHE=DIR names a larger disk" in lines


# --- the model behind the numbers
def test_a_model_of_so_many_bytes_has_the_parts_of_the_real_one():
    made = small_4.model(KNOWN["Q4_K_M"])
    assert made.sizes.expert == pytest.approx(SMALL_4.expert, rel=0.002)  # the published size, and that of our sizes
    assert made.sizes.kv == SMALL_4.kv and made.dense + made.sizes.experts == KNOWN["Q4_K_M"]
    half = small_4.model(KNOWN["Q4_K_M"] // 2)
    assert half.sizes.expert == pytest.approx(made.sizes.expert / 2)


def test_the_tensors_are_those_of_two_layers_of_q4_k_m():
    layers = [t for t in small_4.tensors() if t.layer >= 0]
    n_bytes = sum(t.bytes for t in layers) / 2 * 36
    norms = 36 * 4 * (2 * 4096 + 1024 + 256)
    assert n_bytes == pytest.approx(SMALL_4.experts + SMALL_4.every + norms, rel=1e-6)


def test_the_speed_is_that_of_the_plan(monkeypatch, tmp_path):
    from ms4.models.calibration import Rates

    monkeypatch.setattr(measured, "rates", lambda key: Rates(**RATES))
    choice = first_run.Choice("a/b:Q4_K_M", KNOWN["Q4_K_M"])
    speeds = first_run.Speeds(choice, 100 * GB, Here())
    speeds._thread.join()
    made = first_run.planned(choice, 100 * GB, Here(), Rates(**RATES))
    assert made.load == "memory" and f"about {made.warm.tokens_per_s:.1f} tok/s written" in speeds.text()
    large = first_run.Speeds(replace(choice, bytes=10**14), 4 * GB, Here())
    large._thread.join()
    assert "does not fit" in large.text() and "tok/s" not in large.text()
    card = cards.find("4090")[1]
    faster = first_run.Speeds(choice, 100 * GB, Here(replace(ASSUMED, card=card), card.vram, "NVIDIA GeForce RTX 4090"))
    faster._thread.join()
    warm = first_run.planned(choice, 100 * GB, faster._here, Rates(**RATES)).warm.tokens_per_s
    assert warm > made.warm.tokens_per_s and f"about {warm:.1f} to " in faster.text()
    unknown = first_run.Speeds(choice, 100 * GB, Here(ASSUMED, card.vram, "NVIDIA X"))
    unknown._thread.join()
    assert "the table of cards does not have this one" in unknown.text()
