"""How the memory of a card is divided: how long steps are, what they and the kv cache get, and the slots."""

import subprocess

import pytest
from test_stream import compiled

GIB, WANTED, BATCH = 1 << 30, 65 << 30, 2048
SOURCES = ("tests/checkdivide.c", "csrc/cuda/divide.c", "csrc/types.c", "csrc/error.c")


@pytest.fixture(scope="module")
def divide(tmp_path_factory):
    program = compiled(SOURCES, tmp_path_factory.mktemp("divide") / "checkdivide", "-Icsrc", "-pthread")

    def divided(room, experts=WANTED, n_batch=BATCH, may_choose=1):
        """(n_batch, aside, slots), or None if there is no room."""
        command = [program, *map(str, (int(room), int(experts), n_batch, may_choose))]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return None if "no room" in out else tuple(map(int, out.split()))

    return divided


def test_prompts_go_in_longer_steps_where_their_experts_are_copied_and_there_is_room(divide):
    lengths = {gib: divide(gib * GIB)[0] for gib in (3, 8, 12, 19, 21, 29, 44)}
    assert lengths == {3: 1024, 8: BATCH, 12: BATCH, 19: 2 * BATCH, 21: 2 * BATCH, 29: 2 * BATCH, 44: 4 * BATCH}
    assert divide(100 * GIB)[0] == BATCH  # nothing is copied
    assert divide(21 * GIB, experts=8 * GIB)[0] == BATCH
    assert divide(21 * GIB, n_batch=512, may_choose=0)[0] == 512  # somebody has said it
    assert divide(3 * GIB, n_batch=4096, may_choose=0)[0] == 4096


def test_slots_get_what_is_left(divide):
    for gib in (3, 8, 12, 19, 21, 29, 44, 100):
        n_batch, aside, slots = divide(gib * GIB)
        assert slots == gib * GIB - aside and slots > gib * GIB / 2
        step = aside - min(32768 * 36 * (2 * 320 + 12), gib * GIB // 4)
        assert step / n_batch < 420_000 + (100 << 20) / n_batch  # bytes of a row, and of what is there once
        if n_batch > BATCH:
            assert step <= gib * GIB / 10
    assert divide(100 << 20) is None and divide(0) is None
