"""Progress bars: in a terminal, and of one process alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from gsm8k_core import ranks

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], what: str, total: int | None = None, start: int = 0
) -> Iterator[Item]:
    """A tqdm bar in a terminal; nothing in a log file, where a bar would be a thousand lines."""
    from tqdm import tqdm

    yield from tqdm(items, desc=what, total=total, initial=start, disable=not _shows_bars())


def progress_bar(what: str, total: int, start: int = 0) -> Any:
    """The bar of `progress` for work that calls back: a context manager to call `update()` on."""
    from tqdm import tqdm

    return tqdm(desc=what, total=total, initial=start, disable=not _shows_bars())


def _shows_bars() -> bool:
    return sys.stderr.isatty() and ranks.is_main()
