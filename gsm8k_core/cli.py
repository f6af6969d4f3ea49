"""What the command lines share: logging, one-line errors, settings arguments."""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, get_args

import yaml
from pydantic import BaseModel

from gsm8k_core import ranks
from gsm8k_core.config import (
    METHOD_RESOURCES,
    MODEL_RESOURCES,
    VLLM_EVALUATION_KEYS,
    VLLM_ROLLOUT_KEYS,
    Comparison,
    Config,
    EngineName,
    ExpertIterationMethod,
    ModelSettings,
    RunSettings,
    TrainSettings,
    VllmSettings,
    checked,
    doubts,
    load_config,
    merge,
    parse_yaml,
    read_yaml,
    settings_from,
)
from gsm8k_core.errors import ConfigError, Gsm8kError, first_line
from gsm8k_core.redaction import redact

log = logging.getLogger(__name__)

SECONDS_TO_BE_ENDED = 20.0
MEMORY_EXCERPT_CHARACTERS = 160
"""How much of torch's words, which go on about its allocator, stands in the line."""
# Host and process id of the snakemake, or other caller, that a job works for.
SNAKEMAKE_VARIABLE = "GSM8K_SNAKEMAKE"


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's `main` with logging on; return its exit code.

    What the user can mend (Gsm8kError, a full disk, a missing file, too little memory) becomes one
    line on stderr and exit code 1; anything else is a bug and keeps its traceback. Ctrl-C gives
    130. Secrets are struck out of all of it, warnings and what ends threads included. Under
    torchrun, rank 0 logs, and the others no more than warnings.
    """
    # Scripts that load torch switch garbage collection off for that: it would go again and again
    # through what is there to stay, for a fifth of the time (docs/experiments.md).
    gc.freeze()
    gc.enable()
    level = "INFO" if ranks.is_main() else "WARNING"
    asked = os.environ.get("GSM8K_LOG_LEVEL", level).upper()
    known = logging.getLevelNamesMapping()
    logging.basicConfig(level=known.get(asked, level), handlers=[_redacting_handler()])
    if asked not in known:
        log.warning("GSM8K_LOG_LEVEL: no level %s; there are: %s", asked, ", ".join(known))
    sys.excepthook = _write_redacted_traceback
    threading.excepthook = _write_redacted_traceback_of_thread
    sys.unraisablehook = _write_redacted_unraisable
    logging.captureWarnings(True)  # or they would go to stderr as they are
    end_with_snakemake()
    for noisy in ("httpx", "httpx2", "httpcore", "urllib3", "filelock", "fsspec", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Its warnings name every retry twice; the error at the end says what came of them.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # where it is imported later
    return _exit_code(main)


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit` does, but without tearing down torch where it is imported.

    That takes a second of the processor, of transformers mostly (docs/experiments.md), and what
    threads of gloo are left can abort it: torchrun would call a job failed whose work is done.
    """
    if "torch" in sys.modules:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code(main: Callable[[], int | None]) -> int:
    """Run `main`; what the user can mend becomes a line on stderr, and the exit code."""
    try:
        code = main() or 0
        if "gsm8k_core.distributed" in sys.modules:
            sys.modules["gsm8k_core.distributed"].end()
        return code
    except Gsm8kError as error:
        sys.stderr.write(redact(f"{_rank_prefix()}error: {error}\n"))
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(redact(f"{_rank_prefix()}error: {where}{error.strerror or error}\n"))
        return 1
    except KeyboardInterrupt:
        if "gsm8k_core.manifest" in sys.modules:
            sys.modules["gsm8k_core.manifest"].Attempts.interrupted = True
        sys.stderr.write(f"{_rank_prefix()}interrupted\n")
        return 130
    except (RuntimeError, MemoryError) as error:
        if _is_out_of_memory(error):
            log.debug("where the memory was asked for", exc_info=True)
            sys.stderr.write(redact(f"{_rank_prefix()}error: {_memory_advice(error)}\n"))
            return 1
        if ranks.world_size() == 1 or not any(word in str(error) for word in ("gloo", "NCCL")):
            raise
        sys.stderr.write(f"{_rank_prefix()}lost contact with another rank\n")
        # torchrun takes the first to end for the cause, and is about to end this one.
        time.sleep(SECONDS_TO_BE_ENDED)
        raise


def this_process() -> str:
    """What `SNAKEMAKE_VARIABLE` says to jobs that are to end with this process."""
    return f"{platform.node()} {os.getpid()}"


