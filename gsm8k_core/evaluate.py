"""Evaluate a model without a study: prepare problems and weights, generate, grade, record.

    python -m gsm8k_core.cli eval --limit 100
    python -m gsm8k_core.cli eval --model artifacts/experiments/default/tiny-qwen2/grpo/seed0/model
    python -m gsm8k_core.cli eval --model qwen2.5-0.5b-instruct --suite gsm8k --engine vllm

Without --suite, a run's model is asked the problems that its study asks; any other, those of the
first suite. A suite is the one that --config has: `--config config.yaml studies/NAME.yaml` gives a
study's own.

The jobs are those of the workflow, each in a separate process (so a model's memory is free before
the next one begins). They leave the same files, in a folder of this call alone: two evaluations at
once, or one beside snakemake, do not collide.

    artifacts/runs/<UTCSTAMP>_<gitsha>/
        run_manifest.json  sys/  locks/  changes.diff        as for every call
        data/  model/                                        problems; starting weights
        completions/{suite}.jsonl, {suite}.stats.json        metrics/{suite}.json
        grades/{suite}.parquet, {suite}.manifest.json        who graded
        SHA256SUMS                                           python scripts/verify.py --run FOLDER

Problems and weights that the workflow or an earlier evaluation has prepared from the same settings
are linked if their hashes are right; nothing shared is written.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import polars as pl

from gsm8k_core.cli import (
    SNAKEMAKE_VARIABLE,
    add_config_argument,
    add_engine_arguments,
    check_known,
    config_from,
    non_negative,
    positive,
    this_process,
    with_engine_arguments,
)
from gsm8k_core.config import (
    Config,
    EvaluationSettings,
    ModelSettings,
    PromptSettings,
    RunSettings,
    Settings,
    SuiteSettings,
    dump,
    settings_from,
)
from gsm8k_core.errors import ConfigError, Gsm8kError
from gsm8k_core.extras import missing_for
from gsm8k_core.files import Json, link_or_copy, read_json, read_record, sha256_file
from gsm8k_core.layout import ARTIFACTS, RUNS, is_prepared
from gsm8k_core.manifest import INVOCATION_VARIABLE, ROOT, Invocation
from gsm8k_core.metrics import mean_interval
from gsm8k_core.records import hash_folder, job_seconds, split_digests, weights_origin
from gsm8k_core.tables import (
    bounds,
    clusters_of,
    level_text,
    percent,
    problems_text,
    read_grades,
)

log = logging.getLogger(__name__)


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """The flags of `eval`."""
    arguments.add_argument(
        "--model",
        metavar="NAME|FOLDER",
        help="a model of the config, or a folder of weights (default: the study's first)",
    )
    arguments.add_argument(
        "--suite",
        help="a suite of the config (default: the first that asks what a run's study asks of it; "
        "of other models the study's first)",
    )
    arguments.add_argument("--limit", type=positive, metavar="N", help="only the first N problems")
    arguments.add_argument("--prompt", help="prompt of the config; a folder of weights may need it")
    arguments.add_argument(
        "--seed", type=non_negative, help="sampling seed (default: the run's, or 0)"
    )
    add_config_argument(arguments)
    arguments.add_argument(
        "--dtype",
        choices=get_args(ModelSettings.model_fields["dtype"].annotation),
        help="compute type (default: as the model's settings say; of other folders float32)",
    )
    add_engine_arguments(arguments)


@dataclass(frozen=True)
class Subject:
    """What is evaluated: weights, and who they are."""

    name: str
    settings: ModelSettings
    prompt: PromptSettings
    method: str = "base"
    parent: str | None = None
    seed: int = 0
    folder: Path | None = None  # of weights that are there; None: prepared from the settings


def run(args: argparse.Namespace) -> int:
    """Evaluate what the flags of `add_arguments` say; writes the number to stdout.

    Raises ConfigError where the library stands alone: its jobs are the scripts of a clone.
    """
    if not (ROOT / "scripts").is_dir():
        raise ConfigError(f"eval runs scripts/ of a clone, and there are none beside {ROOT}")
    config = config_from(args)
    model = args.model or config.study.models[0]
    suite_name = args.suite or default_suite(model, config)
    check_known("--suite", suite_name, config.suites)
    suite = config.suites[suite_name]
    if args.limit is not None:
        suite = suite.model_copy(update={"limit": min(args.limit, suite.limit or args.limit)})
    # Grading comes last: it would say so when all has been generated.
    if missing := missing_for(config, "grade", suite=suite_name):
        raise ConfigError(missing)
    subject = find_subject(model, args.prompt or suite.prompt, config)
    settings = EvaluationSettings(
        study="eval",
        model=subject.name,
        method=subject.method,
        parent=subject.parent,
        seed=subject.seed if args.seed is None else args.seed,
        suite=suite_name,
        model_settings=with_engine_arguments(subject.settings, args),
        suite_settings=suite.ungraded(),
        prompt=subject.prompt,
    )
    invocation = Invocation(Path(RUNS))
    name = invocation.start(config, evaluation=settings.model_dump(mode="json", by_alias=True))
    folder = Path(RUNS, name)
    log.info("%s", folder)
    try:
        facts = _evaluate(config, subject, settings, suite, folder)
    except KeyboardInterrupt:
        invocation.finish("interrupted")
        raise
    except BaseException:
        invocation.finish("failed")
        raise
    invocation.finish("succeeded", **facts)
    hash_folder(folder)
    sys.stdout.write(_sentence(settings, facts["result"], config.study.confidence))
    sys.stdout.write(f"{folder}\n")
    return 0


def default_suite(model: str, config: Config) -> str:
    """The suite of a call that names none, which a line of the log tells.

    Its dataset is one that the run of `model` has been evaluated on, by what lies beside it: no
    settings of a run name the dataset. Raises ConfigError where no suite of the config has it.
    """
    suites = list(dict.fromkeys([*config.study.suites, *config.suites]))
    asked: list[str] = []
    if model not in config.models:
        stats = sorted((Path(model).resolve().parent / "completions").glob("*.stats.json"))
        found = (read_record(path).get("settings", {}) for path in stats)
        asked = [one["suite_settings"]["dataset"] for one in found if one]
    if not asked:
        log.info("no --suite: taking %s, the first of the config's study", suites[0])
        return suites[0]
    datasets = ", ".join(dict.fromkeys(asked))
    for name in suites:
        if config.suites[name].dataset in asked:
            log.info("no --suite: taking %s; the run's study evaluates it on %s", name, datasets)
            return name
    raise ConfigError(
        f"--model {model}: its study evaluates it on {datasets}, and no suite of the config does: "
        "add the study's file to --config, or name another suite with --suite"
    )


def find_subject(model: str, prompt: str | None, config: Config) -> Subject:
    """The model that `--model` names: of the config, a run's `model/` folder, or any other.

    A run's own settings stand beside its folder and say how it was trained and prompted. Raises
    ConfigError where nothing has that name, or nothing says which prompt to use.
    """
    if prompt is not None:
        check_known("--prompt", prompt, config.prompts)
    chosen = None if prompt is None else config.prompts[prompt]
    if model in config.models:
        settings = config.models[model]
        return Subject(model, settings, chosen or config.prompts[settings.prompt])
    folder = Path(model)
    if not (folder / "config.json").is_file():
        inner = folder / "model"
        if (inner / "config.json").is_file():
            raise ConfigError(f"--model: {model} is a run's folder; did you mean {inner}?")
        raise ConfigError(
            f"--model: no '{model}' in the config and no such folder of weights; "
            f"there are: {', '.join(config.models)}"
        )
    beside = folder.resolve().parent / "settings.json"
    if beside.is_file():
        of_run: RunSettings = settings_from(str(beside), RunSettings)
        return Subject(
            of_run.model,
            of_run.model_settings,
            chosen or of_run.prompt,
            of_run.method,
            of_run.parent,
            of_run.seed,
            folder,
        )
    if prompt is None or chosen is None:
        raise ConfigError(
            f"--model {model}: name its prompt with --prompt NAME; "
            f"there are: {', '.join(config.prompts)}"
        )
    settings = ModelSettings(source="path", path=model, prompt=prompt)
    return Subject(folder.resolve().name, settings, chosen, folder=folder)


def _evaluate(
    config: Config,
    subject: Subject,
    settings: EvaluationSettings,
    suite: SuiteSettings,
    folder: Path,
) -> Json:
    """Run every job; returns what the manifest says at the end."""
    data = _prepare_data(config, suite.dataset, folder)
    model, weights = _prepare_weights(config, subject, folder)
    completions = folder / "completions" / f"{settings.suite}.jsonl"
    stats = folder / "completions" / f"{settings.suite}.stats.json"
    metrics = folder / "metrics" / f"{settings.suite}.json"
    grades = folder / "grades" / f"{settings.suite}.parquet"
    _run_job(
        folder, "generate",
        settings=dump(settings), model=model, data=data / f"{suite.split}.jsonl",
        output=completions, stats=stats,
    )  # fmt: skip
    _run_job(
        folder, "grade",
        settings=dump(suite.graded_by(settings.prompt)), completions=completions, stats=stats,
        output=metrics, grades=grades,
    )  # fmt: skip
    manifest = read_json(data / "manifest.json")
    return {
        "result": summarize(read_grades(grades), config.study.confidence),
        "datasets": {suite.dataset: manifest[suite.split]},
        "models": {subject.name: weights},
        **job_seconds([read_json(stats)]),
    }


def summarize(problems: pl.DataFrame, confidence: float) -> Json:
    """Accuracy (greedy) and pass@1 (over samples) with intervals; null where not decoded so.

    `problems` are what `tables.read_grades` gives.
    """
    clusters = clusters_of(problems)
    result: Json = {
        "num_problems": problems.height,
        "num_clusters": None if clusters is None else clusters.n_unique(),
    }
    of_samples = pl.col("num_correct") / pl.col("num_samples")  # NaN without samples
    for name, grade in (("accuracy", pl.col("greedy")), ("pass_at_1", of_samples)):
        decoded = problems.with_columns(grade=grade).filter(pl.col("grade").is_finite())
        result[name] = None
        if decoded.height:
            values = decoded["grade"].to_numpy()[None, :]
            found = mean_interval(values, confidence, clusters_of(decoded))
            result[name] = {"mean": found.mean, "low": found.low, "high": found.high}
    return result


def _sentence(settings: EvaluationSettings, result: Json, confidence: float) -> str:
    who = settings.model if settings.method == "base" else f"{settings.model} {settings.method}"
    parts = [
        f"{label} {percent(part['mean'])} % {bounds(part['low'], part['high'])}"
        for name, label in (("accuracy", "accuracy"), ("pass_at_1", "pass@1"))
        if (part := result[name]) is not None
    ]
    asked = problems_text(result["num_problems"], result["num_clusters"])
    of = "over them" + ", of this one run" * (settings.method != "base")
    return (
        f"{who} on {settings.suite}: {', '.join(parts)} "
        f"({asked}, {level_text(confidence)} interval {of})\n"
    )


# ------------------------------------------------------------------------------- data and weights


def _prepare_data(config: Config, dataset: str, folder: Path) -> Path:
    settings = config.datasets[dataset]
    target = folder / "data"
    shared = Path(ARTIFACTS) / dataset
    manifest = _manifest_of(shared, settings)
    files = {f"{split}.jsonl": part["sha256"] for split, part in split_digests(manifest).items()}
    if not _link(shared, files, target):
        _run_job(
            folder, "prepare_data", dataset=dataset, settings=dump(settings), output_dir=target
        )
    return target


def _prepare_weights(config: Config, subject: Subject, folder: Path) -> tuple[Path, Json]:
    """The folder of the weights, and where they came from, with their hashes."""
    if subject.folder is not None:
        files = sorted(path for path in subject.folder.iterdir() if path.is_file())
        hashes = {path.name: sha256_file(path) for path in files if path.name[0] != "."}
        return subject.folder, {"from": f"folder {subject.folder.name}", "files": hashes}
    target = folder / "model"
    origin = config.models[subject.name].starting_weights()
    if not any(_link_weights(place, origin, target) for place in _prepared_weights(subject)):
        _run_job(
            folder, "prepare_model",
            model_name=subject.name, settings=dump(origin), output_dir=target,
        )  # fmt: skip
    return target, weights_origin(read_json(target / "manifest.json"))


def _prepared_weights(subject: Subject) -> list[Path]:
    """Where weights of these settings may lie; a folder on the disk may have changed since."""
    if subject.settings.source == "path":
        return []
    return [
        Path(ARTIFACTS) / "models" / subject.name,
        *sorted(Path(RUNS).glob("*/model"), reverse=True),
    ]


def _link_weights(place: Path, wanted: Settings, target: Path) -> bool:
    return _link(place, _manifest_of(place, wanted).get("files", {}), target)


def _manifest_of(place: Path, settings: Settings) -> Json:
    """The manifest of what was prepared in `place`; {} unless it was from these settings."""
    return read_record(place / "manifest.json") if is_prepared(place, settings) else {}


def _link(place: Path, files: dict[str, str], target: Path) -> bool:
    """Link `files` (name → SHA-256) and their manifest into `target`, if all are as they should be.

    What is linked stays whatever happens to `place`; it is linked first, and then hashed.
    """
    if not files:
        return False
    target.mkdir(parents=True)
    try:
        for name in [*files, "manifest.json"]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(place / name, target / name)
        if all(sha256_file(target / name) == digest for name, digest in files.items()):
            return True
    except OSError as error:  # taken away meanwhile
        log.info("%s: %s", place, error)
    shutil.rmtree(target)
    return False


def _run_job(folder: Path, script: str, **options: Any) -> None:
    """Run scripts/{script}.py as the workflow does. Raises Gsm8kError where it fails.

    What it says goes to the terminal.
    """
    words = []
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words],
        env={
            **os.environ,
            INVOCATION_VARIABLE: folder.name,
            SNAKEMAKE_VARIABLE: this_process(),
            "PYTHONPATH": os.pathsep.join(search),
        },
        check=False,
    )
    if result.returncode != 0:
        raise Gsm8kError(
            f"{script} failed with exit code {result.returncode}, see above; {folder} holds what "
            "was written so far"
        )
