"""What a card asks of its model and its tasks is checked before anything runs: by the library, the command and
snakemake.
"""

import json
import subprocess
import sys

import pytest
import yaml

from icl_lib.cards.card import CardError
from icl_lib.cards.checks import check_against_model, config_of
from icl_lib.commands.check import main
from icl_lib.files.paths import root
from icl_lib.models import tiny_config
from icl_lib.models.families import to_hf

TINY = root() / "params" / "tiny.yaml"


@pytest.fixture
def card(tmp_path):
    """Writes a copy of the embedded model's card with changes."""

    def write(name="card", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(TINY.read_text()) | {"run_dir": str(tmp_path / "run")} | changes))
        return path

    return write


BAD = [
    ({"layer_detector": 9}, ["`layer_detector` names layer 9, but icl-tiny has the layers 0 to 5", "must be below"]),
    ({"layer_executor": 6}, ["`layer_executor` names layer 6"]),
    ({"sae_layers": [0, 17]}, ["`sae_layers` names layer 17"]),
    ({"circuit_layers": [2, 6, 7]}, ["`circuit_layers` names layer 6", "names layer 7"]),
    ({"layer_detector": 4}, ["`layer_detector` (4) must be below `layer_executor` (4)"]),
    (
        {"max_shots": 20},
        ["`max_shots`: 20 examples are at least 84 tokens, and the context of icl-tiny has 80: at most 19"],
    ),
    (
        {"tasks": "embeded"},
        ["no source 'embeded'; did you mean 'embedded'?", "embedded, paper, function_vectors, or a folder"],
    ),
    (
        {"saes": ["a/b/l{layer:0-2}"], "sae_layers": [3, 4]},
        ["`saes`: a/b/l{layer:0-2} is of none of the `sae_layers` [3, 4]"],
    ),
    ({"saes": ["a/b/l{layer:3}"]}, ["`saes`: 'a/b/l{layer:3}': layers are written {layer}, or {layer:0-16}"]),
    (
        {"model": "google/gemma-2b", "layer_executor": 18},
        ["`layer_executor` names layer 18, but google/gemma-2b has the layers 0 to 17"],
    ),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_what_the_model_or_the_tasks_cannot_serve_is_named(changes, words):
    values = yaml.safe_load(TINY.read_text()) | changes
    with pytest.raises(CardError) as err:
        check_against_model(values, "x.yaml")
    assert all(word in str(err.value) for word in ["x.yaml", *words]), str(err.value)


def test_folders_of_tasks_and_models(tmp_path):
    values = yaml.safe_load(TINY.read_text())
    with pytest.raises(CardError, match="holds no .json or .tsv file of pairs"):
        check_against_model(values | {"tasks": str(tmp_path)}, "x.yaml")
    (tmp_path / "mine.tsv").write_text("input\toutput\na\tb\n")
    check_against_model(values | {"tasks": str(tmp_path)}, "x.yaml")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(tiny_config(), "float32")))
    assert config_of(str(tmp_path)).n_layers == 2
    with pytest.raises(CardError, match="has the layers 0 to 1"):
        check_against_model(values | {"model": str(tmp_path)}, "x.yaml")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CardError, match="`model`: .*config.json is not valid JSON"):
        config_of(str(tmp_path))
    assert config_of("someone/unheard-of") is None, "of which the layers are checked when it is loaded"


def test_the_command_checks_them_too(card, capsys):
    assert main([str(card(layer_detector=9))]) == 2
    assert "`layer_detector` names layer 9" in capsys.readouterr().err
    assert main([str(card())]) == 0


def test_snakemake_stops_at_such_a_card_before_anything_runs(card, tmp_path):
    cards = {"layer 9": card("a", layer_detector=9), "no source 'embeded'": card("b", tasks="embeded")}
    command = [sys.executable, "-m", "snakemake", "--nolock", "--cores", "1", "--configfile"]
    runs = {
        words: subprocess.Popen(
            [*command, path], cwd=root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for words, path in cards.items()
    }
    for words, run in runs.items():
        said, _ = run.communicate(timeout=120)
        assert run.returncode and words in said and "Traceback" not in said, said
        assert len(said.strip().splitlines()) <= 4, said
    assert not (tmp_path / "run").exists()
