"""A token on an emulated card: in how few calls of the driver it is computed, and who waits for what the router chose.

Where all experts of a layer lie on the card, nobody does, and layers become one graph.  Whoever watches the router
hears of every layer in its turn; so a watched step goes the other way, and both have to give the same.
"""

import subprocess
import sys

import numpy as np
import pytest
from test_cuda import DEMO, calls_of, driver, emulated, pytestmark  # noqa: F401  (a fixture, and marks)
from test_cuda_moves import EVERYTHING, IDS, NOTHING, answer

import ms4
from ms4.models.model import Model
from ms4.quant.tiny import Tiny, write_tiny

TOKENS = """
import sys
import numpy as np
import ms4
from ms4.models.model import Model
ms4.gpu()
with Model.open(sys.argv[1], device=sys.argv[2], vram=int(sys.argv[3])) as model, model.session(64) as session:
    if len(sys.argv) > 6:
        model.engine.fix_rates(1.0, 4096)
        model.engine.warm(bytes.fromhex(sys.argv[6]))
    session.feed(np.arange(3))
    for i in range(int(sys.argv[4])):
        k = int(sys.argv[5])
        model.engine.step([ms4.Span(session, [20 + 37 * i % 800], n_highest=k, n_among=model.shape.n_vocab)])
    stats = model.engine.stats()
    print(model.shape.n_layer, stats.experts_used - stats.pairs_on_gpu)
ms4.gpu()
"""
WAITS = ("cuStreamQuery", "cuEventQuery", "cuCtxSetCurrent")  # as often as it takes, and what costs nothing
OF_A_STEP = {"cuMemcpyHtoDAsync_v2": 2, "cuEventRecord": 2}  # token and tables


FIVE_LAYERS = Tiny(n_layer=5, d_model=256, d_expert=256)
THREE_OF_THEM = 18 << 20  # bytes of the card that hold all experts of so many, and some of another
LAYERS = [(0,), (2,), (4,), (0, 1), (2, 3), (3, 4), (0, 2, 4), (0, 1, 3)]


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("five") / "t.gguf", FIVE_LAYERS)[0]


def calls_of_a_token(report, path, device, vram, n=3, uses=b"", n_highest=0):
    """Layers; calls of the driver for each of n tokens, by name, waits left out; and pairs that the CPU computed."""
    counts, pairs = [], []
    for n_tokens in (2, 2 + n):
        code = [sys.executable, "-c", TOKENS, str(path), device, *map(str, (vram, n_tokens, n_highest))]
        code += [uses.hex()] if uses else []
        done = subprocess.run(code, capture_output=True, text=True, env=emulated(MS4_EMU_REPORT=str(report)))
        assert done.returncode == 0, done.stderr
        n_layer, n_pairs = map(int, done.stdout.split())
        counts.append({name: calls for name, calls in calls_of(report).items() if name not in WAITS})
        pairs.append(n_pairs)
    each = {name: (calls - counts[0].get(name, 0)) / n for name, calls in counts[1].items()}
    return n_layer, {name: calls for name, calls in each.items() if calls}, (pairs[1] - pairs[0]) / n


@pytest.mark.parametrize("n_layer, n_graphs", [(1, 1), (3, 1), (12, 2), (20, 3)])
def test_a_token_of_a_model_that_fits_takes_a_handful_of_calls(n_layer, n_graphs, tmp_path):
    """Logits, and what the router chose in all layers, come home with the last of a few graphs."""
    path = write_tiny(tmp_path / "t.gguf", Tiny(n_layer=n_layer))[0]
    found, each, pairs = calls_of_a_token(tmp_path / "report", path, "cuda", 0)
    assert each == {"cuGraphLaunch": n_graphs, "cuMemcpyDtoHAsync_v2": 2, **OF_A_STEP} and sum(each.values()) <= 10
    assert found == n_layer and not pairs
    assert "\ncontexts made 1\nleft of memory 0\nleft pinned 0\n" in (tmp_path / "report").read_text()


def test_the_highest_logits_take_no_call_more(five, tmp_path):
    all_of_them, highest = (calls_of_a_token(tmp_path / "r", five, "cuda", 0, n_highest=k)[1] for k in (0, 40))
    assert highest == all_of_them and sum(highest.values()) <= 10


def test_with_safe_every_kernel_is_launched_by_itself(five, tmp_path):
    n_layer, each, _ = calls_of_a_token(tmp_path / "report", five, "cuda:safe", 0)
    assert "cuGraphLaunch" not in each and each["cuLaunchKernel"] + each["cuMemcpyHtoDAsync_v2"] > 20 * n_layer


