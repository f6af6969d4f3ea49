"""Check what the README promises of the default study: it learns, on every seed."""

from __future__ import annotations

import sys
from pathlib import Path

from gsm8k_core.files import read_json

RUNS = Path("artifacts/experiments/default/tiny-qwen2")
POINTS = 0.20


def pass_at_1(method: str, seed: int) -> float:
    return float(read_json(RUNS / method / f"seed{seed}" / "metrics/arithmetic.json")["pass_at_1"])


def main() -> int:
    failures = []
    if pass_at_1("base", 0) >= 0.05:
        failures.append(f"base: {pass_at_1('base', 0):.3f} is not under 5 %")
    for seed in (0, 1, 2):
        gain = pass_at_1("grpo", seed) - pass_at_1("sft", seed)
        sys.stdout.write(f"seed {seed}: sampled pass@1 of grpo is {100 * gain:.1f} over sft\n")
        if gain < POINTS:
            failures.append(f"seed {seed}: grpo gains {100 * gain:.1f} points, less than 20")
    sys.stdout.write("".join(f"FAILED {failure}\n" for failure in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
