"""The rate of a disk: what is read, and what is made of it.  Disk and clock are made up, but for one file."""

import os
import random
import threading

import pytest
from fixtures import bravo

from ms4.models import disk_rate, mistral4
from ms4.models.disk_rate import BLOCK, PIECE, Probe, Reader, Samples
from ms4.quant.gguf_file import GgufFile

MB = 1 << 20
LAYERS = [[((0, 100 + (8 * layer + i) * 3 * MB, 3 * MB - 7),) for i in range(8)] for layer in range(4)]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A file without bytes, on a disk of `rate` bytes per second; `asked`: (offset, bytes) of every read."""
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.truncate(128 * MB)

    class Machine:
        def __init__(self):
            self.now, self.rate, self.asked, self.lock, self.path = 0.0, 1e9, [], threading.Lock(), path

        def read(self, fd, part, at):
            with self.lock:
                self.asked.append((at, len(part)))
                self.now += len(part) / self.rate
            return len(part)

    made = Machine()
    monkeypatch.setattr(disk_rate, "read_piece", made.read)
    monkeypatch.setattr(disk_rate.time, "monotonic", lambda: made.now)
    return made


def test_experts_are_those_of_the_file():
    gguf = GgufFile.open(bravo())
    shape = mistral4.shape_of(gguf)
    layers = disk_rate.experts_of(mistral4.tensors_of(gguf, shape))
    assert len(layers) == shape.n_layer - shape.n_dense_layer and {len(layer) for layer in layers} == {shape.n_expert}
    for i, layer in enumerate(layers, shape.n_dense_layer):
        parts = [t for name, t in gguf.tensors.items() if name.startswith(f"blk.{i}.") and "_exps." in name]
        for n, expert in enumerate(layer):
            wanted = [(t.file, t.offset + n * (t.bytes // shape.n_expert), t.bytes // shape.n_expert) for t in parts]
            assert sorted(expert) == sorted(wanted)


def test_pieces_are_whole_blocks_that_cover_an_expert_and_do_not_overlap_in_memory():
    for offset, n in ((0, PIECE), (100, 3 * PIECE), (PIECE - 1, 2), (5 * BLOCK, BLOCK), (7, 1)):
        pieces, room = disk_rate.placed([((0, offset, n), (1, offset, n))])
        for file in (0, 1):
            mine = [piece[1:] for piece in pieces if piece[0] == file]
            assert mine[0][0] == offset // BLOCK * BLOCK and mine[-1][0] + mine[-1][1] >= offset + n
            assert all(a + size == b for (a, size, _), (b, _, _) in zip(mine, mine[1:], strict=False))
            assert all(a % BLOCK == size % BLOCK == to % BLOCK == 0 and 0 < size <= PIECE for a, size, to in mine)
        ends = [to + size for *_, size, to in pieces]
        assert ends[-1] == room and all(end == to for end, (*_, to) in zip(ends, pieces[1:], strict=False))


def test_experts_are_drawn_by_layer_as_many_as_a_token_uses_and_none_twice():
    drawn = list(disk_rate.drawn(LAYERS, 3, random.Random(1)))
    assert [len(group) for group in drawn] == [3] * 8 + [2] * 4
    for i, group in enumerate(drawn):
        assert set(group) <= set(LAYERS[i % 4])
    everything = [expert for group in drawn for expert in group]
    assert sorted(everything) == sorted(e for layer in LAYERS for e in layer)
    assert drawn != list(disk_rate.drawn(LAYERS, 3, random.Random(2)))


def test_the_rate_is_that_of_the_disk_and_nothing_is_read_twice(machine):
    with Reader([machine.path], LAYERS, 4) as reader:
        assert reader.rate(0.03) == pytest.approx(1e9)
        machine.rate = 0.25e9
        assert reader.rate(0.03) == pytest.approx(0.25e9)
        assert reader.rate(100.0) == pytest.approx(0.25e9)
        assert reader.rate(1.0) == 0  # all of it has been read
    offsets = [at for at, _ in machine.asked]
    assert len(offsets) >= 32 * 3 and max(offsets) > 90 * MB


def test_memory_that_was_never_used_is_taken_once_and_no_more_than_allowed(machine, monkeypatch):
    sizes, plain = [], disk_rate.taken

    def taken(n_bytes):
        sizes.append(n_bytes)
        return plain(n_bytes)

    with Reader([machine.path], LAYERS, 4) as reader:
        monkeypatch.setattr(disk_rate, "taken", taken)
        assert reader.rate(100.0, fresh=40 * MB) == pytest.approx(1e9)
        assert len(sizes) == 3 and sum(sizes) <= 40 * MB
        sizes.clear()
        reader.rate(0.03)
        assert len(sizes) == 1


def test_slices_are_measured_apart_and_small_files_say_nothing(machine, monkeypatch):
    class Tensor:
        role, layer, file, offset, bytes, dims = "ffn_up_exps", 0, 0, 0, 120 * MB, (64, 64, 40)

    monkeypatch.setattr(disk_rate, "SLICE", 0.01)
    probe = Probe([machine.path], [Tensor], 4)
    probe.slices(2)
    machine.rate = 2e9
    probe.slices(2)
    probe.fresh()
    probe.close()
    found = probe.samples
    assert found.slices == pytest.approx((1e9, 1e9, 2e9, 2e9)) and found.fresh == pytest.approx((2e9,))
    Tensor.bytes = disk_rate.SMALLEST // 40 * 40 - 40
    small = Probe([machine.path], [Tensor], 4)
    small.slices(3)
    small.close()
    assert small.samples is None


def test_a_file_without_experts_is_read_in_chunks(tmp_path):
    (tmp_path / "a").write_bytes(bytes(2 * disk_rate.CHUNK + 5))
    chunk = disk_rate.CHUNK
    assert disk_rate.chunks_of([tmp_path / "a"]) == [[((0, 0, chunk),), ((0, chunk, chunk),)]]


def test_a_real_file_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 16) * 24)
    layers = [[((0, 5 + i * 400_000, 390_000),) for i in range(3)]]
    with Reader([path], layers, 2) as reader:
        assert reader.rate(60.0) > 0 and reader.rate(60.0) == 0
    with pytest.raises(OSError):
        Reader([tmp_path / "none"], layers, 2)


def test_what_is_made_of_samples():
    assert Samples().rate is None
    only = Samples(slices=(9.0, 1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 2.0, 2.0, 0.1)).rate
    assert (only.bytes_per_s, only.low, only.high, only.n_runs) == (2.0, 1.0, 3.0, 0)
    one = Samples(slices=(4.0,), runs=(2.0,)).rate
    assert (one.bytes_per_s, one.low, one.high, one.n_runs) == (3.0, 2.0, 4.0, 1)
    many = Samples(
        slices=(40.0,), runs=(1.0, 2.0, 3.0), fresh=(9.0, 0.5, 0.7, 0.6), filled=(1e9, 11e9, 12e9, 11e9)
    ).rate
    assert (many.bytes_per_s, many.low, many.high) == (2.0, 1.0, 3.0)
    assert [many.filling(n) for n in (1e8, 2e9, 11e9, 40e9)] == [9.0, 9.0, 0.6, 0.6]
    assert many.slowest(11e9) == (1.0, 0.5) and many.fastest(11e9) == (3.0, 0.7) and many.fastest(0) == (3.0, 0.0)
    assert Samples(slices=(10.0,) * 12).enough(12, 1 << 40) and not Samples(slices=(10.0,)).enough(12, 1 << 40)
    assert Samples(slices=(200.0,)).enough(12, 100)  # all of the file was read in that