def test_a_token_whose_experts_lie_in_both_memories_takes_one_call_for_a_layer(tmp_path):
    """A graph from the sum of a layer to the experts of the next, and one behind the last; what the CPU computes takes
    one copy more.  Experts that come and go do not change that: where they lie is a table on the card."""
    n_layer, each, pairs = calls_of_a_token(tmp_path / "report", DEMO / "ms4-demo.gguf", "cuda", 20 << 20, 8)
    assert pairs > 0 and each["cuGraphLaunch"] == n_layer + 1 and "cuLaunchKernel" not in each
    assert "cuGraphInstantiateWithFlags" not in each and "cuGraphExecKernelNodeSetParams_v2" not in each
    assert each["cuMemcpyHtoDAsync_v2"] >= 2 + pairs and each["cuMemcpyDtoHAsync_v2"] == 1


# --- what is heard late


def counted(path, device, watched, uses=b"", **options):
    """Logits; the counts of the policy, and what of ms4_stats follows from the router's choice."""
    with Model.open(path, device=device, **options) as model, model.session(256) as session:
        model.engine.fix_rates(*NOTHING)
        if uses:
            model.engine.warm(uses)
        if watched:
            model.engine.watch(lambda layer, ids: None)
        logits = answer(session, IDS, 6)
        stats = model.engine.stats()
        said = (stats.experts_used, stats.pairs_on_gpu, stats.bytes_on_gpu, stats.bytes_decode)
        return logits, model.engine.uses(), said


@pytest.mark.parametrize("load", ["map", "stream"])
def test_what_is_heard_after_the_step_counts_as_what_was_waited_for(load):
    path = DEMO / "ms4-demo.gguf"
    late, uses, said = counted(path, "cuda", False, load=load)
    for device, watched in (("cuda", True), ("cuda:safe", False)):
        logits, others, theirs = counted(path, device, watched, load=load)
        assert np.array_equal(logits, late) and others == uses and theirs == said
    assert said[0] == said[1] > 0


@pytest.fixture(scope="module")
def there(five):
    """there(layers): counts by which all experts of these layers have earned a slot, and no others."""
    with Model.open(five, device="cuda") as model:
        shape, fingerprint = model.shape, int.from_bytes(model.engine.uses()[24:32], "little")

    def counts(layers):
        every, often = np.arange(shape.n_expert, dtype=np.int32), np.full(shape.n_expert, 50, np.int32)
        with ms4.Policy(shape.n_layer, shape.n_expert) as policy:
            for layer in layers:
                policy.count(layer, every, often, 1)
            return policy.pack(fingerprint)

    return counts


@pytest.mark.parametrize("layers", LAYERS)
def test_a_layer_that_is_there_joins_its_neighbours(layers, five, there, tmp_path):
    """A graph ends where somebody has to hear of the choice, and with the step."""
    n_layer, each, pairs = calls_of_a_token(tmp_path / "report", five, "cuda", THREE_OF_THEM, uses=there(layers))
    assert pairs > 0 and each["cuGraphLaunch"] == n_layer - len(layers) + 1
    assert each["cuMemcpyDtoHAsync_v2"] == 2 and "cuLaunchKernel" not in each


def test_layers_that_come_and_go_change_no_bit(five, there):
    """Some layers on the card, and then others; between two tokens the router is watched, or not, and experts move."""
    with Model.open(five) as cpu, cpu.session(256) as session:
        want = answer(session, IDS, 16)
    for layers in LAYERS:
        with Model.open(five, device="cuda", vram=THREE_OF_THEM) as model, model.session(256) as session:
            model.engine.fix_rates(*NOTHING)
            model.engine.warm(there(layers))
            got = [session.feed(IDS)]
            for i in range(16):
                model.engine.watch((lambda layer, ids: None) if i % 5 == 2 else None)
                if i == 6:
                    model.engine.warm(there(LAYERS[i]))
                if i == 10:
                    model.engine.fix_rates(*EVERYTHING)
                got.append(session.feed([int(np.argmax(got[-1]))]))
            stats = model.engine.stats()
        assert np.array_equal(np.array(got), want), layers
        assert 0 < stats.pairs_on_gpu < stats.experts_used, layers


def test_what_is_heard_late_counts_where_only_some_layers_are_there(five, there):
    for layers in ((4,), (0, 1, 3)):
        options = {"uses": there(layers), "vram": THREE_OF_THEM}
        late, waited = (counted(five, "cuda", watched, **options) for watched in (False, True))
        assert np.array_equal(late[0], waited[0]) and late[1:] == waited[1:], layers
