"""What differs between runs that are compared: settings, engine, code, environment.

Facts are read from what every stage wrote beside its results (`completions/{suite}.stats.json`,
`train/summary.json`, `settings.json`). A fact that a file does not tell is not compared: a study of
an older version, or one scored by other tools, is still a study.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gsm8k_core.files import Json, read_json

Facts = dict[str, Any]

# What names a run and is meant to differ between two of them.
IDENTITY = {"study", "model", "method", "parent", "seed", "suite", "round", "kind"}

MEANINGS = {
    "engine": "another program generated the completions",
    "device": "generated on another device",
    "dtype": "another compute type",
    "grading": "graded another way",
    "model settings": "other settings of the model or its engine",
    "suite settings": "other problems, sampling or limits",
    "prompt": "another prompt",
    "commit": "another commit of the repository",
    "code": "another version of gsm8k_core or scripts",
    "packages": "other versions of packages",
    "python": "another Python",
    "machine": "another processor or operating system",
    "training settings": "seeds of one method were trained with different settings",
}


def read_optional(path: Path) -> Json:
    """A JSON object, or {} where the file is missing. Raises DataError when it is malformed."""
    if not path.exists():
        return {}
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def evaluation_facts(stats: Json, metrics: Json) -> Facts:
    """What decided a run's completions and grades, by a short name; stats may be {}."""
    known = {**metrics, **stats}
    facts: Facts = {key: known.get(key) for key in ("engine", "device", "dtype")}
    settings = stats.get("settings")
    for key, value in (settings if isinstance(settings, dict) else {}).items():
        if key not in IDENTITY:
            facts[key.replace("_", " ")] = value
    if metrics.get("grading") is not None:
        facts["grading"] = {"grading": metrics["grading"], "marker": metrics.get("marker")}
    return _known({**facts, **_environment(known.get("provenance"))})


def training_facts(summary: Json) -> Facts:
    """With what a run was trained, under names that begin with `training`; summary may be {}."""
    facts = {"device": summary.get("device"), **_environment(summary.get("provenance"))}
    return {f"training {key}": value for key, value in _known(facts).items()}


def training_settings(settings: Json) -> Facts:
    """How a run was trained. Only runs of the same method are meant to agree on it."""
    parts = {key: value for key, value in settings.items() if key not in IDENTITY}
    return {"training settings": parts} if parts else {}


def _environment(provenance: Any) -> Facts:
    if not isinstance(provenance, dict):
        return {}
    git = provenance.get("git")
    platform = [provenance.get("platform"), provenance.get("processor")]
    return {
        "commit": _commit(git) if isinstance(git, dict) else None,
        "code": str(provenance["code_digest"])[:12] if provenance.get("code_digest") else None,
        "packages": provenance.get("packages"),
        "python": provenance.get("python"),
        "machine": platform if any(platform) else None,
    }


def _commit(git: Json) -> str | None:
    """`886377824fa6`, or `886377824fa6+e224f000` where files differed from it."""
    if not git.get("commit"):
        return None
    difference = git.get("diff_sha256")
    return str(git["commit"])[:12] + (f"+{difference[:8]}" if difference else "")


def _known(facts: Facts) -> Facts:
    return {key: value for key, value in facts.items() if value is not None}


def differing(a: Sequence[Facts], b: Sequence[Facts]) -> list[str]:
    """Names of the facts that the runs of `a` and those of `b` both tell and do not agree on."""
    return [
        name
        for name in dict.fromkeys(name for facts in a for name in facts)
        if (other := _values(b, name)) and _values(a, name) != other
    ]


def inconsistent(runs: Sequence[Facts]) -> list[str]:
    """Names of the facts that these runs do not agree on among themselves."""
    names = dict.fromkeys(name for facts in runs for name in facts)
    return [name for name in names if len(_values(runs, name)) > 1]


def _values(runs: Iterable[Facts], name: str) -> set[str]:
    return {json.dumps(facts[name], sort_keys=True) for facts in runs if name in facts}


def flag_text(against: str, names: Sequence[str]) -> str:
    """`parent: code, engine`, or nothing. Where the code differs, the commit does too."""
    shown = [
        name
        for name in names
        if not (name.endswith("commit") and name.removesuffix("commit") + "code" in names)
    ]
    return f"{against}: {', '.join(shown)}" if shown else ""


def meaning(name: str) -> str:
    """A flag's word in plain language."""
    if name not in MEANINGS and name.startswith("training "):
        return f"{MEANINGS.get(name.removeprefix('training '), 'another value')}, in training"
    return MEANINGS.get(name, "other settings")


def leaf_changes(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Every leaf of two JSON values that differs, by dotted key; what is missing is None."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            name = f"{where}.{key}" if where else str(key)
            changes |= leaf_changes(old.get(key), new.get(key), name)
        return changes
    return {} if old == new else {where: (old, new)}
