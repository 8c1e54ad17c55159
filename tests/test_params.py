"""Cards: what a notebook declares, and every way a card can be wrong."""

import json

import nbformat
import pytest
import yaml

from icl_lib.cards.card import Card, CardError, check_card, check_values, for_notebook, parameters, read_card, type_name
from icl_lib.commands.check import main

CELL = """\
run_dir: str = "runs/tiny"  # where results go
seed: int = 0  # PRNG seed
tvc_l1: list[float] = [0.001, 0.01]  # L1 coefficients"""


@pytest.fixture
def notebook(tmp_path):
    cell = nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "02_toy.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), path)
    return path


def check(**values):
    return check_values({"run_dir": "runs/x", **values}, "x.yaml")


def test_every_key_says_what_it_means_and_its_default_is_possible():
    assert all(field.description for field in Card.model_fields.values())
    assert Card.model_validate(Card().model_dump()) == Card()
    assert type_name(Card.model_fields["tvc_l1"].annotation) == "list[float]"
    assert type_name(Card.model_fields["sae_variant"].annotation) == "str"


def test_a_good_card_passes_and_numbers_take_their_declared_type():
    card = check(tvc_lr=1, tvc_l1=[1, 0.5], seed=0, layer_executor=0, n_shots=0)
    assert card.tvc_lr == 1.0 and isinstance(card.tvc_lr, float)
    assert all(isinstance(v, float) for v in card.tvc_l1)
    assert check(saes="owner/suite").saes == ["owner/suite"], "a text may stand for a list of one"
    with pytest.raises(ValueError, match="frozen"):
        card.seed = 1


def test_a_sweep_may_be_empty_and_then_there_is_none():
    assert check(sweep_widths=[]).sweep_widths == [] and check(latent_scales=[]).latent_scales == []
    assert check(sae_variant="").sae_variant == "", "a text may be empty where its default is"


def test_saes_that_the_run_makes_are_looked_for_later():
    assert check(saes=["runs/mine/saes"]) and check(saes=["data/none/l{layer}"])
    with pytest.raises(CardError, match="data/none does not exist"):
        check(saes=["data/none"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sweep_widths": [0]}, ["sweep_widths", "1 or more"]),
        ({"n_prompt": 4}, ["n_prompt", "did you mean `n_prompts`"]),
        ({"zzzz": 4}, ["no notebook declares `zzzz`", "known keys", "tvc_lr"]),
        ({"n_prompts": "4"}, ["n_prompts", "expected int", "prompts per task", "write 4 without quotes"]),
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
        ({"text": "data/no-such-text"}, ["text", "data/no-such-text does not exist"]),
        ({"detector_lr": 0}, ["detector_lr", "above 0"]),
        ({"scale_executor": -2.0}, ["scale_executor", "-1 or more"]),
        ({"tvc_l1": [0.1, float("inf")]}, ["tvc_l1", "not a finite number"]),
        ({"saes": []}, ["saes", "empty"]),
        ({"circuit_layers": [2, 2]}, ["circuit_layers", "twice"]),
    ],
)
def test_a_bad_value_is_named_with_its_repair(values, words):
    with pytest.raises(CardError) as err:
        check(**values)
    assert all(word in str(err.value) for word in ["x.yaml", *words]), str(err.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(CardError) as err:
        check(n_prompts=0, tvc_lr="fast", sed=1)
    assert len(str(err.value).splitlines()) == 4


def test_a_card_must_say_where_results_go():
    with pytest.raises(CardError, match="`run_dir` is missing.*runs/mine"):
        check_values({"seed": 1}, "params/mine.yaml")


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


def test_yaml_floats_without_a_point_are_caught(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text("run_dir: runs/x\ntvc_lr: 1e-3\n")
    with pytest.raises(CardError, match="YAML reads 1e-3 as text, write 1.0e-3"):
        check_card(path)
    path.write_text("run_dir: runs/x\ntvc_lr: 1.0e-3\n")
    assert check_card(path).tvc_lr == 1e-3


def test_a_notebook_gets_only_what_it_declares(notebook):
    assert for_notebook({"seed": 3, "n_prompts": 4}, notebook) == {"seed": 3}


def test_a_notebook_cut_short_is_named(notebook):
    notebook.write_text(notebook.read_text()[:100])
    with pytest.raises(CardError, match="02_toy.ipynb is not a readable notebook"):
        parameters(notebook)


def test_the_command_reports_without_a_traceback(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "no card at" in capsys.readouterr().err


def test_papermill_reads_back_what_a_card_says(notebook):
    """The values written for one notebook survive papermill's YAML reader, small floats included."""
    part = for_notebook({"run_dir": "runs/x", "tvc_l1": [1e-5, 1e-3], "seed": 3}, notebook)
    assert yaml.safe_load(yaml.safe_dump(part)) == part
    assert json.loads(json.dumps(part)) == part
