"""Secrets are refused in settings, and struck out of what is logged or written down.

A secret is the value of an environment variable whose name says so ($HF_TOKEN, $WANDB_API_KEY, …),
the user and password of a URL, or a text in the form of a well-known kind of key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

STRUCK_OUT = "***"
SECRET_WORDS = {"KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"}
# Shorter values (`1`, `false`) would strike out half of every log.
MIN_SECRET_LENGTH = 8
URL_USER = re.compile(r"(?<=://)[^\s/@\"']+(?=@)")
# Hugging Face, OpenAI and its like, GitHub, AWS.
KEY_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"
)


def environment_secrets() -> dict[str, str]:
    """Name and value of the environment variables that hold secrets, the longest value first."""
    found = {
        name: value
        for name, value in os.environ.items()
        if SECRET_WORDS & set(name.upper().split("_")) and len(value) >= MIN_SECRET_LENGTH
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def redact(text: str) -> str:
    """`text` with every secret in it replaced by `***`."""
    for value in environment_secrets().values():
        text = text.replace(value, STRUCK_OUT)
    return KEY_FORM.sub(STRUCK_OUT, URL_USER.sub(STRUCK_OUT, text))


def secrets_in_settings(settings: Any) -> list[str]:
    """`key: what it holds` of every text among nested settings that holds a secret.

    Settings are written into manifests and commands, so they are refused rather than redacted.
    """
    return [
        f"{key}: holds {kind}; settings are written down, so it belongs into the environment"
        for key, text in _texts(settings, "")
        if (kind := _kind_of_secret(text)) is not None
    ]


def _kind_of_secret(text: str) -> str | None:
    for name, value in environment_secrets().items():
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