def end_with_snakemake() -> None:
    """End this process soon after the snakemake (or `eval`) that it works for, even a killed one.

    Nobody would learn of its result, and the job that redoes it would find it at work. Looks every
    second, in a thread. By hand, or in a container that does not see snakemake, it does nothing.
    """
    import psutil

    host, _, pid = os.environ.get(SNAKEMAKE_VARIABLE, "").partition(" ")
    if host != platform.node():
        return

    def is_there(snakemake: psutil.Process) -> bool:
        try:
            return snakemake.is_running() and snakemake.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def end() -> None:
        log.error("the caller of this job (process %s) has ended, so it stops", pid)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_BE_ENDED)
        os._exit(128 + signal.SIGTERM)  # where a library has caught the signal

    def watch(snakemake: psutil.Process) -> None:
        while is_there(snakemake):
            time.sleep(1.0)
        end()

    try:
        snakemake = psutil.Process(int(pid))
        # Whatever began after this process has got the number of one that has ended.
        visible = snakemake.create_time() <= psutil.Process().create_time()
        if "GSM8K_CONTAINER" in os.environ:  # where the same number may be another process
            visible = visible and "snakemake" in " ".join(snakemake.cmdline())
    except psutil.Error:
        visible = False
    if visible:
        threading.Thread(target=watch, args=(snakemake,), daemon=True).start()
    elif "GSM8K_CONTAINER" not in os.environ:
        end()


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether memory is short: Python's, or by torch (which need not be imported here) of a GPU or
    of the CPU.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error).lower() for words in ("out of memory", "can't allocate memory"))


def _memory_advice(error: RuntimeError | MemoryError) -> str:
    said = first_line(error)[:MEMORY_EXCERPT_CHARACTERS] or type(error).__name__
    if isinstance(error, MemoryError):
        return (
            f"out of memory ({said}): this machine, or what the job may take of it, has too little"
        )
    return (
        f"out of memory ({said}): lower tokens_per_microbatch (or, if it was generating, "
        "completions_per_batch), or set gradient_checkpointing: true; with vLLM lower "
        "vllm.rollout_gpu_memory_fraction (or vllm.kv_cache_gib, where it is set). The run resumes "
        "from its last checkpoint, and finished ones stay as they are. "
        "Weights, gradients and AdamW's moments alone take 16 bytes per parameter: if these do "
        "not fit, set lora, or more gpus"
    )


def _rank_prefix() -> str:
    return f"[rank {ranks.rank()}] " if ranks.world_size() > 1 else ""


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _redacting_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _RedactingFormatter(
            f"%(asctime)s {_rank_prefix()}%(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
        )
    )
    return handler


