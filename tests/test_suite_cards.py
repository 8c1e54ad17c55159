"""Cards of suites: those of the repository, one run from a folder of text to a folder of SAEs, and cards that cannot be."""

import json

import jax
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icl_lib.models import Site, Transformer, save_model, tiny_config
from icl_lib.runs import root
from icl_lib.runs.params import CardError
from icl_lib.saes import load_suite
from icl_lib.saes.corpus import CorpusError
from icl_lib.saes.train import members, read_suite_card, recipe, run

CONFIG = tiny_config()
WORDS = [f"w{i}" for i in range(CONFIG.d_vocab - 3)]


@pytest.mark.parametrize("path", sorted((root() / "params" / "suites").glob("*.yaml")), ids=lambda p: p.stem)
def test_cards_of_the_repository(path):
    card = read_suite_card(path)
    assert members(card, 6) and recipe(card).n_steps == card.steps
    assert card.run_dir == f"runs/suites/{path.stem}"


def test_the_papers_suite():
    card = read_suite_card(root() / "params" / "suites" / "gemma-1-2b.yaml")
    suite = members(card, 18)
    assert len(suite) == 54 and {m.d_sae for m in suite} == {32768}
    tokens = card.contexts * (card.context - 1) * card.steps // card.steps_per_pass
    assert tokens == pytest.approx(150e6, rel=0.02)
    how = recipe(card)
    assert (how.learning_rate, how.beta1, how.beta2, how.warmup) == (1e-3, 0, 0.99, 128)


@pytest.fixture
def card_file(tmp_path):
    """A card of a model folder with its tokenizer and a file of text; gives a function that writes it with changes."""
    save_model(Transformer.init(CONFIG, key=jax.random.key(0)), tmp_path / "model", dtype="float32")
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", pad_token="<pad>").save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 30)) for _ in range(80)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    values = {
        "model": str(tmp_path / "model"), "text": str(tmp_path / "text.jsonl"), "context": 16, "run_dir": str(tmp_path / "run"),
        "sparsity": {"resid_pre": [0.01, 1]}, "d_sae": [24, 32], "layers": [1], "recipe": "standard", "steps": 12, "batch_size": 32,
        "contexts": 4, "passes": 2, "steps_per_pass": 2, "changes": {"learning_rate": 1e-2},
    }  # fmt: skip

    def write(**changes):
        path = tmp_path / "card.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}))
        return path

    return write


def test_from_a_card_to_saes(card_file):
    folder = run(read_suite_card(card_file()))
    for width in (24, 32):
        for value in ("0.01", "1"):
            sae = load_suite(folder / f"d_sae_{width}_sparsity_{value}")[Site("resid_pre", 1)]
            assert (sae.architecture, sae.d_sae, sae.d_in) == ("standard", width, CONFIG.d_model)
            assert dict(sae.metadata)["context_size"] == 16 and dict(sae.metadata)["sparsity"] == float(value)


def test_cards_that_cannot_be(card_file):
    with pytest.raises(CardError, match=r"(?s)`contxt`: Extra inputs.*the keys of a suite's card are model, revision"):
        read_suite_card(card_file(contxt=16))
    with pytest.raises(CardError, match=r"`steps`: .*valid integer.*got '12'"):
        read_suite_card(card_file(steps="12"))
    with pytest.raises(CardError, match="`text`: Field required"):
        read_suite_card(card_file(text=None))
    with pytest.raises(CardError, match="`recipe`: must be one of icl-sfc, .*got 'top-k'"):
        read_suite_card(card_file(recipe="top-k"))
    with pytest.raises(ValueError, match="unknown site 'resid'; did you mean 'resid_mid'|unknown site 'resid'"):
        run(read_suite_card(card_file(sparsity={"resid": [0.1]})))
    with pytest.raises(ValueError, match="layer of the card must be in 0..1"):
        run(read_suite_card(card_file(layers=[2])))
    with pytest.raises(ValueError, match="a recipe has no rate; it has"):
        run(read_suite_card(card_file(changes={"rate": 0.1})))
    with pytest.raises(CorpusError, match=r"text.jsonl has no column of text named 'body'; its columns are text \(str\)"):
        run(read_suite_card(card_file(text_column="body")))
    with pytest.raises(CorpusError, match="text.jsonl ended after .* contexts are needed next .read 1 time.*more epochs"):
        run(read_suite_card(card_file(steps=10_000)))
