"""What a device can do at best: bf16 matrix products and copies, to hold other numbers against.

TFLOP/s of square products (2·n³ operations, random data) and GB/s of a copy within the device's
memory (bytes read and written). Medians of `--rounds` timed rounds after one that is not counted.

    python benchmarks/ceilings.py
    python benchmarks/ceilings.py --device cpu --sizes 512 1024 --copy-mib 64
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import device_name, settle
from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.files import write_json


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int, times: int) -> float:
    """Median seconds of one call of `work`, over `rounds` rounds of `times` calls."""
    found = []
    for _ in range(rounds + 1):
        settle(device.type)
        started = time.perf_counter()
        for _ in range(times):
            work()
        settle(device.type)
        found.append((time.perf_counter() - started) / times)
    return statistics.median(found[1:])


def arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    found.add_argument("--device", choices=["cuda", "cpu"], default=default)
    found.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192], help="of products")
    found.add_argument("--copy-mib", type=int, default=4096)
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--output", type=Path, help="the numbers, JSON")
    return found


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    device = torch.device(args.device)
    times = 10 if device.type == "cuda" else 1
    rows = []
    for size in args.sizes:
        left = torch.randn(size, size, device=device).bfloat16()
        right = torch.randn(size, size, device=device).bfloat16()
        seconds = seconds_of(lambda a=left, b=right: a @ b, device, args.rounds, times)  # type: ignore[misc]
        name = f"bf16 product, {size} × {size}"
        rows.append({"what": name, "value": 2 * size**3 / seconds / 1e12, "unit": "TFLOP/s"})
    source = torch.ones(args.copy_mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, args.rounds, times)
    name = f"copy of {args.copy_mib} MiB"
    rows.append({"what": name, "value": 2 * source.numel() / seconds / 1e9, "unit": "GB/s"})

    named = device_name(args.device)
    sys.stdout.write(f"{named}, torch {torch.__version__}\n\n| | |\n|---|---:|\n")
    for row in rows:
        sys.stdout.write(f"| {row['what']} | {row['value']:,.1f} {row['unit']} |\n")
    if args.output is not None:
        facts = {"device": named, "torch": torch.__version__, "rows": rows}
        write_json(args.output, facts)
    return 0


if __name__ == "__main__":
    leave(run_script(main))
