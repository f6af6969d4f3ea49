"""A small finished study for the tests of the report, made with the project's own scripts.

Problem `k` of 40: base is right on the first 4, sft on the first 16, grpo on the first 36, and
`twin` is right where sft is but for two problems, and on the last five has a wrong answer of its
own. Some completions are hostile.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gsm8k_core.files import write_json, write_jsonl, write_text

NUM_PROBLEMS = 40
SEEDS = (0, 1)
METHODS = ("base", "sft", "grpo", "twin")
PARENTS = {"base": None, "sft": "base", "grpo": "sft", "twin": "sft"}
STUDY: dict[str, Any] = {
    "name": "demo",
    "models": ["m1"],
    "methods": list(METHODS),
    "suites": ["test"],
    "seeds": list(SEEDS),
    "chains": {
        "base": ["base"],
        "sft": ["base", "sft"],
        "grpo": ["base", "sft", "grpo"],
        "twin": ["base", "sft", "twin"],
    },
    "confidence": 0.95,
}

HOSTILE_ID = '</script><img src=x onerror="hacked=1">'
ATTACK = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!--"
HOSTILE = {
    "script": f"{ATTACK}\n#### 7",
    "link": "<a href='javascript:window.hacked=1'>x</a><iframe src='http://example.com'></iframe>",
    "control": "NUL \x00, half a pair \ud83d, override \u202eevil\u202c, line\u2028end\n#### 7",
    "right to left": "الجواب هو سبعة\n#### 7",
    "long": "x" * 500_000 + "<b>bold</b>" + "y" * 500_000 + "\n#### 7",
    "emoji": "😀😀😀 so #### 7",
    "empty": "",
    "blank": "\n" * 40 + "#### 7",
    "unseen": "soft\u00ad mongolian\u180e hangul\u3164 braille\u2800 tag\U000e0041\ufe01\n#### 7",
}
"""Greedy completions of seed 0 of grpo on problems 0, 1, …"""


def is_right(method: str, number: int) -> bool:
    limit = {"base": 4, "sft": 16, "grpo": 36, "twin": 16}[method]
    return (number < limit) != (method == "twin" and number in (3, 30))


def problem_id(number: int) -> str:
    return HOSTILE_ID if number == 0 else f"test-{number}"


def problem_row(number: int) -> dict[str, Any]:
    hostile = ATTACK if number == 1 else ""
    question = f"{hostile}Question {number}: how many {'apples' if number % 2 else 'pears'}?"
    return {"id": problem_id(number), "question": question, "answer": "3 + 4\n#### 7", "gold": "7"}


def completion_rows(method: str, seed: int, num_samples: int, greedy: bool) -> list[dict[str, Any]]:
    hostile = list(HOSTILE.values())
    rows = []
    for number in range(NUM_PROBLEMS):
        for sample in range(-1 if greedy else 0, num_samples):
            right = is_right(method, number) and sample < 2
            wrong = 9 if method == "twin" and number >= 35 else 8
            text = f"{method} thinks of {number}.\n#### {7 if right else wrong}"
            if method == "grpo" and seed == 0 and sample < 0 and number < len(hostile):
                text = hostile[number]
            rows.append(
                {
                    "problem_id": problem_id(number),
                    "decoding": "greedy" if sample < 0 else "sample",
                    "sample_index": max(sample, 0),
                    "gold": "7",
                    "completion": text,
                    "token_ids": [5] * 10,
                    "num_tokens": 10,
                    "finish_reason": "length" if number % 10 == 9 else "stop",
                }
            )
    return rows


def make_study(
    folder: Path,
    script: Callable[[str], ModuleType],
    num_samples: int = 3,
    models: tuple[str, ...] = ("m1",),
    greedy: bool = True,
) -> dict[str, Path]:
    """Write a study below `folder`; returns the paths that report.py takes."""
    study_dir = folder / "experiments"
    for model in models:
        for method in METHODS:
            for seed in [0] if method == "base" else SEEDS:
                run = study_dir / model / method / f"seed{seed}"
                _write_run(run, completion_rows(method, seed, num_samples, greedy), script)
    write_jsonl(folder / "problems.jsonl", map(problem_row, range(NUM_PROBLEMS)))
    write_json(folder / "study.json", {**STUDY, "models": list(models)})
    results = folder / "results"
    arguments = ["--study", str(folder / "study.json"), "--study-dir", str(study_dir)]
    assert script("compare").main([*arguments, "--output-dir", str(results)]) == 0
    write_json(
        folder / "runs" / "1" / "run_manifest.json",
        {"study": "demo", "command": ["snakemake", "--cores", "1"], "state": "succeeded",
         "started": "2026-01-01T00:00:00+00:00", "git": {"commit": "abc123"}},
    )  # fmt: skip
    # Of some other call, whose machine went down: no reason for this study to have no report.
    write_text(folder / "runs" / "2" / "run_manifest.json", "{")
    return {
        "study": folder / "study.json",
        "study_dir": study_dir,
        "comparison": results / "comparison.parquet",
        "problems": folder / "problems.jsonl",
        "runs": folder / "runs",
        "output": results / "report.html",
    }


def _write_run(run: Path, rows: list[dict[str, Any]], script: Callable[[str], ModuleType]) -> None:
    method, seed = run.parent.name, int(run.name.removeprefix("seed"))
    identity = {"model": run.parent.parent.name, "method": method, "seed": seed, "suite": "test"}
    completions, stats = run / "completions" / "test.jsonl", run / "completions" / "test.stats.json"
    completions.parent.mkdir(parents=True)
    # ASCII JSON, as other tools write it: half a surrogate pair has no UTF-8.
    completions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    provenance = {"git": {"commit": "abc123"}, "written": "2026-01-01T00:00:00+00:00"}
    write_json(
        stats,
        identity
        | {"parent": PARENTS[method], "engine": "transformers", "seconds_generating": 2.5}
        | {"provenance": provenance, "settings": {"suite_settings": {"temperature": 1.0}}},
    )
    grade = ["--completions", str(completions), "--stats", str(stats)]
    grade += ["--settings", '{"grading": "strict", "marker": "####"}']
    grade += ["--output", str(run / "metrics" / "test.json")]
    assert script("grade").main([*grade, "--grades", str(run / "grades" / "test.parquet")]) == 0
    if method == "base":
        return
    steps = range(1, 21)
    if method == "sft":
        log = [{"step": step, "loss": 5.0 / step + seed} for step in steps]
    else:
        log = [{"step": step, "reward_mean": step / 20 + 0.1 * seed, "loss": 0.0} for step in steps]
    write_jsonl(run / "train" / "metrics.jsonl", log)
    write_json(run / "settings.json", {"method": method, "seed": seed, "learning_rate": 0.1})
    write_json(
        run / "train" / "summary.json",
        {"seconds_training": 60.0, "num_tokens": 1000, "starting_weights": "w" * 8,
         "data_sha256": "d" * 8},
    )  # fmt: skip


def report_arguments(paths: dict[str, Path]) -> list[str]:
    return [
        "--study", str(paths["study"]), "--study-dir", str(paths["study_dir"]),
        "--comparison", str(paths["comparison"]), "--problems", f"test={paths['problems']}",
        "--runs-dir", str(paths["runs"]), "--output", str(paths["output"]),
    ]  # fmt: skip
