"""Secrets are refused in settings and struck out of what is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gsm8k_core.config import (
    ApiSettings,
    ModelSettings,
    load_config,
    merge,
    parse_config,
    settings_from,
)
from gsm8k_core.errors import ConfigError
from gsm8k_core.files import read_json
from gsm8k_core.manifest import redacted
from gsm8k_core.redaction import redact, redact_assignments

ROOT = Path(__file__).resolve().parent.parent
HUB_KEY = "hf_" + "a1B2" * 6


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-key")
    monkeypatch.setenv("WANDB_API_KEY_OLD", "planted-key-and-more")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-as-it-were")
    monkeypatch.setenv("SHORT_TOKEN", "on")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key planted-key!", "key ***!"),
        ("planted-key-and-more", "***"),  # the longer one first, or its end would stay
        ("https://me:word@host/x and s3://bucket/y", "https://***@host/x and s3://bucket/y"),
        ("https://token@host", "https://***@host"),
        ("https://me:w@rd@host/x@y", "https://***@host/x@y"),
        (f"with {HUB_KEY}.", "with ***."),
        ("sk-" + "x" * 30, "***"),
        ("github_pat_" + "a1B2_" * 8, "***"),
        ("glpat-" + "a1-B2" * 4, "***"),
        ("xoxb-" + "123-abc" * 4 + " and xoxp-" + "123-abc" * 4, "*** and ***"),
        ("AIza" + "a1_B2" * 7, "***"),
        ("wandb_v1_" + "a1_B2" * 8, "***"),
        ("pypi-AgEIcHlwaS5vcmc" + "a1-B2" * 4, "***"),
        ("ASIA" + "A1B2" * 4, "***"),
        (
            f"RUN wandb login --relogin {'0a1b2' * 8} && true",
            "RUN wandb login --relogin *** && true",
        ),
        ("wandb login; git checkout 0a1b2c3, pypi-attestations-of-a-package, ASIATIC", None),
        ("false-as-it-were, on, a@b.c, task-and-some-more-words", None),
    ],
)
def test_secrets_are_struck_out_and_nothing_else(text: str, expected: str | None) -> None:
    assert redact(text) == (text if expected is None else expected)


BEGIN, END = "-----BEGIN {}PRIVATE KEY-----", "-----END {}PRIVATE KEY-----"


@pytest.mark.parametrize("kind", ["", "RSA ", "ENCRYPTED ", "OPENSSH "])
def test_a_private_key_is_struck_out_line_by_line(kind: str) -> None:
    begin, end = BEGIN.format(kind), END.format(kind)
    assert redact(f"a\n{begin}\nMIIE+x\nab==\n{end}\nb") == f"a\n{begin}\n***\n***\n{end}\nb"
    patch = f" a\n+{begin}\n+MIIE+x\n+ab==\n+{end}\n b\n"
    assert redact(patch) == f" a\n+{begin}\n+***\n+***\n+{end}\n b\n"
    escaped = json.dumps({"private_key": f"{begin}\nMIIE+x\nab==\n{end}\n", "id": "b"})
    assert json.loads(redact(escaped)) == {"private_key": f"{begin}***{end}\n", "id": "b"}


def test_a_block_of_pgp_and_each_of_several_keys_are_struck_out_and_nothing_between() -> None:
    begin, end = BEGIN.format(""), END.format("")
    keys = f"{begin}\nab\n{end}\nbetween\n{begin}\ncd\n{end}"
    assert redact(keys) == f"{begin}\n***\n{end}\nbetween\n{begin}\n***\n{end}"
    begin, end = (text.format("PGP ").replace("KEY", "KEY BLOCK") for text in (BEGIN, END))
    assert redact(f"{begin}\n\nab\n{end}") == f"{begin}\n\n***\n{end}"


def test_a_certificate_and_the_mere_name_of_a_key_stay() -> None:
    text = f"-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----\n{BEGIN.format('')}\nab\n"
    assert redact(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "MYAPIKEY", "OPENAI_APIKEY", "PGPASS", "DB_PASS", "SMTP_PASSPHRASE", "API_AUTH", "HUB_PAT",
        "HFTOKEN", "hf_token", "WANDB_API_KEY_OLD", "HF_TOKEN_2", "API_KEYS", "AUTHORIZATION",
    ],
)  # fmt: skip
def test_a_variable_whose_name_says_so_holds_a_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "planted-value")
    assert redact("x planted-value y") == "x *** y"


@pytest.mark.parametrize(
    "name",
    [
        "PATH", "PYTHONPATH", "PATTERN", "AUTHOR", "GIT_AUTHOR_NAME", "SSH_AUTH_SOCK", "KEYBOARD",
        "GIT_ASKPASS", "BYPASS", "COMPASS", "TOKENIZERS_PARALLELISM", "MONKEY", "MAX_TOKENS",
        "METRIC_KEYS", "TOKEN_LIMIT",
    ],
)  # fmt: skip
def test_a_variable_of_a_similar_name_holds_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "planted-value")
    assert redact("x planted-value y") == "x planted-value y"


SECRET_NAMES = (
    "api-key", "apikey", "api-keys", "x-api-key", "token", "hf-token", "auth-token", "auth-tokens",
    "api-token", "password", "passwd", "db-password", "passphrase", "key", "key-file", "secrets",
    "storage-s3-secret-key", "storage-s3-access-key", "client-secret", "credentials",
    "authorization", "pass", "auth", "pat", "token-file", "private-keys",
)  # fmt: skip
HARMLESS_NAMES = (
    "prompt-tokens", "completion-tokens", "max-new-tokens", "tokens-per-microbatch", "tokens",
    "max-completion-tokens", "truncate-prompt-tokens", "stop-token-ids", "return-token-ids",
    "thinking-token-budget", "token-limit", "tokenizer", "keyboard", "author", "keep-going",
    "prompt-cache-key", "path", "pattern", "slurm-pass-command-as-script",
)  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_an_option_and_a_parameter_whose_names_say_so_hold_secrets(name: str) -> None:
    shown = ["x.py", f"--{name}", "***", "--other", "150"]
    assert redacted(["x.py", f"--{name}", "150", "--other", "150"]) == shown
    assert redacted([f"--{name}=150"]) == [f"--{name}=***"]
    for parameter in (name, name.replace("-", "_"), name.title()):
        with pytest.raises(ValidationError, match=f"{parameter} looks like a secret"):
            ApiSettings(base_url="https://host", model="m", parameters={parameter: "150"})


def test_a_parameter_within_others_whose_name_says_so_holds_a_secret() -> None:
    source = {"type": "search", "parameters": {"top_n": 3, "authentication": {"key": "150"}}}
    with pytest.raises(ValidationError, match="parameters: key looks like a secret") as caught:
        ApiSettings(base_url="https://h", model="m", parameters={"data_sources": [source]})
    assert "$DEEPSEEK_API_KEY" in str(caught.value)
    schema = {"type": "object", "properties": {"key": {"type": "string"}}}
    parameters = {"thinking": {"type": "enabled", "budget_tokens": 150}, "stop": ["key"]}
    parameters["response_format"] = {"json_schema": {"schema": schema}}
    assert ApiSettings(base_url="https://h", model="m", parameters=parameters).parameters


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_an_option_and_a_parameter_of_similar_names_hold_none(name: str) -> None:
    command = ["x.py", f"--{name}", "150", f"--{name}=150"]
    assert redacted(command) == command
    parameters = {name.replace("-", "_"): 150}
    settings = ApiSettings(base_url="https://host", model="m", parameters=parameters)
    assert settings.parameters == parameters


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("DB_PASS=hunter2", "DB_PASS=***"),
        ("+export PGPASS='a b c'  # mine", "+export PGPASS='***'  # mine"),
        ('API_KEY = "abc" + x', 'API_KEY = "***" + x'),
        ('"API_KEY": "abc",', '"API_KEY": "***",'),
        ("ENV A_TOKEN=b C_KEY=$d", "ENV A_TOKEN=*** C_KEY=***"),
        ("HF_TOKEN: abc\nPATH=/bin", "HF_TOKEN: ***\nPATH=/bin"),
        ("HF_TOKEN=$HF_TOKEN ${{ x }}", None),
        ("HF_TOKEN: ${{ secrets.HF_TOKEN }}", None),
        ('KEY_VARIABLE = "DEEPSEEK_API_KEY"', None),
        ("run(HF_TOKEN=FAKE_TOKEN)", None),
        ("AUTHOR=me PATTERN=x pad_token='<pad>'", None),
        ('OpenAI(api_key="zx81-my-private-value-99")', 'OpenAI(api_key="***")'),
        (f'wandb.login(key="{"0a1b2" * 8}")', 'wandb.login(key="***")'),
        (f'"hf_token": "{"0a1b2" * 8}",', '"hf_token": "***",'),
        ("password: correct-horse-1", "password: ***"),
        ('db_password = "correct-horse"', 'db_password = "***"'),
        ("password=hunter2hunter2", "password=***"),
        ('-H "Authorization: Bearer 9f3c12ab0d"', '-H "Authorization: Bearer ***"'),
        ('{"Authorization": "Basic bWU6d29yZA=="}', '{"Authorization": "Basic ***"}'),
        (
            "headers={'authorization': 'Bearer 9f3c12ab0d'}",
            "headers={'authorization': 'Bearer ***'}",
        ),
        ('headers["Authorization"] = "Bearer 9f3c12ab"', 'headers["Authorization"] = "Bearer ***"'),
        ("add('Authorization', 'Bearer 9f3c12ab')", "add('Authorization', 'Bearer ***')"),
        ("# authorization: basic authentication is used", None),
        ('-H "Authorization: Bearer $KEY"; f"Authorization: Bearer {key}"', None),
        # As INI has it: .aws/credentials, .pypirc, .s3cfg.
        (
            "[a]\naws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY\nregion = e",
            "[a]\naws_secret_access_key = ***\nregion = e",
        ),
        (
            "+AWS_SECRET_ACCESS_KEY = wJalrXUtnFEMI/K7MDENG/bPx \n",
            "+AWS_SECRET_ACCESS_KEY = *** \n",
        ),
        ("password = hunter2hunter2", "password = ***"),
        ("secret_key\t=\t" + "0a1B2" * 8, "secret_key\t=\t***"),
        ("password= hunter2hunter2", "password= ***"),
        ("    client-key-data: LS0tLS1CRUdJTiBSU0EgUFJJ=", "    client-key-data: ***"),
        ("    x-api-key: 0123456789abcdef0123", "    x-api-key: ***"),
        ("API_KEY = read_key()\nPASSWORD = words[0]\nHF_TOKEN = settings.hf_token_2", None),
        ("sort_key = row.accuracy_at_1_by_seed\npassword = ask(2)\ntoken = tokens[10]", None),
        ("cache-key: artifacts/models/qwen2.5-0.5b\nkey = value\npass = 1", None),
        # Upper-case names within the value of another.
        ('command = "export DB_PASS=hunter2 && ./run"', 'command = "export DB_PASS=*** && ./run"'),
        ("  env: DB_PASS=hunter2", "  env: DB_PASS=***"),
        ("docker run --env=WANDB_API_KEY=0123", "docker run --env=WANDB_API_KEY=***"),
        ('run: "SMTP_KEY=abcd"', 'run: "SMTP_KEY=***'),
        ('sort_key = "accuracy_at_1_by_seed_mean"; first_pass = "generate"', None),
        ("cache_key: artifacts/models/qwen2.5-0.5b", None),
        ("password: SecretStr\ntoken: tokenizers.Tokenizer", None),
        ('eos_token = "<|endoftext|>"; key="problem_id"; f(token=tokens[0])', None),
        ('row["key"], sorted(rows, key="accuracy_of_100"), {"api_key": api_key}', None),
    ],
)
def test_the_value_that_a_file_gives_to_a_secret_is_struck_out(
    line: str, expected: str | None
) -> None:
    assert redact_assignments(line) == (line if expected is None else expected)


@pytest.mark.parametrize("part", ["a-", "aB3-_x", "key ", "wandb login ", BEGIN.format("") + "\n"])
def test_a_long_text_is_read_in_a_time_that_grows_as_it_does(part: str) -> None:
    text = part * (200_000 // len(part))  # quadratic, it would take minutes
    assert redact_assignments(redact(text)) == text


def test_nothing_is_struck_out_of_the_code_and_the_configs_of_the_repository() -> None:
    folders = ("gsm8k_core", "scripts", "benchmarks", "rules", "profiles")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    files += [ROOT / "Snakefile", ROOT / "config.yaml", ROOT / "pyproject.toml", ROOT / "uv.lock"]
    kinds = {"", ".py", ".smk", ".json", ".yaml", ".toml", ".lock"}
    texts = {path: path.read_text("utf-8") for path in files if path.suffix in kinds}
    del texts[ROOT / "gsm8k_core" / "redaction.py"]  # its comments have examples
    assert len(texts) > 50
    assert [path for path, text in texts.items() if redact_assignments(redact(text)) != text] == []


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        (
            {"datasets": {"gsm8k": {"path": "https://me:hunter22@host/gsm8k"}}},
            "datasets.gsm8k.path: holds the user or password of a URL",
        ),
        (
            {"prompts": {"plain": {"system": f"you are {HUB_KEY}"}}},
            "prompts.plain.system: holds what looks like a key",
        ),
        (
            {"tracking": {"project": "p", "entity": "planted-key"}},
            "tracking.entity: holds the value of $WANDB_API_KEY",
        ),
        (
            {"suites": {"gsm8k": {"stop": ["a", "planted-key"]}}},
            "suites.gsm8k.stop: holds the value of $WANDB_API_KEY",
        ),
    ],
)
def test_settings_that_hold_a_secret_are_refused_without_repeating_it(
    overlay: dict[str, Any], line: str
) -> None:
    raw = merge(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")), overlay)
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert line in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("hunter22", HUB_KEY, "planted-key"))


def test_settings_given_to_a_script_are_refused_too() -> None:
    text = json.dumps({"source": "path", "path": "ftp://me:hunter22@host", "prompt": "plain"})
    with pytest.raises(ConfigError, match="--settings: path: holds the user or password") as caught:
        settings_from(text, ModelSettings)
    assert "hunter22" not in str(caught.value)


def test_the_configs_of_the_repository_hold_no_secret() -> None:
    for study in (ROOT / "studies").glob("*.yaml"):
        load_config(ROOT / "config.yaml", [study])


@pytest.mark.parametrize(
    "failure",
    [
        "raise RuntimeError('no planted-key')",
        "raise DataError('no planted-key')",
        "raise OSError('no planted-key')",
        "log.warning('no %s', 'planted-key')",
        "warnings.warn('no planted-key')",
        "thread = threading.Thread(target=fails); thread.start(); thread.join()",
        "Unraisable()",
    ],
)
def test_no_message_of_a_script_holds_a_secret(failure: str) -> None:
    code = (
        "import logging, sys, threading, warnings; from gsm8k_core.cli import run_script\n"
        "from gsm8k_core.errors import DataError\n"
        "log = logging.getLogger('x')\n"
        "def fails(*_):\n    raise RuntimeError('no planted-key')\n"
        "class Unraisable:\n    __del__ = fails\n"
        f"def main():\n    {failure}\n"
        "sys.exit(run_script(main))\n"
    )
    # On standard input: a traceback quotes the line of a file, not what it computed.
    result = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "no ***" in result.stderr
    assert "planted-key" not in result.stderr


def test_a_saved_record_is_still_json_after_redaction(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(redact(json.dumps({"url": 'http://u:p@h/"x"', "k": "planted-key"})), "utf-8")
    assert read_json(path) == {"url": 'http://***@h/"x"', "k": "***"}
