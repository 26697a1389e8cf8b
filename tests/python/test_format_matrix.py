"""docs/formats.md is what scripts/format_matrix.py makes of docs/formats.json, with no cell left open."""

import json

import format_matrix
import pytest


def test_the_page_is_that_of_the_notes(root):
    notes = json.loads((root / "docs" / "formats.json").read_text(encoding="utf-8"))
    assert (root / "docs" / "formats.md").read_text(encoding="utf-8") == format_matrix.render(notes)


def test_a_cell_without_a_result_needs_a_reason(root):
    notes = json.loads((root / "docs" / "formats.json").read_text(encoding="utf-8"))
    gone = next(note for note in notes if note["format"] == "gptq" and note["reader"] == "gptqmodel")
    with pytest.raises(ValueError, match="no test shows.*read by gptqmodel"):
        format_matrix.render([note for note in notes if note is not gone])


def test_unknown_names_are_refused():
    note = {"format": "awq", "writer": "gptq", "options": "", "reader": "gptq", "result": "same bits"}
    with pytest.raises(ValueError, match="unknown format or reader"):
        format_matrix.render([note])
