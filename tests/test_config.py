"""Settings: every mistake at once and by key, overlays, defaults, and canonical dumps."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from gsm8k_core import config as config_module
from gsm8k_core.config import (
    Comparison,
    Config,
    DpoMethod,
    ExpertIterationMethod,
    GrpoMethod,
    LoraSettings,
    Settings,
    doubts,
    dump,
    load_config,
    merge,
    parse_config,
    read_yaml,
    settings_from,
)
from gsm8k_core.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SELECTING = (ExpertIterationMethod, DpoMethod)
RAW: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
KL_IN_REWARD = {"kl_coefficient": 0.05, "kl_placement": "reward", "kl_estimator": "k1"}
WRONG_REWARDS = (
    ({"answer": 0},
     "every part has weight 0, and nothing would be learned: set answer: 1, or custom"),
    ({"length_shaping": {"start": 8, "end": 9}},
     "length_shaping needs a length weight other than 0, such as length: 1"),
    ({"custom_weight": 0.5}, "custom_weight needs custom: 'module:function'"),
    ({"custom": ":score"}, "custom must be 'module:function'"),
    ({"custom": "my_reward:"}, "custom must be 'module:function'"),
    ({"custom": "my/reward.py:score"},
     "custom names a module, not its file: write 'my.reward:score'"),
    ({"custom": "./my_reward.py:score"},
     "custom names a module, not its file: write 'my_reward:score'"),
)  # fmt: skip


def mistakes(overlay: dict[str, Any]) -> list[str]:
    """The lines of the error that the repository's config gives under `overlay`, less the first."""
    with pytest.raises(ConfigError) as caught:
        parse_config(merge(RAW, overlay))
    first, *lines = str(caught.value).split("\n")
    assert first == f"{len(lines)} mistake{'s' if len(lines) > 1 else ''} in the config:"
    return [line.strip() for line in lines]


def small() -> dict[str, Any]:
    """The smallest config that is valid."""
    return {
        "study": {
            "name": "s", "dataset": "d", "models": ["m"], "methods": ["base", "sft"],
            "seeds": [0, 1], "suites": ["t"],
        },
        "datasets": {"d": {"kind": "arithmetic"}},
        "prompts": {"p": {}},
        "models": {"m": {"source": "embedded", "prompt": "p"}},
        "methods": {"base": {"kind": "base"}, "sft": {"kind": "sft"}},
        "suites": {"t": {"dataset": "d"}},
    }  # fmt: skip


def test_the_smallest_config_is_valid() -> None:
    assert parse_config(small()).study.seeds == [0, 1]


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_of_the_repository_is_valid(path: Path) -> None:
    config = load_config(ROOT / "config.yaml", [path])
    assert config.study.name == path.stem
    for model in config.study.models:
        for method in config.study.methods:
            if config.parent_of(method) is not None:
                config.run_settings(model, method, 0)


def test_the_default_study_of_the_repository_is_valid() -> None:
    assert load_config(ROOT / "config.yaml").study.name == "default"


# mistakes


