"""Fetch, verify and split GSM8K.

Whatever the source (a local folder, the hub's parquet, GitHub's JSONL), the rows must have the
pinned content digest, so that a study means the same data everywhere.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from pathlib import Path

from gsm8k_core.config import Gsm8kDataset
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, iter_jsonl
from gsm8k_core.problems import Problem, problem_from_row

log = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT_SECONDS = 60
SPLITS = ("train", "test")
GITHUB_RAW = "https://raw.githubusercontent.com"
GITHUB_FOLDER = "grade_school_math/data"


def content_digest(rows: list[Json]) -> str:
    """Hex SHA-256 over the rows in order, each as compact JSON of [question, answer] and "\\n"."""
    digest = hashlib.sha256()
    for row in rows:
        pair = json.dumps(
            [row.get("question"), row.get("answer")], ensure_ascii=False, separators=(",", ":")
        )
        digest.update(pair.encode("utf-8") + b"\n")
    return digest.hexdigest()


def fetch_gsm8k(settings: Gsm8kDataset) -> tuple[dict[str, list[Json]], str]:
    """Raw rows of both splits and where they came from, verified against the pinned digests.

    Sources in order: `settings.path` or $GSM8K_DIR (if either is set, it alone is used), the hub at
    the pinned revision, GitHub at the pinned commit. Raises DataError when none can be had, or when
    a split is not the pinned one.
    """
    folder = settings.path or os.environ.get("GSM8K_DIR")
    if folder:
        splits = {split: list(iter_jsonl(Path(folder) / f"{split}.jsonl")) for split in SPLITS}
        source = "local folder"
    else:
        splits, source = _download(settings)
    for split in SPLITS:
        _verify(splits[split], split, settings.digests.get(split), source)
    return splits, source


def _verify(rows: list[Json], split: str, expected: str | None, source: str) -> None:
    found = content_digest(rows)
    if expected is None:
        raise DataError(f"datasets.*.digests.{split}: missing; this source has {found}")
    if found != expected:
        raise DataError(
            f"GSM8K {split} is not the pinned one: {len(rows)} rows with content digest {found}, "
            f"expected {expected} (source: {source}). Take an unchanged copy, or pin this digest "
            f"under datasets.<name>.digests.{split} if you mean to use it."
        )


def _download(settings: Gsm8kDataset) -> tuple[dict[str, list[Json]], str]:
    faults = []
    for name, fetch in (("hub", _from_hub), ("GitHub", _from_github)):
        try:
            return fetch(settings)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            log.info("GSM8K: %s cannot serve it: %s", name, reason)
            faults.append(f"{name}: {reason}")
    raise DataError(
        "GSM8K could not be fetched (" + "; ".join(faults) + "). Without a network, set GSM8K_DIR "
        "(or datasets.gsm8k.path) to a folder with its train.jsonl and test.jsonl."
    )


def _from_hub(settings: Gsm8kDataset) -> tuple[dict[str, list[Json]], str]:
    import datasets
    from huggingface_hub.errors import HTTPError

    splits = {}
    for split in SPLITS:
        try:
            table = datasets.load_dataset(
                settings.hub_id, settings.hub_config, split=split, revision=settings.revision
            )
        except (HTTPError, datasets.exceptions.DatasetsError) as error:
            raise OSError(f"{type(error).__name__}: {error}") from error  # not all of them are one
        splits[split] = [{"question": row["question"], "answer": row["answer"]} for row in table]
    return splits, f"hub: {settings.hub_id} ({settings.hub_config}) at {settings.revision}"


def _from_github(settings: Gsm8kDataset) -> tuple[dict[str, list[Json]], str]:
    splits = {}
    for split in SPLITS:
        url = (
            f"{GITHUB_RAW}/{settings.github_repository}/{settings.commit}/{GITHUB_FOLDER}/"
            f"{split}.jsonl"
        )
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
                text = response.read().decode("utf-8")
        except urllib.error.HTTPError as error:
            raise OSError(f"{url}: HTTP {error.code}") from error
        except http.client.HTTPException as error:  # among them a body that was cut short
            raise OSError(f"{url}: {type(error).__name__}: {error}") from error
        splits[split] = [json.loads(line) for line in text.split("\n") if line]
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
