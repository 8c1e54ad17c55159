"""Cards: what a notebook declares, and every way a card can be wrong."""

import json

import nbformat
import pytest

from icl_lib.cards.card import CardError, all_declared, check_card, check_values, declared, for_notebook, read_card
from icl_lib.commands.check import main

CELL = """\
run_dir: str = "runs/tiny"  # where results go
model: str = "some/hub-model"  # folder or hub id
seed: int = 0  # PRNG seed
n_prompts: int = 16  # prompts a task
sweep_widths: list[int] = [8, 16]  # widths tried
n_shots: int = 8  # examples a prompt
layer_executor: int = 3  # resid_pre layer
tvc_l1: list[float] = [0.001, 0.01]  # L1 coefficients
tvc_lr: float = 0.05  # Adam's rate
quick: bool = False  # fewer tasks
sae_variant: str = ""  # form of the SAEs"""


def _notebook(folder, name, cell):
    cells = [nbformat.v4.new_markdown_cell("# T"), nbformat.v4.new_code_cell("import jax")]
    cells.append(nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]}))
    path = folder / name
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        ),
        path,
    )
    return path


@pytest.fixture
def notebook(tmp_path):
    return _notebook(tmp_path, "02_toy.ipynb", CELL)


@pytest.fixture
def check(notebook):
    return lambda **values: check_values({"run_dir": "runs/x", **values}, declared(notebook), "x.yaml")


def test_declared_reads_type_default_and_meaning(notebook):
    p = declared(notebook)["tvc_l1"]
    assert (p.type, p.default, p.help, p.notebooks) == (list[float], [0.001, 0.01], "L1 coefficients", ("02_toy",))


def test_declared_sees_the_names_that_papermill_sees(notebook):
    import papermill

    assert list(declared(notebook)) == list(papermill.inspect_notebook(str(notebook)))


def test_a_good_card_passes_and_numbers_take_their_declared_type(check):
    card = check(tvc_lr=1, tvc_l1=[1, 0.5], seed=0, layer_executor=0, n_shots=0, quick=True)
    assert card["tvc_lr"] == 1.0 and isinstance(card["tvc_lr"], float)
    assert all(isinstance(v, float) for v in card["tvc_l1"])


def test_a_sweep_may_be_empty_and_then_there_is_none(check):
    assert check(sweep_widths=[])["sweep_widths"] == []
    assert check(sae_variant="")["sae_variant"] == "", "a text may be empty where its default is"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sweep_widths": [0]}, ["sweep_widths", "1 or more"]),
        ({"n_prompt": 4}, ["n_prompt", "did you mean `n_prompts`"]),
        ({"zzzz": 4}, ["no notebook declares `zzzz`", "known keys", "tvc_lr"]),
        ({"n_prompts": "4"}, ["n_prompts", "expected int", "prompts a task", "write 4 without quotes"]),
        ({"n_prompts": 4.5}, ["n_prompts", "expected int", "4.5"]),
        ({"n_prompts": True}, ["n_prompts", "expected int", "True"]),
        ({"tvc_lr": "1e-3"}, ["tvc_lr", "expected float", "write 1.0e-3"]),
        ({"tvc_l1": ["1e3"]}, ["tvc_l1", "list[float]", "write 1.0e+3"]),
        ({"tvc_l1": 0.1}, ["tvc_l1", "expected list[float]"]),
        ({"tvc_l1": []}, ["tvc_l1", "empty"]),
        ({"tvc_l1": [0.1, 0.1]}, ["tvc_l1", "twice"]),
        ({"tvc_l1": [-0.1]}, ["tvc_l1", "-0.1 is impossible", "0 or more"]),
        ({"tvc_lr": 0.0}, ["tvc_lr", "above 0"]),
        ({"tvc_lr": float("nan")}, ["tvc_lr", "not a finite number"]),
        ({"n_prompts": 0}, ["n_prompts", "1 or more"]),
        ({"n_shots": -1}, ["n_shots", "0 or more"]),
        ({"layer_executor": -1}, ["layer_executor", "0 or more"]),
        ({"model": ""}, ["model", "empty"]),
        ({"model": "assets/no-such-model"}, ["model", "assets/no-such-model does not exist", "hub id"]),
        ({"sae_variant": "papers"}, ["sae_variant", "'papers' is none of '', 'paper'"]),
        ({"quick": "yes"}, ["quick", "expected bool"]),
    ],
)
def test_a_bad_value_is_named_with_its_repair(check, values, words):
    with pytest.raises(CardError) as err:
        check(**values)
    assert all(word in str(err.value) for word in ["x.yaml", *words]), str(err.value)


