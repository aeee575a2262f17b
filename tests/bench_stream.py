"""Measures experts that stay on the disk against the same file mapped, in alternation, and the disk's limit.

    python tests/bench_stream.py FILE.gguf --ram 8G [--limit 8G] [--pp 512] [--tg 32] [--rounds 3] [--threads 2]

Every round runs both once, each in a process of its own, after the file's pages were dropped from the page cache, and
measures the disk with nothing else: pieces of 4 MB at random, 8 at a time, past the page cache.  --limit puts both into
a memory cgroup of so many bytes (root, cgroup version 1 or 2), so that the mapped file cannot use the whole machine.
The tokens are random.  The limit of decode is the disk's rate over the bytes of experts that were not in memory; of
prefill, the time that the disk needs for what was read.  Not a test: it takes minutes and wants a quiet machine.
"""

import argparse
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

import ms4
from ms4.models.model import Model

PIECE, DEPTH, MEASURED = 4 << 20, 8, 4 << 30
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(text: str) -> int:
    unit = UNITS.get(text[-1:].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


def paths_of(file: str) -> list[str]:
    from ms4.quant.gguf_file import GgufFile

    return list(GgufFile.open(file).paths)


def forget(paths: list[str]) -> None:
    """Drops the pages of the files from the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def disk_rate(paths: list[str]) -> float:
    """Bytes per second of random pieces, DEPTH at a time."""
    path = max(paths, key=os.path.getsize)
    n_pieces = os.path.getsize(path) // PIECE
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    own = threading.local()  # a thread's room: its pages are there before the clock runs

    def room() -> None:
        own.room = mmap.mmap(-1, PIECE)
        own.room.write(bytes(PIECE))

    def read(_: int) -> int:
        return os.preadv(fd, [own.room], random.randrange(n_pieces) * PIECE)

    begun = time.perf_counter()
    with ThreadPoolExecutor(DEPTH, initializer=room) as pool:
        done = sum(pool.map(read, range(MEASURED // PIECE)))
    seconds = time.perf_counter() - begun
    os.close(fd)
    return done / seconds


def status_bytes(name: str) -> int:
    """A line of /proc/self/status, such as VmRSS or VmHWM."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def child(a: argparse.Namespace) -> None:
    """One run of prefill and decode; prints what it was as JSON."""
    rng = np.random.default_rng(a.seed)
    ram = size(a.ram) if a.load == "stream" else 0
    begun = time.perf_counter()
    rows = {}
    with Model.open(a.file, load=a.load, threads=a.threads, ram=ram) as model:
        rows["open"] = {"seconds": time.perf_counter() - begun}
        n_vocab = model.shape.n_vocab
        with model.session(a.pp + a.warm + a.tg) as session:

            def phase(name: str, n: int, work) -> None:
                before, begun = model.engine.stats(), time.perf_counter()
                work()
                seconds, after = time.perf_counter() - begun, model.engine.stats()
                names = ("experts_wanted", "experts_there", "experts_read", "bytes_disk", "ns_disk", "ns_waited")
                rows[name] = {k: getattr(after, k) - getattr(before, k) for k in names}
                rows[name] |= {"tokens_per_s": n / seconds, "seconds": seconds, "rss": status_bytes("VmRSS")}

            phase("prefill", a.pp, lambda: session.feed(rng.integers(0, n_vocab, a.pp)))
            phase("warm", a.warm, lambda: [session.feed([i]) for i in rng.integers(0, n_vocab, a.warm)])
            phase("decode", a.tg, lambda: [session.feed([i]) for i in rng.integers(0, n_vocab, a.tg)])
        layer = next(w for n, w in model.gguf.tensors.items() if "_exps" in n)
        rows["about"] = {
            "peak_rss": status_bytes("VmHWM"),
            "experts": sum(t.bytes for n, t in model.gguf.tensors.items() if "_exps" in n),
            "n_experts": layer.dims[-1] * (model.shape.n_layer - model.shape.n_dense_layer),
            "stats": {k: getattr(model.engine.stats(), k) for k in ("slots", "slot_bytes_most", "ram", "direct")},
        }
    print(json.dumps(rows))


def cgroup(limit: int) -> list[Path]:
    """A new memory cgroup of so many bytes: the files that a process writes its id to, to be in it."""
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    folder = (one if one.is_dir() else two) / f"bench-stream-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / ("memory.limit_in_bytes" if one.is_dir() else "memory.max")).write_text(str(limit))
    return [folder / "cgroup.procs"]


def run(a: argparse.Namespace, load: str, seed: int, groups: list[Path]) -> dict:
    command = [sys.executable, __file__, a.file, "--child", "--load", load, "--seed", str(seed), "--ram", a.ram]
    command += ["--pp", str(a.pp), "--tg", str(a.tg), "--warm", str(a.warm), "--threads", str(a.threads)]

    def join() -> None:
        for group in groups:
            group.write_text(str(os.getpid()))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=join)
    if done.returncode:
        sys.exit(f"{load} exited with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def say(load: str, got: dict, rate: float) -> None:
    one = got["about"]["experts"] / got["about"]["n_experts"]
    for phase in ("prefill", "decode"):
        r = got[phase]
        text = f"{load:<7}{phase:<8}{r['tokens_per_s']:8.2f} tok/s  rss {r['rss'] / 1e9:.2f} GB"
        if r["experts_wanted"]:
            missing = (r["experts_wanted"] - r["experts_there"]) * one
            limit = r["seconds"] * rate / max(missing if phase == "decode" else r["bytes_disk"], 1)
            text += f"  there {100 * r['experts_there'] / r['experts_wanted']:.0f} %"
            text += f"  read {r['bytes_disk'] / 1e9:.2f} GB at {r['bytes_disk'] / max(r['ns_disk'], 1):.2f} GB/s"
            text += f"  waited {r['ns_waited'] / 1e9 / r['seconds'] * 100:.0f} %  of the limit {100 / limit:.0f} %"
        print(text, flush=True)


def parser(description: str, rounds: int, load: str) -> argparse.ArgumentParser:
    """What a benchmark takes that runs itself again as a child, in a process of its own, for each figure."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    numbers = (("--pp", 512), ("--tg", 32), ("--warm", 16), ("--rounds", rounds), ("--threads", 0), ("--seed", 1))
    for name, value in numbers:
        p.add_argument(name, type=int, default=value)
    p.add_argument("--load", default=load, help=argparse.SUPPRESS)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return p


def main() -> None:
    p = parser(__doc__, rounds=3, load="stream")
    p.add_argument("--ram", required=True, help="bytes for the process that streams, such as 8G")
    p.add_argument("--limit", help="bytes of a cgroup that both run in")
    a = p.parse_args()
    if a.child:
        return child(a)
    paths, ratios = paths_of(a.file), {"prefill": [], "decode": []}
    groups = cgroup(size(a.limit)) if a.limit else []
    print(f"ms4 {ms4.__version__}, {os.path.basename(a.file)}, {sum(map(os.path.getsize, paths)) / 1e9:.1f} GB")
    try:
        for seed in range(a.rounds):
            got = {}
            for load in ("stream", "map"):
                forget(paths)
                rate = disk_rate(paths)
                got[load] = run(a, load, seed, groups)
                print(f"disk {rate / 1e9:.2f} GB/s")
                say(load, got[load], rate)
            about = got["stream"]["about"]
            print(f"stream peak rss {about['peak_rss'] / 1e9:.2f} GB of {size(a.ram) / 1e9:.2f}, {about['stats']}")
            for phase, all_ratios in ratios.items():
                all_ratios.append(got["stream"][phase]["tokens_per_s"] / got["map"][phase]["tokens_per_s"])
        for phase, all_ratios in ratios.items():
            print(f"{phase}: stream is {median(all_ratios):.2f} times as fast as map (median of {len(all_ratios)})")
    finally:
        for group in groups:
            os.rmdir(group.parent)


if __name__ == "__main__":
    main()
