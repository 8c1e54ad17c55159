"""The cut form of an intervention against the tap form on whole prompts, and what vectors do to the planted model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import Site, Transformer, tiny_config
from icl_lib.tasks import Role, Template, answer_nll, make_prompts, stack_prompts
from icl_lib.vectors import (
    base_nll,
    cut,
    inserted_nll,
    inserted_nll_by_layer,
    latent_directions,
    negative_steering,
    relative_change,
    steer,
    task_vector,
)
from tests.planted import (
    AT,
    D_VOCAB,
    N_TASKS,
    planted_model,
    planted_sae,
    planted_stack,
    planted_task,
    planted_tokenizer,
)


@pytest.fixture(scope="module")
def model():
    """Random weights, where everything depends on everything."""
    return Transformer.init(tiny_config(n_layers=2, d_vocab=D_VOCAB), key=jax.random.key(3))


@pytest.fixture(scope="module")
def planted():
    return planted_model()


def long_answers(n_prompts, n_shots, dummy=False, seed=0, length=None):
    """Prompts whose inputs have 1 to 3 tokens and whose answers have 1 to 4."""
    task = planted_task(0)
    task = dataclasses.replace(task, pairs=tuple((x, y + " w" * (i % 4)) for i, (x, y) in enumerate(task.pairs)))
    template = Template(prefix="", dummy=("X", "Y w") if dummy else None)
    return make_prompts(
        task, planted_tokenizer(), n_prompts=n_prompts, n_shots=n_shots, seed=seed, template=template, length=length
    )


def test_prompts_of_these_tests_differ_in_length():
    prompts = long_answers(12, 2)
    assert len(set(np.asarray(prompts.query_arrow).tolist())) > 3
    assert set(np.asarray(prompts.answer).sum(-1).tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("where", "layer", "n_first"), [("query_arrow", 0, 2), ("query_arrow", 1, 3), ("dummy_output", 1, 2)]
)
def test_cut_form_equals_tap_form(model, getkey, where, layer, n_first):
    prompts = long_answers(12, 2, dummy=True, length=40)
    vector = 2 * jax.random.normal(getkey(), (16,))
    at = jnp.asarray(np.arange(40)[None] == np.asarray(getattr(prompts, where))[:, None])
    frozen = cut(model, prompts, layer, where, n_first)
    for v in (vector, jnp.zeros(16)):
        logits = steer(model, prompts.tokens, Site("resid_pre", layer), v, at)
        assert np.allclose(inserted_nll(model, frozen, v), answer_nll(logits, prompts, n_first), atol=2e-5)
    assert np.allclose(base_nll(model, frozen), answer_nll(logits, prompts, n_first), atol=2e-5)
    assert not np.allclose(inserted_nll(model, frozen, vector), base_nll(model, frozen), atol=1e-2)


def test_suffix_and_past_are_no_longer_than_needed(model):
    frozen = cut(model, long_answers(12, 2, length=40), 1, n_first=2)
    assert frozen.resid.shape == (12, 2, 16), "the arrow and the first answer token predict two answer tokens"
    assert frozen.past.k[0].shape[1] == int(frozen.past.length.max())


def test_padding_changes_nothing(model, getkey):
    vector = jax.random.normal(getkey(), (16,))
    short, long = (inserted_nll(model, cut(model, long_answers(12, 2, length=n), 1), vector) for n in (None, 40))
    assert np.allclose(short, long, atol=1e-5)


def test_stack_of_tasks_equals_each_alone(model, getkey):
    """Tasks of one to two shots: prefixes and suffixes differ in length, also between the tasks."""
    singles = [long_answers(5, n, dummy=True, seed=n) for n in (1, 2)]
    vectors = jax.random.normal(getkey(), (2, 4, 16))
    stacked = cut(model, stack_prompts(singles), 1, "dummy_output")
    assert stacked.tasks == (2,)
    alone = jnp.stack(
        [inserted_nll(model, cut(model, p, 1, "dummy_output"), v) for p, v in zip(singles, vectors, strict=True)]
    )
    assert np.allclose(inserted_nll(model, stacked, vectors), alone, atol=2e-5)
    assert np.allclose(inserted_nll(model, stacked, vectors[:, 0]), alone[:, 0], atol=2e-5)


def test_turns_that_bound_memory_change_nothing(model, getkey, monkeypatch):
    frozen = cut(model, long_answers(5, 1), 1)
    vectors = jax.random.normal(getkey(), (7, 16))
    at_once = inserted_nll(model, frozen, vectors)
    monkeypatch.setattr("icl_lib.vectors.insert.turn", lambda *args: (1, 3))
    assert np.allclose(inserted_nll(model, frozen, vectors), at_once, atol=1e-5)


def test_one_program_for_all_layers_equals_one_cut_per_layer(model, getkey):
    prompts = stack_prompts([long_answers(5, n, seed=n) for n in (0, 1)])
    vectors = jax.random.normal(getkey(), (2, 4, 2, 16))
    together = inserted_nll_by_layer(model, cut(model, prompts, 0), vectors)
    apart = jnp.stack([inserted_nll(model, cut(model, prompts, i), vectors[:, :, i]) for i in range(2)], axis=2)
    assert together.shape == (2, 4, 2, 5)
    assert np.allclose(together, apart, atol=2e-5)
    last = inserted_nll_by_layer(model, cut(model, prompts, 0), vectors[:, :, 1:], jnp.array([1]))
    assert np.allclose(last, apart[:, :, 1:], atol=2e-5)


def test_gradient_sees_only_the_vector(model, getkey):
    """The cut form is differentiable: compare with central differences."""
    frozen = cut(model, long_answers(4, 1), 1)
    vector, direction = jax.random.normal(getkey(), (16,)), jax.random.normal(getkey(), (16,))
    mean = lambda v: inserted_nll(model, frozen, v).mean()
    slope = jax.jit(jax.grad(mean))(vector) @ direction
    numeric = (mean(vector + 1e-2 * direction) - mean(vector - 1e-2 * direction)) / 2e-2
    assert np.isclose(slope, numeric, rtol=2e-2, atol=1e-3)


def latent_nll(model, sae, frozen, latents, scale):
    """NLL (task, latent, b) with one latent alone steering."""
    directions = latent_directions(sae, latents, scale)
    return inserted_nll(model, frozen, jnp.broadcast_to(directions, (*frozen.tasks, *directions.shape)))


def test_executors_and_detectors_pick_their_task(planted):
    executors = latent_nll(planted, planted_sae(1), cut(planted, planted_stack(6, 0), 1), jnp.array(AT.exe), 1.0).mean(
        -1
    )
    zero_shot = planted_stack(6, 0, dummy=True)
    frozen = cut(planted, zero_shot, 0, "dummy_output")
    detectors = latent_nll(planted, planted_sae(0), frozen, jnp.array(AT.det), jnp.full(3, 8.0)).mean(-1)
    for nll in (executors, detectors):
        assert nll.shape == (N_TASKS, 3)
        assert float(jnp.diag(nll).max()) < 0.1 < 3 < float(base_nll(planted, frozen).min())
        assert float((nll + 100 * jnp.eye(3)).min()) > 4
    frozen = cut(planted, planted_stack(6, 0), 1)
    spare = latent_nll(planted, planted_sae(1), frozen, jnp.array(AT.spare[:3]), 1.0)
    assert np.allclose(relative_change(spare, base_nll(planted, frozen)), 0, atol=0.02)


def test_directions_have_the_length_of_their_scale(getkey):
    sae = planted_sae(1)
    sae = dataclasses.replace(sae, W_dec=jax.random.normal(getkey(), (64, 64)))
    d = latent_directions(sae, jnp.array([[3, 4], [5, 6]]), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    assert d.shape == (2, 2, 64)
    assert np.allclose(np.linalg.norm(d, axis=-1), [[1, 2], [3, 4]], rtol=1e-5)
    assert np.allclose(d[1, 0], 3 * sae.W_dec[5] / jnp.linalg.norm(sae.W_dec[5]), atol=1e-5)


def test_relative_change():
    base = jnp.array([[2.0, 4.0], [1.0, 1.0]])
    nll = jnp.stack([base, base * 0.0, base * 2.0], axis=1)
    assert np.allclose(relative_change(nll, base), [[0, -1, 1], [0, -1, 1]])
    # a ratio of means, not a mean of ratios
    assert np.isclose(relative_change(jnp.array([0.0, 4.0]), jnp.array([2.0, 4.0])), -1 / 3)
    with pytest.raises(ValueError, match="first axes must agree"):
        relative_change(nll, jnp.ones((3, 2)))


def test_negative_steering_undoes_an_executor(planted):
    prompts = planted_stack(6, 3)
    nll, accuracy = negative_steering(planted, planted_sae(1), prompts, 1, jnp.array(AT.exe), 1.0)
    assert nll.shape == accuracy.shape == (N_TASKS, 3, 6)
    # three of four arrows know the task; without the executor none does
    own, others = np.eye(3, dtype=bool), ~np.eye(3, dtype=bool)
    assert np.allclose(np.asarray(accuracy)[own], 0.0)
    assert np.allclose(np.asarray(accuracy)[others], 0.75)
    assert np.asarray(nll)[own].min() > 3 > 1 > np.asarray(nll)[others].max()


def test_negative_steering_equals_a_tap(model, getkey):
    prompts = long_answers(5, 2)
    sae = dataclasses.replace(planted_sae(1), W_dec=jax.random.normal(getkey(), (64, 16)), b_dec=jnp.zeros(16))
    nll, accuracy = negative_steering(model, sae, prompts, 1, jnp.array([7]), 3.0)
    logits = steer(
        model,
        prompts.tokens,
        Site("resid_pre", 1),
        -latent_directions(sae, jnp.array([7]), 3.0)[0],
        prompts.mask(Role.ARROW),
    )
    assert np.allclose(nll[0], answer_nll(logits, prompts), atol=2e-5)
    hit = np.asarray(logits.argmax(-1))[:, :-1] == np.asarray(prompts.tokens)[:, 1:]
    arrows = np.asarray(prompts.mask(Role.ARROW))[:, :-1]
    assert np.allclose(accuracy[0], [hit[b][arrows[b]].mean() for b in range(5)])


def test_bad_input_is_named(model, planted):
    prompts = long_answers(2, 1)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.1.*got 2"):
        cut(model, prompts, 2)
    with pytest.raises(ValueError, match='where must be "query_arrow" or "dummy_output", got \'arrow\''):
        cut(model, prompts, 1, "arrow")
    with pytest.raises(ValueError, match="no dummy output found in 2 prompts"):
        cut(model, prompts, 1, "dummy_output")
    blind = dataclasses.replace(prompts, roles=jnp.where(prompts.roles == Role.ARROW, int(Role.INPUT), prompts.roles))
    with pytest.raises(ValueError, match="no query arrow found in 2 prompts"):
        cut(model, blind, 1)
    with pytest.raises(ValueError, match="n_first must be at least 1"):
        cut(model, prompts, 1, n_first=0)
    frozen = cut(model, prompts, 1)
    with pytest.raises(ValueError, match="vectors must have shape"):
        inserted_nll(model, frozen, jnp.zeros(17))
    with pytest.raises(ValueError, match="before the cut at layer 1"):
        inserted_nll_by_layer(model, frozen, jnp.zeros((2, 16)))
    with pytest.raises(ValueError, match="SAE writes vectors of width 64, the model has d_model = 16"):
        negative_steering(model, planted_sae(1), prompts, 1, jnp.array([0]), 1.0)
    with pytest.raises(ValueError, match=r"latents \[64\] do not exist.*0\.\.63"):
        latent_directions(planted_sae(1), jnp.array([64]), 1.0)


def test_a_loss_of_zero_has_no_relative_change():
    assert np.isnan(relative_change(jnp.ones((2, 3)), jnp.zeros((2, 3)))).all()


def test_no_vectors_have_no_loss(model):
    frozen = cut(model, planted_stack(2, 1), 1)
    assert inserted_nll(model, frozen, jnp.zeros((N_TASKS, 0, 16))).shape == (N_TASKS, 0, 2)


def test_prompts_longer_than_the_context_are_refused(model):
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, n_ctx=5))
    with pytest.raises(ValueError, match="5"):
        cut(short, long_answers(2, 2), 1)
    with pytest.raises(ValueError, match="5"):
        task_vector(short, long_answers(2, 2))
