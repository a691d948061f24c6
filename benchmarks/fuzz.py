"""Millions of mutants for every parser of packages and of the network, and tampering with a signed package.

    python benchmarks/fuzz.py --mutants 5000000 [--tries 100000] [--seed 0] [--out benchmarks/results/fuzz.json]

Work goes in blocks, each with a random seed of its own, (seed, block), and is written down after each, so that the same
command goes on where it was ended. Asserted: no crash, no error but ours, no mutant over a second. Counted: memory,
resident, after a twentieth of all blocks and at the end. A crash or hang names its block, which `--block` repeats.

Prints one JSON line.
"""

import argparse
import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.remove(str(Path(__file__).resolve().parent))  # its names are those of folders of tests

from package import fuzzing
from ship import fuzzing as network

BLOCK, TRIES = 20_000, 5_000
"""Mutants, and tries of tampering, between two notes."""
HANGS_S, WAITS_S = 120, 1800
"""A block that takes more CPU seconds, or seconds, ends the process with a trace."""
SLOW_S = 1.0
Row = dict[str, Any]


def resident_kib() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def add(row: Row, key: str, counts: Counter[str]) -> None:
    """Sum up counts in JSON."""
    row[key] = dict(Counter(row.get(key, {})) + counts)


def mutants(count: int, seed: int, row: Row, note: Any) -> None:
    """Blocks of mutants that are still missing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a").mkdir()
        (folder / "b").mkdir()
        with network.targets(folder / "b") as more:
            parsers = fuzzing.targets(folder / "a") + more
            row["parsers"] = len(parsers)
            start, blocks = row.get("blocks", 0), -(-count // BLOCK)
            for block in range(start, blocks):
                faulthandler.dump_traceback_later(WAITS_S, exit=True)
                resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + HANGS_S, resource.RLIM_INFINITY))
                print(f"block {block} of {blocks}", file=sys.stderr, flush=True)
                found = fuzzing.fuzz(parsers, BLOCK, [seed, block])
                assert found.slowest_s < SLOW_S, f"a mutant of block {block} took {found.slowest_s:.1f} s"
                if block == start + blocks // 20:
                    row["resident_kib_early"] = resident_kib()
                row |= {"blocks": block + 1, "mutants": (block + 1) * BLOCK, "resident_kib": resident_kib()}
                row["slowest_s"] = round(max(row.get("slowest_s", 0.0), found.slowest_s), 4)
                row["cpu_s"] = round(row.get("cpu_s", 0.0) + found.cpu_s, 1)
                add(row, "by_parser", found.mutants)
                add(row, "refused", found.refused)
                note()
    faulthandler.cancel_dump_traceback_later()
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def tampering(tries: int, seed: int, row: Row, note: Any) -> None:
    """Blocks of tampering that are still missing."""
    for block in range(row.get("tamper_blocks", 0), -(-tries // TRIES)):
        try_it = fuzzing.tamper if block % 2 == 0 else fuzzing.tamper_sealed
        add(row, "tampered", try_it(TRIES, [seed, block]))
        row |= {"tamper_blocks": block + 1, "tries": (block + 1) * TRIES}
        print(f"{row['tries']} tries", file=sys.stderr, flush=True)
        note()


def main() -> None:
    """Go on until all is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--tries", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block", type=int, help="repeat this block only")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGXCPU, chain=True)
    out: Path | None = args.out
    row: Row = {"bench": "fuzz", "seed": args.seed, "cpus": os.cpu_count()}
    if args.block is not None:
        row["blocks"], args.mutants, out = args.block, (args.block + 1) * BLOCK, None
    elif out and out.exists():
        row = json.loads(out.read_text())

    def note() -> None:
        row["date"] = time.strftime("%Y-%m-%d")
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            aside = out.with_suffix(".part")
            aside.write_text(json.dumps(row, indent=1) + "\n")
            aside.replace(out)

    mutants(args.mutants, args.seed, row, note)
    tampering(args.tries, args.seed, row, note)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
