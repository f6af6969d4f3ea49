"""The page on settings says what the code says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def test_the_settings_page_is_up_to_date(script: Callable[[str], ModuleType]) -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == script("document_settings").page(), "run scripts/document_settings.py"


def test_every_setting_is_explained(script: Callable[[str], ModuleType]) -> None:
    rows = [line for line in script("document_settings").page().split("\n") if line[:3] == "| `"]
    assert len(rows) > 80
    for row in rows:
        key, *_ = row.strip("| ").split(" | ")
        assert key.startswith("`kind`") or not row.endswith("|  |"), f"explain {key} in config.py"
