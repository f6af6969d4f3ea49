"""Secrets are refused in settings, and struck out of what is logged or written down.

A secret is the value of an environment variable or of an option whose name says so ($HF_TOKEN,
--api-key), the user and password of a URL, or a text in the form of a well-known kind of key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

STRUCK_OUT = "***"
# What makes a name a secret's: $OPENAI_APIKEY, --hf-token, client_secret. KEY and TOKEN at the end
# of a word, for tokenizers and prompt_tokens are none; PASS, AUTH and PAT as the last word alone:
# $SSH_AUTH_SOCK is a path, $SSH_ASKPASS a program.
SECRET_NAME = re.compile(
    r"""SECRET | PASSWORD | PASSWD | PASSPHRASE | CREDENTIAL | AUTHORIZATION | API_?KEY
    | (?<!MON)KEY(?![A-Z]) | TOKEN(?![A-Z])
    | (ACCESS|API|AUTH|HF|HUB|PRIVATE|SESSION|USER)_?(KEY|TOKEN)S(?![A-Z])
    | (^|_)(?!BYPASS|COMPASS|ASKPASS)[A-Z0-9]*PASS$ | (^|_)(AUTH|PAT)$""",
    re.VERBOSE,
)
# Parts of names that are a request's, and speak of the tokens of a text or of a cache.
HARMLESS_PART = re.compile(r"(TOKEN_(IDS|BUDGET|COUNT|LIMIT)|PROMPT_CACHE_KEY)(?![A-Z])")
# Shorter values (`1`, `false`) would strike out half of every log.
MIN_SECRET_LENGTH = 8
URL_USER = re.compile(r"(?<=://)[^\s/\"']+(?=@)")  # to the last @: a password may hold others
# Hugging Face, OpenAI and its like, GitHub, GitLab, Slack, AWS, Google, W&B, PyPI.
KEY_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|xox[a-z]-[A-Za-z0-9-]{10,}|A(?:KIA|SIA)[A-Z0-9]{16}\b"
    r"|AIza[A-Za-z0-9_-]{30,}|wandb_v1_[A-Za-z0-9_-]{16,}|pypi-AgE[A-Za-z0-9_-]{16,})"
)
# W&B's older keys have no form of their own.
WANDB_LOGIN = re.compile(r"(\bwandb[ \t]+login\b[^\n]{0,200}?)\b[0-9a-f]{40}\b")
# A private key's block, its lines as they are or escaped in JSON; each line keeps what a patch
# begins it with, so that the patch still applies.
PRIVATE_KEY = re.compile(
    r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----)(.{1,20000}?)(?=-----END [A-Z ]*PRIVATE)"
)
LINE_OF_KEY = re.compile(r"(?m)^([+ -]?+).+$")
# A header in a file: curl -H "Authorization: Bearer …", headers["Authorization"] = "Bearer …"; a
# reference to a variable is none, and a word without a digit or `=` is prose.
IN_A_HEADER = re.compile(
    r"(?i)(authorization[\"'\])]{0,2}[ \t]*[:=,]?[ \t]*f?[\"']?(?:bearer|basic|token)[ \t]+)"
    r"(?=[\w.~+/-]*[\d=])[\w.~+/=-]{8,}"
)
# What gives a value to a name: in a .env file, a shell, code, JSON or YAML. Upper-case names come
# first: `command = "export DB_PASS=…"` is an assignment as a whole.
UPPER_CASE, ANY_CASE = (
    re.compile(
        rf"""(?<![\w$])(?P<name>{name})
        (?: ["']?[ \t]*[=:][ \t]* (?P<quoted>"[^"\n]*"|'[^'\n]*')
          | = (?P<word>[^\s"']\S*)
          | (?: (?P<blanks>[ \t]+=[ \t]*) | [=:][ \t]+ ) (?P<last>[^\s"']\S*) [ \t]*$
        )""",
        re.VERBOSE | re.MULTILINE,
    )
    for name in ("[A-Z][A-Z0-9_]*", r"(?<!\w-)[A-Za-z_][A-Za-z0-9_-]*")
)
# A value that is none: `$HF_TOKEN`, `${{ secrets.HF_TOKEN }}`, `$(cat token)`.
REFERENCE = re.compile(r"\$(?:[A-Z_][A-Z0-9_]*\b|[{(]).*")
# In lower case a name is a field's or a parameter's as well: eos_token = "<|endoftext|>". There a
# value is struck out only where it looks like a key, or the name speaks of a password.
LOOKS_LIKE_KEY = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[\w./+=-]{20,}")
LOOKS_LIKE_NAME = re.compile(r"(?=\S*[_./])[a-z0-9_./-]+")  # sort_key = "accuracy_at_1_by_seed"
PASSWORD_NAME = re.compile(r"SECRET|PASSWORD|PASSWD|PASSPHRASE")
# The name of a variable, as in KEY_VARIABLE = "DEEPSEEK_API_KEY" or f(HF_TOKEN=FAKE_TOKEN).
VARIABLE = re.compile(r"([A-Z][A-Z_]*)(?:[,)].*)?")


def is_secret_name(name: str) -> bool:
    """Whether a variable, an option or a parameter of this name holds a secret."""
    words = HARMLESS_PART.sub("", name.upper().replace("-", "_"))
    return SECRET_NAME.search(words) is not None


def environment_secrets() -> dict[str, str]:
    """Name and value of the environment variables that hold secrets, the longest value first."""
    found = {
        name: value
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value) >= MIN_SECRET_LENGTH
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def redact(text: str) -> str:
    """`text` with every secret in it replaced by `***`."""
    for value in environment_secrets().values():
        text = text.replace(value, STRUCK_OUT)
    text = PRIVATE_KEY.sub(lambda key: key[1] + LINE_OF_KEY.sub(rf"\1{STRUCK_OUT}", key[2]), text)
    text = WANDB_LOGIN.sub(rf"\1{STRUCK_OUT}", text)
    return KEY_FORM.sub(STRUCK_OUT, URL_USER.sub(STRUCK_OUT, text))


def redact_assignments(text: str) -> str:
    """`text` with the values of headers and of variables that hold a secret replaced by `***`.

    For files as they are; in a log it would strike out more than secrets.
    """

    def strike(match: re.Match[str]) -> str:
        group = next(name for name in ("quoted", "word", "last") if match[name] is not None)
        value = match[group].strip("\"'")
        variable = VARIABLE.fullmatch(value)
        is_a_name = variable is not None and is_secret_name(variable[1])
        if not value or not is_secret_name(match["name"]) or is_a_name or REFERENCE.match(value):
            return match[0]
        # An upper-case name with blanks around `=` is code as often: API_KEY = read_key().
        certain = match["name"].isupper() and match["blanks"] is None
        if not certain and not _is_literal_secret(match["name"], group, value):
            return match[0]
        before = match[0][: match.start(group) - match.start()]
        quote = match[group][0] if group == "quoted" else ""
        return before + quote + STRUCK_OUT + quote + match[0][match.end(group) - match.start() :]

    text = IN_A_HEADER.sub(rf"\1{STRUCK_OUT}", text)
    return ANY_CASE.sub(strike, UPPER_CASE.sub(strike, text))


def _is_literal_secret(name: str, group: str, value: str) -> bool:
    """Whether `value`, given to a name that is not in upper case, is a secret and not code."""
    if LOOKS_LIKE_NAME.fullmatch(value):
        return False
    if LOOKS_LIKE_KEY.fullmatch(value):
        return True
    if PASSWORD_NAME.search(name.upper()) is None or len(value) < MIN_SECRET_LENGTH:
        return False
    # Without quotes it may be code: `password: SecretStr`, `f(password=words[0])`.
    plain = re.fullmatch(r"\S+" if group == "quoted" else r"(?=\S*\d)[^\s()\[\]{},]+", value)
    return plain is not None


def secrets_in_settings(settings: Any) -> list[str]:
    """`key: what it holds` of every text among nested settings that holds a secret.

    Settings are written into manifests and commands, so they are refused rather than redacted.
    """
    known = environment_secrets()
    return [
        f"{key}: holds {kind}; settings are written down, so it belongs into the environment"
        for key, text in _texts(settings, "")
        if (kind := _kind_of_secret(text, known)) is not None
    ]


def _kind_of_secret(text: str, known: dict[str, str]) -> str | None:
    for name, value in known.items():
        if value in text:
            return f"the value of ${name}"
    if URL_USER.search(text):
        return "the user or password of a URL"
    return "what looks like a key" if KEY_FORM.search(text) else None


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text below `value`; names of keys are texts too."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield key or "config", str(name)
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
