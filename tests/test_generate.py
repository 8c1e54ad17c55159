"""Greedy generation against recomputation from nothing, and against transformers."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from icl_lib.models import Site, Transformer, generate, save_model, tiny_config
from icl_lib.models.generate import _generate

LENGTHS = np.array([7, 1, 4, 9], np.int32)


def talkative(key, **overrides):
    """A random model with strong blocks: with weak ones and a tied embedding the last token is repeated for ever."""
    model = Transformer.init(tiny_config(**overrides), key=key)
    return eqx.tree_at(lambda m: m.blocks, model, jax.tree.map(lambda w: 3 * w if w.ndim == 2 else w, model.blocks))


@pytest.fixture
def prompts(getkey):
    tokens = jax.random.randint(getkey(), (4, 9), 3, 40, jnp.int32)
    return jnp.where(jnp.arange(9)[None] < LENGTHS[:, None], tokens, 0)


def recomputed(model, tokens, length, n_new):
    """The whole text run again for every token, one prompt at a time."""
    forward, out = eqx.filter_jit(lambda model, tokens: model(tokens)), []
    for row, n in zip(np.asarray(tokens), length, strict=True):
        text = np.zeros(len(row) + n_new, np.int32)
        text[:n] = row[:n]
        for i in range(n_new):
            text[n + i] = int(forward(model, jnp.asarray(text)[None])[0, n + i - 1].argmax())
        out.append(text[n : n + n_new])
    return np.stack(out)


@pytest.mark.parametrize(
    "overrides", [{}, {"windows": (3, None)}, {"rotary_dim": 4, "parallel": True, "tied": False}], ids=str
)
def test_equal_to_recomputation(overrides, prompts, getkey):
    model = talkative(getkey(), **overrides)
    ours = generate(model, prompts, jnp.asarray(LENGTHS), 10, stop=())
    assert ours.shape == (4, 10) and ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, recomputed(model, prompts, LENGTHS, 10))
    assert len(np.unique(ours)) > 8
    # what stands after a prompt changes nothing, nor does a wider table
    other = jnp.pad(
        jnp.where(jnp.arange(9)[None] < LENGTHS[:, None], prompts, 39), ((0, 0), (0, 3)), constant_values=39
    )
    np.testing.assert_array_equal(generate(model, other, jnp.asarray(LENGTHS), 10, stop=()), ours)


def test_equal_to_transformers(tmp_path, prompts, getkey):
    model = talkative(getkey())
    save_model(model, tmp_path, dtype="float32")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = np.asarray(generate(model, prompts, jnp.asarray(LENGTHS), 8, stop=()))
    for row, n, new in zip(np.asarray(prompts), LENGTHS, ours, strict=True):
        text = torch.tensor(row[None, :n].astype(np.int64))
        theirs = peer.generate(
            text,
            attention_mask=torch.ones_like(text),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, n:].tolist() == new.tolist()


def test_stops_and_pads(prompts, getkey):
    model = talkative(getkey())
    free = np.asarray(generate(model, prompts, jnp.asarray(LENGTHS), 8, stop=()))
    ends = (int(free[0, 3]), int(free[2, 1]))  # tokens that come up
    stopped = np.asarray(generate(model, prompts, jnp.asarray(LENGTHS), 8, stop=ends))
    for before, after in zip(free, stopped, strict=True):
        at = next((i for i, token in enumerate(before) if token in ends), 7)
        assert after.tolist() == before[: at + 1].tolist() + [0] * (7 - at)
    assert (stopped == 0).any()
    # the default end is the config's
    named = Transformer(
        model.embed, model.blocks, model.norm, model.unembed, dataclasses.replace(model.config, eos_id=ends[0])
    )
    by_default = generate(named, prompts, jnp.asarray(LENGTHS), 8)
    np.testing.assert_array_equal(by_default, generate(model, prompts, jnp.asarray(LENGTHS), 8, stop=(ends[0],)))
    both = dataclasses.replace(model.config, eos_id=ends[0], more_eos=ends[1:])
    by_default = generate(
        Transformer(model.embed, model.blocks, model.norm, model.unembed, both), prompts, jnp.asarray(LENGTHS), 8
    )
    np.testing.assert_array_equal(by_default, stopped)


def test_one_program_for_all_lengths(prompts, getkey):
    model = talkative(getkey())
    args = lambda length: (model, prompts, jnp.asarray(length, jnp.int32), jnp.asarray([1], jnp.int32), 3)
    lowered = {_generate.lower(*args(length)).as_text() for length in ([7, 1, 4, 9], [2, 2, 2, 2])}
    assert len(lowered) == 1


def test_clear_errors(prompts, getkey):
    model = talkative(getkey())
    with pytest.raises(ValueError, match="n_new is at least 1 and lengths are 1 to 9"):
        generate(model, prompts, jnp.asarray([7, 0, 4, 9]), 3)
    with pytest.raises(ValueError, match="n_new is at least 1"):
        generate(model, prompts, jnp.asarray(LENGTHS), 0)
    with pytest.raises(ValueError, match="9 tokens and 60 new ones are more than the model's context of 64"):
        generate(model, prompts, jnp.asarray(LENGTHS), 60)
    with pytest.raises(
        ValueError, match="a table of prompts of 69 tokens is longer than the context of this model, 64"
    ):
        generate(model, jnp.pad(prompts, ((0, 0), (0, 60))), jnp.asarray(LENGTHS), 3)


def test_a_tap_acts_on_prompts_and_on_what_is_written(prompts, getkey):
    """Steered greedy text is that of the steered model run again for every token; the tap sees every site."""
    model, seen = talkative(getkey()), set()
    vector = 3 * jax.random.normal(getkey(), (16,))

    def steer(site, x):
        seen.add((site, x.shape[1]))
        return (
            x + vector[None, None] if site in (Site("resid_pre", 1), Site("v", 0), Site("embed")) and x.ndim == 3 else x
        )

    ours = generate(model, prompts, jnp.asarray(LENGTHS), 6, stop=(), tap=steer)
    np.testing.assert_array_equal(ours, recomputed(partial(model, tap=steer), prompts, LENGTHS, 6))
    assert (ours != generate(model, prompts, jnp.asarray(LENGTHS), 6, stop=())).any()
    assert {site for site, seq in seen if seq == 1} == {site for site, seq in seen if seq == 9}
    still = generate(model, prompts, jnp.asarray(LENGTHS), 6, stop=(), tap=lambda site, x: x)
    np.testing.assert_array_equal(still, generate(model, prompts, jnp.asarray(LENGTHS), 6, stop=()))


def test_rows_of_uneven_lengths_are_a_table_with_lengths(prompts, getkey):
    model = talkative(getkey())
    rows = [row[:n].tolist() for row, n in zip(np.asarray(prompts), LENGTHS, strict=True)]
    ours = generate(model, prompts, jnp.asarray(LENGTHS), 4, stop=())
    for same in (rows, [np.asarray(row) for row in rows], tuple(map(jnp.asarray, rows))):
        np.testing.assert_array_equal(generate(model, same, n_new=4, stop=()), ours)
    np.testing.assert_array_equal(generate(model, np.asarray(prompts)[3:], n_new=4, stop=()), ours[3:])
    with pytest.raises(ValueError, match=r"must be \(batch, seq\), got shape \(9,\); is tokens\[None\] meant"):
        generate(model, prompts[0], n_new=4)
