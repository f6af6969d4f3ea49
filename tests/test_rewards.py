from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gsm8k_core.config import GrpoMethod, LengthRewardSettings, RewardSettings, SftMethod
from gsm8k_core.errors import DataError, TrainingError
from gsm8k_core.files import sha256_file
from gsm8k_core.rewards import (
    build_reward_fn,
    gsm8k_reward,
    length_reward,
    missing_reward,
    reward_code,
    reward_source,
)


@pytest.mark.parametrize(
    ("response", "format_reward", "answer_reward"),
    [
        ("9 * 2 = 18\n#### 18", 1.0, 1.0),
        ("9 * 2 = 18\n#### 19", 1.0, 0.0),
        ("The answer is 18", 0.0, 0.0),
        ("####", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_default_reward_is_the_exact_answer_after_the_marker(
    response: str, format_reward: float, answer_reward: float
) -> None:
    assert gsm8k_reward(response, "18") == {
        "reward": answer_reward,
        "format_reward": format_reward,
        "answer_reward": answer_reward,
    }


def test_a_gold_that_is_no_number_is_an_error_even_where_the_response_says_the_same() -> None:
    with pytest.raises(DataError):
        gsm8k_reward("#### eighteen", "eighteen")


def test_an_unknown_grading_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'flex' is unknown: take one of strict, flexible, lm_ev"):
        gsm8k_reward("18", "18", grading="flex")  # type: ignore[arg-type]


def test_the_reward_is_the_weighted_sum_of_its_components() -> None:
    settings = RewardSettings(
        answer=2.0, format=0.5, length=0.25, length_shaping=LengthRewardSettings(start=10, end=20)
    )
    reward_fn = build_reward_fn(settings, "####")
    # Right, marked, 14 tokens: 2·1 + 0.5·1 + 0.25·(−0.4) = 2.4
    assert reward_fn("#### 18", "18", 14) == pytest.approx(
        {"reward": 2.4, "answer_reward": 1.0, "format_reward": 1.0, "length_reward": -0.4}
    )
    # Wrong, marked, 5 tokens: 0.5
    assert reward_fn("#### 19", "18", 5)["reward"] == 0.5
    # No marker, 30 tokens: −0.25
    assert reward_fn("18", "18", 30)["reward"] == -0.25


def test_components_that_were_not_asked_for_are_absent() -> None:
    assert set(build_reward_fn(RewardSettings(), "####")("#### 1", "1", 1)) == {
        "reward",
        "answer_reward",
        "format_reward",
    }


def test_flexible_grading_pays_for_the_answer_without_the_marker_but_not_for_the_format() -> None:
    reward_fn = build_reward_fn(RewardSettings(grading="flexible", format=0.1), "####")
    assert reward_fn("It is 18.", "18", 3) == {
        "reward": 1.0,
        "answer_reward": 1.0,
        "format_reward": 0.0,
    }


def test_the_marker_of_the_prompt_is_the_one_that_counts() -> None:
    boxed = build_reward_fn(RewardSettings(), "boxed")
    assert boxed("\\boxed{18}", "18", 3)["reward"] == 1.0
    assert boxed("#### 18", "18", 3)["reward"] == 0.0


@pytest.mark.parametrize(
    ("num_tokens", "reward"), [(0, 0.0), (100, 0.0), (150, -0.5), (200, -1.0), (999, -1.0)]
)
def test_the_length_reward_falls_linearly_from_start_to_end(num_tokens: int, reward: float) -> None:
    assert length_reward(num_tokens, 100, 200) == reward


@pytest.mark.parametrize(
    ("num_tokens", "reward"), [(80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (101, -1.0)]
)
def test_the_length_reward_is_dapos_overlong_punishment(num_tokens: int, reward: float) -> None:
    # Eq. 13 with 100 tokens and a buffer of 20: ((100 - 20) - length) / 20 between 80 and 100.
    assert length_reward(num_tokens, 100 - 20, 100) == pytest.approx(reward)


def test_without_a_buffer_only_lengths_above_the_limit_are_penalized() -> None:
    assert [length_reward(num_tokens, 100, 100) for num_tokens in (99, 100, 101)] == [0, 0, -1]


# ------------------------------------------------------------------------------------------ custom


@pytest.fixture
def custom_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(completion, gold): return -len(completion) / 10\n"
        "def whole(completion, gold): return completion == gold\n"
        "def fails(completion, gold): raise KeyError('shoe')\n"
        "def text(completion, gold): return 'high'\n"
        "def nothing(completion, gold): pass\n"
        "def huge(completion, gold): return 10**400\n"
        "def nan(completion, gold): return float('nan')\n"
        "def infinite(completion, gold): return float('inf')\n"
        "def told(completion, gold, question, *, truncated):\n"
        "    return question == 'How many?' and truncated\n"
        "def length(completion, gold, num_tokens=0): return num_tokens\n"
        "def all_of_it(completion, gold, **context): return len(context)\n"
        "def question_first(question, gold): return question == '#### 18'\n"
        "def gathered(*texts, question): return len(texts) + len(question)\n"
        "NUMBER = 3\n",
        encoding="utf-8",
    )
    (tmp_path / "my_broken_rewards.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_rewards", "my_broken_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("custom_module")
def test_a_custom_reward_adds_its_weighted_value() -> None:
    settings = RewardSettings(custom="my_rewards:brevity", custom_weight=0.5)
    # 1·1 + 0.5·(−7/10) = 0.65
    result = build_reward_fn(settings, "####")("#### 18", "18", 2)
    assert result["custom_reward"] == -0.7
    assert result["reward"] == pytest.approx(0.65)


@pytest.mark.usefixtures("custom_module")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("told", 1.0),
        ("length", 7.0),
        ("all_of_it", 3.0),
        ("question_first", 1.0),
        ("gathered", 11.0),
    ],
)
def test_a_custom_reward_is_told_what_it_has_arguments_for(name: str, value: float) -> None:
    reward_fn = build_reward_fn(RewardSettings(answer=0.0, custom=f"my_rewards:{name}"), "####")
    assert reward_fn("#### 18", "18", 7, "How many?", truncated=True)["custom_reward"] == value


@pytest.mark.usefixtures("custom_module")
def test_a_custom_reward_may_answer_yes_or_no() -> None:
    settings = RewardSettings(answer=0.0, custom="my_rewards:whole")
    assert build_reward_fn(settings, "####")("18", "18", 1)["reward"] == 1.0


@pytest.mark.usefixtures("custom_module")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "PYTHONPATH"),
        ("my_rewards:missing", "no function 'missing'"),
        ("my_rewards:NUMBER", "no function 'NUMBER'"),
        ("my_broken_rewards:f", "; install no_such_package_at_all$"),
    ],
)
def test_a_custom_reward_that_cannot_be_imported_stops_before_training(
    path: str, message: str
) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        build_reward_fn(RewardSettings(custom=path), "####")
    assert path in str(caught.value)


