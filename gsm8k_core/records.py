"""What a finished study leaves so that a stranger can rebuild and recheck it.

    results/{study}/provenance.json   each row of the comparison → the files it was computed from
                                      → the run manifests of the calls that made those
    results/{study}/SHA256SUMS        every file of the study, by `sha256sum`; from the folder that
                                      holds artifacts/, `sha256sum -c` checks it as well

The files of a study are its experiments, its results, the run manifests of its calls, and the
datasets, traces and starting weights that it came from, with the logs and benchmarks of all of it.

Not among them, by their nature: `state/` (checkpoints of an unfinished run), `*.partial`
(completions of an unfinished job), hidden files (Snakemake's empty time stamps, locks, what a kill
has left) and what lies outside artifacts/, as Snakemake's own log in `.snakemake/log` does, which
ends after the record. `wandb/` is hashed, but files that are new in it are no difference: `wandb
sync` adds some. A damaged SHA256SUMS shows as the differences that it makes, or as an error that
names the row.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gsm8k_core.config import (
    RESERVED_DATASET_NAMES,
    EvaluationSettings,
    ExpertIterationMethod,
    GradingSettings,
    RunSettings,
    Settings,
    checked,
)
from gsm8k_core.differences import leaf_changes
from gsm8k_core.errors import DataError
from gsm8k_core.files import (
    FINISHED,
    Json,
    atomic_path,
    read_json,
    read_record,
    sha256_file,
    write_json,
    write_text,
)
from gsm8k_core.layout import ARTIFACTS, RUNS, Layout
from gsm8k_core.progress import progress

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
UNRECORDED = ".unrecorded"
SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
LEFT_OUT_FOLDERS = {"state", FINISHED}
WANDB_FOLDER = "wandb"
# Of artifacts/: they hold a log of each dataset and each model that was prepared.
LOG_FOLDERS = ("logs", "benchmarks")
ROUND_FOLDER = re.compile(r"round\d+")
ORIGIN_KEYS = ("from", "revision", "commit", "gguf_file", "gguf_sha256", "files")


# ------------------------------------------------------------------------------------- provenance


def study_provenance(layout: Layout) -> Json:
    """Each row of the comparison with the files that it was computed from; only what is there.

    `made_by` lists the run manifests of the calls that generated, graded and trained a run, its
    parents included, and of those that prepared its data, traces and starting weights; earlier
    calls of a job that was killed are there too. A stage that was run by hand has none. `grading`
    is the record of the grading call itself, `tables` those of compare, plot and report.
    """
    config = layout.config
    rows = []
    for model in config.study.models:
        for method in config.study.methods:
            for suite in config.study.suites:
                runs = [
                    _run_sources(layout, model, method, seed, suite)
                    for seed in config.seeds_of(method)
                ]
                found = [run for run in runs if "metrics" in run]
                if found:
                    rows.append({"model": model, "method": method, "suite": suite, "runs": found})
    tables = [str(path) for path in sorted(Path(layout.results, "manifests").glob("*.json"))]
    return {
        "study": config.study.name,
        "rows": rows,
        "tables": {"records": tables, "made_by": _made_by(tables)},
        "dropped_weights": dropped_weights(layout),
    }


def dropped_weights(layout: Layout) -> list[str]:
    """Folders of trained weights that are gone because the study does not keep them."""
    keep = layout.config.study.keep_models
    folders = [
        summary.parents[1] / "model"
        for summary in sorted(Path(layout.experiments).rglob("train/summary.json"))
    ]
    return [
        str(folder)
        for folder in folders
        if not folder.exists()
        and (keep == "none" or (keep == "final" and ROUND_FOLDER.fullmatch(folder.parent.name)))
    ]


def _run_sources(layout: Layout, model: str, method: str, seed: int, suite: str) -> Json:
    config = layout.config
    run = layout.run(model, method, seed)
    suite_settings = config.suites[suite]
    files = {
        "metrics": f"{run}/metrics/{suite}.json",
        "grades": f"{run}/grades/{suite}.parquet",
        "grading": f"{run}/grades/{suite}.manifest.json",
        "completions": f"{run}/completions/{suite}.jsonl",
        "stats": f"{run}/completions/{suite}.stats.json",
        "problems": f"{layout.data(suite_settings.dataset)}/manifest.json",
        "starting_weights": f"{layout.starting_weights(model)}/manifest.json",
    }
    summaries, of_rounds, training_data = [], [], []
    for stage in config.method_chain(method):
        if config.methods[stage].trains:
            folder = Path(layout.run(model, stage, seed))
            summaries.append(f"{folder}/train/summary.json")
            # Expert iteration and DPO sample and train in rounds, maybe each in a call of its own.
            for name in ("train/summary.json", "completions.stats.json"):
                of_rounds += [str(path) for path in sorted(folder.glob(f"round*/{name}"))]
            training_data += _data_records(layout, stage)
    training_data = list(dict.fromkeys(training_data))
    return {
        "seed": seed,
        **{name: path for name, path in files.items() if Path(path).exists()},
        "summaries": [path for path in summaries if Path(path).exists()],
        "training_data": [path for path in training_data if Path(path).exists()],
        "made_by": _made_by(
            [
                files["stats"],
                files["grading"],
                *reversed(summaries),
                *reversed(of_rounds),
                *training_data,
                files["problems"],
                files["starting_weights"],
            ]
        ),
    }


def _data_records(layout: Layout, stage: str) -> list[str]:
    """The manifests of what a method learns from; of traces, how they were collected as well."""
    config = layout.config
    dataset = config.dataset_of(stage)
    records = [f"{layout.data(dataset)}/manifest.json"]
    if dataset in config.traces:
        records += [
            f"{layout.data(dataset)}/collected.json",
            f"{layout.data(config.traces[dataset].dataset)}/manifest.json",
        ]
    return records


def _made_by(records: Iterable[str]) -> list[str]:
    """The run manifests of the calls that wrote these records, each once."""
    names = [name for path in records for name in calls_of(read_record(Path(path)))]
    return [f"{RUNS}/{name}/run_manifest.json" for name in dict.fromkeys(names)]


def calls_of(record: Json) -> list[str]:
    """The calls that a record names: that which wrote it, then earlier attempts, latest first."""
    attempts = [attempt.get("invocation") for attempt in record.get("attempts", [])]
    return [name for name in [_invocation_of(record), *reversed(attempts)] if name]


def invocation_facts(layout: Layout, invocation: str | None) -> Json:
    """What a call's manifest says at its end: digests of what went in, seconds that jobs held.

    `seconds_cpu_jobs` and `seconds_gpu` add up the training and generating jobs that this call has
    finished, on whatever machines they ran; a job that shares a model over several GPUs counts
    each. What earlier calls did for those jobs counts too, as far as this one went on from it.
    """
    config = layout.config
    own = [record for record in _job_records(layout) if _invocation_of(record) == invocation]
    return {
        "datasets": {
            name: split_digests(read_record(Path(layout.data(name), "manifest.json")))
            for name in layout.datasets()
        },
        "models": {
            model: weights_origin(
                read_record(Path(layout.starting_weights(model), "manifest.json"))
            )
            for model in config.study.models
        },
        **job_seconds(own),
    }


def split_digests(manifest: Json) -> Json:
    """Of each split of a dataset: rows, content digest and SHA-256."""
    return {
        name: part for name, part in manifest.items() if isinstance(part, dict) and "sha256" in part
    }


def weights_origin(manifest: Json) -> Json:
    """Where starting weights came from, at which revision, and their hashes."""
    return {key: manifest[key] for key in ORIGIN_KEYS if key in manifest}


def _job_records(layout: Layout) -> list[Json]:
    """What every training and generating job of the study wrote about itself."""
    root = Path(layout.experiments)
    paths = {
        path
        for pattern in ("summary.json", "*.stats.json")
        for path in root.rglob(pattern)
        if not {*LEFT_OUT_FOLDERS, WANDB_FOLDER} & set(path.relative_to(root).parts)
    }
    # finish_rounds adds up what its rounds have told already.
    records = [read_record(path) for path in sorted(paths)]
    return [record for record in records if "num_rounds" not in record]


def _invocation_of(record: Json) -> str | None:
    return (record.get("provenance") or {}).get("invocation")


def job_seconds(records: Iterable[Json]) -> Json:
    """CPU and GPU seconds of jobs, from the records that they wrote.

    `seconds_cpu_jobs` is of all attempts, killed ones included; `seconds_gpu` of the work that is
    in the result, without what a kill lost (a record's `attempts_total` has that too).
    """
    records = list(records)
    attempts = [record.get("attempts_total", {}) for record in records]  # one may be damaged
    return {
        "seconds_cpu_jobs": round(sum(float(one.get("seconds_cpu", 0.0)) for one in attempts), 1),
        "seconds_gpu": round(sum(_gpu_seconds(record) for record in records), 1),
    }


def num_gpus(record: Json) -> int | None:
    """GPUs that a stage held.

    None on the CPU, one for each rank of training, as many as vLLM shared the model over, else one.
    """
    device = record.get("device")
    if device is None:
        return None
    if device == "cpu":
        return 0
    if "num_ranks" in record:
        return int(record["num_ranks"])
    settings = record.get("settings") or {}
    vllm = settings.get("model_settings", {}).get("vllm", {})
    return int(vllm.get("tensor_parallel", 1)) if record.get("engine") == "vllm" else 1


def sampling_cost(stats: Sequence[Json]) -> Json:
    """What sampling the completions of a training run cost, of the stats of each sampling.

    The start of the engine is part of it, as it is of GRPO's first step.
    """
    seconds = [one["seconds_loading"] + one["seconds_generating"] for one in stats]
    gpus = [num_gpus(one) or 0 for one in stats]
    gpu_seconds = [number * of_one for number, of_one in zip(gpus, seconds, strict=True)]
    return {
        "seconds_sampling": round(sum(seconds), 3),
        "gpu_seconds_sampling": round(sum(gpu_seconds), 3),
        "num_sampled_tokens": sum(one["num_completion_tokens"] for one in stats),
    }


def seconds_of_training_job(record: Json) -> float:
    """What a run took, by its summary: training and validation."""
    return float(record.get("seconds_training", 0.0) + record.get("seconds_validating", 0.0))


def _gpu_seconds(record: Json) -> float:
    # A round's or DPO's sampling is a job of its own, whose stats tell its seconds.
    training = seconds_of_training_job(record) - record.get("seconds_sampling", 0.0)
    generating = record.get("seconds_loading", 0.0) + record.get("seconds_generating", 0.0)
    return (num_gpus(record) or 0) * (training + generating)


# --------------------------------------------------------------------------------------- settings


def check_settings(layout: Layout) -> None:
    """Raise DataError where a run or its completions were made with other settings than asked for.

    Snakemake makes such again, by its own record of how they were made. It has none of what a job
    finished on a cluster after its snakemake had been killed, and takes that as it is.
    """
    found: dict[str, list[str]] = {}
    for path, made, asked in _made_and_asked(layout):
        if other := _differing(made, asked):
            found[path] = other
    if found:
        lines = [f"  {path}: {other}" for path, others in found.items() for other in others]
        lines = lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else [])
        raise DataError(
            "made with other settings than the study asks for:\n"
            + "\n".join(lines)
            + f"\nTo make them again, add to the command: --forcerun {' '.join(found)}"
        )


def _made_and_asked(
    layout: Layout,
) -> Iterator[tuple[str, Settings, Settings]]:
    """A file that tells how something of the study was made, what it tells, and what is asked.

    Both without resources, of which no result depends.
    """
    config = layout.config
    for model in config.study.models:
        for method in config.stages():
            settings = config.methods[method]
            for seed in config.seeds_of(method):
                run = layout.run(model, method, seed)
                rounds = range(1, settings.sampling_rounds + 1)
                if isinstance(settings, ExpertIterationMethod):
                    trained = [(number, f"{run}/round{number}") for number in rounds]
                else:
                    trained = [(0, run)] if settings.trains else []
                for number, folder in trained:
                    path = f"{folder}/settings.json"
                    if Path(path).exists():
                        made = checked(read_json(Path(path)), RunSettings, path)
                        asked = config.run_settings(model, method, seed, number)
                        yield path, made.without_resources(), asked.without_resources()
                sampled = {
                    f"{run}/round{number}/completions.stats.json": config.round_generation_settings(
                        model, method, seed, number
                    )
                    for number in rounds
                }
                graded: dict[str, GradingSettings] = {}
                if method in config.study.methods:
                    for suite in config.study.suites:
                        path = f"{run}/completions/{suite}.stats.json"
                        sampled[path] = config.evaluation_settings(model, method, seed, suite)
                        path = f"{run}/metrics/{suite}.json"
                        graded[path] = config.grading_settings(model, suite)
                for path, sampling in sampled.items():
                    if (told := read_record(Path(path)).get("settings")) is not None:
                        was = checked(told, EvaluationSettings, path)
                        yield path, was.without_resources(), sampling.without_resources()
                for path, grading in graded.items():
                    metrics = read_record(Path(path))
                    if "grading" in metrics:
                        taken = {
                            key: metrics[key]
                            for key in GradingSettings.model_fields
                            if key in metrics
                        }
                        yield path, checked(taken, GradingSettings, path), grading


def _differing(made: Settings, asked: Settings) -> list[str]:
    """Each key that differs, with both values, but for the study's name: it decides nothing."""
    was, is_now = (
        one.model_dump(mode="json", by_alias=True, exclude={"study"}) for one in (made, asked)
    )
    return [
        f"{key} is {old!r}, the study asks for {new!r}"
        for key, (old, new) in leaf_changes(was, is_now).items()
    ]


# ------------------------------------------------------------------------------------------- sums


def note_unrecorded(layout: Layout, since_ns: int) -> None:
    """Note that what was written after `since_ns` has no hash yet, until `record_study` is done.

    A call that is killed in between has said in its manifest that it came to its end.
    """
    write_text(Path(layout.results, UNRECORDED), str(_unrecorded_since(layout, since_ns)))


def _unrecorded_since(layout: Layout, since_ns: int) -> int:
    path = Path(layout.results, UNRECORDED)
    return min(since_ns, int(path.read_text(encoding="utf-8"))) if path.exists() else since_ns


def write_provenance(layout: Layout) -> Json:
    """Write provenance.json of what there is of the study; returns it."""
    provenance = study_provenance(layout)
    write_json(Path(layout.results, "provenance.json"), provenance)
    return provenance


def record_study(
    layout: Layout, since_ns: int, has_failed: bool = False, num_threads: int = 1
) -> None:
    """Write provenance.json and SHA256SUMS of the study as it lies there.

    A hash that is recorded already stays unless the file was written after `since_ns` (ns since
    the epoch, by the file system's clock), that is by this call: what somebody else has changed
    in between is for `verify` to find. It also spares reading the weights of a large study anew.
    A call that `has_failed` has removed what it did not make again: that is missing.
    `num_threads` files are hashed at a time.
    """
    results = Path(layout.results)
    since_ns = _unrecorded_since(layout, since_ns)
    provenance = write_provenance(layout)
    known = read_sums(results / SUMS) if (results / SUMS).exists() else {}
    sums, new = {}, []
    for path in _study_files(layout, provenance):
        if str(path) in known and path.stat().st_ctime_ns < since_ns:
            sums[str(path)] = known[str(path)]
        else:
            new.append(path)
    with ThreadPoolExecutor(num_threads) as threads:
        hashes = progress(threads.map(sha256_file, new), "hashing", len(new))
        sums |= dict(zip(map(str, new), hashes, strict=True))
    dropped = set(provenance["dropped_weights"])
    for name in known.keys() - sums.keys():
        if str(Path(name).parent) in dropped:
            continue
        if has_failed or _nearest_folder(Path(name)).stat().st_ctime_ns < since_ns:
            sums[name] = known[name]  # this call has not replaced it: it is missing
    write_sums(results / SUMS, sums)
    (results / UNRECORDED).unlink(missing_ok=True)


def _nearest_folder(path: Path) -> Path:
    """The innermost folder above `path` that is there."""
    return next(folder for folder in path.parents if folder.is_dir())


def write_sums(path: Path, sums: dict[str, str]) -> None:
    """Write file → hash in the form of `sha256sum`; names as their bytes are."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    with atomic_path(path) as temporary:
        temporary.write_bytes(os.fsencode(text))


def read_sums(path: Path) -> dict[str, str]:
    """File → hash. Raises DataError that names the line (from 1) that is none."""
    try:
        lines = os.fsdecode(path.read_bytes()).split("\n")
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; it is written when the study finishes, and by `snakemake "
            "--forcerun compare` of a finished one"
        ) from error
    sums = {}
    for number, line in enumerate(lines[:-1], start=1):
        match = SUMS_LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{path}, row {number}: not a line of sha256sum; it was changed")
        sums[match[2]] = match[1]
    if lines[-1]:
        raise DataError(f"{path}: ends without a newline: cut short?")
    return sums


def hash_folder(folder: Path) -> None:
    """Write SHA256SUMS of everything in a folder (that of an `eval`) into it."""
    write_sums(folder / SUMS, {str(path): sha256_file(path) for path in _files_below([folder])})


def _study_files(layout: Layout, provenance: Json) -> Iterator[Path]:
    """Every file of a study that is there, each once."""
    made_by = [name for row in provenance["rows"] for run in row["runs"] for name in run["made_by"]]
    manifests = [Path(name) for name in [*made_by, *provenance["tables"]["made_by"]]]
    # Its other calls too: that which only plotted, that which failed.
    for path in sorted(Path(RUNS).glob("*/run_manifest.json")):
        if read_record(path).get("study") == layout.config.study.name:
            manifests.append(path)
    shared = [*layout.datasets(), *layout.config.study.models]
    folders = [
        Path(layout.experiments),
        Path(layout.results),
        *(Path(layout.data(name)) for name in layout.datasets()),
        *(Path(layout.starting_weights(model)) for model in layout.config.study.models),
        *(path.parent for path in manifests),
    ]
    yield from _files_below(dict.fromkeys(folders))
    for kind in LOG_FOLDERS:  # of what prepared data, traces and weights, for all studies
        for path in sorted(Path(ARTIFACTS, kind).glob("*/*")):
            if path.stem in shared and path.is_file():
                yield path


def _files_below(folders: Iterable[Path]) -> Iterator[Path]:
    """Every file that belongs to a record, in order of name within its folder."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            hidden = any(part.startswith(".") for part in parts)
            if path.is_file() and not hidden and not LEFT_OUT_FOLDERS & set(parts):
                if path.name != SUMS and path.suffix != ".partial":
                    yield path


@dataclass(frozen=True)
class Differences:
    """Files that are not as recorded, by name."""

    changed: list[str]
    missing: list[str]
    new: list[str]
    num_checked: int

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.new)


