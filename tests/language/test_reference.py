"""The reference page says what the program does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sqlext import option_table, reference


def test_the_page_is_fresh() -> None:
    """REFERENCE.md is what the option table makes now."""
    assert reference.main(["--check"]) == 0


def test_every_option_is_on_the_page() -> None:
    """No setting, option, action or old key is left out."""
    page = reference.page()
    for spec in option_table.TABLE:
        assert f"`{spec.name}`" in page
    for action in option_table.ACTIONS:
        assert f'action="{action.name}"' in page


def test_a_stale_page_is_told(tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """`--check` fails until the page is written again."""
    monkeypatch.setattr(reference, "PAGE", tmp_path / "REFERENCE.md")
    assert reference.main(["--check"]) == 1
    assert "python -m sqlext.reference" in capsys.readouterr().err
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0


@pytest.mark.parametrize("module", ["sqlext.parser", "sqlext.options", "sqlext.script", "sqlext.dialects"])
def test_the_language_loads_nothing_heavy(module: str) -> None:
    """Reading statements needs neither DuckDB nor sqlglot, Arrow, Ray or torch."""
    code = (
        "import sys, types, pathlib; package = types.ModuleType('sqlext'); "
        "package.__path__ = [str(pathlib.Path('sqlext').resolve())]; sys.modules['sqlext'] = package; "
        f"import {module}; "
        "print(sorted({'duckdb', 'sqlglot', 'pyarrow', 'ray', 'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    root = reference.PAGE.parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
