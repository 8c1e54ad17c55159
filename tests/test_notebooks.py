"""The notebooks as files: pairs of the same cells, executed in order, small, readable; and the cards that set them."""

import ast
import json
import re

import jupytext
import nbformat
import pytest

from icl_lib.cards.card import Card, check_card, notebook_files, parameters, read_card, type_name
from icl_lib.files.paths import root

EXPECTED = [
    "00_a_model_that_learns_in_context",
    "01_sparse_autoencoders",
    "02_task_vectors",
    "03_task_vector_cleaning",
    "04_executors",
    "05_detectors",
    "06_sparse_feature_circuits",
]
NOTEBOOKS = notebook_files()
CARDS = sorted((root() / "params").glob("*.yaml"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def _read(path):
    return nbformat.read(path, as_version=4)


def _code(path):
    return [c for c in _read(path).cells if c.cell_type == "code"]


def _prose(path):
    return [c for c in _read(path).cells if c.cell_type == "markdown"]


def test_the_first_seven_notebooks_are_there_and_paired():
    assert [p.stem for p in NOTEBOOKS][:7] == EXPECTED
    assert [p.stem for p in NOTEBOOKS] == [p.stem for p in sorted((root() / "notebooks").glob("[0-9][0-9]_*.py"))]


@each_notebook
def test_both_files_hold_the_same_cells(path):
    def cells(notebook):
        return [(c.cell_type, c.source.strip(), c.metadata.get("tags", [])) for c in notebook.cells]

    assert cells(jupytext.read(path.with_suffix(".py"))) == cells(_read(path)), (
        f"jupytext --update --to ipynb {path.stem}.py, then run it"
    )


@each_notebook
def test_the_run_is_complete_and_in_order(path):
    assert [c.execution_count for c in _code(path)] == list(range(1, len(_code(path)) + 1)), (
        "run all cells from the top"
    )
    assert not [o for c in _code(path) for o in c.outputs if o.output_type == "error"]


@each_notebook
def test_the_file_is_small_and_its_kernel_plain(path):
    assert path.stat().st_size <= 1_500_000
    assert _read(path).metadata.kernelspec.name == "python3"


@each_notebook
def test_it_reads_claim_code_close(path):
    prose = _prose(path)
    assert prose[0].source.startswith("# ") and "**Claim" in prose[0].source
    assert len(prose) >= 0.7 * len(_code(path)), f"{len(prose)} cells of prose to {len(_code(path))} of code"
    close = "\n".join(c.source for c in prose[-5:])  # a heading may stand before a cell for one model
    assert [word for word in ("What we saw", "Limits", "Next") if word not in close] == []


@each_notebook
def test_it_guards_its_numbers(path):
    checked = [c for c in _code(path) if "nbval-check-output" in c.metadata.get("tags", [])]
    assert checked and any("assert " in c.source or "close_run(" in c.source for c in _code(path))


@each_notebook
def test_it_names_no_machine(path):
    """No absolute path of one machine anywhere, and nothing fetched by address."""
    outputs = json.dumps(
        [
            [{k: v for k, v in o.items() if k != "data"}, o.get("data", {}).get("text/plain", "")]
            for c in _code(path)
            for o in c.outputs
        ]
    )
    text = outputs + "\n".join(c.source for c in _read(path).cells)
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt)/\w+", text) == []
    assert re.findall(r"\w+://", outputs + "\n".join(c.source for c in _code(path))) == []


@each_notebook
def test_its_parameters_are_those_of_a_card(path):
    """Each with the name, type, default and meaning that the card's model gives it."""
    found = parameters(path)
    assert {"run_dir", "seed", "model"} <= set(found)
    for name, said in found.items():
        field = Card.model_fields[name]
        assert said["inferred_type_name"] == type_name(field.annotation), name
        assert ast.literal_eval(said["default"]) == field.default, name
        assert said["help"] == field.description, name


@pytest.mark.parametrize("card", CARDS, ids=lambda p: p.name)
def test_every_card_is_valid(card):
    """Every key is declared by a notebook, every value has its type and is possible."""
    assert check_card(card)


def test_the_tiny_card_is_the_notebooks_defaults():
    """nbval runs the defaults and `make demo` runs the card: the same experiment."""
    assert read_card(root() / "params" / "tiny.yaml") == Card().model_dump()
    assert {name for path in NOTEBOOKS for name in parameters(path)} == set(Card.model_fields), "every key is used"
