"""The image's recipe agrees with what else pins its versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from gsm8k_core.manifest import SECRET_FILES

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def default_base() -> str:
    found = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_base_has_the_cuda_that_the_locked_torch_was_built_with() -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    (toolkit,) = (package for package in packages if package["name"] == "cuda-toolkit")
    found = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-base-\S+", default_base())
    assert found is not None
    assert toolkit["version"].startswith(f"{found[1]}.")


def test_the_image_that_is_pushed_has_that_base_too() -> None:
    build = yaml.safe_load((ROOT / ".github" / "workflows" / "build.yml").read_text("utf-8"))
    variants = build["jobs"]["image"]["strategy"]["matrix"]["include"]
    assert {variant["extra"]: variant["base"] for variant in variants}["vllm"] == default_base()


def test_what_the_recipe_installs_is_an_extra_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    build = yaml.safe_load((ROOT / ".github" / "workflows" / "build.yml").read_text("utf-8"))
    variants = build["jobs"]["image"]["strategy"]["matrix"]["include"]
    default = re.search(r"^ARG EXTRA=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert default is not None
    wanted = {default[1], *(variant["extra"] for variant in variants)}
    assert wanted <= set(project["optional-dependencies"])


def test_what_a_manifest_leaves_out_as_secret_gets_into_no_image() -> None:
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    anywhere = {line.removeprefix("**/") for line in left_out if line.startswith("**/")}
    assert anywhere - {"__pycache__"} == set(SECRET_FILES)
    assert not any(line.startswith("!") for line in left_out)