def test_all_mistakes_are_reported_at_once_each_by_its_key() -> None:
    lines = mistakes(
        {
            "study": {"seeds": [0, 1, 0], "suites": ["arithmetc"]},
            "methods": {
                "grpo": {"learning_rate": -1.0, "clip_hihg": 0.3},
                "rft": {"from": "stf"},
                "lost": {"kind": "sft", "from": "found"},
                "found": {"kind": "sft", "from": "lost"},
            },
            "suites": {"gsm8k": {"dataset": "gsm9k"}},
            "models": {"tiny-qwen2": {"source": "hub"}},
        }
    )
    assert sorted(line.split(": ")[0] for line in lines) == [
        "methods.grpo.clip_hihg",
        "methods.grpo.learning_rate",
        "methods.lost.from",
        "methods.rft.from",
        "models.tiny-qwen2",
        "study.seeds",
        "study.suites",
        "suites.gsm8k.dataset",
    ]


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        (
            {"methods": {"grpo": {"clip_hihg": 0.3}}},
            "methods.grpo.clip_hihg: unknown key; did you mean 'clip_high'?",
        ),
        (
            {"methods": {"grpo": {"reward": {"anser": 1}}}},
            "methods.grpo.reward.anser: unknown key; did you mean 'answer'?",
        ),
        (
            {"methods": {"sft": {"lora": {"ranks": 4}}}},
            "methods.sft.lora.ranks: unknown key; did you mean 'rank'?",
        ),
        (
            {"suites": {"gsm8k": {"marker": "\\boxed{}"}}},
            "suites.gsm8k.marker: the marker of \\boxed{} is called 'boxed'",
        ),
        (
            {"methods": {"lora": {"kind": "sft", "from": "base", "lerning_rate": 0.1}}},
            "methods.lora.lerning_rate: unknown key; did you mean 'learning_rate'?",
        ),
        (
            {"suites": {"selection": {"dataset": "gsm8k", "num_sample": 4}}},
            "suites.selection.num_sample: unknown key; did you mean 'num_samples'?",
        ),
        ({"studdy": {}}, "studdy: unknown key; did you mean 'study'?"),
        ({"study": {"sedes": [1]}}, "study.sedes: unknown key; did you mean 'seeds'?"),
        (
            {"datasets": {"arithmetic": {"num_tset": 3}}},
            "datasets.arithmetic.num_tset: unknown key; did you mean 'num_test'?",
        ),
        (
            {"methods": {"grpo": {"learning_rate": -0.1}}},
            "methods.grpo.learning_rate: input should be greater than 0, found -0.1",
        ),
        (
            {"suites": {"gsm8k": {"dataset": "gsm9k"}}},
            "suites.gsm8k.dataset: no dataset 'gsm9k'; did you mean 'gsm8k'?",
        ),
        (
            {"methods": {"grpo": {"from": "stf"}}},
            "methods.grpo.from: no method 'stf'; did you mean 'sft'?",
        ),
        (
            {"methods": {"gropo": {"learning_rate": 1e-6}}},
            "methods.gropo.kind: missing; expected one of base, dpo, expert_iteration, grpo, sft "
            "(or did you mean methods.grpo?)",
        ),
        (
            {"methods": {"mine": {"kind": "ppo"}}},
            "methods.mine.kind: no kind 'ppo'; did you mean 'dpo'?",
        ),
        (
            {"datasets": {"other": {"platinum": True}}},
            "datasets.other.kind: missing; expected one of arithmetic, gsm8k, gsm_symbolic",
        ),
        (
            {"models": {"tiny-qwen": {"prompt": "plain"}}},
            "models.tiny-qwen.source: missing, and it has no default (or did you mean "
            "models.tiny-qwen2?)",
        ),
        *(
            (
                {"methods": {"grpo": {"advantage": advantage, "group_size": 1}}},
                f"methods.grpo: advantage: {advantage} needs group_size of 2 or more",
            )
            for advantage in ("group_zscore", "group_centered", "leave_one_out")
        ),
        ({"study": {"seeds": [3, 1, 3]}}, "study.seeds: listed twice: 3"),
        ({"study": {"models": ["tiny-qwen2"] * 2}}, "study.models: listed twice: tiny-qwen2"),
        (
            {"study": {"dataset": "xyzzy"}},
            "study.dataset: no dataset 'xyzzy'; there are: arithmetic, gsm8k, "
            "gsm8k_lm_eval, gsm8k_platinum, gsm_symbolic",
        ),
        (
            {"defaults": {"grop": {}}},
            "defaults.grop: no such kind; expected sft, expert_iteration, dpo or grpo",
        ),
        (
            {"models": {"x": {"source": "hub", "hub_id": "a/b", "prompt": "plain"}}},
            "models.x: source: hub needs revision",
        ),
        (
            {"models": {"tiny-qwen2": {"prompt": "lm_eval_5shot"}}},
            "models.tiny-qwen2.prompt: 'lm_eval_5shot' shows the examples of each test problem, "
            "but training problems have none; name it in a suite",
        ),
        (
            {"suites": {"gsm8k": {"prompt": "lm_eval_5shot"}}},
            "suites.gsm8k.prompt: 'lm_eval_5shot' shows each problem's own examples; use a "
            "dataset with examples_per_test_problem, and its test split",
        ),
        (
            {"suites": {"gsm8k_lm_eval": {"split": "val"}}},
            "suites.gsm8k_lm_eval.prompt: 'lm_eval_5shot' shows each problem's own examples; use "
            "a dataset with examples_per_test_problem, and its test split",
        ),
        (
            {"prompts": {"plain": {"template": "{question} {question}"}}},
            "prompts.plain: template must contain {question} exactly once",
        ),
        (
            {"datasets": {"models": {"kind": "arithmetic"}}},
            "datasets.models: the name is taken by a folder of artifacts/",
        ),
        (
            {"suites": {"gsm8k": {"greedy": False}}},
            "suites.gsm8k: asks for no completion: set greedy: true or num_samples above 0",
        ),
        (
            {"methods": {"grpo": {"prompts_per_step": 32, "minibatches": 3}}},
            "methods.grpo: minibatches (3) must divide prompts_per_step (32)",
        ),
        (
            {"methods": {"grpo": {"reference_refresh_steps": 5}}},
            "methods.grpo: reference_refresh_steps needs kl_coefficient above 0",
        ),
        *(
            (
                {"methods": {"grpo": {"objective": objective, "dual_clip": 3.0, "minibatches": 1}}},
                "methods.grpo: dual_clip needs objective: ppo_clip",
            )
            for objective in ("cispo", "reinforce")
        ),
        *(
            (
                {"methods": {"dr_grpo": {**KL_IN_REWARD, "kl_estimator": estimator}}},
                "methods.dr_grpo: kl_placement: reward needs kl_estimator: k1: as a reward, k2 and "
                "k3 do not have the gradient of the KL",
            )
            for estimator in ("k2", "k3")
        ),
        (
            {"methods": {"grpo": {**KL_IN_REWARD, "kl_placement": "loss"}}},
            "methods.grpo: kl_placement: loss does not go with kl_estimator: k1, whose gradient is "
            "0 in expectation: take k2 or k3, or kl_placement: reward",
        ),
        *(
            ({"methods": {"grpo": {"reward": reward}}}, f"methods.grpo.reward: {said}")
            for reward, said in WRONG_REWARDS
        ),
        (
            {"methods": {"reinforce": {"dynamic_sampling": True, "group_size": 1}}},
            "methods.reinforce: dynamic_sampling needs group_size of 2 or more: a group of one has "
            "no spread",
        ),
        (
            {"methods": {"reinforce_pp": {"dynamic_sampling": True}}},
            "methods.reinforce_pp: dynamic_sampling does not go with advantage: batch_zscore, "
            "which learns from a group of equal rewards by comparing it with the others: set one "
            "of them",
        ),
        (
            {"methods": {"grpo": KL_IN_REWARD}},
            "methods.grpo: kl_placement: reward does not go with advantage: group_zscore: in a "
            "group that is all right or all wrong it would scale differences of KL to spread 1, "
            "whatever kl_coefficient is; take group_centered, leave_one_out or batch_zscore",
        ),
        (
            {"methods": {"rloo": {**KL_IN_REWARD, "mask_truncated": True}}},
            "methods.rloo: kl_placement: reward does not go with mask_truncated: truncated "
            "completions would pay no KL, yet count in what others are compared with; set one of "
            "them",
        ),
        *(
            (
                {"methods": {"rloo": several}},
                "methods.rloo: objective: reinforce has no ratio to correct what was sampled "
                "before an update: set minibatches: 1 and epochs_per_batch: 1, or take ppo_clip or "
                "cispo",
            )
            for several in ({"minibatches": 4}, {"epochs_per_batch": 2})
        ),
        (
            {"methods": {"Big Name": {"kind": "sft"}}},
            "methods.Big Name: names are lower-case letters, digits, '.', '_' and '-'",
        ),
    ],
)
def test_a_mistake_says_what_would_be_right(overlay: dict[str, Any], line: str) -> None:
    assert mistakes(overlay) == [line]


def test_all_that_contradicts_itself_is_told_at_once_where_values_are_right_by_themselves() -> None:
    four = {
        "prompts_per_step": 30, "group_size": 1, "overlong_buffer": 64, "dual_clip": 0.5,
        "keep_best": True,
    }  # fmt: skip
    lines = [
        "methods.grpo: keep_best needs validate_every_steps above 0",
        "methods.grpo: dual_clip must be above 1",
        "methods.grpo: minibatches (4) must divide prompts_per_step (30)",
        "methods.grpo: advantage: group_zscore needs group_size of 2 or more",
        "methods.grpo: overlong_buffer (64) must be below max_new_tokens (48)",
    ]
    assert mistakes({"methods": {"grpo": four}}) == lines
    bad = {"methods": {"grpo": {**four, "prompts_per_step": 0}}, "study": {"seeds": [-1]}}
    both = [
        "study.seeds.0: input should be greater than or equal to 0, found -1",
        "methods.grpo.prompts_per_step: input should be greater than 0, found 0",
    ]
    assert mistakes(bad) == both  # and then, these two mended, what is above
    elsewhere = {"methods": {"grpo": four}, "study": {"seeds": [-1]}}
    assert mistakes(elsewhere) == [both[0], *lines]
    two = {"prompts": {"plain": {"template": "", "system": "s"}}}
    assert len(mistakes(two)) == 2


