from __future__ import annotations

from typing import Any

from gsm8k_core.differences import (
    differing,
    evaluation_facts,
    flag_text,
    inconsistent,
    leaf_changes,
    meaning,
    training_facts,
    training_settings,
)

STATS: dict[str, Any] = {
    "engine": "transformers",
    "device": "cpu",
    "dtype": "float32",
    "problems_sha256": "ee",
    "completions_sha256": "ff",
    "seconds_generating": 1.5,
    "settings": {
        "method": "sft",
        "seed": 3,
        "suite_settings": {"max_new_tokens": 256},
        "prompt": {"template": "{question}"},
    },
    "provenance": {
        "written": "2026-01-01",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "git": {"commit": "abc", "dirty": False, "diff_sha256": None},
        "code_digest": "123",
        "platform": "Linux",
        "processor": "EPYC",
        "environment": {"SLURM_JOB_ID": "17"},
    },
}
METRICS = {"grading": "strict", "marker": "####", "accuracy": 0.5}


def changed(**changes: Any) -> dict[str, Any]:
    return {**STATS, **changes}


def test_runs_that_were_made_alike_do_not_differ_by_seed_time_or_job() -> None:
    provenance = {**STATS["provenance"], "written": "2026-02-02", "environment": {"X": "1"}}
    settings = {**STATS["settings"], "seed": 4, "method": "grpo"}
    other = changed(provenance=provenance, settings=settings, seconds_generating=9.0)
    a, b = evaluation_facts(STATS, METRICS), evaluation_facts(other, {**METRICS, "accuracy": 0.1})
    assert differing([a], [b]) == []
    assert inconsistent([a, b]) == []


def test_what_decided_the_completions_and_grades_is_named() -> None:
    old = STATS["provenance"]
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("engine", {"engine": "vllm"}, {}),
        ("device", {"device": "NVIDIA H200"}, {}),
        ("problems", {"problems_sha256": "ff"}, {}),
        ("dtype", {"dtype": "bfloat16"}, {}),
        ("suite settings", {"settings": {"suite_settings": {"max_new_tokens": 1}}}, {}),
        ("prompt", {"settings": {"prompt": {"template": "Q: {question}"}}}, {}),
        ("grading", {}, {"grading": "flexible"}),
        ("grading", {}, {"marker": "boxed"}),
        ("packages", {"provenance": {**old, "packages": {"torch": "2.12.0"}}}, {}),
        ("python", {"provenance": {**old, "python": "3.12.1"}}, {}),
        ("machine", {"provenance": {**old, "processor": "Xeon"}}, {}),
        ("commit", {"provenance": {**old, "git": {"commit": "def", "diff_sha256": None}}}, {}),
        ("commit", {"provenance": {**old, "git": {"commit": "abc", "diff_sha256": "1"}}}, {}),
        ("code", {"provenance": {**old, "code_digest": "456"}}, {}),
    ]
    first = evaluation_facts(STATS, METRICS)
    for name, stats, metrics in cases:
        other = evaluation_facts(changed(**stats), {**METRICS, **metrics})
        assert differing([first], [other]) == [name], name
        assert meaning(name) != "other settings", name


def test_what_one_side_does_not_tell_is_not_compared() -> None:
    known = evaluation_facts(STATS, METRICS)
    assert differing([known], [evaluation_facts({}, {})]) == []
    assert differing([{}], [known]) == []
    assert differing([training_facts({})], [training_facts({"device": "cpu"})]) == []
    assert evaluation_facts({"provenance": {"git": None}, "settings": None}, {}) == {}


def test_seeds_count_as_alike_where_both_sides_have_the_same_mixture() -> None:
    a, b = {"code": "1"}, {"code": "2"}
    assert differing([a, b], [b, a]) == []
    assert differing([a, b], [a, a]) == ["code"]
    assert inconsistent([a, b]) == ["code"]


def test_a_flag_does_not_name_the_commit_beside_the_code() -> None:
    assert flag_text("parent", ["commit", "code", "engine"]) == "parent: code, engine"
    assert flag_text("base", ["commit"]) == "base: commit"
    assert flag_text("base", ["training commit", "training code"]) == "base: training code"
    assert flag_text("base", ["training commit", "code"]) == "base: training commit, code"
    assert flag_text("seeds", []) == ""


def test_training_has_words_of_its_own() -> None:
    facts = training_facts({"device": "cpu", "provenance": STATS["provenance"]})
    assert set(facts) == {
        "training device", "training commit", "training code", "training packages",
        "training python", "training machine",
    }  # fmt: skip
    assert meaning("training code").endswith(", in training")


