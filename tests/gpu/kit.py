"""Prove this repository on a GPU: tests, benchmarks, and SmolLM2-135M trained on GSM8K for real.

    bash tests/gpu/check.sh --minutes 30 --output results

The phases, in order, each with its share of the minutes (what one leaves over goes to those after):

    install     join and install what tests/gpu/pack.sh gathered (nothing, where all is there)
    prepare     problems and starting weights
    tests       tests/gpu, and the ordinary tests of what computes
    sft         a few steps to measure the speed, then as many as the time allows
    benchmarks  the device's ceilings, then the scripts of benchmarks/ on it (GRPO from sft's model)
    grpo        as sft, from the model that it left
    evaluate    greedy answers to the test problems by each model, graded and compared
    report      report.md and report.json; also written after every other phase

State is kept in a folder (`--state`), so a call that is cut short, or ends by `--call-minutes`, is
gone on with by the same command; exit code 75 says that something is left to do, 1 that something
failed or did not end in its time. No command goes on when the minutes are up. Where calls may be
killed after ten minutes:

    bash tests/gpu/check.sh --minutes 27 --call-minutes 9 --output results       # three times

A machine without a network first receives the pack (see tests/gpu/pack.sh), piece by piece. Nothing
is fetched then. `--device cpu` rehearses all of it on a CPU in sizes that fit one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kit_report import write_report

ROOT = Path(__file__).resolve().parent.parent.parent
STUDY = "studies/smollm2-gsm8k-gpu.yaml"
REHEARSAL = "tests/gpu/rehearsal.yaml"
UNFINISHED = 75
SAVE_SECONDS = 15

# Phases in order; the number is the share of the time that is left when it begins.
SHARES = {
    "install": None,
    "prepare": None,
    "tests": 10,
    "sft": 12,
    "benchmarks": 15,
    "grpo": 43,
    "evaluate": 20,
    "report": None,
}
PHASES = list(SHARES)
GRPO_BENCHMARK = "grpo against TRL"
TRIAL_STEPS = {"sft": 8, "grpo": 3}
NEEDED = ("torch", "transformers", "pydantic", "polars", "scipy", "psutil", "yaml", "tqdm")
TESTS = (
    "tests/gpu",
    "tests/test_masking.py",
    "tests/test_tokenization.py",
    "tests/test_scoring.py",
    "tests/test_losses.py",
    "tests/test_advantages.py",
    "tests/test_grpo.py",
    "tests/test_hf_engine.py",
)
FACTS_OF_MACHINE = """
import importlib.metadata, json, torch
from gsm8k_core.manifest import git_state, host_facts, package_versions
names = "accelerate gguf liger-kernel cut-cross-entropy safetensors triton trl vllm".split()
others = {}
for name in names:
    try:
        others[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
cuda = torch.cuda.is_available()
print(json.dumps({
    **host_facts(), "packages": {**package_versions(), **others}, "git": git_state(),
    "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(0) if cuda else None,
    "num_gpus": torch.cuda.device_count(),
    "threads": torch.get_num_threads(),
}))
"""


class Stopped(Exception):
    """What ran out of its phase's time, or of all minutes (`box`), or of this call's (`call`)."""

    def __init__(self, limit: str, what: str = "stopped at the end of its time") -> None:
        super().__init__(what)
        self.limit = limit


class Failed(Exception):
    """A phase could not be done; the message says why, in a line."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Kit:
    """State of one study on one machine, kept in a folder between calls."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self.path = folder / "kit.json"
        self.started = time.monotonic()
        self.call_end = math.inf
        if args.call_minutes is not None:
            self.call_end = self.started + 60 * args.call_minutes
        given = {
            "minutes": args.minutes,
            "device": args.device,
            "study": args.study,
        }
        self.state: dict[str, Any] = {"settings": {}, "calls": [], "phases": {}, "commands": []}
        if self.path.exists():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
        self.state["settings"].update({k: v for k, v in given.items() if v is not None})
        self.settings: dict[str, Any] = self.state["settings"]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        command = "bash tests/gpu/check.sh " + shlex.join(sys.argv[1:])
        self.state["calls"].append({"started": now, "command": command})
        self.output_dir: Path | None = args.output
        self.wanted: list[str] = args.phase or PHASES
        self.benchmarks: list[str] | None = args.benchmarks
        self.phase = ""
        self.phase_end = math.inf

    # ------------------------------------------------------------------------------------ keeping

    def save(self) -> None:
        """Write the state, whole or not at all."""
        seconds = time.monotonic() - self.started
        self.state["calls"][-1]["seconds"] = round(seconds, 1)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def seconds_left(self) -> float:
        """Of the minutes for all calls together."""
        used = sum(call.get("seconds", 0.0) for call in self.state["calls"][:-1])
        return 60 * self.settings["minutes"] - used - (time.monotonic() - self.started)

    def facts(self, phase: str) -> dict[str, Any]:
        """What a phase found so far, to be read and added to."""
        facts: dict[str, Any] = self.state["phases"][phase].setdefault("facts", {})
        return facts

    def done(self, phase: str) -> bool:
        """Whether a phase is not tried again by itself: it ended, or its time did."""
        return self.state["phases"].get(phase, {}).get("status") in ("done", "cut")

    # ----------------------------------------------------------------------------------- commands

    @property
    def site(self) -> Path:
        return self.folder / "site-packages"  # so named, as dill knows libraries by it

    def environment(self) -> dict[str, str]:
        """Of every command: what was installed here, no network, the device that was asked for."""
        paths = [str(ROOT), str(self.site), os.environ.get("PYTHONPATH", "")]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        found |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if (self.folder / "data" / "gsm8k").is_dir():  # received: there is no network
            found["GSM8K_DIR"] = str(self.folder / "data" / "gsm8k")
            found |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        if (self.site / "vllm").is_dir() and not (self.site / "flashinfer").is_dir():
            # Else vLLM imports it. Our engine sets this itself, but TRL and lm-eval do not.
            found["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        if self.settings["device"] == "cpu":
            found["CUDA_VISIBLE_DEVICES"] = ""
        return found

    def run(self, *words: Any, until: float | None = None, output: Path | None = None) -> float:
        """Run Python with `words` from the repository's root; returns its seconds.

        What it says goes to logs/<phase>.log, standard output to `output` if given. Raises Stopped
        at the phase's or the call's end, or that of all minutes (the command is asked to stop, then
        made to), Failed with the log's last line.
        """
        arguments = [str(word) for word in words]
        minutes_end = time.monotonic() + self.seconds_left()
        end = min(self.phase_end if until is None else until, self.call_end, minutes_end)
        log = self.folder / "logs" / f"{self.phase}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        record: dict[str, Any] = {
            "phase": self.phase,
            "command": shlex.join(["python", *arguments]),
        }
        with log.open("ab") as handle, open(output or os.devnull, "wb") as results:
            handle.write(f"$ {record['command']}\n".encode())
            handle.flush()
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self.environment(),
                stdout=handle if output is None else results,
                stderr=handle,
                process_group=0,  # to be stopped with all that it started
            )
            code: int | None = None
            try:
                while code is None and time.monotonic() < end:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = process.wait(max(0.1, min(end - time.monotonic(), SAVE_SECONDS)))
                    self.save()  # the time used, should this process be killed
            finally:
                _stop(process)
        seconds = time.monotonic() - started
        record |= {"seconds": round(seconds, 1), "code": code}
        self.state["commands"].append(record)
        self.save()
        if code is None:
            raise Stopped("call" if end == self.call_end else "box")
        if code != 0:
            name = " ".join(arguments[: 2 if arguments[0] == "-m" else 1])
            raise Failed(f"{name} gave {code}: {last_line(log)} (logs/{log.name})")
        return seconds

    # ------------------------------------------------------------------------------------- phases

    def begin(self, phase: str) -> None:
        """Give a phase its time: its share of what is left, less what it has used."""
        entry = self.state["phases"].setdefault(phase, {"seconds": 0.0})
        if entry.get("status") == "failed":  # tried again: with all of its time
            self.state["phases"][phase] = entry = {"seconds": 0.0, "facts": entry.get("facts", {})}
        share = SHARES[phase]
        self.phase, self.phase_end = phase, math.inf
        if share is not None:
            later = sum(SHARES[p] or 0 for p in self.wanted if not self.done(p))
            if "box_seconds" not in entry:
                entry["box_seconds"] = round(max(self.seconds_left(), 0.0) * share / later, 1)
            self.phase_end = time.monotonic() + max(entry["box_seconds"] - entry["seconds"], 5.0)
        entry["status"] = "unfinished"

    def perform(self, phase: str, work: Callable[[Kit], None]) -> None:
        """Do a phase; whatever becomes of it is kept and reported."""
        self.begin(phase)
        entry = self.state["phases"][phase]
        box = f", {entry['box_seconds']:.0f} s for it" if "box_seconds" in entry else ""
        say(f"== {phase} ({max(self.seconds_left(), 0) / 60:.1f} min left{box})")
        started = time.monotonic()
        entry.pop("reason", None)
        try:
            work(self)
            entry["status"] = "done"
        except Stopped as stop:
            if stop.limit == "box":
                entry |= {"status": "cut", "reason": str(stop)}
            else:
                entry["reason"] = "the call's time was up"
        except Failed as error:
            entry |= {"status": "failed", "reason": str(error)}
        except Exception as error:  # a bug here must not cost the phases after it, nor the report
            traceback.print_exc()
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - started, 1)
        text = f"   {entry['status']} after {entry['seconds']:.0f} s"
        say(f"{text}: {entry['reason']}" if "reason" in entry else text)
        self.save()
        write_report(self.folder, self.output_dir)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group.

    First as Ctrl-C does: pytest then still writes down which tests have failed so far.
    """
    for number, patience in ((signal.SIGINT, 15), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def last_line(log: Path) -> str:
    """What a command said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
    return lines[-1][:300]


# --------------------------------------------------------------------------------- receive, install


def receive(pack: Path, piece: Path) -> list[str]:
    """Copy a piece of the pack into `pack`; returns the parts that are still missing."""
    if not (piece / "pack.json").is_file():
        raise Failed(f"{piece}: no pack.json there; is it a piece that pack.sh wrote?")
    pack.mkdir(parents=True, exist_ok=True)
    for path in sorted(piece.iterdir()):
        temporary = pack / f".{path.name}.tmp"
        shutil.copyfile(path, temporary)
        temporary.replace(pack / path.name)
    return missing_parts(pack)


def missing_parts(pack: Path) -> list[str]:
    files = json.loads((pack / "pack.json").read_text(encoding="utf-8"))["files"]
    parts = [part for facts in files.values() for part in facts["parts"]]
    return [part for part in parts if not (pack / part).is_file()]


def join(pack: Path, folder: Path) -> list[Path]:
    """The pack's files, whole and with the right digests, in `folder`."""
    missing = missing_parts(pack)
    if missing:
        raise Failed(f"the pack lacks {', '.join(missing)}: --receive the pieces that hold them")
    folder.mkdir(parents=True, exist_ok=True)
    files = json.loads((pack / "pack.json").read_text(encoding="utf-8"))["files"]
    for name, facts in files.items():
        content = b"".join((pack / part).read_bytes() for part in facts["parts"])
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise Failed(f"{name} did not arrive as it was sent: receive its pieces again")
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def is_installed(wheel: Path) -> bool:
    """Whether this Python has the wheel's package already, in whatever version."""
    name = wheel.name.split("-")[0].replace("_", "-")
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install(kit: Kit) -> None:
    if (kit.folder / "pack" / "pack.json").is_file():
        files = join(kit.folder / "pack", kit.folder / "files")
        data = kit.folder / "data" / "gsm8k"
        data.mkdir(parents=True, exist_ok=True)
        for path in files:
            if path.suffix == ".jsonl":
                shutil.copyfile(path, data / path.name)
        unpack([path for path in files if path.name.startswith("environment-")], kit.site)
        wheels = [path for path in files if path.suffix == ".whl" and not is_installed(path)]
        command = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        if wheels:
            kit.run(*command, "--no-compile", "--target", kit.site, *wheels)
        kit.facts("install")["installed"] = sorted(path.name for path in wheels)
        shutil.rmtree(kit.folder / "files")
    add_site(kit)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Failed(
            f"this Python lacks {', '.join(missing)}: install them, or make a pack with "
            "tests/gpu/pack.sh where there is a network, and --receive its pieces"
        )
    answer = subprocess.run(
        [sys.executable, "-c", FACTS_OF_MACHINE],
        cwd=ROOT,
        env=kit.environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if answer.returncode != 0:
        raise Failed(f"the library cannot be imported: {answer.stderr.strip()[-300:]}")
    facts = json.loads(answer.stdout.strip().split("\n")[-1])
    kit.facts("install")["machine"] = {**facts, "python": sys.version.split()[0]}
    if facts["gpu"] is None and kit.settings["device"] != "cpu":
        raise Failed("torch sees no GPU here (--device cpu rehearses the kit on a CPU)")
    say(f"   {facts['gpu'] or 'CPU'}, torch {facts['packages']['torch']}, Python {sys.version[:6]}")


def unpack(archives: list[Path], site: Path) -> None:
    """The locked environment into `site`, and CUDA's libraries from where this Python has them."""
    if not archives:
        return
    site.mkdir(exist_ok=True)
    command = ["tar", "--extract", "--directory", str(site), "--file"]
    running = [subprocess.Popen([*command, str(path)]) for path in archives]
    for path, process in zip(archives, running, strict=True):
        if process.wait() != 0:
            raise Failed(f"{path.name}: tar gave {process.returncode}")
    own = importlib.util.find_spec("nvidia")
    for place in (own.submodule_search_locations or []) if own is not None else []:
        for folder in Path(place).iterdir():
            link = site / "nvidia" / folder.name
            if folder.is_dir() and not link.exists():
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(folder)


def add_site(kit: Kit) -> None:
    """Let this process import what was installed, and the library."""
    for path in (str(kit.site), str(ROOT)):
        if path not in sys.path:
            sys.path.insert(0, path)
    importlib.invalidate_caches()


# ------------------------------------------------------------------------------- the study's pieces


class Study:
    """The study that the settings name, and where its parts lie in the state folder."""

    def __init__(self, kit: Kit) -> None:
        add_site(kit)
        from gsm8k_core.config import load_config

        self.kit = kit
        self.files = [str(ROOT / "config.yaml"), *kit.settings["study"]]
        named = load_config(Path(self.files[0]), [ROOT / path for path in self.files[1:]])
        (self.model,) = named.study.models
        overlay = kit.folder / "steps.json"
        gpus = 0 if kit.settings["device"] == "cpu" else 1
        steps = {
            name: {"num_steps": steps, "checkpoint_every_steps": every}
            for name, (steps, every) in kit.state.get("steps", {}).items()
        }
        overlay.write_text(
            json.dumps({"models": {self.model: {"gpus": gpus}}, "methods": steps}, indent=1),
            encoding="utf-8",
        )
        self.files.append(str(overlay))
        self.config = load_config(Path(self.files[0]), [ROOT / path for path in self.files[1:]])
        (self.suite,) = self.config.study.suites
        self.methods = self.config.study.methods
        self.dataset = self.config.study.dataset
        self.runs = kit.folder / "experiments"

    @property
    def data(self) -> Path:
        return self.kit.folder / "problems"

    @property
    def weights(self) -> Path:
        return self.kit.folder / "starting-weights"

    def run_dir(self, method: str) -> Path:
        return self.runs / self.model / method / "seed0"

    def trained_model(self, method: str | None) -> Path:
        return self.weights if method in (None, "base") else self.run_dir(str(method)) / "model"

    def cell(self, method: str) -> list[str]:
        """The arguments that name a cell of the study."""
        named = ["--config", *self.files, "--model-name", self.model, "--method", method]
        return [*named, "--seed", "0"]


def prepare(kit: Kit) -> None:
    study = Study(kit)
    if not (study.data / "manifest.json").exists():
        settings = study.config.datasets[study.dataset].model_dump_json()
        words = ["scripts/prepare_data.py", "--dataset", study.dataset, "--settings", settings]
        kit.run(*words, "--output-dir", study.data)
    if not (study.weights / "manifest.json").exists():
        settings = study.config.models[study.model].starting_weights().model_dump_json()
        words = ["scripts/prepare_model.py", "--model-name", study.model, "--settings", settings]
        kit.run(*words, "--output-dir", study.weights)
    kit.facts("prepare")["model"] = model_shape(study.weights)
    kit.facts("prepare")["study"] = {
        "model": study.model, "dataset": study.dataset, "suite": study.suite,
        "files": kit.settings["study"],
    }  # fmt: skip


def model_shape(folder: Path) -> dict[str, int]:
    """What the number of operations depends on, read off the files."""
    num_parameters = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                num_parameters += math.prod(tensor["shape"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "num_parameters": num_parameters,
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "vocabulary": config["vocab_size"],
    }


# -------------------------------------------------------------------------------- tests, benchmarks


def run_tests(kit: Kit) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise Failed("pytest is not installed")
    xml = kit.folder / "tests.xml"
    xml.unlink(missing_ok=True)  # of an earlier call
    kit.facts("tests").pop("counts", None)
    words = ["-m", "pytest", *TESTS, "-q", "-ra", "-W", "default", "-m", "not slow"]
    words += ["-p", "no:cacheprovider", f"--junitxml={xml}"]
    try:
        kit.run(*words)
    finally:
        if xml.exists():
            kit.facts("tests")["counts"] = count_tests(xml)


def count_tests(xml: Path) -> dict[str, Any]:
    from xml.etree import ElementTree

    suite = next(ElementTree.parse(xml).getroot().iter("testsuite"))
    wrong = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts: dict[str, Any] = {
        name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    }
    return {**counts, "failed": wrong[:20]}


def benchmark_commands(kit: Kit, study: Study) -> dict[str, list[Any]]:
    """Name and command line of each. They print Markdown."""
    on_cpu = kit.settings["device"] == "cpu"
    device = ["--device", kit.settings["device"]] + ["--dtype", "bfloat16"] * (not on_cpu)
    weights = ["--model", study.weights]
    model = [*weights, "--model-name", study.model]
    train = ["--data", study.data / "train.jsonl"]
    test = ["--config", *study.files, "--data", study.data / "test.jsonl"]
    ceilings_file = kit.folder / "ceilings.json"
    # Arguments, what is added on a CPU, and what is on a GPU.
    commands: dict[str, tuple[list[Any], str, str]] = {
        "ceilings": (
            ["ceilings", *device[:2], "--output", ceilings_file],
            "--sizes 256 512 --copy-mib 64 --rounds 2",
            "",
        ),
        "scoring": (
            ["scoring", *device],
            "--hidden 32 --vocabulary 500 --rows 2 --tokens 16 --rounds 1",
            "",
        ),
        "scoring without entropy": (
            ["scoring", *device, "--without-entropy"],
            "--hidden 32 --vocabulary 500 --rows 2 --tokens 16 --rounds 1",
            "",
        ),
        "training step": (
            ["training_step", *weights, *device],
            "--rows 1 --shortest 16 --rounds 1",
            "",
        ),
        "shared prompts": (
            ["shared_prompts", *weights, *device],
            "--prompts 2 --group-size 2 --completion-tokens 4 8 --rounds 1",
            "",
        ),
        "engines": (
            ["engines", *model, *test],
            "--num-problems 4 --max-new-tokens 8 --batch-size 2",
            "--num-problems 512 --max-new-tokens 256 --batch-size 256",
        ),
    }
    with_vllm = " --engine vllm" * (importlib.util.find_spec("vllm") is not None)
    if importlib.util.find_spec("trl") is not None:
        commands["sft against TRL"] = (
            ["sft", *model, *train, *device],
            "--batch-size 2 --steps 1 --rounds 1",
            "--batch-size 64 --tokens-per-microbatch 32768 --rounds 4",
        )
        learned = ["--model", study.trained_model("sft")]
        commands[GRPO_BENCHMARK] = (
            ["grpo", *learned, "--model-name", study.model, *train, *device],
            "--prompts 2 --group-size 2 --max-new-tokens 4 --rounds 1",
            "--prompts 16 --group-size 16 --max-new-tokens 128 --trl-accumulation 4 --rounds 4"
            + with_vllm,
        )
    raw = kit.environment().get("GSM8K_DIR")
    if raw and importlib.util.find_spec("lm_eval") is not None:
        commands["evaluation against lm-eval"] = (
            ["evaluation", *weights, "--gsm8k", raw, *device],
            "--limit 2 --rounds 1 --max-new-tokens 4 --batch-size 2",
            "--limit 1000 --rounds 5 --batch-size 256 --lm-eval-batch-size 64" + with_vllm,
        )
    return {
        name: [f"benchmarks/{script}.py", *words, *(for_cpu if on_cpu else for_gpu).split()]
        for name, ((script, *words), for_cpu, for_gpu) in commands.items()
    }


def run_benchmarks(kit: Kit) -> None:
    study = Study(kit)
    folder = kit.folder / "benchmarks"
    folder.mkdir(exist_ok=True)
    faults, cut = [], []
    commands = benchmark_commands(kit, study)
    if kit.benchmarks is not None:
        if unknown := [name for name in kit.benchmarks if name not in commands]:
            raise Failed(f"no benchmark {', '.join(unknown)}: there are {', '.join(commands)}")
        commands = {name: commands[name] for name in kit.benchmarks}
    finished = kit.facts("benchmarks").setdefault("finished", [])
    for number, (name, words) in enumerate(commands.items()):
        if name in finished:
            continue
        output = folder / f"{name}.md"
        # From weights that solve nothing, ours makes hardly a backward pass: that says little.
        if name == GRPO_BENCHMARK and not study.trained_model("sft").is_dir():
            output.write_text("Left out: phase sft has left no model to start from.\n", "utf-8")
            continue
        # None may eat what is left for those after it.
        left = kit.phase_end - time.monotonic()
        until = time.monotonic() + max(left / (len(commands) - number) * 1.5, 5.0)
        try:
            kit.run(*words, until=min(until, kit.phase_end), output=output)
        except Failed as error:
            faults.append(str(error))
        except Stopped as stop:
            if stop.limit == "call":
                raise
            cut.append(name)
        finished.append(name)
    if faults or cut:
        kit.facts("benchmarks")["finished"] = []
    what = f"stopped at the end of their time: {', '.join(cut)}"
    if faults:
        raise Failed("; ".join(faults + [what] * bool(cut)))
    if cut:
        raise Stopped("box", what)


# ----------------------------------------------------------------------------------------- training


def train(kit: Kit, method: str) -> None:
    """Measure a few steps, choose how many fit, run them; a late run ends at a checkpoint."""
    study = Study(kit)
    if method not in study.methods:
        return
    settings = study.config.trained(method)
    starting_model = study.trained_model(study.config.parent_of(method))
    if not starting_model.is_dir():
        raise Failed(f"{starting_model.name} of the parent is missing: its phase has to end first")
    script = f"scripts/train_{settings.kind}.py"
    words = [script, *study.cell(method), "--starting-model", starting_model]
    words += ["--data", study.data / "train.jsonl"]
    run_dir, facts = study.run_dir(method), kit.facts(method)
    if (run_dir / "model").is_dir():
        return
    if method not in kit.state.setdefault("steps", {}):
        trial = run_dir.parent / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        if settings.num_steps <= 2 * TRIAL_STEPS[method]:
            steps, every = settings.num_steps, settings.checkpoint_every_steps
            facts["chosen"] = f"{steps} steps, as the study has it"
        else:
            limit = ["--max-steps", TRIAL_STEPS[method], "--output-dir", trial]
            try:
                seconds_trial = kit.run(*words, *limit)
            except Stopped as stop:
                if stop.limit == "call":
                    raise
                raise Stopped("box", "stopped before a few steps had shown its speed") from None
            seconds = seconds_a_step(trial / "train" / "metrics.jsonl")
            startup = max(seconds_trial - seconds * TRIAL_STEPS[method], 0.0)
            box = kit.phase_end - time.monotonic() - startup
            steps = max(2, min(settings.num_steps, int(0.9 * box / seconds)))
            every = max(1, min(steps, int(30 / seconds)))
            facts["chosen"] = (
                f"{steps} of {settings.num_steps} steps: {seconds:.2f} s each in a trial of "
                f"{TRIAL_STEPS[method]}, {max(box, 0):.0f} s for them"
            )
            shutil.rmtree(trial)
        kit.state["steps"][method] = [steps, every]
        kit.save()
        study = Study(kit)
        words[1 : 1 + len(study.cell(method))] = study.cell(method)
    say(f"   {facts['chosen']}")
    words += ["--output-dir", run_dir]
    try:
        # A quarter more than planned; then it is told to end where its last checkpoint is.
        kit.run(*words, until=kit.phase_end + 0.25 * kit.state["phases"][method]["box_seconds"])
    except Stopped as stop:
        checkpoints = sorted((run_dir / "state").glob("step-*"))
        if stop.limit == "call":
            raise
        if not checkpoints:
            raise Stopped("box", "stopped before its first checkpoint") from None
        last = int(checkpoints[-1].name.removeprefix("step-"))
        facts["cut"] = f"cut after {last} steps, the time being up"
        kit.run(*words, "--max-steps", last, until=math.inf)


def seconds_a_step(metrics: Path) -> float:
    """Median over the later half of the steps of a run."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").split("\n") if line]
    totals = [row["seconds_total"] for row in rows]
    steps = [b - a for a, b in zip(totals, totals[1:], strict=False)]
    return max(statistics.median(steps[len(steps) // 2 :]), 1e-3)


# --------------------------------------------------------------------------------------- evaluation


def evaluate(kit: Kit) -> None:
    """Completions and grades of every model that there is; those trained come first."""
    study = Study(kit)
    kit.phase_end = max(kit.phase_end, time.monotonic() + kit.seconds_left())
    present = [m for m in study.methods if study.trained_model(m).is_dir()]
    missing = [m for m in study.methods if m not in present]
    for method in sorted(present, key=lambda m: m == "base"):
        run_dir = study.run_dir(method)
        completions = run_dir / "completions" / f"{study.suite}.jsonl"
        stats = completions.with_suffix(".stats.json")
        if not stats.exists():
            words: list[Any] = ["scripts/generate.py", *study.cell(method), "--suite", study.suite]
            words += ["--model", study.trained_model(method), "--data", study.data / "test.jsonl"]
            kit.run(*words, "--output", completions, "--stats", stats)
        grades = run_dir / "grades" / f"{study.suite}.parquet"
        if not grades.exists():
            grading = study.config.grading_settings(study.model, study.suite).model_dump_json()
            words = ["scripts/grade.py", "--settings", grading, "--completions", completions]
            words += ["--stats", stats, "--grades", grades]
            kit.run(*words, "--output", run_dir / "metrics" / f"{study.suite}.json")
        compare(kit, study)
    if missing:
        raise Failed(f"{', '.join(missing)}: not trained, so not evaluated")


def compare(kit: Kit, study: Study) -> None:
    """The study's own table, of what has been evaluated so far."""
    graded = [m for m in study.methods if (study.run_dir(m) / "grades").is_dir()]
    settings = json.loads(study.config.comparison().model_dump_json())
    settings["methods"] = graded
    words = ["scripts/compare.py", "--study", json.dumps(settings), "--study-dir", study.runs]
    kit.run(*words, "--output-dir", kit.folder / "results")


WORK: dict[str, Callable[[Kit], None]] = {
    "install": install,
    "prepare": prepare,
    "tests": run_tests,
    "sft": lambda kit: train(kit, "sft"),
    "benchmarks": run_benchmarks,
    "grpo": lambda kit: train(kit, "grpo"),
    "evaluate": evaluate,
    "report": lambda _: None,
}


def arguments() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--minutes", type=float, help="for all calls together (default: 30)")
    found.add_argument("--call-minutes", type=float, help="this call ends after so many")
    found.add_argument("--output", type=Path, metavar="DIR", help="where the report goes as well")
    found.add_argument(
        "--state",
        type=Path,
        default=ROOT / "artifacts" / "gpu-check",
        metavar="DIR",
        help="kept between calls (default: artifacts/gpu-check)",
    )
    found.add_argument("--receive", type=Path, metavar="PIECE", help="take in a piece of the pack")
    found.add_argument("--phase", nargs="+", choices=PHASES, help="these alone (default: all)")
    found.add_argument(
        "--benchmarks", nargs="+", metavar="NAME", help="of that phase these alone, in this order"
    )
    found.add_argument("--again", action="store_true", help="redo phases that are done")
    found.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda")
    found.add_argument(
        "--study",
        nargs="+",
        metavar="FILE",
        help=f"of one model and one suite (default: {STUDY}; on a CPU {REHEARSAL} over it)",
    )
    return found


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does: what it has started is stopped too.

    SIGINT is set as well: a shell has what it starts with `&` ignore it, and so would what this
    process starts.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def main() -> int:
    args = arguments().parse_args()
    if args.receive is not None:
        try:
            missing = receive(args.state / "pack", args.receive)
        except Failed as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        say(f"still missing: {', '.join(missing)}" if missing else "the pack is complete")
        return 0
    args.state.mkdir(parents=True, exist_ok=True)
    args.state = args.state.resolve()
    kit = Kit(args.state, args)
    kit.settings.setdefault("minutes", 30.0)
    kit.settings.setdefault("device", "cuda")
    if "study" not in kit.settings:
        rehearsal = kit.settings["device"] == "cpu"
        kit.settings["study"] = [STUDY, REHEARSAL] if rehearsal else [STUDY]
    wanted = kit.wanted
    if not args.phase or "install" not in args.phase:
        wanted = ["install", *[phase for phase in wanted if phase != "install"]]
    try:
        with stoppable():
            for phase in wanted:
                if kit.done(phase) and not (args.again and phase in (args.phase or PHASES)):
                    continue
                if args.again and phase in kit.state["phases"]:
                    del kit.state["phases"][phase]
                kit.perform(phase, WORK[phase])
                if phase == "install" and not kit.done(phase):
                    break
                if kit.call_end <= time.monotonic() + 5:
                    say("   this call's time is up: give the same command again")
                    break
    except KeyboardInterrupt:
        kit.save()
        sys.stderr.write("interrupted: give the same command again to go on\n")
        return 130
    statuses = [kit.state["phases"].get(phase, {}).get("status") for phase in wanted]
    left = [phase for phase in wanted if not kit.done(phase)]
    say(f"report: {(args.output or args.state) / 'report.md'}")
    if "failed" in statuses:
        return 1
    if left:
        return UNFINISHED
    return 1 if "cut" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
