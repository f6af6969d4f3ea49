"""Fetch, verify and split GSM8K, and make from it what other evaluations make of it.

Whatever the source (a local folder, the hub's parquet, GitHub's JSONL), the rows must have the
pinned content digest, so that a study means the same data everywhere.

Derived: GSM8K-Platinum's test split, and the worked examples that lm-evaluation-harness would show
before each test problem.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import logging
import os
import random
import re
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

from gsm8k_core.config import Gsm8kDataset
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, packaged_json, parse_jsonl, read_lines
from gsm8k_core.problems import Problem, WorkedExample, problem_from_row, warn_of_misspelt

log = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT_SECONDS = 60
SPLITS = ("train", "test")
LISTED_FAULTS = 20
COMMIT = re.compile(r"[0-9a-f]{40}")
GITHUB_RAW = "https://raw.githubusercontent.com"
GITHUB_FOLDER = "grade_school_math/data"


def content_digest(rows: list[Json]) -> str:
    """Hex SHA-256 over the rows in order, each as compact JSON of [question, answer] and "\\n".

    A row's `demonstration`, `examples` and `{"id": …, "cluster": …}`, which GSM8K's rows have not,
    follow the answer.
    """
    digest = hashlib.sha256()
    for row in rows:
        parts = [row.get("question"), row.get("answer")]
        optional = (row.get(key) for key in ("demonstration", "examples"))
        parts += [value for value in optional if value not in (None, [])]
        if named := {key: row[key] for key in ("id", "cluster") if row.get(key) is not None}:
            parts.append(named)
        text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
        digest.update(text.encode("utf-8") + b"\n")
    return digest.hexdigest()


def make_gsm8k(settings: Gsm8kDataset) -> tuple[dict[str, list[Problem]], str]:
    """Problems of train, val and test as the settings ask for them, and where they came from.

    Raises DataError as `fetch_gsm8k` does, and when the settings do not go with these rows.
    """
    rows, source = fetch_gsm8k(settings)
    problems = split_gsm8k(rows, settings.num_val)
    if settings.examples_per_test_problem:
        # Before Platinum: a problem has the same examples in both test splits.
        problems["test"] = with_lm_eval_examples(
            problems["test"],
            rows["train"],
            settings.examples_per_test_problem,
            settings.examples_seed,
        )
    if settings.platinum:
        problems["test"] = revise_as_platinum(problems["test"], content_digest(rows["test"]))
    return problems, source


def fetch_gsm8k(settings: Gsm8kDataset) -> tuple[dict[str, list[Json]], str]:
    """Raw rows of both splits and where they came from, verified against the pinned digests.

    Sources in order: `settings.path` or $GSM8K_DIR (if either is set, it alone is used), the hub at
    the pinned revision, GitHub at the pinned commit; for a `hub_id` other than GSM8K's, the hub
    alone. Raises DataError when none can be had, when rows are no problems (all of them are named),
    or when a split is not the pinned one.
    """
    if local := local_folder(settings):
        folder = Path(local).expanduser()
        names = {split: str(folder / f"{split}.jsonl") for split in SPLITS}
        source, where = "local folder", " ($GSM8K_DIR)" * (settings.path is None)
        read = {split: _read_rows(names[split]) for split in SPLITS}
        splits = {split: list(rows.values()) for split, (rows, _) in read.items()}
        faults = {
            split: bad_lines + _faults(rows, names[split], split)
            for split, (rows, bad_lines) in read.items()
        }
    else:
        splits, source = _download(settings)
        name = _name(settings)
        names, where = {split: f"{name} {split}" for split in SPLITS}, f" (source: {source})"
        faults = {
            split: _faults(dict(enumerate(rows, start=1)), names[split], split)
            for split, rows in splits.items()
        }
    # Before digests: one that is pinned before its rows are mended would have to be pinned again.
    if bad := [fault for split in SPLITS for fault in faults[split]]:
        more = len(bad) - LISTED_FAULTS
        listed = bad[:LISTED_FAULTS] + [f"and {more} more"] * (more > 0)
        raise DataError(f"{'; '.join(listed)}. Mend these; then the digests are compared")
    _verify(splits, names, settings.digests, where)
    return splits, source


def _name(settings: Gsm8kDataset) -> str:
    """What is downloaded, as errors call it."""
    return settings.hub_id if settings.is_on_hub_alone else "GSM8K"


def local_folder(settings: Gsm8kDataset) -> str | None:
    """The folder that the rows lie in; None where they are to be downloaded."""
    if settings.path or settings.is_on_hub_alone:
        return settings.path
    return os.environ.get("GSM8K_DIR")


def _read_rows(path: str) -> tuple[dict[int, Json], list[str]]:
    """The rows of a JSONL file by their number, and what is wrong with lines that are none."""
    rows, faults = {}, []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            (rows[number],) = parse_jsonl([line], path, number)
        except DataError as error:
            faults.append(str(error))
    return rows, faults


def _faults(rows: dict[int, Json], name: str, split: str) -> list[str]:
    """What makes numbered rows no problems, each with its place; `name` is that of their file."""
    faults = [] if rows else [f"{name}: holds no problem"]
    warn_of_misspelt(set[str]().union(*rows.values()), name)
    row_of: dict[str, int] = {}
    for number, row in rows.items():
        where = f"{name}, row {number}"
        try:
            problem = problem_from_row(row, where, default_id=f"{split}-{number - 1}")
        except DataError as error:
            faults.append(str(error))
            continue
        first = row_of.setdefault(problem.id, number)
        if first != number:
            faults.append(f"{where}: id {problem.id!r} is that of row {first} too")
    return faults


def _verify(
    splits: dict[str, list[Json]], names: dict[str, str], expected: dict[str, str], where: str
) -> None:
    """Raise one DataError for all splits whose content is not that of the digests `expected`."""
    found = {split: content_digest(rows) for split, rows in splits.items()}
    faults = [
        f"{names[split]} is not the pinned one: {len(splits[split])} rows with content digest "
        f"{digest}, expected {expected.get(split, 'none')}"
        for split, digest in found.items()
        if digest != expected.get(split)
    ]
    if faults:
        pins = ", ".join(f"{split}: {digest}" for split, digest in found.items())
        remedy = "If you mean to use it as it is"
        if expected == Gsm8kDataset.model_fields["digests"].default:
            remedy = "Take an unchanged copy of GSM8K, or, for problems of your own"
        raise DataError(
            f"{'; '.join(faults)}{where}. {remedy}, pin it under datasets.<name>: "
            f"digests: {{{pins}}}"
        )


def _download(settings: Gsm8kDataset) -> tuple[dict[str, list[Json]], str]:
    sources = [("hub", _from_hub)]
    remedy = "datasets.<name>.path"
    if not settings.is_on_hub_alone:
        sources.append(("GitHub", _from_github))
        remedy = "GSM8K_DIR (or datasets.gsm8k.path)"
    faults = []
    for name, fetch in sources:
        try:
            return fetch(settings)
        except (OSError, ValueError, DataError) as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            log.info("%s: %s cannot serve it: %s", _name(settings), name, reason)
            faults.append(f"{name}: {reason}")
    raise DataError(
        f"{_name(settings)} could not be fetched ({'; '.join(faults)}). Without a network, set "
        f"{remedy} to a folder with its train.jsonl and test.jsonl."
    )


def _from_hub(settings: Gsm8kDataset) -> tuple[dict[str, list[Json]], str]:
    import datasets
    from huggingface_hub.errors import HTTPError

    splits = {}
    try:
        commit = _commit_on_hub(settings)
        for split in SPLITS:
            table = datasets.load_dataset(
                settings.hub_id, settings.hub_config, split=split, revision=commit
            )
            splits[split] = [
                {key: value for key, value in row.items() if value is not None} for row in table
            ]
    except (HTTPError, datasets.exceptions.DatasetsError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error  # not all of them are one
    named = settings.revision if settings.revision == commit else f"{settings.revision} = {commit}"
    return splits, f"hub: {settings.hub_id} ({settings.hub_config}) at {named}"


def _commit_on_hub(settings: Gsm8kDataset) -> str:
    """The commit that the revision stands for. One that is named otherwise is asked for."""
    from huggingface_hub import HfApi

    if COMMIT.fullmatch(settings.revision):
        return settings.revision
    found = HfApi().dataset_info(settings.hub_id, revision=settings.revision).sha
    if found is None:
        raise OSError(f"{settings.hub_id} at {settings.revision}: the hub names no commit")
    if not found.startswith(settings.revision):
        log.warning(
            "%s at %s: this name can move; it stands for commit %s now: write that as "
            "datasets.<name>.revision",
            settings.hub_id,
            settings.revision,
            found,
        )
    return found


def _from_github(settings: Gsm8kDataset) -> tuple[dict[str, list[Json]], str]:
    splits = {}
    for split in SPLITS:
        url = (
            f"{GITHUB_RAW}/{settings.github_repository}/{settings.commit}/{GITHUB_FOLDER}/"
            f"{split}.jsonl"
        )
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            raise OSError(f"{url}: HTTP {error.code}") from error
        except http.client.HTTPException as error:  # among them a body that was cut short
            raise OSError(f"{url}: {type(error).__name__}: {error}") from error
        splits[split] = list(parse_jsonl(io.BytesIO(body), f"{split}.jsonl"))
    return splits, f"GitHub: {settings.github_repository} at {settings.commit}"


def split_gsm8k(splits: dict[str, list[Json]], num_val: int) -> dict[str, list[Problem]]:
    """Problems of train, val and test.

    `val` is the `num_val` train questions whose SHA-256 is smallest: a rule that depends on the
    questions alone, neither on their order nor on a random generator.
    """
    problems = {
        split: [
            problem_from_row(row, f"GSM8K {split}, row {index + 1}", default_id=f"{split}-{index}")
            for index, row in enumerate(rows)
        ]
        for split, rows in splits.items()
    }
    for split, of_split in problems.items():
        if repeated := [name for name, n in Counter(p.id for p in of_split).items() if n > 1]:
            raise DataError(f"GSM8K {split}: id {repeated[0]!r} occurs twice")
    if num_val >= len(problems["train"]):
        raise DataError(
            f"num_val is {num_val} of {len(problems['train'])} train rows: leave some to train on"
        )
    ranked = sorted(
        problems["train"], key=lambda p: hashlib.sha256(p.question.encode("utf-8")).hexdigest()
    )
    val_ids = {problem.id for problem in ranked[:num_val]}
    return {
        "train": [problem for problem in problems["train"] if problem.id not in val_ids],
        "val": [problem for problem in problems["train"] if problem.id in val_ids],
        "test": problems["test"],
    }


def revise_as_platinum(test: list[Problem], test_digest: str) -> list[Problem]:
    """GSM8K-Platinum (Vendrow et al. 2025) from GSM8K's test split, whose content digest it takes.

    Without the problems that its authors found ambiguous or wrong, and with the golds that they
    corrected; ids stay. The worked solution of a corrected problem led to the old gold, so only the
    gold is left of it. Raises DataError when `test` is not the split that these facts are about.
    """
    facts = packaged_json("platinum.json")
    if test_digest != facts["test_digest"]:
        raise DataError(
            "GSM8K-Platinum is known by row number for the published test split alone (content "
            f"digest {facts['test_digest']}); this one has {test_digest}. Set platinum: false"
        )
    removed = set(facts["removed"])
    golds = {row["test_index"]: row["platinum_gold"] for row in facts["revised"]}
    return [
        replace(problem, answer=f"#### {golds[index]}", gold=golds[index])
        if index in golds
        else problem
        for index, problem in enumerate(test)
        if index not in removed
    ]


def with_lm_eval_examples(
    test: list[Problem], train_rows: list[Json], num_examples: int, seed: int
) -> list[Problem]:
    """Test problems with the worked examples that lm-evaluation-harness draws for each.

    As its task `gsm8k` (0.4.13, one process) does: one `random.Random(seed)` for the whole test
    split, from which every problem in turn draws `num_examples` distinct rows of all of train, so a
    problem's examples depend on its row. The harness's own seed is 1234.

    Raises DataError when train is smaller than that, or an example asks what a test problem asks.
    """
    if num_examples > len(train_rows):
        raise DataError(
            f"examples_per_test_problem is {num_examples}, but train has {len(train_rows)} rows"
        )
    pool = [WorkedExample(row["question"], row["answer"]) for row in train_rows]
    asked = {" ".join(problem.question.split()).casefold(): problem.id for problem in test}
    for number, example in enumerate(pool, start=1):
        same = asked.get(" ".join(example.question.split()).casefold())
        if same is not None:
            raise DataError(
                f"GSM8K train, row {number} asks what {same} asks: it cannot be an example"
            )
    generator = random.Random(seed)
    return [
        replace(problem, examples=tuple(generator.sample(pool, num_examples))) for problem in test
    ]
