"""Write docs/settings.md from gsm8k_core/config.py, the one definition of every setting.

    python scripts/document_settings.py --output docs/settings.md

A test fails when the page and the code have drifted apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gsm8k_core import config
from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.files import write_text

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("study", config.StudySettings),
    ("datasets.*, kind: gsm8k", config.Gsm8kDataset),
    ("datasets.*, kind: arithmetic", config.ArithmeticDataset),
    ("datasets.*, kind: gsm_symbolic", config.GsmSymbolicDataset),
    ("prompts.*", config.PromptSettings),
    ("models.*", config.ModelSettings),
    ("vllm, and models.*.vllm", config.VllmSettings),
    ("methods.*, kind: base", config.BaseMethod),
    ("methods.*, every kind that trains", config.TrainSettings),
    ("methods.*, kind: sft", config.SftMethod),
    ("methods.*, kind: expert_iteration", config.ExpertIterationMethod),
    ("methods.*, kind: dpo", config.DpoMethod),
    ("methods.*, kind: grpo", config.GrpoMethod),
    ("methods.*.reward", config.RewardSettings),
    ("methods.*.reward.length_shaping", config.LengthRewardSettings),
    ("methods.*.lora", config.LoraSettings),
    ("suites.*", config.SuiteSettings),
    ("tracking", config.TrackingSettings),
    ("traces.*", config.TracesSettings),
    ("traces.*.api", config.ApiSettings),
    ("traces.*.budget", config.BudgetSettings),
    ("traces.*.selection", config.TraceSelectionSettings),
)


def _names(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


HEADER = f"""# Settings

Written by `python scripts/document_settings.py` from `gsm8k_core/config.py`; do not edit.
`defaults.<kind>` holds settings shared by every method of that kind; a method's own settings win.
`engine` and `vllm` apply to every model; a model's own settings win.
The column `default` is what the code takes where no file says otherwise. **`config.yaml` says
otherwise for much**: in its `defaults:` (for `grpo` among others `num_steps` and `learning_rate`)
and for its models, methods and suites. `python scripts/show_settings.py` prints the settings in
force ([usage.md](usage.md#the-settings-in-force)); each call keeps them in its `run_manifest.json`.

Changing these settings does not redo what has finished:

- `datasets.*` of kind `gsm8k`: {_names(config.GSM8K_SOURCES)} (the rows are
  identified by their digests, not by where they come from),
- `models.*`: {_names((*config.SCHEDULER_KEYS, *config.MODEL_RESOURCES))}, and the number of `gpus`
  (but a change from 0 or to 0 makes another run),
- `vllm`: {_names(config.VLLM_RESOURCES)},
- `methods.*`: {_names(config.METHOD_RESOURCES)},
- `traces.*.api`: {_names(("base_url", *config.API_RESOURCES))},
- `traces.*.budget`: {_names(config.PRICES)},
- `tracking`.

A change of a suite's {_names(config.GradingSettings.model_fields)} only grades again.
"""


def page() -> str:
    """The whole page, as Markdown."""
    parts = [HEADER]
    inherited = set(config.TrainSettings.model_fields)
    for title, model in SECTIONS:
        own = {
            name: field
            for name, field in model.model_fields.items()
            if model is config.TrainSettings or name not in inherited
        }
        summary = (model.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
        rows = [
            f"| `{field.alias or name}` | {_type(field.annotation)} | {_default(field)} "
            f"| {_cell(field.description or '')} |"
            for name, field in own.items()
        ]
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"## {title}", "", summary, "", *table]) + "\n")
    return "\n".join(parts)


def _type(annotation: Any) -> str:
    return f"`{_cell(_type_name(annotation))}`"


def _type_name(annotation: Any) -> str:
    """A type as one would write it, without the bounds that pydantic hangs on it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (UnionType, Union):
        return " | ".join(map(_type_name, inner))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_name, inner))}]"
    return "None" if annotation is NoneType else annotation.__name__


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return "see below"
    return f"`{_cell(repr(field.default))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--output",
        type=Path,
        default=Path("docs/settings.md"),
        help="page to write (default: docs/settings.md)",
    )
    args = arguments.parse_args(argv)
    write_text(args.output, page())
    return 0


if __name__ == "__main__":
    leave(run_script(main))
