"""What is said of a GPU, and what of it is remembered; no card is needed for that."""

from dataclasses import fields, replace

import ms4
from ms4.cli import card
from ms4.facts import Stats

NONE = Stats(
    **{f.name: {"load": "map", "isa": "avx2", "device": "cuda", "note": ""}.get(f.name, 0) for f in fields(Stats)}
)
GPU = ms4.Gpu("a card", "0000:01:00.0", "12.9", "8.6", 82, 24 << 30, 23 << 30)


def test_the_line_holds_everything_that_was_moved_read_and_done_without():
    some = replace(
        NONE,
        vram_bytes=21 * 10**9,
        vram_experts=1290,
        vram_slots=1290,
        experts=4608,
        experts_used=1000,
        pairs_on_gpu=740,
        uploads=81,
        bytes_uploaded=11 * 10**8,
        evictions=79,
        bytes_streamed=3 * 10**9,
        bytes_prefill=4 * 10**9,
        bytes_decode=6 * 10**9,
        bytes_on_gpu=7 * 10**9,
        bytes_fetched=8 * 10**6,
        bytes_disk=5 * 10**8,
        bus_bytes_per_s=24.3e9,
        stream_from=41,
        pinned_bytes=10**9,
    )
    assert card.line(some) == (
        "GPU 21.0 GB, 1290 of 4608 experts with 74 % of their work · 81 brought (1.1 GB), 79 put out · 3.0 GB brought "
        "for one layer · weights read: 7.0 GB by the GPU, 3.0 GB by the CPU, 500.0 MB from the disk · 8.0 MB fetched "
        "from it · bus 24.3 GB/s: prompts bring experts from 41 rows on · 1.0 GB pinned"
    )
    less = replace(some, unpinned_bytes=10**7, slots_given_up=12, uploads_failed=3)
    assert card.line(less) == card.line(some) + (
        " · 10.0 MB refused · 12 places for experts given up for want of memory · 3 experts could not be brought"
    )


def test_where_all_is_on_the_card_nothing_is_said_of_moves():
    assert card.line(replace(NONE, vram_bytes=10**9, vram_experts=8, vram_slots=8, experts=8, pinned_bytes=10**6)) == (
        "GPU 1.0 GB, 8 of 8 experts · 1.0 MB pinned"
    )


def test_what_a_run_saw_of_the_bus_is_there_for_doctor(monkeypatch, tmp_path):
    monkeypatch.setattr("ms4.cli.measured.machine_path", lambda: tmp_path / "machine.json")
    monkeypatch.setattr(ms4, "gpu", lambda: GPU)
    card.keep(NONE)  # nothing was brought
    assert card.remembered(GPU) == ""
    card.keep(replace(NONE, bus_bytes_per_s=24.3e9, stream_from=41))
    assert card.remembered(GPU) == "; the last run brought experts at 24.3 GB/s, and those of prompts from 41 rows on"
    assert card.remembered(replace(GPU, bus="0000:02:00.0")) == ""


def test_a_turn_of_a_chat_has_its_own_counts():
    before = replace(NONE, experts=8, vram_slots=4, vram_experts=4, experts_used=100, pairs_on_gpu=10, uploads=3)
    now = replace(before, experts_used=300, pairs_on_gpu=160, uploads=5, bytes_uploaded=2 * 10**6, evictions=2)
    short, whole = card.of_turn(now, before)
    assert short == "75 % of the experts on the GPU" and " with 75 % of their work · 2 brought (2.0 MB)" in whole
    assert card.of_turn(replace(now, device="cpu"), before) == ("", "")
    assert card.of_turn(replace(now, vram_slots=8), before)[0] == ""