def test_what_contradicts_itself_in_the_defaults_is_told_once_and_as_theirs() -> None:
    line = "defaults.grpo: minibatches (5) must divide prompts_per_step (32)"
    assert mistakes({"defaults": {"grpo": {"minibatches": 5}}}) == [line]
    own = {"defaults": {"grpo": {"minibatches": 5}}, "methods": {"grpo": {"prompts_per_step": 31}}}
    assert mistakes(own) == [
        "methods.grpo: minibatches (5) must divide prompts_per_step (31)", line
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "overlay"),
    [
        ("study.seeds.0", {"study": {"seeds": [True]}}),
        ("study.confidence", {"study": {"confidence": True}}),
        ("suites.gsm8k.limit", {"suites": {"gsm8k": {"limit": yaml.safe_load("yes")}}}),
        ("methods.sft.num_steps", {"methods": {"sft": {"num_steps": True}}}),
        ("defaults.sft.learning_rate", {"defaults": {"sft": {"learning_rate": True}}}),
        ("methods.grpo.reward.answer", {"methods": {"grpo": {"reward": {"answer": True}}}}),
        ("datasets.arithmetic.seed", {"datasets": {"arithmetic": {"seed": True}}}),
        ("vllm.max_sequences", {"vllm": {"max_sequences": True}}),
    ],
)
def test_yes_is_no_number(key: str, overlay: dict[str, Any]) -> None:
    meant = "expected a number, found true (in YAML, yes and on mean true, no and off false)"
    assert mistakes(overlay) == [f"{key}: {meant}"]


def test_a_comparison_by_hand_says_which_method_lacks_what() -> None:
    given: dict[str, Any] = {
        "name": "s", "models": ["m"], "methods": ["base", "sft"], "suites": ["t"],
        "seeds": [0, 1],
        "chains": {"base": ["base"], "sft": ["base", "sft"]}, "confidence": 0.95,
    }  # fmt: skip

    def said(**changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            settings_from(json.dumps({**given, **changes}), Comparison, "--study")
        return str(caught.value)

    study = settings_from(json.dumps(given), Comparison)
    assert [study.seeds_of(method) for method in study.methods] == [[0], [0, 1]]
    assert [study.parent_of(method) for method in study.methods] == [None, "base"]
    assert said(chains={"sft": ["base"]}) == (
        "--study: chains: the stages of the method 'base' are missing; chains: the stages of the "
        "method 'sft' are missing"
    )
    assert said(confidence=1.5) == "--study: confidence: Input should be less than 1"
    assert "seeds: List should have at least 1 item" in said(seeds=[])


def test_a_comparison_knows_the_size_of_the_report() -> None:
    config = parse_config(merge(small(), {"study": {"report_megabytes": 7.5}}))
    assert config.comparison().report_megabytes == 7.5
    assert parse_config(small()).comparison().report_megabytes == 20.0


def numbers_in(annotation: Any) -> Iterator[Any]:
    """The parts of an annotation that take a number and no bool, with what is checked of them."""
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        if inner[0] in (int, float):
            yield annotation
        else:
            yield from numbers_in(inner[0])
    elif annotation in (int, float):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for part in inner:
            if bool not in inner or part not in (int, float):
                yield from numbers_in(part)


def takes_yes(number: Any) -> bool:
    try:
        TypeAdapter(number).validate_python(True)
    except ValidationError:
        return False
    return True


def test_no_setting_that_is_a_number_takes_yes() -> None:
    sections = [kind for kind in vars(config_module).values()
                if isinstance(kind, type) and issubclass(kind, Settings)]  # fmt: skip
    numbers = [
        (f"{section.__name__}.{name}", number)
        for section in sections
        for hints in [get_type_hints(section, include_extras=True)]
        for name in section.model_fields
        for number in numbers_in(hints[name])
    ]
    assert len({name for name, _ in numbers}) > 100
    assert [name for name, number in numbers if takes_yes(number)] == []


@pytest.mark.parametrize("name", ["reinforce", "rloo", "dr_grpo", "reinforce_pp"])
def test_kl_in_the_reward_goes_with_advantages_that_keep_its_size(name: str) -> None:
    settings = parse_config(merge(RAW, {"methods": {name: KL_IN_REWARD}})).methods[name]
    assert isinstance(settings, GrpoMethod) and settings.kl_placement == "reward"


def test_a_method_that_starts_from_itself_through_others_is_one_circle() -> None:
    three = {
        name: {"kind": "sft", "from": parent}
        for name, parent in [("a", "b"), ("b", "c"), ("c", "a")]
    }
    assert mistakes({"methods": three}) == ["methods.a.from: goes in a circle: a → b → c → a"]
    assert mistakes({"methods": {"self": {"kind": "sft", "from": "self"}}}) == [
        "methods.self.from: goes in a circle: self → self"
    ]


def test_a_missing_base_method_is_said() -> None:
    raw = small()
    del raw["methods"]["base"]
    raw["study"]["methods"] = ["sft"]
    with pytest.raises(ConfigError, match=r"methods.sft.from: defaults to 'base', which is missin"):
        parse_config(raw)


def test_a_missing_section_is_named() -> None:
    raw = small()
    del raw["suites"]
    with pytest.raises(ConfigError, match="suites: missing, and it has no default"):
        parse_config(raw)


def test_an_overlay_alone_is_told_what_it_lies_over() -> None:
    with pytest.raises(ConfigError, match=r"models: missing, .*; is this an overlay\? then"):
        parse_config({"study": RAW["study"]})


@pytest.mark.parametrize(
    "overlay",
    [
        {"methods": {"grpo": {"kind": ["grpo"]}}},
        {"methods": {"grpo": {"from": ["sft"]}}},
        {"methods": {"grpo": {"from": None}}},
        {"methods": {"grpo": {"kind": "ppo"}}},
        {"methods": {"grpo": 3}},
        {"methods": []},
        {"defaults": {"grpo": 5}},
        {"defaults": 5},
        {"study": None},
        {"study": {"models": "tiny-qwen2"}},
        {"suites": {"gsm8k": {"stop": [""]}}},
        {"suites": {1: {"dataset": "gsm8k"}}},
        {"models": {1: {"source": "embedded"}}, "study": {"models": ["nothing"]}},
        *({"methods": {name: body}} for name in (1, None) for body in (5, [1], {"kind": ["x"]})),
        {"methods": {"grpo": {"learning_rate": float("nan")}}},
        {"methods": {"grpo": {"weight_decay": float("inf")}}},
        {"methods": {"grpo": {"learning_rate": float("inf")}}},
        {"methods": {"grpo": {"temperature": float("inf")}}},
        {"methods": {"grpo": {"dual_clip": float("nan")}}},
        {"methods": {"grpo": {"reward": {"answer": float("nan")}}}},
    ],
)
def test_values_of_the_wrong_shape_are_mistakes_and_not_crashes(overlay: dict[str, Any]) -> None:
    assert mistakes(overlay)


# overlays and defaults


def test_overlays_merge_dicts_and_replace_lists_and_scalars() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "list": [1, 2, 3], "scalar": 1}
    overlay = {"a": {"y": {"w": 3}}, "list": [9], "scalar": {"now": "a dict"}}
    assert merge(base, overlay) == {
        "a": {"x": 1, "y": {"z": 2, "w": 3}},
        "list": [9],
        "scalar": {"now": "a dict"},
    }
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "list": [1, 2, 3], "scalar": 1}


