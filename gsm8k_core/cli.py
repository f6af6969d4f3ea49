"""What the command lines share: logging, one-line errors, progress bars, settings arguments."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from gsm8k_core.config import RunSettings, load_config, read_yaml
from gsm8k_core.errors import ConfigError, Gsm8kError

log = logging.getLogger(__name__)
Item = TypeVar("Item")


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's `main` with logging on; return its exit code.

    What the user can mend (Gsm8kError, a full disk, a missing file) becomes one line on stderr and
    exit code 1; anything else is a bug and keeps its traceback. Ctrl-C gives 130.
    """
    logging.basicConfig(
        level=os.environ.get("GSM8K_LOG_LEVEL", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for noisy in ("httpx", "httpx2", "httpcore", "urllib3", "filelock", "fsspec", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Its warnings name every retry twice; the error at the end says what came of them.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return main() or 0
    except Gsm8kError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {where}{error.strerror or error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def progress(
    items: Iterable[Item], what: str, total: int | None = None, start: int = 0
) -> Iterator[Item]:
    """A tqdm bar in a terminal; nothing in a log file, where a bar would be a thousand lines."""
    from tqdm import tqdm

    yield from tqdm(items, desc=what, total=total, initial=start, disable=not sys.stderr.isatty())


def settings_from(text: str, schema: Any) -> Any:
    """Check settings given as JSON text, or as the path of a JSON or YAML file, against `schema`.

    Raises ConfigError that lists every mistake by key.
    """
    try:
        raw = json.loads(text)
        where = "--settings"
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):
            raise ConfigError(f"--settings: not valid JSON ({error}): {text[:200]}") from None
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"--settings: neither JSON nor a file: {text[:200]}") from None
        raw, where = read_yaml(path), str(path)
    try:
        return TypeAdapter(schema).validate_python(raw)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """An ArgumentParser whose --help is the script's own docstring, laid out as written."""
    return argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_run_arguments(arguments: argparse.ArgumentParser) -> None:
    """The two ways to say what a training run is: settings as they are, or a cell of a config."""
    group = arguments.add_argument_group("what to train")
    group.add_argument(
        "--settings",
        metavar="JSON|FILE",
        help="all settings of the run (a run's settings.json); the workflow gives them so",
    )
    group.add_argument(
        "--config",
        nargs="+",
        type=Path,
        default=[Path("config.yaml")],
        metavar="FILE",
        help="config.yaml and overlays; used with --model-name and --method (default: config.yaml)",
    )
    group.add_argument("--model-name", help="a model of the config")
    group.add_argument("--method", help="a method of the config")
    group.add_argument("--seed", type=int, default=0, help="default: 0")


def training_parser(documentation: str | None) -> argparse.ArgumentParser:
    """The arguments that every trainer takes."""
    arguments = parser(documentation)
    add_run_arguments(arguments)
    arguments.add_argument("--starting-model", type=Path, required=True, help="the parent's model")
    arguments.add_argument("--data", type=Path, required=True, help="what it learns from, JSONL")
    arguments.add_argument("--val-data", type=Path, help="validation problems, JSONL")
    arguments.add_argument("--output-dir", type=Path, required=True, help="the run's folder")
    arguments.add_argument("--max-steps", type=int, help="an early look: stop after so many steps")
    return arguments


def selection_parser(documentation: str | None, what: str) -> argparse.ArgumentParser:
    """The arguments of what chooses `what` to learn from among sampled completions."""
    arguments = parser(documentation)
    add_run_arguments(arguments)
    arguments.add_argument("--completions", type=Path, required=True, help="of train problems")
    arguments.add_argument("--data", type=Path, required=True, help="train problems, JSONL")
    arguments.add_argument("--output", type=Path, required=True, help=f"{what}, JSONL")
    return arguments


def check_known(flag: str, name: str, known: Iterable[str]) -> None:
    """Raise ConfigError that lists what there is, unless the config has `name`."""
    if name not in known:
        raise ConfigError(f"{flag}: no '{name}' in the config; there are: {', '.join(known)}")


def run_settings_from(arguments: argparse.Namespace) -> RunSettings:
    """The RunSettings that `add_run_arguments`' arguments name."""
    if arguments.settings is not None:
        return settings_from(arguments.settings, RunSettings)
    if arguments.model_name is None or arguments.method is None:
        raise ConfigError("say what to train: --settings, or --model-name and --method")
    config = load_config(arguments.config[0], arguments.config[1:])
    check_known("--model-name", arguments.model_name, config.models)
    check_known("--method", arguments.method, config.methods)
    return config.run_settings(arguments.model_name, arguments.method, arguments.seed)
