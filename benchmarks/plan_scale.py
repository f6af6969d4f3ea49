"""How long Snakemake takes to plan a large study: `snakemake -n`, nothing is run.

    python benchmarks/plan_scale.py                                       # 20 × 20 × 10
    python benchmarks/plan_scale.py --models 4 --methods 10 --seeds 10

The study is made up: every model is the embedded one under another name, methods are copies of
those that config.yaml has (an SFT parent, GRPO, expert iteration in three rounds, DPO) in turn.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("Snakefile", "config.yaml", "rules", "scripts", "gsm8k_core", "profiles")
COPIED = ("grpo", "dr_grpo", "rft", "dpo", "dapo", "gspo", "expert_iteration", "cispo", "rloo")


def large_study(num_models: int, num_methods: int, num_seeds: int) -> dict[str, Any]:
    """An overlay of config.yaml with that many models, trained methods and seeds."""
    registry = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    models = {f"model{number}": registry["models"]["tiny-qwen2"] for number in range(num_models)}
    methods = {
        f"method{number}": registry["methods"][COPIED[number % len(COPIED)]]
        for number in range(num_methods - 1)
    }
    return {
        "study": {
            "name": "large",
            "models": list(models),
            "methods": ["sft", *methods],
            "seeds": list(range(num_seeds)),
        },
        "models": models,
        "methods": methods,
    }


def make_workspace(folder: Path, overlay: dict[str, Any]) -> None:
    """A folder where the repository's workflow plans `overlay`, and nothing has been run."""
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "large.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")


def plan(
    folder: Path, *options: str, seconds_at_most: float | None = None
) -> tuple[float, dict[str, int]]:
    """Seconds of a dry run in `folder`, and its jobs by rule."""
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "--cores", "2"]
    started = time.monotonic()
    result = subprocess.run(
        [*command, *options, "--configfile", "large.yaml"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=seconds_at_most,
    )  # fmt: skip
    seconds = time.monotonic() - started
    if result.returncode != 0:
        raise SystemExit(result.stdout)
    table = result.stdout.partition("Job stats:")[2]
    return seconds, {name: int(n) for name, n in re.findall(r"^(\w+)\s+(\d+)$", table, re.M)}


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--models", type=int, default=20)
    arguments.add_argument("--methods", type=int, default=20, help="that train")
    arguments.add_argument("--seeds", type=int, default=10)
    arguments.add_argument("--repeat", type=int, default=1)
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_workspace(Path(folder), large_study(args.models, args.methods, args.seeds))
        for _ in range(args.repeat):
            seconds, jobs = plan(Path(folder))
            runs = args.models * args.methods * args.seeds
            print(f"{runs} training runs, {jobs['total']} jobs: {seconds:.1f} s")
    print(", ".join(f"{name} {count}" for name, count in jobs.items()))


if __name__ == "__main__":
    main()