def test_overlay_files_apply_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("study: {name: one, seeds: [5, 6]}\n", encoding="utf-8")
    second.write_text("study: {name: two}\n", encoding="utf-8")
    study = load_config(ROOT / "config.yaml", [first, second]).study
    assert (study.name, study.seeds, study.dataset) == ("two", [5, 6], "arithmetic")


def test_defaults_apply_by_kind_and_a_methods_own_settings_win() -> None:
    raw = small() | {"defaults": {"sft": {"num_steps": 7, "batch_size": 3}, "grpo": {}}}
    raw["methods"] |= {
        "own": {"kind": "sft", "num_steps": 9},
        "grpo": {"kind": "grpo"},
    }
    config = parse_config(raw)
    assert [config.trained(m).num_steps for m in ("sft", "own", "grpo")] == [7, 9, 500]
    assert config.trained("own").model_dump()["batch_size"] == 3


def test_a_mistake_in_defaults_is_named_where_it_stands() -> None:
    # Two methods of the kind inherit it: one mistake, at the key that the user has to mend.
    lines = mistakes({"defaults": {"expert_iteration": {"num_stpes": 3, "temperature": -1}}})
    assert sorted(lines) == [
        "defaults.expert_iteration.num_stpes: unknown key; did you mean 'num_steps'?",
        "defaults.expert_iteration.temperature: input should be greater than 0, found -1",
    ]


# files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe", "not valid YAML"),
        (b"- 1\n", "expected a mapping"),
        (b"", "expected a mapping"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(ROOT / "config.yaml", [path])
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml")


def test_a_folder_is_named_and_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "config.yaml", [tmp_path])
    assert str(caught.value) == f"{tmp_path}: Is a directory"


def test_paths_may_be_texts(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("study: {seeds: [7]}", encoding="utf-8")
    assert load_config(str(ROOT / "config.yaml"), [str(overlay)]).study.seeds == [7]
    with pytest.raises(ConfigError, match="none: no such file"):
        load_config("none")


# what runs depend on


def reverse_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reverse_keys(value[key]) for key in reversed(value)}
    return value


def all_run_settings(config: Config) -> dict[tuple[str, str, int], str]:
    return {
        (model, method, seed): dump(config.run_settings(model, method, seed))
        for model in config.models
        for method in config.methods
        if config.parent_of(method) is not None
        for seed in (0, 1)
    }


def test_dump_does_not_depend_on_the_order_of_keys() -> None:
    assert all_run_settings(parse_config(RAW)) == all_run_settings(parse_config(reverse_keys(RAW)))


def test_dump_does_not_depend_on_the_order_of_keys_inside_a_value() -> None:
    one = {"kind": "gsm8k", "digests": {"train": "a", "test": "b"}}
    datasets = [parse_config(small() | {"datasets": {"d": order}}).datasets["d"]
                for order in (one, reverse_keys(one))]  # fmt: skip
    assert dump(datasets[0]) == dump(datasets[1])


@pytest.mark.parametrize(
    "files", [[], *([path] for path in sorted((ROOT / "studies").glob("*.yaml")))], ids=str
)
def test_a_dump_of_any_section_gives_back_the_same_settings(files: list[Path]) -> None:
    config = load_config(ROOT / "config.yaml", files)
    sections: list[Any] = [config, config.study, config.comparison()]
    for registry in (config.datasets, config.models, config.methods, config.suites, config.prompts):
        sections += registry.values()
    for model in config.study.models:
        for method in config.stages():
            if config.methods[method].kind != "base":
                sections.append(config.run_settings(model, method, 1))
        sections += [
            config.evaluation_settings(model, config.study.methods[0], 0, suite)
            for suite in config.study.suites
        ]
    for settings in sections:
        again = type(settings).model_validate(json.loads(dump(settings)))
        assert again == settings and dump(again) == dump(settings)


def test_a_setting_that_an_update_adds_changes_no_dump() -> None:
    class Later(GrpoMethod):
        added: int = 3
        nested: LoraSettings = LoraSettings()

    given: dict[str, Any] = {"kind": "grpo", "learning_rate": 0.123}
    assert dump(Later(**given)) == dump(GrpoMethod(**given))
    assert json.loads(dump(Later(**given, added=4))) == {**given, "added": 4}


def test_kinds_tell_whether_they_train_how_often_they_sample_and_what_they_learn_from() -> None:
    kinds: list[tuple[dict[str, Any], bool, int]] = [
        ({"kind": "base"}, False, 0),
        ({"kind": "sft"}, True, 0),
        ({"kind": "sft", "dataset": "own"}, True, 0),
        ({"kind": "expert_iteration", "rounds": 3}, True, 3),
        ({"kind": "dpo"}, True, 1),
        ({"kind": "grpo"}, True, 0),
    ]
    raw = small()
    raw["datasets"]["own"] = {"kind": "arithmetic"}
    raw["methods"] |= {f"m{number}": given for number, (given, _, _) in enumerate(kinds)}
    config = parse_config(raw)
    for number, (given, trains, sampling_rounds) in enumerate(kinds):
        method = config.methods[f"m{number}"]
        assert (method.trains, method.sampling_rounds) == (trains, sampling_rounds)
        assert config.dataset_of(f"m{number}") == given.get("dataset", "d")
        assert json.loads(dump(method)) == given  # no setting, but what follows from them


