"""What differs between runs that are compared: settings, engine, code, environment.

Facts are read from what every stage wrote beside its results (`completions/{suite}.stats.json`,
`train/summary.json`, `settings.json`). A fact that a file does not tell is not compared: a study
whose completions other tools wrote is still a study.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gsm8k_core.files import Json

Facts = dict[str, Any]

# What names a run and is meant to differ between two of them.
IDENTITY = {"study", "model", "method", "parent", "seed", "suite", "round", "kind"}

# Facts whose names begin so: the weights of a method, as evaluated or as trained from. Every seed
# has its own, so they are compared with those of a parent only.
WEIGHTS_OF = "weights of "
# The file of a custom reward: to be compared where it is the same `module:function`.
CODE_OF = "code of "

MEANINGS = {
    "engine": "another program generated the completions",
    "device": "generated on another device",
    "dtype": "another compute type",
    "grading": "graded another way",
    "model settings": "other settings of the model or its engine",
    "suite settings": "other problems, sampling or limits",
    "prompt": "another prompt",
    "commit": "another commit of the repository",
    "code": "another version of gsm8k_core, scripts or rules",
    "packages": "other versions of packages",
    "python": "another Python",
    "machine": "another processor or operating system",
    "training settings": "seeds of one method were trained with different settings",
    "problems": "other problems, or other texts of the same ones",
    "training data": "trained on other data, by the name of the same dataset",
    "starting weights": "training did not start from the weights that were evaluated",
}


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
    facts["problems"] = _short(known.get("problems_sha256"))
    if known.get("method"):
        facts[f"{WEIGHTS_OF}{known['method']}"] = _short(stats.get("weights"))
    return _known({**facts, **_environment(known.get("provenance"))})


def training_facts(summary: Json) -> Facts:
    """With what a run was trained, under names that begin with `training`; summary may be {}."""
    facts = {"device": summary.get("device"), **_environment(summary.get("provenance"))}
    # Who trains on its own completions shares them with nobody, not even with another seed.
    if "seconds_sampling" not in summary:
        facts["data"] = _short(summary.get("data_sha256"))
    for custom, digest in (summary.get("reward_code") or {}).items():
        facts[f"{CODE_OF}{custom}"] = _short(digest)
    known = {f"training {key}": value for key, value in _known(facts).items()}
    # The last of several rounds may start from the one before it.
    if summary.get("parent") and summary.get("num_rounds", 1) == 1:
        known[f"{WEIGHTS_OF}{summary['parent']}"] = _short(summary.get("starting_weights"))
    return _known(known)


def origin_facts(stats: Json, summary: Json) -> Facts:
    """Data and weights that a run began with: what the same run of two studies is to share.

    A model that was not trained began with its own weights.
    """
    weights = summary.get("starting_weights") if summary else stats.get("weights")
    facts = {"training data": summary.get("data_sha256"), "starting weights": weights}
    return _known({name: _short(value) for name, value in facts.items()})


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
        "code": _short(provenance.get("code_digest")),
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


def _short(digest: Any) -> str | None:
    return str(digest)[:12] if digest else None


def _known(facts: Facts) -> Facts:
    return {key: value for key, value in facts.items() if value is not None}


def differing(a: Sequence[Facts], b: Sequence[Facts]) -> list[str]:
    """Names of the facts that the runs of `a` and those of `b` both tell and do not agree on.

    `starting weights` where a run of `a` was trained from weights of b's method that no run of `b`
    was evaluated with.
    """
    names = [
        name
        for name in dict.fromkeys(name for facts in a for name in facts)
        if (other := _values(b, name)) and not _agree(name, _values(a, name), other)
    ]
    if "training data" in names and _datasets(a) != _datasets(b):
        names.remove("training data")  # chosen so: a setting of the method
    return ["starting weights" if name.startswith(WEIGHTS_OF) else name for name in names]


def _agree(name: str, values: set[str], others: set[str]) -> bool:
    # A parent may have more seeds than were trained on.
    return values <= others if name.startswith(WEIGHTS_OF) else values == others


def _datasets(runs: Iterable[Facts]) -> set[Any]:
    """Names of the datasets that a method's settings give it; None for the study's."""
    settings = [facts.get("training settings", {}).get("method_settings") for facts in runs]
    return {one.get("dataset") if isinstance(one, dict) else None for one in settings}


def inconsistent(runs: Sequence[Facts]) -> list[str]:
    """Names of the facts that these runs do not agree on among themselves."""
    names = dict.fromkeys(name for facts in runs for name in facts)
    shared = [name for name in names if not name.startswith(WEIGHTS_OF)]
    return [name for name in shared if len(_values(runs, name)) > 1]


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
    if name.startswith(f"training {CODE_OF}"):
        return "the file of this custom reward was another one"
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
