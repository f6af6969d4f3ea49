"""Reward functions: exact answer, format, length, and the user's own.

A component is a number by itself, logged by its own name; `reward` is their weighted sum.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from numbers import Real
from pathlib import Path
from typing import Any, get_args

from gsm8k_core.answers import Marker, extract_answer
from gsm8k_core.config import GrpoMethod, RewardGrade, RewardSettings
from gsm8k_core.errors import TrainingError
from gsm8k_core.files import sha256_file
from gsm8k_core.grading import is_right, read_gold

RewardFn = Callable[..., dict[str, float]]
"""(completion, gold, num_tokens, question, truncated) -> components and their weighted sum."""
CustomRewardFn = Callable[..., float]
"""(completion, gold) -> a number; some take what `CONTEXT` names besides."""
CONTEXT = ("question", "num_tokens", "truncated")
"""What a custom reward is told besides, if it has arguments of these names."""


def gsm8k_reward(
    response: str, ground_truth: str, marker: Marker = "####", grading: RewardGrade = "strict"
) -> dict[str, float]:
    """1 for the exact answer (after the marker, unless `grading` reads it otherwise), else 0.

    Returns `reward` (equal to `answer_reward`), `format_reward` (1 where a number follows the
    marker, right or wrong) and `answer_reward`. `ground_truth` is text: a number, or a worked
    answer that ends in `#### 18`. Raises DataError when it is neither, ValueError for an unknown
    `grading`.
    """
    components = answer_components(response, ground_truth, grading, marker)
    return {"reward": components["answer_reward"], **components}


def answer_components(
    completion: str, gold: str, grading: RewardGrade, marker: Marker
) -> dict[str, float]:
    """`format_reward` (a number follows the marker) and `answer_reward` (right by `grading`)."""
    if grading not in get_args(RewardGrade):
        known = ", ".join(get_args(RewardGrade))
        raise ValueError(f"grading {grading!r} is unknown: take one of {known}")
    number = extract_answer(completion, "strict", marker)
    if grading == "strict":
        right = number == read_gold(gold).value  # as `is_right` does, without reading twice
    else:
        right = is_right(completion, gold, grading, marker)
    return {"format_reward": float(number is not None), "answer_reward": float(right)}


def length_reward(num_tokens: int, start: int, end: int) -> float:
    """0 up to `start` tokens, −1 from `end` on, linear between; where they are one, −1 above it.

    DAPO's soft overlong punishment (Yu et al. 2025, eq. 13) begins at the limit of a completion's
    length less a buffer, and ends at the limit.
    """
    share = (num_tokens - start) / max(end - start, 1)
    return -min(max(share, 0.0), 1.0)


def build_reward_fn(settings: RewardSettings, marker: Marker) -> RewardFn:
    """The reward function that a method asks for: fn(completion, gold, num_tokens, question="",
    truncated=False), where `question` and `truncated` (cut at its longest) matter to a custom one.

    It returns `reward`, `answer_reward`, `format_reward`, and `length_reward` and `custom_reward`
    where the settings name them. Raises TrainingError now when the custom function cannot be
    imported, and when called if it raises or returns what is not a finite number. Where a function
    of (completion, gold) is wanted, as by `compute_group_normalized_rewards` and `log_generations`,
    `gsm8k_reward` is one.
    """
    shaping = settings.length_shaping
    custom = None if settings.custom is None else import_reward(settings.custom)
    told = set() if custom is None else _context_of(custom)

    def reward_fn(
        completion: str, gold: str, num_tokens: int, question: str = "", truncated: bool = False
    ) -> dict[str, float]:
        components = answer_components(completion, gold, settings.grading, marker)
        reward = (
            settings.answer * components["answer_reward"]
            + settings.format * components["format_reward"]
        )
        if shaping is not None:
            components["length_reward"] = length_reward(num_tokens, shaping.start, shaping.end)
            reward += settings.length * components["length_reward"]
        if custom is not None:
            known = {"question": question, "num_tokens": num_tokens, "truncated": truncated}
            context = {name: known[name] for name in told}
            value = call_custom(custom, str(settings.custom), completion, gold, context)
            components["custom_reward"] = value
            reward += settings.custom_weight * value
        return {"reward": reward, **components}

    return reward_fn


def reward_source(path: str, folders: Sequence[str] | None = None) -> Path | None:
    """The file of the module that `module:function` names; None where there is none.

    Looked for as `import` does, in `folders` (unset: `sys.path`), but nothing of it is executed.
    """
    top, *deeper = path.partition(":")[0].split(".")
    found = (finder.find_spec(top, folders) for finder in sys.meta_path)
    spec = next(filter(None, found), None)
    for name in deeper:
        spec = spec and PathFinder.find_spec(name, list(spec.submodule_search_locations or []))
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


MAKE_NAMES_UP = {"globals", "vars", "setattr", "exec"}


def missing_reward(path: str, folders: Sequence[str] | None = None) -> str:
    """What is wrong with `module:function`, with a remedy; empty where it looks complete.

    The file is read and nothing of it executed, so what it only makes up then is not seen.
    """
    module, _, function = path.partition(":")
    source = reward_source(path, folders)
    if source is None:
        return f"no module {module!r} here; put its folder on PYTHONPATH"
    if source.suffix != ".py":
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source.read_bytes())
            compile(tree, str(source), "exec")
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        return f"{source}{line}: {error.msg}; mend it"
    except ValueError as error:  # a null byte, before Python 3.12
        return f"{source}: {error}; mend it"
    except RecursionError:  # nested too deep to be read here
        return ""
    bound = list(_bindings(tree))
    found = [node for name, node in bound if name == function]
    # Names that are made up as it is executed, or assigned within a function.
    made_up = {"*", "__getattr__"} & {name for name, _ in bound} or any(
        (isinstance(node, ast.Global) and function in node.names)
        or (isinstance(node, ast.Name) and node.id in MAKE_NAMES_UP)
        for node in ast.walk(tree)
    )
    if made_up:
        return ""
    if not found:
        return f"{source} has no function {function!r}; name one that it has"
    return _not_a_reward(found[0], function, source) if len(found) == 1 else ""


def _bindings(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names that a module gets when it is executed, with what gives them; `*` for any.

    Within functions and classes names are their own.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], node
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            yield from ((t.id, node.value) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node
        elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name is not None:
            yield node.name, node
        elif not isinstance(node, ast.Lambda):
            yield from _bindings(node)


def _not_a_reward(node: ast.AST, function: str, source: Path) -> str:
    """Why what is called `function` takes no (completion, gold); empty where that is not plain."""
    where = f"{source}, line {getattr(node, 'lineno', 0)}: {function!r}"
    if isinstance(node, ast.Constant):
        return f"{where} is no function; name one"
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.decorator_list:
        return ""
    if isinstance(node, ast.AsyncFunctionDef):
        return f"{where} is async; a reward is called as fn(completion, gold)"
    taken = node.args
    places = [*taken.posonlyargs, *taken.args]
    needed = [argument.arg for argument in places[2 : len(places) - len(taken.defaults)]]
    by_place_alone = {argument.arg for argument in taken.posonlyargs}
    by_name = zip(taken.kwonlyargs, taken.kw_defaults, strict=True)
    needed += [argument.arg for argument, default in by_name if default is None]
    if (len(places) >= 2 or taken.vararg) and {*needed} <= {*CONTEXT} - by_place_alone:
        return ""
    return (
        f"{where} takes ({ast.unparse(taken)}); a reward is called as fn(completion, gold): give "
        f"it two arguments, and others only of the names {', '.join(CONTEXT)}"
    )


def _context_of(function: CustomRewardFn) -> set[str]:
    """What of `CONTEXT` a function has arguments for, beside the first two."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of some callables Python knows no signature
        return set()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return set(CONTEXT)
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    by_name += [p for p in by_place[2:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {parameter.name for parameter in by_name} & set(CONTEXT)


def reward_code(method: object, folders: Sequence[str] | None = None) -> dict[str, str] | None:
    """Of a method with a custom reward, its `module:function` and the SHA-256 of that file.

    None for other methods. What the file imports is not looked at.
    """
    path = method.reward.custom if isinstance(method, GrpoMethod) else None
    source = None if path is None else reward_source(path, folders)
    return None if path is None or source is None else {path: sha256_file(source)}


def import_reward(path: str) -> CustomRewardFn:
    """The function at `module:function`. Raises TrainingError that says what could not be found."""
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        remedy = "mend it"
        if isinstance(error, ModuleNotFoundError):
            own = f"{module_name}.".startswith(f"{error.name}.")
            remedy = "put its folder on PYTHONPATH" if own else f"install {error.name}"
        raise TrainingError(
            f"reward.custom {path!r}: cannot import {module_name!r} "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    function: CustomRewardFn | None = getattr(module, function_name, None)
    if function is None or not callable(function):
        raise TrainingError(
            f"reward.custom {path!r}: {module_name!r} has no function {function_name!r}"
        )
    return function


def call_custom(
    function: CustomRewardFn, path: str, completion: str, gold: str, context: dict[str, Any]
) -> float:
    """Call a custom reward and check what it returns. Raises TrainingError."""
    where = f"reward.custom {path!r} on the completion {completion[:80]!r} (gold {gold!r})"
    try:
        value = function(completion, gold, **context)
    except Exception as error:  # the user's code may raise anything
        raise TrainingError(f"{where}: raised {type(error).__name__}: {error}") from error
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise TrainingError(f"{where}: returned {value!r:.80}, expected a finite number")
    return number