def test_a_learning_rate_changes_the_settings_of_its_method_alone() -> None:
    before = all_run_settings(parse_config(RAW))
    after = all_run_settings(
        parse_config(merge(RAW, {"methods": {"grpo": {"learning_rate": 0.123}}}))
    )
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key in before if key[1] == "grpo"} != set()


def test_threads_and_memory_do_not_fetch_the_weights_again() -> None:
    changed = merge(RAW, {"models": {"tiny-qwen2": {"threads": 7, "mem_mb": 9}}})
    one, two = parse_config(RAW), parse_config(changed)
    assert len({dump(found.models["tiny-qwen2"].starting_weights()) for found in (one, two)}) == 1


def test_stages_parents_and_seeds() -> None:
    config = parse_config(RAW)
    assert config.method_chain("rft") == ["base", "sft", "rft"]
    alone = parse_config(merge(RAW, {"study": {"methods": ["rft", "grpo"]}}))
    assert alone.stages() == ["base", "sft", "rft", "grpo"]
    assert config.parent_of("base") is None
    assert config.seeds_of("base") == [0]
    assert config.seeds_of("rft") == config.study.seeds
    with pytest.raises(ConfigError, match=r"methods\.base: kind base trains nothing"):
        config.trained("base")


def test_rounds_of_expert_iteration_see_other_problems_each_round_and_seed() -> None:
    config = parse_config(RAW)
    seeds = [
        config.round_generation_settings(
            "tiny-qwen2", "rft", seed, number
        ).suite_settings.shuffle_seed
        for seed in range(3)
        for number in range(1, 4)
    ]
    assert len(set(seeds)) == 9
    suite = config.round_generation_settings("tiny-qwen2", "rft", 0, 1).suite_settings
    assert (suite.split, suite.greedy, suite.limit) == ("train", False, 2000)


def test_settings_cannot_be_changed_after_checking() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(small()).study.name = "other"


def test_more_gpus_than_one_are_no_reason_to_train_again_but_one_instead_of_none_is() -> None:
    dumps = {
        gpus: dump(
            parse_config(merge(RAW, {"models": {"tiny-qwen2": {"gpus": gpus}}}))
            .run_settings("tiny-qwen2", "sft", 0)
            .without_resources()
        )
        for gpus in (0, 1, 4)
    }
    assert dumps[0] != dumps[1] == dumps[4]


JOBS: list[Callable[[Config], Any]] = [
    lambda config: config.run_settings("tiny-qwen2", "grpo", 0),
    lambda config: config.evaluation_settings("tiny-qwen2", "grpo", 0, "arithmetic"),
    lambda config: config.round_generation_settings("tiny-qwen2", "rft", 0, 1),
]


def deciding(settings: Any) -> str:
    """What the workflow compares of a job's settings."""
    return dump(settings.without_resources())


def test_more_memory_or_threads_is_no_reason_to_train_again(config: Config) -> None:
    raw = config.model_dump(mode="json", by_alias=True)
    raw["models"]["tiny-qwen2"] |= {"mem_mb": 9000, "threads": 7}
    changed = parse_config(raw)
    for build in JOBS:
        assert deciding(build(changed)) == deciding(build(config))


def test_vllms_share_of_memory_and_gpus_is_no_reason_to_train_or_generate_again(
    config: Config,
) -> None:
    raw = config.model_dump(mode="json", by_alias=True)
    of_evaluation = {"gpu_memory_fraction": 0.5, "tensor_parallel": 2}
    of_rollouts = {"rollout_gpu_memory_fraction": 0.3, "sleep_level": 1}
    of_both = {"max_sequences": 99}
    memory = {**of_evaluation, **of_rollouts, **of_both}
    raw["models"]["tiny-qwen2"] |= {"gpus": 2, "vllm": memory}
    changed = parse_config(raw)
    raw["models"]["tiny-qwen2"]["gpus"] = 1
    raw["models"]["tiny-qwen2"]["vllm"] = {"tensor_parallel": 1}
    plain = parse_config(raw)
    for build in JOBS:
        assert deciding(build(changed)) == deciding(build(plain))
    # The job is told all the same, by flags, each job what it reads.
    for method, own in ((None, of_evaluation), ("grpo", of_rollouts)):
        told = {f"vllm_{key}": value for key, value in {**own, **of_both}.items()}
        found = plain.resources("tiny-qwen2", method)
        assert changed.resources("tiny-qwen2", method) == found | told
        assert not told.keys() & found.keys()


def test_what_running_out_of_memory_or_time_changes_is_no_reason_to_train_again(
    config: Config,
) -> None:
    raw = config.model_dump(mode="json", by_alias=True)
    of_method = {
        "tokens_per_microbatch": 512,
        "gradient_checkpointing": True,
        "checkpoint_every_steps": 7,
        "keep_checkpoints": 1,
    }
    of_model = {"completions_per_batch": 8, "compile_layers": True}
    raw["methods"]["grpo"] |= of_method
    raw["models"]["tiny-qwen2"] |= of_model
    changed = parse_config(raw)
    for build in JOBS:
        assert deciding(build(changed)) == deciding(build(config))
    assert changed.resources("tiny-qwen2", "grpo") == {**of_method, **of_model}
    assert changed.resources("tiny-qwen2") == {"completions_per_batch": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"engine": "vllm"},
        {"vllm": {"dtype": "bfloat16"}},
        {"vllm": {"kv_cache_dtype": "fp8"}},
        {"vllm": {"max_model_length": 99}},
    ],
)
def test_what_decides_a_number_is_a_reason_to_make_it_again(
    config: Config, changes: dict[str, Any]
) -> None:
    changed = parse_config(merge(RAW, {"models": {"tiny-qwen2": changes}}))
    for build in JOBS:
        assert deciding(build(changed)) != deciding(build(config))


@pytest.mark.parametrize("method", ["sft", "rft", "dpo", "grpo"])
def test_every_setting_of_a_method_but_four_is_a_reason_to_train_again(
    config: Config, method: str
) -> None:
    settings = config.run_settings("tiny-qwen2", method, 0)
    fields = type(settings.method_settings).model_fields
    others = settings.method_settings.model_copy(update=dict.fromkeys(fields, "other"))
    kept = settings.model_copy(update={"method_settings": others}).without_resources()
    assert {key for key in fields if getattr(kept.method_settings, key) != "other"} == {
        "tokens_per_microbatch", "gradient_checkpointing", "checkpoint_every_steps",
        "keep_checkpoints",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["rft", "dpo"])