def trained(method: str, seed: int, **summary: Any) -> dict[str, Any]:
    """Facts of a run that was evaluated with weights `{method}{seed}`."""
    identity = {"method": method, "parent": summary.pop("parent", None), "seed": seed}
    settings = {"method_settings": {"dataset": summary.pop("dataset", None)}}
    return {
        **evaluation_facts({**identity, "weights": f"{method}{seed}"}, {}),
        **(training_facts({**identity, **summary}) if summary else {}),
        **(training_settings(settings) if summary else {}),
    }


def test_a_child_is_to_start_from_its_parents_evaluated_weights() -> None:
    base = [trained("base", 0)]
    sft = [trained("sft", n, parent="base", starting_weights="base0") for n in (0, 1, 2)]
    grpo = [trained("grpo", n, parent="sft", starting_weights=f"sft{n}") for n in (0, 1)]
    for method in (sft, grpo):
        assert inconsistent(method) == []
    assert differing(sft, base) == differing(grpo, sft) == differing(grpo, base) == []
    other = trained("grpo", 1, parent="sft", starting_weights="older")
    found = differing([grpo[0], other], sft)
    assert found == ["starting weights"]
    assert "did not start from" in meaning("starting weights")
    # The last of several rounds may have started from the one before.
    rounds = {"parent": "sft", "starting_weights": "round1", "num_rounds": 2}
    assert differing([trained("expert", 0, **rounds)], sft) == []
    rounds["num_rounds"] = 1
    assert differing([trained("expert", 0, **rounds)], sft) == ["starting weights"]


def test_methods_and_seeds_are_to_share_the_data_of_the_same_dataset() -> None:
    sft = [trained("sft", seed, data_sha256="aa") for seed in (0, 1)]
    assert inconsistent(sft) == []
    assert differing([trained("grpo", 0, data_sha256="aa")], sft) == []
    assert differing([trained("grpo", 0, data_sha256="bb")], sft) == ["training data"]
    assert inconsistent([sft[0], trained("sft", 2, data_sha256="bb")]) == ["training data"]
    assert meaning("training data").startswith("trained on other data")


def test_a_custom_reward_is_to_have_the_same_code_wherever_it_is_used() -> None:
    def run(method: str, seed: int, custom: str, digest: str) -> dict[str, Any]:
        return trained(method, seed, device="cpu", reward_code={custom: digest})

    grpo = [run("grpo", seed, "mine:short", "aa") for seed in (0, 1)]
    assert inconsistent(grpo) == []
    name = "training code of mine:short"
    assert inconsistent([*grpo, run("grpo", 2, "mine:short", "bb")]) == [name]
    assert differing([run("grpo2", 0, "mine:short", "bb")], grpo) == [name]
    assert "custom reward" in meaning(name)
    # Another reward is a choice of the method, and so is none.
    assert differing([run("grpo2", 0, "mine:long", "bb")], grpo) == []
    assert differing([trained("sft", 0, device="cpu", reward_code=None)], grpo) == []


def test_data_that_a_method_is_meant_to_have_for_itself_is_no_difference() -> None:
    sft = [trained("sft", seed, data_sha256="aa") for seed in (0, 1)]
    traces = trained("sft2", 0, data_sha256="bb", dataset="traces")
    assert "training data" not in differing([traces], sft)
    own = [trained("expert", n, data_sha256=f"{n}", seconds_sampling=1.0) for n in (0, 1)]
    assert differing(own, sft) == []
    assert inconsistent(own) == []


def test_a_commit_with_changes_is_not_the_commit() -> None:
    git = {"commit": "886377824fa663885", "diff_sha256": "e224f000f37"}
    facts = evaluation_facts({"provenance": {"git": git}}, {})
    assert facts == {"commit": "886377824fa6+e224f000"}
    facts = evaluation_facts({"provenance": {"git": {**git, "diff_sha256": None}}}, {})
    assert facts == {"commit": "886377824fa6"}


def test_leaf_changes_are_told_by_key_with_both_values() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": 1, "same": 0}
    new = {"a": {"b": 2, "c": [2]}, "e": 1, "same": 0}
    assert leaf_changes(old, new) == {
        "a.b": (1, 2), "a.c": ([1], [2]), "d": (1, None), "e": (None, 1),
    }  # fmt: skip
    assert leaf_changes(1, 2, "code") == {"code": (1, 2)}


def test_a_compute_type_is_compared_whoever_has_told_it() -> None:
    told = {key: value for key, value in STATS.items() if key != "completions_sha256"}
    facts = evaluation_facts({**told, "dtype": "bfloat16"}, METRICS)
    assert differing([facts], [evaluation_facts(STATS, METRICS)]) == ["dtype"]
