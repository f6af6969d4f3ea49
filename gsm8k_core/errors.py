"""Exceptions whose message is meant for the person at the terminal.

Library code raises these; only a script's command line turns them into one line on stderr
(see `gsm8k_core.cli`). Anything else that propagates is a bug and keeps its traceback.
"""

from __future__ import annotations


class Gsm8kError(Exception):
    """Something the user can mend: the message says what, where and how."""


class ConfigError(Gsm8kError):
    """The settings are wrong. The message lists every mistake, by key."""


class DataError(Gsm8kError):
    """A dataset is missing, malformed or not the one that was pinned."""


class ModelError(Gsm8kError):
    """A model or tokenizer cannot be found or loaded."""


class ApiError(Gsm8kError):
    """A chat API refuses to go on: a wrong key, no balance, a request that it does not accept."""


class BusyError(Gsm8kError):
    """Another process writes the same files."""


class TrainingError(Gsm8kError):
    """A run cannot go on: a non-finite loss, a reward that is no number, a broken checkpoint."""


def first_line(error: BaseException) -> str:
    """What another library's error says, for a message of one's own."""
    lines = str(error).strip().split("\n")
    return lines[0][:300]
