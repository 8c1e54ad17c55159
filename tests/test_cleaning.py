"""Task vector cleaning: step by step against a plain loop, published properties, and recovery of planted latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from icl_lib.vectors import base_nll, clean, cut, gradient_pursuit, inserted_nll, select_l1, task_vector
from tests.planted import AT, N_TASKS, THRESHOLD, planted_model, planted_prompts, planted_sae, planted_stack

MAX_STEPS = 80


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def frozen(model):
    """Zero-shot prompts of all tasks, cut before layer 1."""
    return cut(model, planted_stack(8, 0, seed=5), 1)


@pytest.fixture(scope="module")
def vectors(model):
    """Task vectors with three distractors each: latents that nothing reads."""
    found = task_vector(model, planted_stack(8, 4), layers=[1])[:, 0]
    return found.at[:, jnp.array(AT.spare[:3])].set(0.4)


@pytest.fixture(scope="module")
def cleaned(model, frozen, vectors):
    return clean(model, planted_sae(1), vectors, frozen, l1=[0.0, 0.02, 0.1], lr=0.05, patience=20, max_steps=MAX_STEPS)


def one(frozen, task):
    return jax.tree.map(lambda x: x[task], frozen)


def reference(model, sae, vector, frozen, l1, lr, patience, max_steps, monitor):
    """Algorithm 1 as a Python loop on one task, literally: the L0 of each iterate, and what is returned."""
    theta, optimiser = sae.pre(vector), optax.adam(lr)
    state = optimiser.init(theta)

    @jax.jit
    def loss_and_gradient(theta):
        def loss(theta):
            z = jnp.where(jax.nn.relu(theta) > sae.threshold, jax.nn.relu(theta), 0)
            nll = inserted_nll(model, frozen, z @ sae.W_dec + sae.b_dec).mean()
            return nll + l1 * z.sum(), nll

        return jax.value_and_grad(loss, has_aux=True)(theta)

    best, kept, waited, nlls, l0s = np.inf, theta, 0, [], []
    for _ in range(max_steps):
        (total, nll), gradient = loss_and_gradient(theta)
        nlls.append(float(nll))
        l0s.append(int((theta > sae.threshold).sum()))
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimiser.update(gradient, state)
        new = theta + update
        signal = int((new > sae.threshold).sum()) if monitor == "l0" else float(total)
        if signal < best:
            best, waited = signal, 0
            kept = theta
        theta = new
        waited += 1
        if waited > patience:
            break
    return (theta if monitor == "l0" else kept), nlls, l0s


@pytest.mark.parametrize(("monitor", "patience"), [("l0", 4), ("loss", 3)])
def test_follows_the_algorithm_step_by_step(model, frozen, vectors, monitor, patience):
    """lr is large, so that latents die and the loss turns within a few steps."""
    sae, lr, max_steps = planted_sae(1), 0.15, 25
    ours = clean(model, sae, vectors, frozen, l1=[0.1], lr=lr, patience=patience, max_steps=max_steps, monitor=monitor)
    theta, nlls, l0s = reference(model, sae, vectors[1], one(frozen, 1), 0.1, lr, patience, max_steps, monitor)
    steps = int(ours.steps[1, 0])
    assert steps == len(nlls) < max_steps, "the lane should stop early, at the same step as the loop"
    assert np.allclose(ours.nll_curve[1, 0, :steps], nlls, atol=1e-4)
    assert np.array_equal(ours.l0_curve[1, 0, :steps], l0s)
    assert (
        np.isnan(np.asarray(ours.nll_curve[1, 0, steps:])).all()
        and np.isnan(np.asarray(ours.l0_curve[1, 0, steps:])).all()
    )
    assert np.allclose(ours.f[1, 0], jnp.where(theta > THRESHOLD, theta, 0), atol=1e-3)


def test_lanes_do_not_disturb_each_other(model, frozen, vectors, cleaned):
    """A lane that stops early keeps its state while others run on: the same result as alone, without lane axes."""
    assert len(set(np.asarray(cleaned.steps).ravel().tolist())) > 1
    alone = clean(model, planted_sae(1), vectors[2], one(frozen, 2), l1=0.1, lr=0.05, patience=20, max_steps=MAX_STEPS)
    assert alone.f.shape == (64,) and alone.nll.shape == ()
    assert int(alone.steps) == int(cleaned.steps[2, 2])
    assert np.allclose(alone.f, cleaned.f[2, 2], atol=1e-4)


def test_result_is_consistent(model, frozen, cleaned):
    assert cleaned.f.shape == (N_TASKS, 3, 64) and cleaned.nll_curve.shape == (N_TASKS, 3, MAX_STEPS)
    assert np.array_equal(cleaned.l0, (cleaned.f > 0).sum(-1))
    assert np.allclose(cleaned.vector, planted_sae(1).decode(cleaned.f), atol=1e-6)
    assert np.allclose(inserted_nll(model, frozen, cleaned.vector).mean(-1), cleaned.nll, atol=1e-5)


def test_support_only_shrinks(cleaned, vectors):
    started = np.asarray(planted_sae(1).encode(vectors)) > 0
    assert not (np.asarray(cleaned.f > 0) & ~started[:, None]).any()
    falls = np.diff(np.asarray(cleaned.l0_curve), axis=-1)
    assert (falls[~np.isnan(falls)] <= 0).all()
    assert np.array_equal(cleaned.l0_curve[..., 0], np.broadcast_to(started.sum(-1)[:, None], (N_TASKS, 3)))


def test_without_penalty_the_loss_does_not_rise(cleaned):
    assert (np.asarray(cleaned.nll[:, 0]) <= np.asarray(cleaned.nll_curve[:, 0, 0]) + 1e-4).all()


def test_planted_executors_are_recovered(model, frozen, vectors, cleaned):
    """Of ten latents only the executor of the task is left, and the cleaned vector does what the task vector does."""
    assert int(cleaned.l0_curve[0, 0, 0]) >= 10
    for t in range(N_TASKS):
        assert np.flatnonzero(cleaned.f[t, 2]).tolist() == [AT.exe[t]]
    assert float(cleaned.nll[:, 2].max()) < 0.1 < 3 < float(base_nll(model, frozen).min())


def test_planted_detectors_are_recovered_from_pursuit(model):
    """At the dummy output, from pursuit on the noisy mean of output tokens."""
    frozen = cut(model, planted_prompts(1, 8, 0, dummy=True), 0, "dummy_output")
    vector = (
        jnp.zeros(64).at[AT.det[1]].set(2.0).at[jnp.array(AT.spare[:2])].set(0.6).at[jnp.array(AT.out[6:12])].set(0.3)
    )
    out = clean(
        model, planted_sae(0), vector, frozen, l1=0.02, lr=0.05, patience=30, max_steps=MAX_STEPS, init="pursuit", k=4
    )
    assert np.flatnonzero(out.f).tolist() == [AT.det[1]]
    assert float(out.nll) < 0.1


def test_pursuit_start_is_the_pursuit_code(model, frozen, vectors):
    """With a bias in the decoder, the code explains what the bias leaves."""
    sae = dataclasses.replace(planted_sae(1), b_dec=jnp.full(64, 0.01))
    out = clean(model, sae, vectors, frozen, l1=0.0, lr=0.0, patience=1, max_steps=1, init="pursuit", k=3)
    assert np.allclose(out.f, gradient_pursuit(vectors - sae.b_dec[None], sae.W_dec, 3), atol=1e-5)


def test_weights_of_given_latents_are_tuned(model, frozen, vectors):
    """Without a penalty the loss falls below that of the start, and no latent comes in that was not given."""
    sae, init = planted_sae(1), np.zeros((N_TASKS, 64), np.float32)
    init[:, :3] = 3.0
    run = lambda init, **options: clean(model, sae, vectors, frozen, l1=0.0, init=jnp.asarray(init), **options)
    tuned = run(init, lr=0.05, patience=20, max_steps=MAX_STEPS, monitor="loss")
    assert (np.asarray(tuned.f)[:, 3:] == 0).all() and (tuned.nll < tuned.nll_curve[:, 0]).all()
    started = run(np.asarray(sae.pre(vectors)), lr=0.0, patience=1, max_steps=1)
    assert np.allclose(started.f, sae.encode(vectors), atol=1e-6)


def test_nan_gradients_stop_nothing(model, frozen, vectors):
    """One broken prompt makes every loss NaN: theta stays where it was."""
    broken = dataclasses.replace(one(frozen, 0), resid=one(frozen, 0).resid.at[0].set(jnp.nan))
    out = clean(model, planted_sae(1), vectors[0], broken, l1=0.0, lr=0.1, patience=3, max_steps=10)
    assert np.allclose(out.f, planted_sae(1).encode(vectors[0]), atol=1e-6)
    assert int(out.steps) == 4 and np.isnan(float(out.nll))


def test_choice_of_l1():
    l0 = jnp.array([[9, 4, 2], [8, 3, 3], [5, 4, 3]])
    nll = jnp.array([[1.0, 1.01, 1.5], [0.9, 0.8, 0.7], [2.0, 1.9, 2.1]])
    reference = jnp.array([1.0, 1.0, 1.0])
    # the smallest that is good enough; equal L0, so the lower loss; none is good enough, so the lowest loss
    assert np.array_equal(select_l1(l0, nll, reference), [1, 2, 1])
    assert np.array_equal(select_l1(l0, nll, reference, tolerance=1.6), [2, 2, 1])
    # means: L0 7.3, 3.7, 2.7 and NLL 1.30, 1.24, 1.43 against 1.25
    assert np.array_equal(select_l1(l0, nll, reference * 1.25, tolerance=1.0, shared=True), [1, 1, 1])
    assert int(select_l1(l0[0], nll[0], jnp.array(1.0))) == 1


def test_take_picks_one_l1_per_task(cleaned):
    picked = cleaned.take(jnp.array([2, 0, 1]))
    assert picked.f.shape == (N_TASKS, 64) and picked.l0.shape == (N_TASKS,)
    for t, i in enumerate((2, 0, 1)):
        assert np.array_equal(picked.f[t], cleaned.f[t, i]) and int(picked.l0[t]) == int(cleaned.l0[t, i])


def test_bad_input_is_named(model, frozen, vectors):
    sae = planted_sae(1)
    run = lambda **change: clean(
        **({"model": model, "sae": sae, "vector": vectors, "cut": frozen, "l1": 0.1, "lr": 0.1} | change)
    )
    narrow = dataclasses.replace(sae, W_dec=jnp.zeros((64, 32)), b_dec=jnp.zeros(32))
    with pytest.raises(ValueError, match="SAE writes vectors of width 32, the model has d_model = 64"):
        run(sae=narrow)
    with pytest.raises(ValueError, match=r"vector must have shape \(3, 64\).*got \(64,\)"):
        run(vector=vectors[0])
    with pytest.raises(ValueError, match="monitor must be one of l0, loss"):
        run(monitor="l1")
    with pytest.raises(ValueError, match="init must be one of encoder, pursuit"):
        run(init="random")
    with pytest.raises(ValueError, match=rf"init must have shape \({N_TASKS}, 64\) .*got \({N_TASKS}, 63\)"):
        run(init=jnp.zeros((N_TASKS, 63)))
    with pytest.raises(ValueError, match="l1 must be one number or a list of numbers >= 0"):
        run(l1=[-1.0])