def test_what_a_method_learns_from_is_sampled_as_its_settings_say(method: str) -> None:
    how = {"prompts_per_round": 7, "completions_per_prompt": 3, "temperature": 0.6}
    config = parse_config(merge(RAW, {"methods": {method: {**how, "max_new_tokens": 99}}}))
    suite = config.round_generation_settings("tiny-qwen2", method, 0, 1).suite_settings
    assert (suite.limit, suite.num_samples, suite.temperature) == (7, 3, 0.6)
    assert (suite.max_new_tokens, suite.dataset) == (99, config.study.dataset)


def test_a_suite_s_prompt_is_for_evaluation_alone_and_goes_before_the_model_s() -> None:
    suites = {"arithmetic": {"prompt": "chat_boxed"}}
    config = parse_config(merge(RAW, {"suites": suites}))
    suite, own = config.prompts["chat_boxed"], config.prompts["plain"]
    asked = config.evaluation_settings("tiny-qwen2", "grpo", 0, "arithmetic")
    assert asked.prompt == suite != own
    assert config.grading_settings("tiny-qwen2", "arithmetic").marker == suite.answer_marker
    assert config.run_settings("tiny-qwen2", "grpo", 0).prompt == own
    assert config.round_generation_settings("tiny-qwen2", "rft", 0, 1).prompt == own


def test_more_gpus_to_share_a_model_than_it_has_are_refused(config: Config) -> None:
    raw = config.model_dump(mode="json", by_alias=True)
    raw["models"]["tiny-qwen2"] |= {"gpus": 2, "vllm": {"tensor_parallel": 4}}
    message = "models.tiny-qwen2: vllm.tensor_parallel is 4, but gpus is only 2"
    with pytest.raises(ConfigError, match=message):
        parse_config(raw)
    others = ["smollm2-135m-instruct"]
    assert parse_config({**raw, "study": {**raw["study"], "models": others}})  # nothing is asked
    raw["models"]["tiny-qwen2"]["engine"] = "transformers"  # which takes one for its own
    assert parse_config(raw).models["tiny-qwen2"].gpus_generating == 1


def test_the_readme_s_study_of_one_s_own_is_one() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = textwrap.dedent("  " + text.partition("```yaml\n")[2].partition("```")[0].lstrip())
    shipped = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    config = parse_config(merge(shipped, yaml.safe_load(example)))
    method = config.methods["my_grpo"]
    assert isinstance(method, GrpoMethod) and method.reward.custom == "my_reward:score"
    assert config.stages() == ["base", "sft", "my_grpo"]


def test_one_overlay_that_is_no_list_is_refused() -> None:
    with pytest.raises(TypeError, match=r"overlays is one path: pass \['studies/presets.yaml'\]"):
        load_config(ROOT / "config.yaml", "studies/presets.yaml")  # type: ignore[arg-type]


def test_another_prompt_does_not_fetch_the_weights_again(config: Config) -> None:
    raw = config.model_dump(mode="json", by_alias=True)
    raw["models"]["tiny-qwen2"]["prompt"] = "chat_hash"
    changed = parse_config(raw)
    both = (changed, config)
    assert len({dump(found.models["tiny-qwen2"].starting_weights()) for found in both}) == 1
    assert changed.run_settings("tiny-qwen2", "sft", 0) != config.run_settings(
        "tiny-qwen2", "sft", 0
    )


def test_a_parent_in_the_defaults_must_exist_too(config: Config) -> None:
    raw = config.model_dump(mode="json", by_alias=True)
    raw["methods"]["dpo"] = {"kind": "dpo"}
    raw["defaults"] = {"dpo": {"from": "sftt"}}
    with pytest.raises(ConfigError, match=r"methods.dpo.from: no method 'sftt'; did you mean"):
        parse_config(raw)


def test_a_study_of_a_real_model_is_told_what_it_has_inherited_from_the_embedded_one() -> None:
    shipped = load_config(ROOT / "config.yaml")

    def line(overlay: dict[str, Any]) -> str:
        raw = merge(read_yaml(ROOT / "config.yaml"), overlay)
        return doubts(parse_config(raw), shipped, [overlay])

    study = {"models": ["smollm2-135m-instruct"], "methods": ["sft", "grpo", "dapo", "dpo"]}
    names, _, remedy = line({"study": study}).partition(": ")
    assert names.split(", ") == [
        "defaults.dpo.learning_rate (0.0001)",
        "defaults.dpo.max_new_tokens (48)",
        "defaults.grpo.learning_rate (0.0003)",
        "defaults.grpo.max_new_tokens (48)",
        "defaults.sft.learning_rate (0.004)",
    ]
    assert "from config.yaml for smollm2-135m-instruct. Set them in your study" in remedy
    # Said once, or meant: a rate of one's own, however high, adapters, the embedded model.
    own: dict[str, dict[str, Any]] = {
        "sft": {"lora": {"rank": 8}},
        "grpo": {
            "learning_rate": 5e-4, "max_new_tokens": 60, "importance_correction": "none",
        },
        "dpo": {"learning_rate": 1e-6, "max_new_tokens": 256},
    }  # fmt: skip
    assert line({"study": study, "defaults": own}) == ""
    assert line({}) == ""
    longer = {**own, "grpo": {**own["grpo"], "learning_rate": 1e-6, "max_new_tokens": 256}}
    assert line({"study": study, "defaults": longer}) == (
        "methods.dapo.overlong_buffer: 8 of 256 new tokens, so a completion is punished only just "
        "before it is cut (DAPO: a fifth). Set it in your study."
    )
    set_too = {"study": study, "defaults": longer, "methods": {"dapo": {"overlong_buffer": 51}}}
    assert line(set_too) == ""
    # Of a model that somebody adds, float32 on a GPU is seldom meant.
    added = {"source": "hub", "hub_id": "a/b", "revision": "0" * 40, "prompt": "plain"}
    of_added = {"study": {**study, "models": ["b"]}, "defaults": own, "models": {"b": added}}
    assert line(of_added).startswith("models.b.dtype: dtype is unset and defaults to float32")
    for meant in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"gpus": 0}):
        assert line({**of_added, "models": {"b": {**added, **meant}}}) == ""
    studies = {path.stem: read_yaml(path) for path in sorted((ROOT / "studies").glob("*.yaml"))}
    variants = studies.pop("grpo-variants")
    for own in (*studies.values(), merge(studies["qwen2.5-gsm8k"], variants)):
        assert line(own) == ""


