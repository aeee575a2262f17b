"""Measures ms4 and other engines on one file, in alternation, and prints each one's tokens/s and the ratios.

    python tests/alternate.py FILE.gguf --peer 'a=PATH/llama-bench -mmp 0' --peer 'b=PATH/llama-bench -mmp 0 -rtr 1'

Machines drift, so every round runs every engine once, in turn, and what is compared is the best round of each; the
median of the rounds' own ratios stands beside it, as on some machines the memory is twice as fast for a minute.  A peer
is a name and the command line of a llama-bench (llama.cpp or a fork of it); -m, -p, -n, -t, -r and -o json are added.
With --busy N every engine runs a second time in every round, beside N processes that never rest.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from statistics import median

START = "from ms4.cli.start import main; main()"
Rates = dict[str, float]  # "prefill", "decode": tokens per second; of ms4 also the shares of the machine's limits
SHARES = {"decode": "share_of_read_bandwidth", "prefill": "share_of_int8_peak"}


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "active"})
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\nexited with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def run_ms4(a: argparse.Namespace) -> Rates:
    command = [sys.executable, "-c", START, "bench", "-m", a.file, "--format", "json", "-r", str(a.repeat)]
    command += ["--pp", str(a.pp), "--tg", str(a.tg), "--threads", str(a.threads), "--load", a.load]
    if a.depth:
        command += ["--depth", str(a.depth)]
    report = json.loads(run(command))
    rates = {row["phase"]: row["best_tokens_per_s"] for row in report["rows"]}
    return rates | {SHARES[row["phase"]]: row[SHARES[row["phase"]]] for row in report["rows"]}


def run_peer(line: str, a: argparse.Namespace) -> Rates:
    """The tests of a llama-bench: one that only reads, and one that only writes."""
    command = [*shlex.split(line), "-m", a.file, "-p", str(a.pp), "-n", str(a.tg), "-t", str(a.threads)]
    text = run([*command, "-r", str(a.repeat), "-o", "json"])
    rates: Rates = {}
    for test in json.loads(text[text.index("[") :]):
        best = max(test.get("samples_ts") or [test["avg_ts"]])
        rates["decode" if test["n_gen"] else "prefill"] = best
    return rates


@contextlib.contextmanager
def busy(n: int) -> Iterator[None]:
    """So many processes that take a core each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def report(seen: dict[str, dict[str, list[float]]]) -> None:
    """What each phase's best rates are, and ours as a multiple of the peers'."""
    for phase, by_name in seen.items():
        ours = max(by_name["ms4"])
        if phase in SHARES.values():
            low, middle = min(by_name["ms4"]), median(by_name["ms4"])
            print(f"{phase}: median {100 * middle:.0f} %, {100 * low:.0f} to {100 * ours:.0f} %")
            continue
        others = (
            f"| {name} {max(rates):.2f}: {ours / max(rates):.2f}x, median {median_ratio(by_name['ms4'], rates):.2f}x"
            for name, rates in by_name.items()
            if name != "ms4"
        )
        print(f"{phase:8} ms4 {ours:.2f} tok/s", *others)


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND of a llama-bench; repeatable")
    parser.add_argument("--pp", type=int, default=512)
    parser.add_argument("--tg", type=int, default=32)
    parser.add_argument("--depth", type=int, default=0, help="ms4: tokens of context (peers: their -d N or -gp N,TG)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--load", default="copy")
    parser.add_argument("-r", "--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="once more beside N busy processes")
    a = parser.parse_args()
    peers = dict(p.split("=", 1) for p in a.peer)
    seen: dict[int, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for number, name, n_busy in product(range(a.rounds), ("ms4", *peers), sorted({0, a.busy})):
        with busy(n_busy):
            rates = run_ms4(a) if name == "ms4" else run_peer(peers[name], a)
        said = (f"{k} {v:8.2f}" for k, v in rates.items())
        print(f"round {number + 1} {name:8}", *said, f"beside {n_busy} busy" * (n_busy > 0), flush=True)
        for phase, rate in rates.items():
            seen[n_busy][phase][name].append(rate)
    report(seen[0])
    if a.busy:
        print(f"beside {a.busy} busy processes:")
        report(seen[a.busy])
        for name, rates_ in seen[0]["decode"].items():
            share = median_ratio(seen[a.busy]["decode"][name], rates_)
            print(f"{name} decodes at {100 * share:.0f} % of its quiet rate (median round)")


if __name__ == "__main__":
    main()
