"""Time and memory of scripts/compare.py on a study of 1,000 runs × 1,319 problems × 8 samples.

Writes synthetic grades, summaries and statistics (about 0.2 GB) to a temporary folder, runs the
real script as a process of its own and prints its seconds and peak resident memory.

    python benchmarks/compare_scale.py
    python benchmarks/compare_scale.py --num-models 1 --max-seconds 20 --max-gib 1
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from gsm8k_core.config import Comparison, dump
from gsm8k_core.files import Json, write_json
from gsm8k_core.grading import GRADES

ROOT = Path(__file__).resolve().parent.parent
METHODS = [
    "base",
    *(f"method{number}" for number in range(1, 34)),
]  # with the base 100 runs a model


def make_study(num_models: int) -> Comparison:
    """Models with the base model run once and 33 methods of three seeds: 100 runs each."""
    return Comparison(
        name="scale",
        models=[f"model{number}" for number in range(num_models)],
        methods=METHODS,
        suites=["gsm8k"],
        seeds=[0, 1, 2],
        chains={m: ["base"] if m == "base" else ["base", m] for m in METHODS},
        confidence=0.95,
    )


def write_run(run: Path, trained: bool, num_problems: int, num_samples: int, seed: int) -> None:
    """What grade.py, generate.py and the trainers leave of one run."""
    random = np.random.default_rng(seed)
    num_rows = num_problems * num_samples
    correct = random.random(num_rows) < 0.5
    columns: Json = {
        "problem_id": np.repeat([f"gsm8k-test-{i:04d}" for i in range(num_problems)], num_samples),
        "cluster": pl.Series([None] * num_rows, dtype=pl.String),
        "decoding": ["sample"] * num_rows,
        "sample_index": np.tile(np.arange(num_samples), num_problems),
        "correct": correct,
        **dict.fromkeys(GRADES, correct),
        "has_format": np.ones(num_rows, dtype=bool),
        "extracted": random.integers(0, 500, num_rows).astype(str),
        "num_tokens": random.integers(50, 300, num_rows),
        "truncated": np.zeros(num_rows, dtype=bool),
    }
    (run / "grades").mkdir(parents=True)
    pl.DataFrame(columns).write_parquet(run / "grades" / "gsm8k.parquet")
    by_k = {str(k): 0.5 for k in (1, 2, 4, 8)}
    provenance = {"code_digest": "0" * 64, "python": "3.11", "packages": {"torch": "2.13.0"}}
    cost = {"device": "NVIDIA H200", "peak_memory_mb": 20_000, "provenance": provenance}
    write_json(
        run / "metrics" / "gsm8k.json",
        {
            "accuracy": None,
            "pass_at_1": float(correct.mean()),
            "num_samples": num_samples,
            "pass_at_k": by_k,
            "maj_at_k": by_k,
            "accuracy_flexible": float(correct.mean()),
            "format_fraction": 1.0,
            "mean_completion_tokens": 175.0,
            "truncated_fraction": 0.0,
            "contradicted_fraction": 0.0,
            "num_prompts_truncated": 0,
            "math_verify_killed": None,
            "seconds_generating": 60.0,
            "grading": "strict",
            "marker": "####",
        },
    )
    write_json(run / "completions" / "gsm8k.stats.json", {**cost, "num_completion_tokens": 10**6})
    if trained:
        write_json(
            run / "train" / "summary.json",
            {**cost, "seconds_training": 3600.0, "num_tokens": 10**7},
        )


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--num-models", type=int, default=10, help="100 runs each (default: 10)")
    arguments.add_argument("--num-problems", type=int, default=1319)
    arguments.add_argument("--num-samples", type=int, default=8)
    arguments.add_argument("--max-seconds", type=float, default=60.0)
    arguments.add_argument("--max-gib", type=float, default=2.0)
    args = arguments.parse_args()

    study = make_study(args.num_models)
    with tempfile.TemporaryDirectory(prefix="compare-scale-") as folder:
        study_dir, results = Path(folder) / "runs", Path(folder) / "results"
        runs = [
            (study_dir / model / method / f"seed{seed}", method)
            for model in study.models
            for method in study.methods
            for seed in study.seeds_of(method)
        ]
        for seed, (run, method) in enumerate(runs):
            write_run(run, method != "base", args.num_problems, args.num_samples, seed)
        command = [sys.executable, str(ROOT / "scripts" / "compare.py"), "--study", dump(study)]
        command += ["--study-dir", str(study_dir), "--output-dir", str(results)]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        num_rows = pl.read_parquet(results / "comparison.parquet").height
    # Linux counts KiB, macOS bytes.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
    passed = seconds <= args.max_seconds and gib <= args.max_gib
    result = {
        "num_runs": len(runs),
        "num_completions": len(runs) * args.num_problems * args.num_samples,
        "num_table_rows": num_rows,
        "seconds": round(seconds, 1),
        "peak_rss_gib": round(gib, 2),
        "passed": passed,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