def test_a_study_is_told_of_a_dataset_that_no_suite_asks_where_one_of_the_two_is_inherited() -> (
    None
):
    shipped = load_config(ROOT / "config.yaml")

    def line(*studies: dict[str, Any], **suite: Any) -> str:
        own = {
            "datasets": {"mine": {"kind": "arithmetic", "seed": 7}},
            "suites": {"of_mine": {"dataset": "mine"}, "arithmetic": suite},
        }
        raw = merge(read_yaml(ROOT / "config.yaml"), own)
        overlays = [{"study": study} for study in studies]
        for overlay in overlays:
            raw = merge(raw, overlay)
        return doubts(parse_config(raw), shipped, overlays)

    assert line({"dataset": "mine"}) == (
        "study.suites: arithmetic, which is inherited, asks problems of arithmetic, and the "
        "methods learn from mine. Name a suite with dataset: mine."
    )
    for meant in (["of_mine"], ["arithmetic", "of_mine"], ["gsm8k"]):
        assert line({"dataset": "mine", "suites": meant}) == ""
    assert line({"dataset": "mine"}, dataset="mine") == ""
    # The toy problems, inherited by a study of GSM8K.
    for model in ("tiny-qwen2", "qwen2.5-0.5b-instruct"):
        said = line({"models": [model], "methods": ["base", "sft"], "suites": ["gsm8k"]})
        assert said.endswith(
            "study.dataset: arithmetic, which the methods learn from, is inherited, and "
            "study.suites (gsm8k) asks problems of gsm8k. Set study.dataset in your file too."
        )
    assert line({"methods": ["base"], "suites": ["gsm8k"]}) == ""  # learns from nothing
    # Of several files the last one that names either.
    both = {"dataset": "gsm8k", "suites": ["gsm8k"]}
    assert "study.suites: gsm8k, which is inherited, " in line(both, {"dataset": "mine"})
    assert line({"dataset": "mine"}, both, {"seeds": [1]}) == ""
    # GSM8K-Platinum's problems are GSM8K's own.
    assert line(both, {"suites": ["gsm8k_platinum"]}) == ""


def said_of(*overlays: dict[str, Any]) -> str:
    """What is doubted in a study."""
    raw = read_yaml(ROOT / "config.yaml")
    for overlay in overlays:
        raw = merge(raw, overlay)
    return doubts(parse_config(raw), load_config(ROOT / "config.yaml"), overlays)


def test_a_study_that_learns_from_the_templates_of_what_it_asks_is_told_so() -> None:
    def said(learnt: str, suites: list[str], **methods: Any) -> str:
        study = {"dataset": learnt, "suites": suites, "methods": ["sft"]}
        return said_of({"study": study, "methods": methods})

    practised = (
        "study.suites: gsm8k asks GSM8K's test problems, some of which the templates of "
        "gsm_symbolic, which is learned from, are made of: they have been practised."
    )
    assert said("gsm_symbolic", ["gsm8k"]) == practised
    of_method = {"kind": "sft", "dataset": "gsm_symbolic"}
    assert practised in said("gsm8k", ["gsm8k"], sft=of_method)
    assert "practised" not in said("gsm_symbolic", ["gsm_symbolic"])
    assert "practised" not in said("gsm8k", ["gsm_symbolic", "gsm8k"])


def test_worked_examples_that_end_in_another_mark_than_is_rewarded_are_doubted() -> None:
    def said(*methods: str) -> str:
        shown = {"models": {"tiny-qwen2": {"prompt": "cot_8shot"}}}
        from_base = {"methods": {"grpo": {"from": "base"}, "rft": {"from": "base"}}}
        return said_of({"study": {"methods": list(methods)}}, shown, from_base)

    assert said("base", "grpo", "rft") == (
        "models.tiny-qwen2.prompt: cot_8shot shows examples that end in 'The answer is N.', but "
        "grpo, rft reads the answer after another mark and does not stop where the next example "
        "would begin. Train with another prompt, and name this one in a suite."
    )
    assert said("base", "sft", "dr_grpo") == ""  # SFT has taught the mark


def test_rollouts_in_bfloat16_without_a_correction_are_doubted_unless_that_is_meant() -> None:
    def said(grpo: dict[str, Any], **model: Any) -> str:
        own = {"learning_rate": 1e-6, "max_new_tokens": 256, "from": "base", **grpo}
        both = {"dataset": "gsm8k", "suites": ["gsm8k"]}
        study = {"models": ["smollm2-135m-instruct"], "methods": ["grpo"], **both}
        models = {"smollm2-135m-instruct": {"gpus": 1, **model}}
        return said_of({"study": study, "methods": {"grpo": own}, "models": models})

    assert said({}) == (
        "methods.grpo.importance_correction: unset, and smollm2-135m-instruct computes in "
        "bfloat16, in which vLLM's probabilities are not the trainer's: set token (as the studies "
        "of GSM8K do), or none if that is meant."
    )
    for meant in ("none", "token"):
        assert said({"importance_correction": meant}) == ""
    for exact in ({"dtype": "float32"}, {"engine": "transformers"}, {"gpus": 0}):
        assert said({}, **exact) == ""


def test_completions_that_leave_vllm_no_room_for_a_prompt_are_refused() -> None:
    short = {"vllm": {"max_model_length": 48}}
    study = {"methods": ["base", "sft", "grpo"]}
    told = "models.tiny-qwen2: vllm.max_model_length is 48, which holds prompt and completion, and "
    assert mistakes({"study": study, "models": {"tiny-qwen2": short}}) == [
        f"{told}{where}.max_new_tokens is 48: raise the one or lower the other"
        for where in ("suites.arithmetic", "methods.grpo")
    ]
    for model in ({"vllm": {"max_model_length": 49}}, {"engine": "transformers"}):
        parse_config(merge(RAW, {"models": {"tiny-qwen2": {**short, **model}}}))


def test_a_suite_that_by_default_is_shorter_than_the_rollouts_is_doubted() -> None:
    def said(**suite: Any) -> str:
        suites = {"mine": {"dataset": "arithmetic", **suite}}
        grpo = {"grpo": {"max_new_tokens": 512}}
        study = {"suites": ["mine"], "methods": ["base", "sft", "grpo"]}
        return said_of({"study": study, "suites": suites, "methods": grpo})

    assert said() == (
        "suites.mine.max_new_tokens: unset, so completions are cut at 256 tokens, where those that "
        "methods.grpo learns from have up to 512: set it to as many."
    )
    for length in (64, 512):  # what a study says is meant
        assert said(max_new_tokens=length) == ""