@pytest.mark.usefixtures("custom_module")
def test_what_is_missing_of_a_custom_reward_is_told_without_executing_it(tmp_path: Path) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "deep.py").write_text("def f(completion, gold): raise SystemExit")
    (tmp_path / "my_stars.py").write_text("from my_rewards import *\nraise SystemExit")
    for complete in ("my_rewards:brevity", "my_package.deep:f", "my_stars:brevity"):
        assert missing_reward(complete) == "", complete
    for missing in ("my_rewadrs:brevity", "my_package.depe:f", "my_rewards.brevity:f"):
        module = missing.partition(":")[0]
        assert missing_reward(missing) == (
            f"no module {module!r} here; put its folder on PYTHONPATH"
        )
    assert missing_reward("my_rewards:brevty") == (
        f"{tmp_path}/my_rewards.py has no function 'brevty'; name one that it has"
    )
    assert not {"my_rewards", "my_broken_rewards", "my_package", "my_stars"} & sys.modules.keys()


REWARDS = """
import math, os.path as paths
from math import (sqrt as root, dist)
if math.pi > 3:
    def either(completion, gold): return 0
else:
    either = None
try:
    from math import no_such_name
except ImportError:
    no_such_name = lambda completion, gold: 0
@math.cache
def decorated(completion): return 0
def optional(completion, gold, *, scale=1, **others): return 0
def three(completion, gold, scale=1): return 0
def any_number(*texts): return 0
assigned = first = optional
one, (two, *rest) = optional, (optional, optional)
typed: object = optional
class Scored:
    def __new__(cls, completion, gold): return 0
    def method(self, completion, gold): return 0
def of_one(completion): return "\\d"
def of_three(completion, gold, scale): return 0
def named(completion, gold, *, scale): return 0
def judged(completion, gold, question, *, truncated, num_tokens=0): return 0
def by_place(completion, gold, question, /): return 0
async def later(completion, gold): return 0
NUMBER = 3
def outer(completion, gold):
    within = [unpacked for unpacked in gold]
    return within
raise SystemExit
"""