def verify_sums(
    path: Path, on_file: Callable[[Iterable[str]], Iterable[str]] = lambda names: names
) -> Differences:
    """Read every file that `path` (a SHA256SUMS) lists, and look for others in their folders.

    Names are relative to the working directory. `on_file` may wrap the names (a progress bar).
    Raises DataError where the record itself is missing or damaged.
    """
    sums = read_sums(path)
    changed, missing = [], []
    for name in on_file(sums):
        if not Path(name).is_file():
            missing.append(name)
        elif sha256_file(Path(name)) != sums[name]:
            changed.append(name)
    found = {
        str(file)
        for file in _files_below(_recorded_folders(sums, path))
        if WANDB_FOLDER not in file.parts
    }
    return Differences(changed, missing, sorted(found - sums.keys()), len(sums))


def _recorded_folders(sums: Iterable[str], path: Path) -> list[Path]:
    """The folders that a record covers whole: artifacts/{dataset}, …/experiments/{study}, ….

    A folder of `artifacts/` that holds folders of several studies is covered one level deeper, one
    that holds logs of several not at all.
    """
    folders = {path.parent}
    for name in sums:
        parts = Path(name).parts
        if parts[0] == ARTIFACTS and len(parts) > 2 and parts[1] not in LOG_FOLDERS:
            folders.add(Path(*parts[: 3 if parts[1] in RESERVED_DATASET_NAMES else 2]))
    return sorted(folders)
