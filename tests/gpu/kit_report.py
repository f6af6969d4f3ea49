"""The report of tests/gpu/kit.py: what a machine did, as Markdown and as JSON.

Rates of training are medians over the steps after the first few. Model FLOPs a token are
6·N + 6·L·H·T: N parameters (a tied embedding counts once, as the output layer), L layers of width
H, T tokens of an example on average; the second term is causal attention's, forward and backward.
Utilisation is against the product measured on the same device, not against a data sheet.
"""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

WARM_STEPS = 3
Row = dict[str, Any]


def write_report(folder: Path, output_dir: Path | None) -> None:
    """report.md and report.json in the state folder and, with what they stand on, in another."""
    facts = collect(folder)
    (folder / "report.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(facts), encoding="utf-8")
    if output_dir is None:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.json", "tests.xml"):
        copy(folder / name, output_dir / name)
    copy(folder / "results" / "comparison.csv", output_dir / "comparison.csv")
    copy(folder / "results" / "comparison.md", output_dir / "comparison.md")
    for method, path in training_files(folder).items():
        copy(path, output_dir / f"{method}-metrics.jsonl")


def copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, target)


def training_files(folder: Path) -> dict[str, Path]:
    """metrics.jsonl of every run, of an unfinished one too, by method."""
    found = {}
    for pattern in ("*/*/seed0/state/metrics.jsonl", "*/*/seed0/train/metrics.jsonl"):
        for path in sorted((folder / "experiments").glob(pattern)):
            found[path.parent.parent.parent.name] = path
    return found


def collect(folder: Path) -> Row:
    """All that is known so far."""
    state = json.loads((folder / "kit.json").read_text(encoding="utf-8"))
    benchmarks = {
        path.stem: path.read_text(encoding="utf-8").strip()
        for path in sorted((folder / "benchmarks").glob("*.md"))
    }
    model = state["phases"].get("prepare", {}).get("facts", {}).get("model")
    product = best_product(folder / "ceilings.json")
    training = {
        method: training_rates(path, folder, model, product)
        for method, path in training_files(folder).items()
    }
    comparison = folder / "results" / "comparison.csv"
    rows: list[Row] = []
    if comparison.is_file():
        with comparison.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
    generation = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((folder / "experiments").glob("*/*/seed0/completions/*.stats.json"))
    ]
    kept = ("method", "engine", "num_problems", "num_completion_tokens", "seconds_generating",
            "tokens_per_second", "peak_memory_mb")  # fmt: skip
    return {
        **state,
        "benchmarks": benchmarks,
        "training": {method: rates for method, rates in training.items() if rates},
        "generation": [{key: stats[key] for key in kept} for stats in generation],
        "comparison": rows,
    }


def best_product(ceilings: Path) -> float | None:
    """TFLOP/s of the fastest matrix product measured."""
    if not ceilings.is_file():
        return None
    rows = json.loads(ceilings.read_text(encoding="utf-8"))["rows"]
    return max((row["value"] for row in rows if row["unit"] == "TFLOP/s"), default=None)


def flops_per_token(model: Row, length: float) -> float:
    """Forward and backward, of one token of an example `length` tokens long."""
    return float(
        6 * model["num_parameters"] + 6 * model["num_layers"] * model["hidden_size"] * length
    )


def share_of_flops(row: Row) -> float:
    """Of those of a step, what is computed: groups of equal rewards have no backward pass."""
    return 1.0 - 2.0 / 3.0 * row.get("fraction_equal_reward_groups", 0.0)


