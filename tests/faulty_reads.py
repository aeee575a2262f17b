"""Experts that stay on a disk which fails: run with faultinj.so preloaded.  Prints "ok".

python tests/faulty_reads.py MODEL EVERY [VRAM]     every so manieth read fails; with a GPU that has so many bytes
"""

import ctypes
import errno
import sys

import numpy as np

import ms4
from ms4.models.model import Model

SHORT, EMPTY, LATE = -1, -2, -3
ALWAYS = 1 << 30
IDS = np.random.default_rng(7).integers(0, 1400, 12)
CARD = {"device": "cuda", "vram": int(sys.argv[3])} if len(sys.argv) > 3 else {}
fault = ctypes.CDLL(None)


def opened(path):
    """With a card, nothing moves but what a prompt brings for a layer: all that has two rows."""
    model = Model.open(path, load="stream", threads=2, **CARD)
    if CARD:
        model.engine.fix_rates(1.0, 2)
    return model


def answer(path, before=lambda: None, n_bytes=1):
    """A prompt and two tokens more, with room for one expert of each size; what it cost and whether O_DIRECT worked."""
    with opened(path) as model, model.session(32) as session:
        model.engine.fix_slots(n_bytes)
        before()
        got = [*session.feed(IDS, all_logits=True), session.feed([5]), session.feed([6])]
        return np.array(got), model.engine.stats()


def failure(path, kind, nth, times):
    """What is said when reads go wrong; afterwards the same session answers, if the disk does."""
    with opened(path) as model, model.session(32) as session:
        model.engine.fix_slots(1)
        fault.fault_set(kind, nth, times)
        try:
            session.feed(IDS)
        except ms4.EngineError as error:
            said = str(error)
            assert error.status == -2 and session.length == 0, said
        else:
            return None
        finally:
            fault.fault_set(0, 0, 0)
        got = session.feed(IDS, all_logits=True)
        return said, got


def main(path):
    want, stats = answer(path)
    fault.fault_set(0, 0, 0)
    answer(path)
    n_calls = fault.fault_calls()
    assert n_calls > 40 and stats.direct == 1, (n_calls, stats.direct)
    assert (stats.bytes_streamed > 0) == bool(CARD)

    def same(kind, nth, times, n_bytes=1):
        fault.fault_set(kind, nth, times)  # also while the dense parts are read
        got, stats = answer(path, n_bytes=n_bytes)
        fault.fault_set(0, 0, 0)
        assert np.array_equal(got, want), (kind, nth, times)
        return stats

    for n in range(1, n_calls + 1, int(sys.argv[2])):
        same(errno.EIO, n, 1)
        same(errno.EINTR, n, 3)
        same(SHORT, n, 2)
    assert same(SHORT, 1, ALWAYS).direct == 1
    for n_bytes in (1, 100_000, 1 << 40):
        same(LATE, 1, ALWAYS, n_bytes)
    assert same(errno.EINVAL, 1, ALWAYS).direct == 0  # buffered then

    reads = range(1, 30, 3 * int(sys.argv[2]))
    for kind, words in ((errno.EIO, "cannot be read at byte"), (EMPTY, "became shorter")):
        for n in reads:
            said, got = failure(path, kind, n, ALWAYS)
            assert words in said and path in said, said
            assert kind == EMPTY or "layer" in said and "expert" in said and "Input/output error" in said, said
            assert np.array_equal(got, want[: len(IDS)])
    assert failure(path, EMPTY, 1, 0) is None
    print("ok")


if __name__ == "__main__":
    main(sys.argv[1])