def test_all_problems_are_reported_at_once(check):
    with pytest.raises(CardError) as err:
        check(n_prompts=0, tvc_lr="fast", sed=1)
    assert len(str(err.value).splitlines()) == 4


def test_a_card_must_say_where_results_go(notebook):
    with pytest.raises(CardError, match="`run_dir` is missing.*runs/mine"):
        check_values({"seed": 1}, declared(notebook), "params/mine.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", "seed is set more than once"),
        ("- 1\n- 2\n", "lines `key: value`, got list"),
        ("", "got NoneType"),
        ("seed: [1\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_flat_mapping_is_refused(tmp_path, text, words):
    path = tmp_path / "card.yaml"
    path.write_text(text)
    with pytest.raises(CardError, match=words):
        read_card(path)


def test_a_missing_card_lists_those_there_are(tmp_path):
    with pytest.raises(CardError, match="no card at .*tiny.yaml"):
        read_card(tmp_path / "none.yaml")


def test_yaml_floats_without_a_point_are_caught(tmp_path, notebook):
    path = tmp_path / "card.yaml"
    path.write_text("run_dir: runs/x\ntvc_lr: 1e-3\n")
    with pytest.raises(CardError, match="YAML reads 1e-3 as text, write 1.0e-3"):
        check_card(path, [notebook])
    path.write_text("run_dir: runs/x\ntvc_lr: 1.0e-3\n")
    assert check_card(path, [notebook])["tvc_lr"] == 1e-3


def test_a_notebook_gets_only_what_it_declares(tmp_path):
    small = _notebook(tmp_path, "03_small.ipynb", "seed: int = 0  # PRNG seed")
    assert for_notebook({"seed": 3, "n_prompts": 4}, small) == {"seed": 3}


def test_two_notebooks_must_agree_on_a_type(tmp_path, notebook):
    other = _notebook(tmp_path, "03_other.ipynb", "n_prompts: list[int] = [1]  # sizes")
    with pytest.raises(CardError, match="`n_prompts` is int in 02_toy and list\\[int\\] in 03_other"):
        all_declared([notebook, other])


def test_one_key_of_two_notebooks_names_both(tmp_path, notebook):
    other = _notebook(tmp_path, "03_other.ipynb", "seed: int = 0  # PRNG seed")
    assert all_declared([notebook, other])["seed"].notebooks == ("02_toy", "03_other")


@pytest.mark.parametrize(
    "line", ["x = 3", "x: int = 3 * 2", "x: dict = {}", "x: str | None = None", "x: int", "x: int = (", "print(3)"]
)
def test_a_line_papermill_cannot_set_is_refused(tmp_path, line):
    bad = _notebook(tmp_path, "02_bad.ipynb", line)
    with pytest.raises(CardError, match="02_bad|annotation"):
        declared(bad)


def test_a_notebook_cut_short_is_named(notebook):
    notebook.write_text(notebook.read_text()[:100])
    with pytest.raises(CardError, match="02_toy.ipynb is not a readable notebook"):
        declared(notebook)


def test_the_command_reports_without_a_traceback(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "no card at" in capsys.readouterr().err


def test_papermill_reads_back_what_a_card_says(tmp_path, notebook):
    """The values written for one notebook survive papermill's YAML reader, small floats included."""
    import yaml

    part = for_notebook({"run_dir": "runs/x", "tvc_l1": [1e-5, 1e-3], "tvc_lr": 3.0}, notebook)
    assert yaml.safe_load(yaml.safe_dump(part)) == part
    assert json.loads(json.dumps(part)) == part