def training_rates(metrics: Path, folder: Path, model: Row | None, product: float | None) -> Row:
    """Tokens a second and utilisation of a run's steps; for GRPO of its parts. {} without steps."""
    text = metrics.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if len(rows) < 2 or model is None:
        return {}
    method = metrics.parent.parent.parent.name
    tokens = [b["num_tokens_total"] - a["num_tokens_total"] for a, b in zip(rows, rows[1:])]  # noqa: B905
    pairs = list(zip(rows[1:], tokens, strict=True))
    pairs = pairs[WARM_STEPS:] or pairs
    per_step = examples_per_step(folder, method)
    found: Row = {
        "num_steps": rows[-1]["step"],
        "tokens_per_step": statistics.median(count for _, count in pairs),
        "seconds_a_step": statistics.median(
            row["seconds_updating"] + row.get("seconds_rolling_out", 0.0)
            + row.get("seconds_scoring", 0.0) for row, _ in pairs
        ),
        "tokens_per_second": statistics.median(
            count / max(row["seconds_updating"], 1e-9) for row, count in pairs
        ),
        "peak_memory_mb": max(row["peak_memory_mb"] for row in rows),
        "loss_first_last": [rows[0]["loss"], rows[-1]["loss"]],
    }  # fmt: skip
    length = found["tokens_per_step"] / per_step if per_step else 0.0
    computed = statistics.median(
        share_of_flops(row) * count / max(row["seconds_updating"], 1e-9) for row, count in pairs
    )
    tflops = computed * flops_per_token(model, length) / 1e12
    found |= {"mean_length": length, "model_tflops": tflops}
    if product:
        found["utilisation"] = tflops / product
    if "seconds_rolling_out" in rows[0]:
        found["rollout_tokens_per_second"] = statistics.median(
            row["completion_length_mean"] * per_step / max(row["seconds_rolling_out"], 1e-9)
            for row, _ in pairs
        )
        tenth = max(1, len(rows) // 10)
        found["reward_first_last"] = [
            statistics.mean(row["reward_mean"] for row in part)
            for part in (rows[:tenth], rows[-tenth:])
        ]
        found["share_rolling_out"] = statistics.median(
            row["seconds_rolling_out"] / (row["seconds_rolling_out"] + row["seconds_scoring"]
            + row["seconds_updating"]) for row, _ in pairs
        )  # fmt: skip
    return found


def examples_per_step(folder: Path, method: str) -> int:
    """Examples (or completions) of a step, from the run's settings."""
    for path in (folder / "experiments").glob(f"*/{method}/seed0/settings.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))["method_settings"]
        if settings["kind"] == "grpo":
            return int(settings["prompts_per_step"] * settings["group_size"])
        return int(settings["batch_size"])
    return 0


# ----------------------------------------------------------------------------------------- Markdown


def markdown(facts: Row) -> str:
    machine = facts["phases"].get("install", {}).get("facts", {}).get("machine")
    parts = ["# GPU check", "", *phases_table(facts), *not_done_lines(facts)]
    if machine:
        parts += ["", *machine_lines(machine)]
    parts += ["", "## Study", "", *study_lines(facts)]
    parts += ["", "## Training and sampling, in the study itself", "", *training_table(facts)]
    parts += ["", "## Benchmarks", "", *benchmark_lines(facts)]
    parts += ["", "## Commands", "", *commands_lines(facts)]
    return "\n".join(parts) + "\n"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    aligned = ["|---|" + "---:|" * (len(header) - 1)]
    return [line(header), *aligned, *[line(row) for row in rows]]


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: Any, digits: int = 0, unit: str = "") -> str:
    return "" if value in (None, "") else f"{float(value):,.{digits}f}{unit}"


def percent(value: Any, signed: bool = False) -> str:
    return "" if value in (None, "") else f"{100 * float(value):{'+' if signed else ''}.1f}"


def phases_table(facts: Row) -> list[str]:
    rows = []
    for name, entry in facts["phases"].items():
        what = entry.get("reason", "")
        found = entry.get("facts", {})
        if counts := found.get("counts"):
            wrong = counts["failures"] + counts["errors"]
            passed = counts["tests"] - wrong - counts["skipped"]
            what = f"{passed} passed, {wrong} failed, {counts['skipped']} skipped; {what}"
        what = "; ".join(text for text in (found.get("chosen"), found.get("cut"), what) if text)
        rows.append([name, entry["status"], f"{entry['seconds']:.0f}", what.rstrip("; ")])
    return table(["phase", "outcome", "seconds", ""], rows)


def not_done_lines(facts: Row) -> list[str]:
    """What a reader must not take for done."""
    lines = []
    for status, what in (("failed", "Failed"), ("cut", "Not done in its time, so only in part")):
        names = [name for name, entry in facts["phases"].items() if entry["status"] == status]
        if names:
            lines += ["", f"**{what}: {', '.join(names)}.**"]
    return lines


def machine_lines(machine: Row) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    commit = (machine["git"]["commit"] or "unknown")[:12]
    changed = " with changes" if machine["git"]["dirty"] else ""
    return [
        f"- {gpus}; {machine['processor']}, {machine['logical_cpus']} logical CPUs, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        f"- Python {machine['python']}, CUDA {machine['cuda']}, {packages}",
        f"- commit {commit}{changed}",
    ]


def study_lines(facts: Row) -> list[str]:
    if not facts["comparison"]:
        return ["Nothing evaluated yet."]
    study = facts["phases"]["prepare"]["facts"]["study"]
    rows = []
    for row in facts["comparison"]:
        low, high = percent(row["accuracy_ci_low"]), percent(row["accuracy_ci_high"])
        delta = ""
        if row["delta_vs_parent"]:
            bounds = [percent(row[f"delta_vs_parent_ci_{end}"], True) for end in ("low", "high")]
            delta = f"{percent(row['delta_vs_parent'], True)} [{', '.join(bounds)}]"
        base = ""
        if row["delta_vs_base"]:
            bounds = [percent(row[f"delta_vs_base_ci_{end}"], True) for end in ("low", "high")]
            base = f"{percent(row['delta_vs_base'], True)} [{', '.join(bounds)}]"
        rows.append(
            [
                row["method"],
                row["num_problems"],
                f"{percent(row['accuracy'])} [{low}, {high}]",
                delta,
                number(row["p_value_vs_parent"], 4),
                base,
                percent(row["format_fraction"]),
                percent(row["truncated_fraction"]),
                number(row["mean_completion_tokens"]),
                number(row["train_seconds"]),
            ]
        )
    head = ["method", "problems", "accuracy % (greedy)", "vs parent, points", "p",
            "vs base, points", "format %", "truncated %", "tokens", "training, s"]  # fmt: skip
    return [
        f"{study['model']} on {study['dataset']}, suite {study['suite']}, one seed: intervals "
        "(95 %) and tests are over problems alone.",
        "",
        *table(head, rows),
    ]


def training_table(facts: Row) -> list[str]:
    rows = []
    for method, found in facts["training"].items():
        what = "update of" if "rollout_tokens_per_second" in found else "steps of"
        share = found.get("utilisation")
        rows.append(
            [
                f"{what} {method} ({found['num_steps']} × {found['tokens_per_step']:,.0f} tokens)",
                number(found["tokens_per_second"]),
                number(found["model_tflops"], 2),
                "" if share is None else percent(share),
                number(found["peak_memory_mb"]),
            ]
        )
        if rate := found.get("rollout_tokens_per_second"):
            share = found["share_rolling_out"]
            rows.append([f"rollouts of {method} ({percent(share)} % of a step)", number(rate)])
    for stats in facts["generation"]:
        name = f"greedy answers of {stats['method']} by {stats['engine']}"
        memory = number(stats["peak_memory_mb"])
        rows.append([name, number(stats["tokens_per_second"]), "", "", memory])
    if not rows:
        return ["Nothing trained yet."]
    head = ["", "tokens/s", "model TFLOP/s", "% of measured product", "peak memory, MiB"]
    lines = table(head, [row + [""] * (len(head) - len(row)) for row in rows])
    for method, found in facts["training"].items():
        if rewards := found.get("reward_first_last"):
            first, last = (percent(value) for value in rewards)
            lines += [
                "",
                f"Reward of {method}, first and last tenth of the steps: {first}, {last} %.",
            ]
    return lines


def benchmark_lines(facts: Row) -> list[str]:
    if not any(facts["benchmarks"].values()):
        return ["None run yet."]
    lines: list[str] = []
    for name, text in facts["benchmarks"].items():
        lines += [f"### {name}", "", text or "It said nothing.", ""]
    return lines[:-1]


def commands_lines(facts: Row) -> list[str]:
    calls = [
        f"- {call['started']}: `{call['command']}` ({call.get('seconds', 0):.0f} s)"
        for call in facts["calls"]
    ]
    return [*calls, "", f"{len(facts['commands'])} processes; report.json lists them."]