def test_validation_that_is_shorter_than_the_rollouts_is_doubted() -> None:
    def said(**grpo: Any) -> str:
        return said_of({"methods": {"grpo": {"validation_max_new_tokens": 40, **grpo}}})

    assert said(validate_every_steps=10) == (
        "methods.grpo.validation_max_new_tokens: 40, where rollouts have up to 48 tokens, so "
        "validation counts as wrong what was only longer: set it to as many."
    )
    assert said(validate_every_steps=10, max_new_tokens=40) == ""
    assert said(validate_every_steps=0) == ""


def test_what_does_nothing_without_another_setting_is_doubted() -> None:
    def said(suite: dict[str, Any], **tracking: Any) -> str:
        suites = {"mine": {"dataset": "arithmetic", "max_new_tokens": 48, **suite}}
        return said_of({"study": {"suites": ["mine"]}, "suites": suites, "tracking": tracking})

    idle = "suites.mine.top_p: num_samples is 0, so all completions are greedy and this does "
    assert said({"top_p": 0.9}) == f"{idle}nothing: set num_samples."
    assert said({"top_p": 0.9, "num_samples": 2}) == ""
    alone = "tracking.mode: without tracking.project nothing is sent to W&B: name one."
    assert said({}, mode="online") == alone
    assert said({}, mode="online", project=None) == ""  # switched off
    assert said({}, mode="online", project="mine") == ""


def test_in_the_study_of_instruct_models_every_preset_starts_from_them() -> None:
    config = load_config(ROOT / "config.yaml", [ROOT / "studies" / "qwen2.5-gsm8k.yaml"])
    after_traces = {"sft_r1", "sft_r1_grpo"}  # of a study of their own
    parents = {n: config.parent_of(n) for n in config.methods if n not in {"base", *after_traces}}
    assert {name for name, parent in parents.items() if parent != "base"} == set()
    assert len(parents) > 13


def test_chat_arguments_of_a_prompt_that_a_server_is_asked_with_are_refused() -> None:
    told = {"chat_hash": {"chat_arguments": {"enable_thinking": False}}}
    found = mistakes({"prompts": told, "traces": {"r1_traces": {"prompt": "chat_hash"}}})
    assert found == [
        "traces.r1_traces.prompt: 'chat_hash' has chat_arguments, which reach no server: take "
        "another prompt, and set traces.r1_traces.api.parameters"
    ]


def test_keep_best_that_has_only_start_and_end_to_choose_from_is_said_to_have() -> None:
    shipped = load_config(ROOT / "config.yaml")

    def line(every: int) -> str:
        own = {"keep_best": True, "validate_every_steps": every, "num_steps": 80}
        raw = merge(read_yaml(ROOT / "config.yaml"), {"methods": {"grpo": own}})
        return doubts(parse_config(raw), shipped, [])

    assert line(79) == ""
    assert line(500) == (
        "methods.grpo.keep_best: chooses between start and end alone: with validate_every_steps "
        "500 and num_steps 80 there is no validation in between. Lower validate_every_steps."
    )
    assert "validate_every_steps 80 and num_steps 80" in line(80)


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [
        ("grpo", 0.2, 0.2),  # Schulman et al. 2017, as Shao et al. 2024 have it
        ("dr_grpo", 0.2, 0.2),
        ("reinforce_pp", 0.2, 0.2),
        ("dapo", 0.2, 0.28),  # Yu et al. 2025, section 4.1
        ("gspo", 3e-4, 4e-4),  # Zheng et al. 2025, section 5.1
        ("cispo", 1.0, 4.0),  # MiniMax-M1 2025 leaves the ratio without a lower bound
    ],
)
def test_presets_clip_where_their_papers_do(
    config: Config, method: str, low: float, high: float
) -> None:
    settings = config.trained(method)
    assert isinstance(settings, GrpoMethod)
    assert (settings.clip_low, settings.clip_high) == (low, high)


def test_a_model_that_is_not_there_is_a_mistake_beside_others() -> None:
    found = mistakes({"study": {"models": ["tiny-qwen"], "suites": ["gsm"]}})
    assert [line.partition(";")[0] for line in found] == [
        "study.models: no model 'tiny-qwen'", "study.suites: no suite 'gsm'",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_in_the_debug_form_of_a_study_no_method_selects_from_what_an_untrained_model_writes(
    path: Path,
) -> None:
    config = load_config(ROOT / "config.yaml", [path, ROOT / "studies" / "debug.yaml"])
    selecting = [m for m in config.methods.values() if isinstance(m, SELECTING)]
    assert selecting and all(method.parent != "base" for method in selecting)
    trained = [config.trained(stage) for stage in config.stages() if config.methods[stage].trains]
    assert all(method.kind == "sft" or method.num_steps == 2 for method in trained)


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_smoke_form_of_a_study_is_two_steps_of_its_own_models_and_batches(path: Path) -> None:
    whole = load_config(ROOT / "config.yaml", [path])
    smoke = load_config(ROOT / "config.yaml", [path, ROOT / "studies" / "smoke.yaml"])
    assert smoke.study.models == whole.study.models
    assert smoke.study.methods == whole.study.methods
    for stage in whole.stages():
        if whole.methods[stage].trains:
            short, long = smoke.trained(stage), whole.trained(stage)
            assert short.num_steps == 2, stage
            for key in ("batch_size", "group_size", "max_new_tokens", "tokens_per_microbatch"):
                assert getattr(short, key, None) == getattr(long, key, None), (stage, key)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("study:\n  name: a\nstudy:\n  name: b\n", "'study' stands there twice, in lines 1 and 3"),
        ("a:\n  x: 1\n  y: 2\n  x: 3\n", "'x' stands there twice, in lines 2 and 4"),
        ("seeds: [010]\n", "line 1: '010' is a number that YAML reads as 8"),
        ("seeds:\n- 1:30\n", "line 2: '1:30' is a number that YAML reads as 90"),
        ("seeds: [1_0]\n", "'1_0' is a number that YAML reads as 10"),
        ("template: {{question}}\n", "a.yaml: not valid YAML: "),
        ("revision: 2024-02-30\n", "a.yaml: not valid YAML: day is out of range"),
    ],
)
def test_what_yaml_reads_as_something_else_than_it_looks_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_yaml(tmp_path / "a.yaml")


def test_anchors_quotes_and_plain_numbers_are_read_as_yaml_does(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: -2}\nb: {<<: *a, x: 3}\nc: ['010', 0, +4, 1.5]\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)


def test_the_usual_short_name_of_the_learning_rate_gets_the_long_one_as_a_hint() -> None:
    assert mistakes({"methods": {"sft": {"lr": 0.1}}}) == [
        "methods.sft.lr: unknown key; did you mean 'learning_rate'?"
    ]
