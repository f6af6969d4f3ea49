"""The commands that the pages and the scripts' own examples tell to type are ones that parse.

docs/experiments.md has those of the day that it tells of, whatever has become of them since.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

import gsm8k_core
from gsm8k_core.config import Config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted({ROOT / "README.md", *ROOT.glob("docs/*.md")} - {ROOT / "docs/experiments.md"})
EXAMPLES = sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")])  # in docstrings
PYTHON = r"python (?:(?:scripts|benchmarks)/\w+\.py|-m (?:benchmarks|gsm8k_core)\.\w+)(?= |$)"
CRASHES = "snakemake --resources gpu=1 PATH"  # as docs/design.md says
READERS_OWN = {"studies/NAME.yaml", "studies/NEW.yaml", "studies/YOURS.yaml"}


def documented(program: str) -> list[str]:
    """Commands that the expression `program` begins: lines of code, and what stands in `…`."""
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    texts += [ast.get_docstring(ast.parse(path.read_bytes())) or "" for path in EXAMPLES]
    found = set()
    for text in texts:
        text = re.sub(r" *\\\n *", " ", text)
        code = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
        code += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
        commands = (re.search(rf"(?<!\S){program}.*", line) for line in code)
        found |= {match[0] for match in commands if match and "…" not in match[0]}
    return sorted(found)


def forms(command: str) -> list[list[str]]:
    """The words of a command without what stands in [brackets], and with each `[--flag | …]`."""
    parts = re.findall(r" \[(.*?)\]", command)
    flags = [flag for part in parts for flag in part.split(" | ") if flag.startswith("--")]
    without = re.sub(r" \[.*?\]", "", command)
    return [shlex.split(f"{without} {flag}", comments=True) for flag in ("", *flags)]


class Parsed(BaseException):
    """Nothing after the parser is to run."""


@pytest.mark.slow
@pytest.mark.parametrize("command", documented(PYTHON))
def test_arguments_of_a_documented_command_parse_and_its_names_are_in_the_config(
    command: str,
    script: Callable[[str], ModuleType],
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parse_args = argparse.ArgumentParser.parse_args
    registries: dict[str, Mapping[str, object]] = {
        "model_name": config.models, "method": config.methods, "suite": config.suites,
        "dataset": config.datasets, "traces": config.traces,
    }  # fmt: skip

    def only_parse(parser: argparse.ArgumentParser, words: list[str] | None = None) -> None:
        found = vars(parse_args(parser, words))
        for key, registry in registries.items():
            assert found.get(key) is None or found[key] in registry
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for words in forms(command):
        of_module = words[1] == "-m"
        name = words[2] if of_module else words[1].removesuffix(".py").replace("/", ".")
        folder, _, stem = name.partition(".")
        module = script(stem) if folder == "scripts" else importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", words[2 if of_module else 1 :])
        try:
            module.main()
        except Parsed:
            continue
        except SystemExit as end:
            assert end.code == 0, capsys.readouterr().err  # --help
            continue
        pytest.fail("it parsed nothing")


@pytest.mark.slow
def test_documented_calls_of_snakemake_parse_and_the_files_they_name_are_there() -> None:
    from snakemake.cli import get_argument_parser  # takes a second, for all who collect tests

    parser = get_argument_parser()
    commands = documented("snakemake(?= )")
    commands.remove(CRASHES)
    with pytest.raises(ValueError):
        parser.parse_args(CRASHES.split()[1:])
    assert len(commands) > 20
    for command in commands:
        for words in forms(command):
            parser.parse_args(["1" if word == "N" else word for word in words[1:]])
            files = {word for word in words if word.startswith(("studies/", "profiles/"))}
            missing = {name for name in files - READERS_OWN if not (ROOT / name).exists()}
            assert not missing, command


def test_the_library_table_of_the_usage_page_has_the_names_that_the_package_exports() -> None:
    page = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    section = page.partition("\n## As a library\n")[2].partition("\n## ")[0]
    _, *rows = re.findall(r"^\|.*\| (.*) \|$", section, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == gsm8k_core.__all__
