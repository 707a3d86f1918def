"""The documentation of the configuration."""

from pathlib import Path

import pytest

from shared import configuration_reference as reference
from shared.settings_schema import options

REPOSITORY = Path(__file__).parents[3]


# Requirements: 14.6
def test_the_reference_is_current():
    """``docs/configuration.md`` is what the settings say; python -m shared.configuration_reference writes it."""
    text = (REPOSITORY / reference.DOCUMENT).read_text(encoding="utf-8")

    assert reference.document(text) == text


def test_the_example_is_current():
    """``config/optimization.example.yaml`` is what the settings say."""
    assert (REPOSITORY / reference.EXAMPLE).read_text(encoding="utf-8") == reference.example()


# Requirements: 14.6
def test_every_option_is_described():
    """No option is without a description, and each row of the reference names its variables."""
    tables = reference.tables()

    assert [option.key for option in options() if not option.description] == []
    assert all(f"`{name}`" in tables for option in options() for name in option.variables)


def test_a_document_without_marks_is_refused():
    """The hand-written part is never overwritten by mistake."""
    with pytest.raises(ValueError, match="lost one of its marks"):
        reference.document("# Configuration\n")


def test_stale_files_are_reported_and_written(tmp_path, monkeypatch, capsys):
    """``--check`` only says what is out of date; without it the files are written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "docs" / "configuration.md").write_text(f"before\n{reference.BEGIN}\nold\n{reference.END}\nafter\n")

    first = reference.main(["--check"])
    written = reference.main([])
    second = reference.main(["--check"])

    assert (first, written, second) == (1, 0, 0)
    assert "docs/configuration.md is out of date" in capsys.readouterr().err
    assert (tmp_path / "docs" / "configuration.md").read_text().startswith("before\n")
