"""Free text through the tokenizers of all families, and on into the model."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import Site, generate, load_model, load_tokenizer
from icl_lib.saes import harvest
from icl_lib.tasks import encode_text, load_tasks, make_prompts
from tests.tokenizer_files import NAMES, tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_the_text_of_a_prompt_has_the_tokens_of_the_prompt(name):
    """One rule for BOS and padding: what `make_prompts` makes of a task, `encode_text` makes of the same words."""
    tok = tokenizer(name)
    prompts = make_prompts(load_tasks("embedded")["en_fr"], tok, n_prompts=5, n_shots=2, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        texts, one = encode_text(tok, prompts.texts), encode_text(tok, prompts.texts[0])
    np.testing.assert_array_equal(texts.tokens, prompts.tokens)
    np.testing.assert_array_equal(texts.real, prompts.real)
    bos = tok.bos_token_id is not None and tok.bos_token_id != tok.eos_token_id
    np.testing.assert_array_equal(texts.length, np.asarray(prompts.real).sum(axis=1) + bos)
    np.testing.assert_array_equal(one.tokens[0], texts.tokens[0, : int(texts.length[0])])
    if bos:  # whoever brings it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = encode_text(tok, tok.bos_token + prompts.texts[0]).tokens
        assert again[0, 0] == tok.bos_token_id and (again[0, 1:] != tok.bos_token_id).all()


def test_unknown_words_are_listed_and_known_ones_are_silent():
    tok = load_tokenizer("icl-tiny")
    with pytest.warns(UserWarning, match="does not know 'zebu', 'Zz': each becomes '<unk>'"):
        tokens = encode_text(tok, ["hot -> zebu", "zebu -> Zz ."]).tokens
    assert (tokens == tok.unk_token_id).sum() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode_text(tok, "hot -> cold <unk>").tokens.shape == (1, 5)


def test_what_is_no_text():
    tok = load_tokenizer("icl-tiny")
    with pytest.raises(ValueError, match="takes a text or a list of texts"):
        encode_text(tok, [])
    assert encode_text(tok, "").tokens.tolist() == [[tok.bos_token_id]]
    tok.bos_token = None
    with pytest.raises(ValueError, match="a text is empty"):
        encode_text(tok, ["hot", ""])


def test_texts_go_wherever_prompts_go():
    model, tok = load_model("icl-tiny"), load_tokenizer("icl-tiny")
    texts = encode_text(
        tok, ["Follow the pattern:\nhot -> cold\nwet -> dry\nrich -> poor\nthick ->", "hot -> cold\nnew ->"]
    )
    acts = harvest(model, texts, ["resid_pre.1"])[Site("resid_pre", 1)]
    assert len(acts) == int(texts.real.sum()) == int((texts.length - 1).sum())
    written = generate(model, texts, n_new=1, stop=())
    last = jnp.take_along_axis(model(texts.tokens), (texts.length - 1)[:, None, None], axis=1)[:, 0]
    assert written[:, 0].tolist() == last.argmax(axis=-1).tolist()
    assert tok.decode(written[0]) == "thin"
    for wrong in (["hot -> cold"], "hot -> cold", [[[2, 5]]], [], None):
        with pytest.raises(ValueError, match="texts become one by icl_lib.tasks.encode_text"):
            generate(model, wrong, n_new=2)
