"""The gate: the recorded model passes, any other one is told apart with a reason."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icl_lib.files.paths import root
from icl_lib.models import Transformer, gate, load_model, load_tokenizer, save_model, tiny_config


def tokenizer(shift=0):
    words = [*"abcdefgh", "->", "hot", "cold", "big", "small", "up", "Follow", "the", "pattern", ":", "<unk>"]
    word_level = Tokenizer(models.WordLevel({w: (i + shift) % 40 for i, w in enumerate(words)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token="<unk>")


@pytest.fixture
def model(getkey):
    return Transformer.init(tiny_config(), key=getkey())


def test_the_recorded_model_passes_from_its_folder(model, tmp_path):
    save_model(model, tmp_path, dtype="float32")
    path = gate.record(model, tokenizer(), tmp_path)
    kept = json.loads(path.read_text())
    assert path.name == "icl_gate.json" and len(kept["top_ids"]) == 10 and kept["dtype"] == "float32"
    assert kept["top_logits"] == sorted(kept["top_logits"], reverse=True) and 0 < kept["tolerance"] < 0.1
    assert gate.check(load_model(tmp_path), tokenizer(), tmp_path) < kept["tolerance"] / 10
    assert gate.check(model, tokenizer(), tmp_path / "elsewhere") is None


def test_another_model_is_told_apart(model, tmp_path, getkey):
    gate.record(model, tokenizer(), tmp_path)
    with pytest.raises(
        gate.GateError, match=r"not the weights recorded in .*icl_gate.json: the logit of token \d+ after the prompt"
    ):
        gate.check(Transformer.init(model.config, key=getkey()), tokenizer(), tmp_path)
    # one block of the last layer a little off, which the largest logit alone might not show
    near = eqx.tree_at(lambda m: m.blocks[1].mlp.down, model, replace_fn=lambda w: 1.5 * w)
    with pytest.raises(gate.GateError, match="not the weights"):
        gate.check(near, tokenizer(), tmp_path)
    broken = eqx.tree_at(lambda m: m.embed, model, replace_fn=lambda w: jnp.full_like(w, jnp.nan))
    with pytest.raises(gate.GateError, match="is nan, recorded"):
        gate.check(broken, tokenizer(), tmp_path)
    with pytest.raises(FloatingPointError, match="40 of 40 logits are not finite"):
        gate.record(broken, tokenizer(), tmp_path)
    with pytest.raises(gate.GateError, match=r"token 0 is \[\d+\], recorded \[\d+\]"):
        gate.check(model, tokenizer(shift=1), tmp_path)
    with pytest.raises(gate.GateError, match="recorded with 40 logits, this model has 41"):
        gate.check(Transformer.init(tiny_config(d_vocab=41), key=getkey()), tokenizer(), tmp_path)


def test_the_tolerance_between_two_dtypes_is_that_of_the_lower(model, tmp_path, getkey):
    """On an accelerator a model is loaded in bfloat16, whatever its record was made in."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    other = Transformer.init(model.config, key=getkey())
    for recorded, loaded in ((model, half), (half, model), (half, half)):
        gate.record(recorded, tokenizer(), tmp_path)
        assert gate.check(loaded, tokenizer(), tmp_path) < 0.1
        with pytest.raises(gate.GateError, match="not the weights"):
            gate.check(jax.tree.map(lambda x: x.astype(loaded.embed.dtype), other), tokenizer(), tmp_path)  # noqa: B023


def test_a_prompt_longer_than_the_context_is_refused(model, tmp_path, getkey):
    gate.record(model, tokenizer(), tmp_path)
    short, message = (
        Transformer.init(tiny_config(n_ctx=4), key=getkey()),
        "the gate's prompt of .* context of this model, 4",
    )
    with pytest.raises(ValueError, match=message):
        gate.check(short, tokenizer(), tmp_path)
    with pytest.raises(ValueError, match=message):
        gate.record(short, tokenizer(), tmp_path)


def test_unreadable_records(model, tmp_path):
    path = gate.record(model, tokenizer(), tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="is not valid JSON"):
        gate.check(model, tokenizer(), tmp_path)
    path.write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="lacks tokens, dtype"):
        gate.check(model, tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="makes no token of ''"):
        gate.record(model, tokenizer(), tmp_path, prompt="")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_carries_one(dtype):
    folder = root() / "assets" / "icl-tiny"
    kept = json.loads((folder / gate.FILE).read_text())
    found = gate.check(load_model(folder, dtype=dtype), load_tokenizer(folder), folder)
    assert found < {"float32": 1e-3, "bfloat16": 5 * kept["tolerance"]}[dtype]
