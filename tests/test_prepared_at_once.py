"""Two studies may share artifacts/: what both prepare at once is whole, whoever was last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gsm8k_core.files import read_json, sha256_file

ROOT = Path(__file__).resolve().parent.parent
WRITE_OVER_AND_OVER = """
import sys
from pathlib import Path
from gsm8k_core.files import atomic_path

print("ready", flush=True)
sys.stdin.readline()
for _ in range(150):
    with atomic_path(Path(sys.argv[1])) as temporary:
        temporary.mkdir()
        for name in ("a", "b"):
            (temporary / name).write_text(sys.argv[2], encoding="utf-8")
"""


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_replace_one_folder_at_once_all_succeed_and_leave_one_whole(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "folder"
    writers = [start("-c", WRITE_OVER_AND_OVER, str(folder), f"writer {k}") for k in range(3)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        assert writer.communicate(timeout=300)[1] == ""
        assert writer.returncode == 0
    contents = [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())]
    assert len(contents) == 2 and contents[0] == contents[1]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
def test_two_processes_prepare_the_same_model_and_data_at_once(tmp_path: Path) -> None:
    model, data = tmp_path / "models" / "tiny-qwen2", tmp_path / "arithmetic"
    processes = [
        start("scripts/prepare_model.py", "--model-name", "tiny-qwen2", "--output-dir", str(model)),
        start("scripts/prepare_data.py", "--dataset", "arithmetic", "--output-dir", str(data)),
        start("scripts/prepare_model.py", "--model-name", "tiny-qwen2", "--output-dir", str(model)),
        start("scripts/prepare_data.py", "--dataset", "arithmetic", "--output-dir", str(data)),
    ]
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
    files = read_json(model / "manifest.json")["files"]
    assert {name: sha256_file(model / name) for name in files} == files
    manifest = read_json(data / "manifest.json")
    for split in ("train", "val", "test"):
        assert sha256_file(data / f"{split}.jsonl") == manifest[split]["sha256"]
    assert not [path for path in tmp_path.rglob(".*")]
