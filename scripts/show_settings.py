"""Print the settings that are in force for a study, as YAML; nothing is run.

That is everything that the study uses, with the file's `defaults`, `engine` and `vllm` laid into
methods and models, and what no file says filled in. What is printed is a config itself.

    python scripts/show_settings.py
    python scripts/show_settings.py --config config.yaml studies/qwen2.5-gsm8k.yaml
    python scripts/show_settings.py --key methods.dapo      # of the study or not
"""

from __future__ import annotations

import sys
from typing import Any

import yaml

from gsm8k_core.cli import (
    add_config_argument,
    config_from,
    leave,
    parser,
    run_script,
    warn_of_toy_settings,
)
from gsm8k_core.config import Config
from gsm8k_core.errors import ConfigError
from gsm8k_core.files import Json
from gsm8k_core.layout import Layout

LAID_OVER = ("defaults", "engine", "vllm")  # methods and models have them


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_config_argument(arguments)
    arguments.add_argument(
        "--key", help="only this part of the config, such as methods.grpo or models.NAME.vllm"
    )
    args = arguments.parse_args(argv)
    config = config_from(args)
    warn_of_toy_settings(config, args)
    settings = config.model_dump(mode="json", by_alias=True, exclude=set(LAID_OVER))
    shown = part(settings, args.key) if args.key else used(settings, config)
    text = yaml.safe_dump(shown, sort_keys=False, width=100, allow_unicode=True)
    sys.stdout.write(text.removesuffix("...\n"))  # which ends a document that is one value
    return 0


def used(settings: Json, config: Config) -> Json:
    """Of each registry only what the study uses."""
    data = Layout(config).datasets()
    suites, traces = config.study.suites, [name for name in data if name in config.traces]
    prompts = {
        *(config.models[name].prompt for name in config.study.models),
        *(config.suites[name].prompt for name in suites),
        *(config.traces[name].prompt for name in traces),
    }
    wanted = {
        "datasets": data,
        "prompts": prompts,
        "models": config.study.models,
        "methods": config.stages(),
        "suites": suites,
        "traces": traces,
    }
    return {
        section: {name: one for name, one in content.items() if name in wanted[section]}
        if section in wanted
        else content
        for section, content in settings.items()
    }


def part(settings: Json, key: str) -> Any:
    """What stands under a key with dots in it; names of models may have some themselves."""
    for name in sorted(settings, key=len, reverse=True):
        rest = key.removeprefix(f"{name}.")
        if name == key:
            return settings[name]
        if rest != key and isinstance(settings[name], dict):
            return part(settings[name], rest)
    raise ConfigError(f"--key: no '{key}' among {', '.join(settings)}")


if __name__ == "__main__":
    leave(run_script(main))
