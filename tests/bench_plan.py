"""Puts what `ms4 plan` says beside what a run does, for a file and a list of budgets: one line of CSV a phase.

    python tests/bench_plan.py FILE.gguf --ram 8G,12G,18G [--tg 32] [--rounds 1] [--recalibrate] [--limit 4G]

For each budget: the pages of the file are dropped from the page cache, `ms4 plan` is asked, and a process of its own
opens the file as the plan says and measures.  --ram free: what is free, as without --ram.  --limit puts plan and run
into a memory cgroup of so many bytes (root, cgroup version 1 or 2).  Phases: `prefill cold`, the first prompt, when no
expert is in memory yet (where all lie in memory from the start there is no such phase); `decode`; `prefill`, the
prompt of a second session.  The tokens are random, so choices are uniform: `warm` of the plan is what is compared.

ratio: measured / predicted.  known: the ratio that is left when the model of time is given the rate that the disk had
in that very phase, and the share of experts that was found: what is wrong with the model, and not with the disk.  The
files under XDG_CACHE_HOME and XDG_STATE_HOME are the user's: a plan knows what earlier calls have measured, and with
--learn what the runs before it got, as it does of every `ms4 run`.
Not a test: it takes minutes and wants a quiet machine.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bench_stream
import numpy as np
from bench_stream import forget, paths_of, size, status_bytes

from ms4.cli import measured as kept
from ms4.cli.measured import DiskUse
from ms4.models import forecast
from ms4.models.clock import Machine
from ms4.models.model import Model
from ms4.quant.gguf_file import GgufFile

COLUMNS = (
    "file", "ram", "load", "phase", "predicted", "low", "high", "measured", "ratio", "known", "found_plan", "found_run",
    "disk_plan", "disk_run", "waited", "rss",
)  # fmt: skip
COUNTS = ("experts_wanted", "experts_there", "experts_read", "bytes_disk", "ns_disk", "ns_waited")


def joined(groups: list[Path]):
    """What a child does before it begins: it enters these cgroups."""

    def join() -> None:
        for group in groups:
            group.write_text(str(os.getpid()))

    return join


def called(command: list[str], groups: list[Path]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=joined(groups))
    if done.returncode:
        sys.exit(f"{command[1:3]} exited with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def planned(a: argparse.Namespace, ram: str, groups: list[Path]) -> dict:
    command = [str(Path(sys.executable).with_name("ms4")), "plan", a.file, "--json", "--ctx", str(n_ctx(a))]
    command += ["--recalibrate"] if a.recalibrate else []
    command += [] if ram == "free" else ["--ram", ram]
    command += ["--threads", str(a.threads)] if a.threads else []
    return called(command, groups)


def n_ctx(a: argparse.Namespace) -> int:
    return max(512, a.pp + a.warm + a.tg)


# --- the run
def child(a: argparse.Namespace) -> None:
    """Measures the phases; prints what they were as JSON."""
    rng, rows = np.random.default_rng(a.seed), {}
    ram = 0 if a.ram == "free" or a.load != "stream" else size(a.ram)
    with Model.open(a.file, load=a.load, threads=a.threads, ram=ram) as model:

        def ids(n: int) -> np.ndarray:
            return rng.integers(0, model.shape.n_vocab, n)

        def phase(name: str, n: int, work) -> None:
            before, begun = model.engine.stats(), time.perf_counter()
            work()
            seconds, after = time.perf_counter() - begun, model.engine.stats()
            rows[name] = {k: getattr(after, k) - getattr(before, k) for k in COUNTS}
            rows[name] |= {"tokens_per_s": n / seconds, "seconds": seconds, "rss": status_bytes("VmRSS")}
            rows[name]["slot_bytes"] = after.slot_bytes

        with model.session(n_ctx(a)) as session:
            phase("prefill cold", a.pp, lambda: session.feed(ids(a.pp)))
            phase("warm", a.warm, lambda: [session.feed([i]) for i in ids(a.warm)])
            phase("decode", a.tg, lambda: [session.feed([i]) for i in ids(a.tg)])
            session.rewind(0)
            phase("prefill", a.pp, lambda: session.feed(ids(a.pp)))
        rows["load"] = model.engine.stats().load
    print(json.dumps(rows))


def measured(a: argparse.Namespace, ram: str, load: str, seed: int, groups: list[Path]) -> dict:
    command = [sys.executable, __file__, a.file, "--child", "--load", load, "--seed", str(seed), "--ram", ram]
    command += ["--pp", str(a.pp), "--tg", str(a.tg), "--warm", str(a.warm), "--threads", str(a.threads)]
    return called(command, groups)


# --- side by side
def known(a: argparse.Namespace, about: forecast.Model, plan: dict, phase: str, got: dict) -> float:
    """Tokens per second by the model of time, given the disk's rate of this phase and the share that was found."""
    there = plan["machine"]
    disk = got["bytes_disk"] / (1e-9 * got["ns_disk"]) if got["ns_disk"] else there["disk_bytes_per_s"]
    machine = Machine(None, there["memory_bytes_per_s"], there["cpu_flops"], disk)
    share = found(got)
    written, read = forecast.of_run(about, machine, a.pp, a.pp + a.warm + a.tg // 2, in_prompt=share, found=share)
    return written if phase == "decode" else read


def found(got: dict) -> float:
    return got["experts_there"] / got["experts_wanted"] if got["experts_wanted"] else 1.0


def rows_of(a: argparse.Namespace, ram: str, about: forecast.Model, plan: dict, got: dict) -> list[dict]:
    said = {
        "prefill cold": (plan["prefill"]["cold"], 0.0),
        "decode": (plan["decode"]["warm"], plan["decode"]["warm"]["share_found"]),
        "prefill": (plan["prefill"]["warm"], plan["experts"]["in_ram"] / max(plan["experts"]["all"], 1)),
    }
    if plan["load"] != "stream":
        del said["prefill cold"]
    made = []
    for phase, (row, share) in said.items():
        r, predicted = got[phase], row["tokens_per_s"]
        low, high = row.get("range", (predicted, predicted))
        made.append({
            "file": os.path.basename(a.file), "ram": ram, "load": got["load"], "phase": phase, "predicted": predicted,
            "low": low, "high": high, "measured": r["tokens_per_s"], "ratio": r["tokens_per_s"] / predicted,
            "known": r["tokens_per_s"] / known(a, about, plan, phase, r), "found_plan": share, "found_run": found(r),
            "disk_plan": plan["machine"]["disk_bytes_per_s"] / 1e9, "disk_run": r["bytes_disk"] / max(r["ns_disk"], 1),
            "waited": 1e-9 * r["ns_waited"] / r["seconds"], "rss": r["rss"] / 1e9,
        })  # fmt: skip
    return made


def learn(a: argparse.Namespace, plan: dict, got: dict, rows: list[dict]) -> None:
    """What `ms4 run` keeps of itself: the disk's rate, and what the model of time was wrong by, given that."""
    if got["load"] == "stream":
        wrote, came = (DiskUse(got[name]["bytes_disk"], got[name]["ns_disk"]) for name in ("decode", "prefill cold"))
        came = replace(came, fresh=min(got["prefill cold"]["slot_bytes"], came.bytes))
        kept.learn_disk(kept.disk_key(a.file), wrote, came)
    key = kept.run_key(a.file, plan["load"])
    ratios = {row["phase"]: row["known"] for row in rows}
    kept.learn(key, "decode", ratios["decode"])
    kept.learn(key, "prefill", ratios.get("prefill cold", ratios["prefill"]))


def main() -> None:
    p = bench_stream.parser(__doc__, rounds=1, load="auto")
    p.add_argument("--ram", default="free", help="budgets, such as 8G,12G,18G,free")
    p.add_argument("--limit", help="bytes of a cgroup that plan and run are in")
    p.add_argument("--recalibrate", action="store_true", help="measure the machine again before every plan")
    p.add_argument("--learn", action="store_true", help="keep what each run says for the next plan")
    a = p.parse_args()
    if a.child:
        return child(a)
    if a.pp != forecast.N_PROMPT:
        p.error(f"--pp {a.pp}: plans are about prompts of {forecast.N_PROMPT} tokens")
    about = forecast.Model.of(GgufFile.open(a.file))
    groups = bench_stream.cgroup(size(a.limit)) if a.limit else []
    out = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    out.writeheader()
    try:
        for seed in range(a.seed, a.seed + a.rounds):
            for ram in a.ram.split(","):
                forget(paths_of(a.file))
                plan = planned(a, ram, groups)
                forget(paths_of(a.file))
                got = measured(a, ram, "stream" if plan["load"] == "stream" else "auto", seed, groups)
                rows = rows_of(a, ram, about, plan, got)
                if a.learn:
                    learn(a, plan, got, rows)
                for row in rows:
                    out.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
                sys.stdout.flush()
    finally:
        for group in groups:
            os.rmdir(group.parent)


if __name__ == "__main__":
    main()