def _write_redacted_traceback(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _write_redacted_traceback_of_thread(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_type is SystemExit:  # as Python's own hook
        return
    name = failed.thread.name if failed.thread is not None else "that has ended"
    sys.stderr.write(redact(f"Exception in thread {name}:\n"))
    _write_redacted_traceback(failed.exc_type, failed.exc_value, failed.exc_traceback)


def _write_redacted_unraisable(failed: sys.UnraisableHookArgs) -> None:
    where = f"{failed.err_msg or 'Exception ignored in'}: {failed.object!r}\n"
    sys.stderr.write(redact(where))
    _write_redacted_traceback(failed.exc_type, failed.exc_value, failed.exc_traceback)


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """An ArgumentParser whose --help is the script's own docstring, laid out as written."""
    return argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


def non_negative(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {number}")
    return number


def add_config_argument(arguments: argparse._ActionsContainer) -> None:
    """`--config FILE…`, as `load_config` reads them: the first, and overlays."""
    arguments.add_argument(
        "--config",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="config.yaml first, then overlays (default: config.yaml)",
    )


def config_files(arguments: argparse.Namespace) -> list[Path]:
    """The files of `--config`, or its default."""
    return arguments.config or [Path("config.yaml")]


def config_from(arguments: argparse.Namespace) -> Config:
    """What the files of `--config` say, checked."""
    first, *overlays = config_files(arguments)
    return load_config(first, overlays)


def add_settings_arguments(arguments: argparse._ActionsContainer) -> None:
    """`--settings`, as the workflow gives them, and `--config`, for names to stand for them."""
    arguments.add_argument(
        "--settings",
        metavar="JSON|FILE",
        help="all settings, as the workflow passes them, instead of names in the config",
    )
    add_config_argument(arguments)


def given_settings(arguments: argparse.Namespace, schema: Any, label: str = "") -> Any:
    """What `--settings` says, checked against `schema`; None without it.

    Raises ConfigError for mistakes in it, and where `--config` or a name in it is given besides,
    but for the argument `label`, which then names what comes out.
    """
    if arguments.settings is None:
        return None
    for name in ("config", "model_name", "method", "suite", "round", "seed", "traces"):
        if name != label and getattr(arguments, name, None) is not None:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} repeats what --settings says: give only one of them")
    return settings_from(arguments.settings, schema)


def warn_of_toy_settings(config: Config, arguments: argparse.Namespace) -> None:
    """Log what the study has inherited from config.yaml and may not have meant."""
    first, *overlays = config_files(arguments)
    if first.name != "config.yaml":
        return  # a whole config of one's own
    if doubt := doubts(config, load_config(first), [read_yaml(path) for path in overlays]):
        log.warning("%s", doubt)


def add_run_arguments(arguments: argparse.ArgumentParser) -> None:
    """The two ways to say what a training run is: settings as they are, or a cell of a config."""
    group = arguments.add_argument_group("what to train")
    add_settings_arguments(group)
    group.add_argument("--model-name", help="a model of the config")
    group.add_argument("--method", help="a method of the config")
    group.add_argument(
        "--round", type=positive, help="round of expert iteration (default: 1); others have none"
    )
    group.add_argument("--seed", type=non_negative, help="seed of the run (default: 0)")


def add_engine_arguments(arguments: argparse.ArgumentParser, *, rollouts: bool = False) -> None:
    """`--engine` and a flag for every vLLM setting that evaluation reads, or with `rollouts` a
    trainer; what is given wins over the config.
    """
    group = arguments.add_argument_group(
        "engine", "override the config's settings (docs/settings.md, section `vllm`)"
    )
    group.add_argument("--engine", choices=get_args(EngineName), help="what generates")
    _add_setting(group, ModelSettings, "completions_per_batch")
    unread = VLLM_EVALUATION_KEYS if rollouts else VLLM_ROLLOUT_KEYS
    for name in VllmSettings.model_fields:
        if name not in unread:
            _add_setting(group, VllmSettings, name, "vllm_")


def _add_setting(
    group: argparse._ActionsContainer, section: type[BaseModel], name: str, prefix: str = ""
) -> None:
    """A flag for one setting, explained as the setting is."""
    group.add_argument(
        f"--{prefix}{name}".replace("_", "-"),
        metavar="VALUE",
        help=section.model_fields[name].description,
    )


def _given(arguments: argparse.Namespace, names: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Values of the flags of `_add_setting` that were given, as YAML reads them."""
    found = {}
    for name in names:
        text = getattr(arguments, prefix + name, None)
        if text is None:
            continue
        try:
            found[name] = parse_yaml(text)
        except yaml.YAMLError as error:
            flag = f"--{prefix}{name}".replace("_", "-")
            raise ConfigError(f"{flag}: {' '.join(str(error).split())}") from None
    return found


def with_engine_arguments(model: ModelSettings, arguments: argparse.Namespace) -> ModelSettings:
    """The model's settings, with `--dtype` and what `add_engine_arguments` has laid over them.

    Raises ConfigError for a value that a setting cannot have.
    """
    overlay = _given(arguments, ("engine", "dtype", *MODEL_RESOURCES))
    # vLLM's own compute type goes first: left alone, it would make nothing of `--dtype`.
    vllm: dict[str, Any] = {"dtype": None} if "dtype" in overlay else {}
    overlay["vllm"] = vllm | _given(arguments, VllmSettings.model_fields, "vllm_")
    return checked(merge(model.model_dump(mode="json"), overlay), ModelSettings, "flags")


def training_parser(documentation: str | None) -> argparse.ArgumentParser:
    """The arguments that every trainer takes."""
    arguments = parser(documentation)
    add_run_arguments(arguments)
    arguments.add_argument("--starting-model", type=Path, required=True, help="model to start from")
    arguments.add_argument("--data", type=Path, required=True, help="what to learn from, JSONL")
    arguments.add_argument("--val-data", type=Path, help="validation problems, JSONL")
    arguments.add_argument("--output-dir", type=Path, required=True, help="the run's folder")
    arguments.add_argument(
        "--max-steps", type=positive, help="stop after this many steps (for a quick look)"
    )
    add_engine_arguments(arguments, rollouts=True)
    group = arguments.add_argument_group(
        "resources",
        "override the config's settings; may differ when a run resumes, and change no result",
    )
    for name in METHOD_RESOURCES:
        _add_setting(group, TrainSettings, name)
    _add_setting(group, ModelSettings, "compile_layers")
    return arguments


def study_parser(documentation: str | None) -> argparse.ArgumentParser:
    """The arguments of what reads all runs of a study."""
    arguments = parser(documentation)
    arguments.add_argument(
        "--study",
        metavar="JSON|FILE",
        help="what the workflow passes about the study, instead of --config",
    )
    add_config_argument(arguments)
    arguments.add_argument("--study-dir", type=Path, required=True, help="folder with the runs")
    arguments.add_argument("--manifest", type=Path, help="record of this call to write, JSON")
    return arguments


def study_from(arguments: argparse.Namespace) -> Comparison:
    """What the arguments of `study_parser` name."""
    if arguments.study is None:
        return config_from(arguments).comparison()
    if arguments.config is not None:
        raise ConfigError("--study and --config: take one of them")
    found: Comparison = settings_from(arguments.study, Comparison, "--study")
    return found


def traces_parser(documentation: str | None) -> argparse.ArgumentParser:
    """The arguments that name a dataset of reasoning traces."""
    arguments = parser(documentation)
    add_settings_arguments(arguments)
    arguments.add_argument("--traces", help="a name under traces in the config")
    return arguments


def traces_settings_from(
    arguments: argparse.Namespace, schema: Any, of_config: Callable[[Config, str], Any]
) -> Any:
    """What the arguments of `traces_parser` name: `schema`, as `of_config` makes it by name."""
    if (given := given_settings(arguments, schema)) is not None:
        return given
    if arguments.traces is None:
        raise ConfigError("say which traces: --settings, or --traces")
    config = config_from(arguments)
    check_known("--traces", arguments.traces, config.traces)
    return of_config(config, arguments.traces)


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


def check_round(arguments: argparse.Namespace, num_rounds: int) -> None:
    """Raise ConfigError for a `--round` that `--method` has not."""
    if arguments.round is not None and arguments.round > num_rounds:
        its = f"its last is {num_rounds}" if num_rounds else "it has no rounds here"
        raise ConfigError(f"--round: no round {arguments.round} of {arguments.method}: {its}")


def run_settings_from(arguments: argparse.Namespace) -> RunSettings:
    """The RunSettings that a trainer's (or selection's) arguments name."""
    settings = _run_settings_of_cell(arguments)
    if not hasattr(arguments, "engine"):
        return settings
    method = settings.method_settings
    overlay = {
        **method.model_dump(mode="json", by_alias=True),
        **_given(arguments, METHOD_RESOURCES),
    }
    return settings.model_copy(
        update={
            "model_settings": with_engine_arguments(settings.model_settings, arguments),
            "method_settings": checked(overlay, type(method), "flags"),
        }
    )


def _run_settings_of_cell(arguments: argparse.Namespace) -> RunSettings:
    if (given := given_settings(arguments, RunSettings)) is not None:
        return given
    if arguments.model_name is None or arguments.method is None:
        raise ConfigError("say what to train: --settings, or --model-name and --method")
    config = config_from(arguments)
    check_known("--model-name", arguments.model_name, config.models)
    check_known("--method", arguments.method, config.methods)
    one = {"models": [arguments.model_name], "methods": [arguments.method]}
    cell = config.model_copy(update={"study": config.study.model_copy(update=one)})
    warn_of_toy_settings(cell, arguments)
    method = config.methods[arguments.method]
    num_rounds = method.rounds if isinstance(method, ExpertIterationMethod) else 0
    check_round(arguments, num_rounds)
    number = arguments.round or min(1, num_rounds)
    return config.run_settings(arguments.model_name, arguments.method, arguments.seed or 0, number)


def main(argv: list[str] | None = None) -> int:
    """`python -m gsm8k_core.cli COMMAND`: what needs no study. Its one command is `eval`."""
    from gsm8k_core import evaluate

    arguments = argparse.ArgumentParser(prog="python -m gsm8k_core.cli")
    commands = arguments.add_subparsers(title="commands", metavar="COMMAND", required=True)
    of_eval = commands.add_parser(
        "eval",
        help="evaluate one model on one suite",
        description=evaluate.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_arguments(of_eval)
    return evaluate.run(arguments.parse_args(argv))


if __name__ == "__main__":
    leave(run_script(main))
