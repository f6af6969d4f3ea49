"""What a study will cost, before anything runs: jobs, files, bytes, hours.

Seconds come from the records of finished runs of the same model and method below artifacts/ where
there are any, otherwise from arithmetic on tokens and parameters; each row says which. If a model
is not prepared yet, give its size (--parameters).

    python scripts/plan_study.py
    python scripts/plan_study.py --config config.yaml studies/qwen2.5-gsm8k.yaml --gpus 8 \\
        --parameters qwen2.5-0.5b-instruct=494e6
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gsm8k_core.cli import (
    add_config_argument,
    check_known,
    config_files,
    config_from,
    leave,
    parser,
    positive,
    run_script,
    warn_of_toy_settings,
)
from gsm8k_core.errors import ConfigError
from gsm8k_core.planning import (
    ARITHMETIC,
    SECONDS_OF_START,
    SECONDS_PER_JOB,
    Assumptions,
    Records,
    Work,
    disk_use,
    jobs_by_rule,
    num_files,
    unknown_refills,
    work_of,
)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_config_argument(arguments)
    arguments.add_argument(
        "--gpus", type=positive, default=1, help="GPUs that work at once (default: 1)"
    )
    arguments.add_argument(
        "--cpu-jobs", type=positive, default=1, help="jobs without a GPU at once (default: 1)"
    )
    arguments.add_argument(
        "--parameters",
        nargs="+",
        default=[],
        metavar="MODEL=N",
        help="numbers of parameters of models that are not here yet, such as NAME=494e6",
    )
    for item in fields(Assumptions):
        if item.name != "parameters":
            flag = "--" + item.name.replace("_", "-")
            kind = positive if isinstance(item.default, int) else number_for(item.name)
            arguments.add_argument(
                flag,
                type=kind,
                default=item.default,
                metavar="N",
                help=f"{item.metadata['help']} (default: {item.default:g})",
            )
    arguments.add_argument("--dry-run", action="store_true", help="also time `snakemake -n`")
    arguments.add_argument("--json", action="store_true", help="JSON instead of Markdown")
    args = arguments.parse_args(argv)

    config = config_from(args)
    warn_of_toy_settings(config, args)
    given = {item.name: getattr(args, item.name) for item in fields(Assumptions)}
    given["parameters"] = read_parameters(args.parameters, config.models)
    assumptions = Assumptions(**given)
    work = work_of(config, Records.read(), assumptions)
    jobs = jobs_by_rule(config)
    total = sum(jobs.values())
    trained = [item for item in work if item.suite is None]
    plan: dict[str, Any] = {
        "study": config.study.name,
        "models": len(config.study.models),
        "methods": len(config.study.methods),
        "seeds": len(config.study.seeds),
        "training_runs": sum(item.runs for item in trained),
        "training_runs_finished": sum(item.finished for item in trained),
        "evaluations": sum(item.runs for item in work if item.suite is not None),
        "evaluations_finished": sum(item.finished for item in work if item.suite is not None),
        "jobs": {**jobs, "total": total},
        "planning_seconds": {"estimate": round(SECONDS_OF_START + SECONDS_PER_JOB * total, 1)},
        "files": num_files(config),
        "keep_models": config.study.keep_models,
        "bytes": disk_use(config, assumptions, args.gpus, args.cpu_jobs),
        "hours": hours(work),
        "wall_hours": wall_hours(work, args.gpus, args.cpu_jobs),
        "gpus": args.gpus,
        "cpu_jobs": args.cpu_jobs,
        "assumptions": asdict(assumptions),
        "unknown_refills": unknown_refills(config, work),
    }
    if args.dry_run:
        plan["planning_seconds"] |= time_dry_run(config_files(args))
    text = json.dumps(plan, indent=2) if args.json else markdown(plan)
    sys.stdout.write(text + "\n")
    return 0


def number_for(name: str) -> Callable[[str], float]:
    """What reads the assumption `name` for argparse, and refuses a number that makes no sense."""

    def number(text: str) -> float:
        value = float(text)
        if name.endswith("utilisation"):
            fits, bounds = 0.0 < value <= 1.0, "above 0 and at most 1"
        elif "seconds" in name:
            fits, bounds = value >= 0.0, "from 0 on"
        else:
            fits, bounds = value > 0.0, "above 0"
        if not fits or math.isinf(value):
            raise ArgumentTypeError(f"expected a number {bounds}, found {text}")
        return value

    return number


def read_parameters(pairs: list[str], known: Any) -> dict[str, float]:
    """`MODEL=N` as a mapping."""
    sizes = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        check_known("--parameters", name, known)
        try:
            sizes[name] = number_for("parameters")(number)
        except (ValueError, ArgumentTypeError):
            raise ConfigError(
                f"--parameters: expected MODEL=NUMBER, a number above 0, found {pair}"
            ) from None
    return sizes


def hours(work: list[Work]) -> list[dict[str, Any]]:
    """Hours of a job by method: training and evaluating, of all its models, with their sources."""
    groups: dict[tuple[str, str], list[Work]] = defaultdict(list)
    for item in work:
        groups[item.method, "training" if item.suite is None else "evaluation"].append(item)
    rows = []
    for (method, what), items in groups.items():
        row: dict[str, Any] = {"method": method, "work": what}
        row["runs"] = sum(item.runs for item in items)
        row["finished"] = sum(item.finished for item in items)
        row["longest_run_hours"] = _longest(items)
        for name, with_gpu in (("gpu_hours", True), ("cpu_hours", False)):
            of_kind = [item for item in items if (item.gpus > 0) is with_gpu]
            row[name] = _sum_hours(of_kind)
        row["sources"] = sorted({item.source for item in items})
        rows.append(row)
    return rows


def _longest(items: list[Work]) -> float | None:
    """Hours of one run of the slowest model, by the clock; None where the time of any is not known.

    Of expert iteration and DPO it is the sum of jobs, of which each has a time limit of its own.
    """
    seconds = [item.seconds for item in items if item.seconds is not None]
    return max(seconds) / 3600 if len(seconds) == len(items) else None


def _sum_hours(items: list[Work]) -> float | None:
    """GPU-hours (job-hours without a GPU); None where the time of any is not known."""
    if any(item.seconds is None for item in items):
        return None
    return sum((item.seconds or 0) * item.runs * max(item.gpus, 1) for item in items) / 3600


def wall_hours(work: list[Work], gpus: int, cpu_jobs: int) -> float | None:
    """Hours for what is left to do if no GPU is ever idle; parents make it longer."""
    left = 0.0
    for with_gpu, number in ((True, gpus), (False, cpu_jobs)):
        for item in work:
            if (item.gpus > 0) is with_gpu:
                if item.seconds is None:
                    return None
                runs = item.runs - item.finished
                left += item.seconds * runs * max(item.gpus, 1) / number
    return left / 3600


def time_dry_run(files: list[Path]) -> dict[str, Any]:
    """Seconds of `snakemake -n`, and the jobs that it would do now."""
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "--cores", "1"]
    started = time.monotonic()
    result = subprocess.run(
        [*command, "--snakefile", "Snakefile", "--configfile", *map(str, files)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if result.returncode != 0:
        raise ConfigError(f"the dry run failed:\n{result.stdout[-2000:]}")
    found = re.findall(r"^total\s+(\d+)$", result.stdout, re.M)
    return {
        "measured": round(time.monotonic() - started, 1),
        "jobs_left": int(found[0]) if found else 0,
    }


def markdown(plan: dict[str, Any]) -> str:
    """The plan as a page of Markdown."""
    lines = [
        f"# Plan of study `{plan['study']}`",
        "",
        f"Models: {plan['models']}, methods: {plan['methods']}, seeds: {plan['seeds']}; "
        f"training runs: {plan['training_runs']} ({plan['training_runs_finished']} finished), "
        f"evaluations: {plan['evaluations']} ({plan['evaluations_finished']} finished).",
        "",
        "| rule | jobs |",
        "|---|---:|",
        *(f"| {rule} | {count} |" for rule, count in plan["jobs"].items()),
        "",
    ]
    planning = plan["planning_seconds"]
    per_job = f"{1000 * SECONDS_PER_JOB:g} ms per job"
    lines.append(f"Planning takes about {planning['estimate']} s ({per_job})." + (
        f" Measured: {planning['measured']} s; {planning['jobs_left']} jobs are left to do."
        if "measured" in planning else ""
    ))  # fmt: skip
    lines += ["", f"| on disk (`keep_models: {plan['keep_models']}`) | |", "|---|---:|"]
    lines += [f"| {name} | {_size(size)} |" for name, size in plan["bytes"].items()]
    lines += [f"| files | about {plan['files']} |", ""]
    lines += [
        "| method | work | runs | finished | hours of the longest run | GPU-hours | CPU-job hours "
        "| source |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in plan["hours"]:
        lines.append(
            f"| {row['method']} | {row['work']} | {row['runs']} | {row['finished']} "
            f"| {_hours(row['longest_run_hours'])} | {_hours(row['gpu_hours'])} "
            f"| {_hours(row['cpu_hours'])} "
            f"| {'; '.join(row['sources'])} |"
        )
    lines += [
        "",
        f"Hours for what is left: {_hours(plan['wall_hours'])}, with --gpus {plan['gpus']} and "
        f"--cpu-jobs {plan['cpu_jobs']}, if none is ever idle.",
    ]
    if any(ARITHMETIC in row["sources"] for row in plan["hours"]):
        a = plan["assumptions"]
        lines.append(
            f"Arithmetic: {a['gpu_flops']:.3g} FLOP/s of a GPU ({a['cpu_flops']:.3g} without), of "
            f"which training reaches {a['training_utilisation']:.0%} and sampling "
            f"{a['sampling_utilisation']:.0%}, on a GPU at least "
            f"{1e6 * a['sampling_seconds_per_token']:g} µs per token and "
            f"{a['engine_start_seconds']:g} s per start of vLLM; prompts of {a['prompt_tokens']} "
            f"and completions of at most {a['completion_tokens']} tokens. It can be wrong by a "
            "factor of several."
        )
    if plan["unknown_refills"]:
        told = (f"{name} ({most})" for name, most in plan["unknown_refills"].items())
        lines.append(
            "Dynamic sampling may sample more than the arithmetic counts, in each step up to so "
            f"many times as much again: {', '.join(told)}. How much, nobody knows before: it goes "
            "by how many groups have equal rewards."
        )
    return "\n".join(lines)


def _size(size: float | None) -> str:
    if size is None:
        return "unknown (give --parameters)"
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _hours(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    leave(run_script(main))
