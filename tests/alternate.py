"""Measures ms4 and other engines on one file, in alternation, and prints each one's tokens/s and the ratios.

    python tests/alternate.py FILE.gguf --peer 'a=PATH/llama-bench -mmp 0' --peer 'b=PATH/llama-bench -mmp 0 -rtr 1'

Machines drift, so every round runs every engine once, in turn, and what is compared is the best round of each.  A peer
is a name and the command line of a llama-bench (llama.cpp or a fork of it); -m, -p, -n, -t, -r and -o json are added.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict

START = "from ms4.cli.start import main; main()"
Rates = dict[str, float]  # "prefill", "decode": tokens per second


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
    return {row["phase"]: row["best_tokens_per_s"] for row in report["rows"]}


def run_peer(line: str, a: argparse.Namespace) -> Rates:
    """The tests of a llama-bench: one that only reads, and one that only writes."""
    command = [*shlex.split(line), "-m", a.file, "-p", str(a.pp), "-n", str(a.tg), "-t", str(a.threads)]
    text = run([*command, "-r", str(a.repeat), "-o", "json"])
    rates: Rates = {}
    for test in json.loads(text[text.index("[") :]):
        best = max(test.get("samples_ts") or [test["avg_ts"]])
        rates["decode" if test["n_gen"] else "prefill"] = best
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND of a llama-bench; repeatable")
    parser.add_argument("--pp", type=int, default=512)
    parser.add_argument("--tg", type=int, default=32)
    parser.add_argument("--depth", type=int, default=0, help="ms4: after so many tokens of context (peers: their -d)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--load", default="copy")
    parser.add_argument("-r", "--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    peers = dict(p.split("=", 1) for p in a.peer)
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(a.rounds):
        for name in ("ms4", *peers):
            rates = run_ms4(a) if name == "ms4" else run_peer(peers[name], a)
            print(f"round {number + 1} {name:8}", *(f"{k} {v:8.2f}" for k, v in rates.items()), flush=True)
            for phase, rate in rates.items():
                seen[phase][name].append(rate)
    for phase, by_name in seen.items():
        ours = max(by_name["ms4"])
        print(
            f"{phase:8} ms4 {ours:.2f} tok/s",
            *(f"| {n} {max(v):.2f}: {ours / max(v):.2f}x" for n, v in by_name.items() if n != "ms4"),
        )


if __name__ == "__main__":
    main()