@pytest.mark.parametrize(
    "name",
    ["math", "paths", "root", "dist", "either", "no_such_name", "decorated", "optional", "three",
     "any_number", "assigned", "first", "one", "two", "rest", "typed", "Scored", "outer",
     "judged"],
)  # fmt: skip
def test_a_name_that_a_module_gives_itself_may_be_a_custom_reward(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(REWARDS)
    assert missing_reward(f"own:{name}", [str(tmp_path)]) == ""


@pytest.mark.parametrize(
    "text",
    [
        "globals()['f'] = lambda completion, gold: 1",
        "import sys\nsetattr(sys.modules[__name__], 'f', max)",
        "f = None\ndef fill():\n    global f\n    f = max",
        "match max:\n    case f: pass",
        "from asgiref.sync import async_to_sync\n@async_to_sync\nasync def f(a, b): return 1",
        "x = " + "-" * 5000 + "1\n",
    ],
)
def test_a_name_that_is_made_up_when_the_module_is_executed_is_left_to_the_job(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(text)
    assert missing_reward("own:f", [str(tmp_path)]) == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, f" has no function '{name}'; name one that it has")
          for name in ("completion", "os", "method", "within", "unpacked", "sqrt")),
        ("of_one", ", line 23: 'of_one' takes (completion); a reward is called as "
         "fn(completion, gold): give it two arguments, and others only of the names question, "),
        ("of_three", ", line 24: 'of_three' takes (completion, gold, scale); a reward is "),
        ("by_place", ", line 27: 'by_place' takes (completion, gold, question, /); a reward is "),
        ("named", ", line 25: 'named' takes (completion, gold, *, scale); a reward is called as "),
        ("later", ", line 28: 'later' is async; a reward is called as fn(completion, gold)"),
        ("NUMBER", ", line 29: 'NUMBER' is no function; name one"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_as_a_reward_is_told_without_executing_it(
    name: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(REWARDS)
    assert missing_reward(f"own:{name}", [str(tmp_path)]).startswith(f"{tmp_path}/own.py{said}")


def test_a_custom_reward_that_is_no_python_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, said in (
        ("\ndef score(completion, gold) return 1\n", ", line 2: expected ':'; mend it"),
        ("def score(completion, gold): return 1\nreturn 1\n", ", line 2: 'return' outside"),
        ("score = '\0'\n", ": source code string cannot contain null bytes; mend it"),
    ):
        (tmp_path / "not_python.py").write_text(text)
        found = missing_reward("not_python:score", [str(tmp_path)])
        assert found.startswith(f"{tmp_path}/not_python.py{said}")
    (tmp_path / "not_python_either.py").write_text("def score(completion, gold) return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TrainingError, match=r"SyntaxError: .*; mend it$"):
        build_reward_fn(RewardSettings(custom="not_python_either:score"), "####")


def test_a_custom_reward_is_looked_for_in_the_folders_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text("def f(completion, gold): return 0\n")
    assert reward_source("elsewhere:f") is None
    assert reward_source("elsewhere:f", [str(tmp_path)]) == tmp_path / "elsewhere.py"


@pytest.mark.usefixtures("custom_module")
def test_the_code_of_a_custom_reward_is_the_digest_of_its_file(tmp_path: Path) -> None:
    method = {"kind": "grpo", "reward": {"custom": "my_rewards:brevity"}}
    custom = GrpoMethod.model_validate(method)
    before = reward_code(custom)
    assert before == {"my_rewards:brevity": sha256_file(tmp_path / "my_rewards.py")}
    with (tmp_path / "my_rewards.py").open("a", encoding="utf-8") as file:
        file.write("# edited\n")
    assert reward_code(custom) not in (before, None)
    assert reward_code(GrpoMethod(kind="grpo")) is None
    assert reward_code(SftMethod(kind="sft")) is None


@pytest.mark.usefixtures("custom_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "raised KeyError: 'shoe'"),
        ("text", "returned 'high'"),
        ("nothing", "returned None"),
        ("nan", "returned nan"),
        ("huge", "returned 1000"),
        ("infinite", "returned inf"),
    ],
)
def test_a_custom_reward_that_goes_wrong_names_itself_and_the_completion(
    name: str, message: str
) -> None:
    reward_fn = build_reward_fn(RewardSettings(custom=f"my_rewards:{name}"), "####")
    with pytest.raises(TrainingError, match=message) as caught:
        reward_fn("She sells 18" + "x" * 1000, "18", 4)
    assert f"my_rewards:{name}" in str(caught.value)
    assert "She sells 18" in str(caught.value)
    assert len(str(caught.value)) < 300
