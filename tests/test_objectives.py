"""Each published loss against its equations by hand, gradients against differences or the straight-through formulas,
the optimiser.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from icl_lib.training import TrainingError, kernels, make_recipe, optimiser
from icl_lib.training.objectives import OBJECTIVES, Batch, Weights, base

D, D_SAE, D_OUT, TOKENS = 5, 12, 4, 9
DENSE = ("standard", "gated", "jumprelu")
TOP = ("topk", "batchtopk")
PATHS = [(objective, False) for objective in DENSE + TOP] + [(objective, True) for objective in TOP]


def recipe(objective, **changes):
    # a wide window, so that some pre-activations of nine tokens are in it
    window = {"bandwidth": 0.2, "threshold": 0.1} if objective == "jumprelu" else {}
    return make_recipe(objective, n_steps=100, batch_size=TOKENS, **(window | changes))


def loss_of(objective, p, x, y, sparsity, r, sparse=False):
    return OBJECTIVES[objective].loss(p, Batch(x, y, jnp.float32(sparsity), k_max=5, sparse=sparse), r)


def problem(getkey, objective, skip=False):
    normal = lambda *shape: 0.5 * jax.random.normal(getkey(), shape)
    gated = objective == "gated"
    params = Weights(
        W_enc=normal(D_SAE, D) if objective in TOP else normal(D, D_SAE),
        W_dec=normal(D_SAE, D_OUT),
        b_enc=normal(D_SAE),
        b_mag=normal(D_SAE) if gated else None,
        r_mag=normal(D_SAE) if gated else None,
        b_dec=normal(D_OUT),
        log_threshold=normal(D_SAE) - 1 if objective == "jumprelu" else None,
        W_skip=normal(D, D_OUT) if skip else None,
    )
    return params, 2 * normal(TOKENS, D), 2 * normal(TOKENS, D_OUT)


def reference(objective, P, X, Y, sparsity, dead=None, k_aux=0, alpha=1 / 32, frozen=None):
    """The loss in plain NumPy float64, token by token where the equations are; also the features.

    `frozen`: the parameters of the gate's decoder, which the gated loss holds constant.
    """
    P = {n: None if v is None else np.asarray(v, np.float64) for n, v in P._asdict().items()}
    frozen = (
        P
        if frozen is None
        else {n: None if v is None else np.asarray(v, np.float64) for n, v in frozen._asdict().items()}
    )
    W_enc = P["W_enc"].T if objective in TOP else P["W_enc"]
    skip = lambda P: 0 if P["W_skip"] is None else X @ P["W_skip"]
    h = X @ W_enc
    pre = h + P["b_enc"]
    relu = np.maximum(pre, 0)
    norms = np.linalg.norm(P["W_dec"], axis=1)
    error = lambda f: Y - f @ P["W_dec"] - P["b_dec"] - skip(P)
    if objective == "standard":
        return (error(relu) ** 2).sum(1).mean() + sparsity * (relu * norms).sum(1).mean(), relu
    if objective == "jumprelu":
        f = pre * (pre > np.exp(P["log_threshold"]))
        return (error(f) ** 2).sum(1).mean() + sparsity * (f != 0).sum(1).mean(), f
    if objective == "gated":
        f = (pre > 0) * np.maximum(h * np.exp(P["r_mag"]) + P["b_mag"], 0)
        gate = Y - relu @ frozen["W_dec"] - frozen["b_dec"] - skip(frozen)
        return (error(f) ** 2).sum(1).mean() + sparsity * (relu * norms).sum(1).mean() + (gate**2).sum(1).mean(), f
    f, k = np.zeros_like(relu), int(sparsity)
    if objective == "topk":
        for t in range(len(X)):
            best = np.argsort(-relu[t])[:k]
            f[t, best] = relu[t, best]
    else:
        best = np.unravel_index(np.argsort(-relu.ravel())[: k * len(X)], relu.shape)
        f[best] = relu[best]
    fvu = lambda e, y: (e**2).sum() / ((y - y.mean(0)) ** 2).sum()
    loss, err = fvu(error(f), Y), error(f)
    if dead is not None:
        g = np.zeros_like(relu)
        for t in range(len(X)):
            best = [i for i in np.argsort(-relu[t]) if dead[i]][:k_aux]
            g[t, best] = relu[t, best]
        loss += alpha * fvu(err - g @ P["W_dec"], err)
    return loss, f


@pytest.mark.parametrize("objective, sparse_path", PATHS)
def test_loss_is_the_equation(getkey, objective, sparse_path):
    p, x, y = problem(getkey, objective, skip=True)
    sparsity = 3.0 if objective in TOP else 0.3
    loss, stats = loss_of(objective, p, x, y, sparsity, recipe(objective), sparse_path)
    wanted, f = reference(objective, p, np.asarray(x, np.float64), np.asarray(y, np.float64), sparsity)
    assert float(loss) == pytest.approx(wanted, rel=1e-4)
    assert float(stats.l0) == pytest.approx((f > 0).sum() / TOKENS)
    np.testing.assert_array_equal(stats.count, (f > 0).sum(0))
    if objective == "batchtopk":
        assert float(stats.least) == pytest.approx(f[f > 0].min(), rel=1e-5)


@pytest.mark.parametrize("objective, sparse_path", PATHS)
def test_gradients_are_differences(getkey, objective, sparse_path):
    """Central differences of the reference; jumprelu's threshold has its own test, since its true gradient is 0."""
    p, x, y = problem(getkey, objective, skip=objective != "gated")
    sparsity = 3.0 if objective in TOP else 0.3
    r = recipe(objective)
    grads = jax.grad(lambda p: loss_of(objective, p, x, y, sparsity, r, sparse_path)[0])(p)
    X, Y, eps = np.asarray(x, np.float64), np.asarray(y, np.float64), 1e-6
    for name, value in p._asdict().items():
        if value is None or name == "log_threshold":
            continue
        for i in np.random.default_rng(0).choice(value.size, 6):
            index = np.unravel_index(i, value.shape)
            sides = []
            for sign in (1, -1):
                moved = np.array(value, np.float64)
                moved[index] += sign * eps
                sides.append(reference(objective, p._replace(**{name: moved}), X, Y, sparsity, frozen=p)[0])
            assert float(getattr(grads, name)[index]) == pytest.approx(
                (sides[0] - sides[1]) / (2 * eps), rel=2e-3, abs=2e-4
            ), name


def test_threshold_has_the_straight_through_gradient(getkey):
    """Jumping Ahead, Eqs. (11) and (12), written out: latents whose pre-activation is within half a bandwidth of their
    threshold.
    """
    p, x, y = problem(getkey, "jumprelu")
    r, lam = recipe("jumprelu", bandwidth=0.5), 0.3
    grads = jax.grad(lambda p: loss_of("jumprelu", p, x, y, lam, r)[0])(p)
    P, X, Y = (
        [None if a is None else np.asarray(a, np.float64) for a in p],
        np.asarray(x, np.float64),
        np.asarray(y, np.float64),
    )
    W_enc, W_dec, b_enc, b_dec, theta, eps = P[0], P[1], P[2], P[5], np.exp(P[6]), 0.5 * np.sqrt(D)
    wanted = np.zeros(D_SAE)
    for t in range(TOKENS):
        pre = X[t] @ W_enc + b_enc
        err = Y[t] - (pre * (pre > theta)) @ W_dec - b_dec
        inside = np.abs((pre - theta) / eps) < 0.5
        df = -2 * W_dec @ err
        wanted += inside * (-theta / eps * df - lam / eps) / TOKENS
    assert (wanted != 0).sum() > 3
    np.testing.assert_allclose(grads.log_threshold, wanted * theta, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sparse_path", [False, True])
@pytest.mark.parametrize("objective", TOP)
def test_auxiliary_loss(getkey, objective, sparse_path):
    p, x, y = problem(getkey, objective)
    X, Y, dead = np.asarray(x, np.float64), np.asarray(y, np.float64), np.arange(D_SAE) % 3 == 0
    r, key = recipe(objective, k_aux=2), getkey()

    def loss(p, dead=None):
        value, stats = loss_of(objective, p, x, y, 3, r, sparse_path)
        if dead is None:
            return value
        batch = Batch(x, y, jnp.float32(3), dead, key=key)
        return value + OBJECTIVES[objective].auxiliary(p, batch, jax.lax.stop_gradient(stats.err), r)

    assert float(loss(p, jnp.asarray(dead))) == pytest.approx(reference(objective, p, X, Y, 3, dead, 2)[0], rel=1e-4)
    assert float(loss(p, jnp.zeros(D_SAE, bool))) == pytest.approx(reference(objective, p, X, Y, 3)[0], rel=1e-4)
    change = jax.grad(loss)(p, jnp.asarray(dead)).W_enc - jax.grad(loss)(p).W_enc
    moved = np.abs(np.asarray(change)).max(axis=1) > 1e-7
    assert moved.any() and not moved[~dead].any(), "it trains the encoders of dead latents alone"


def test_the_largest_of_all_are_exact(getkey):
    f = jax.random.normal(getkey(), (64, 256))
    value, place = kernels.top_of_all(f, 40)
    np.testing.assert_array_equal(value, np.sort(np.asarray(f).ravel())[::-1][:40])
    np.testing.assert_array_equal(np.asarray(f).ravel()[place], value)
    pairs = kernels.largest(f, jnp.float32(2), 5, whole=True)
    assert int((pairs.value > 0).sum()) == 128 and int(pairs.token.max()) < 64


def test_matrices_in_bfloat16_are_summed_in_float32(getkey):
    a, w = jax.random.normal(getkey(), (3, 4096)), jnp.ones((4096, 2), jnp.bfloat16)
    out, grad = jax.value_and_grad(lambda w: kernels.matmul(a, w).sum())(w)
    assert kernels.matmul(a, w).dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    assert float(out) == pytest.approx(2 * float(a.astype(jnp.bfloat16).astype(jnp.float32).sum()), abs=1e-2)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_update_is_optax_adam_on_clipped_gradients(getkey, beta1):
    r = recipe("standard", beta1=beta1, clip=0.5, learning_rate=1e-2, warmup=0)
    p, *_ = problem(getkey, "standard")
    adam = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, beta1, r.beta2))
    moments, theirs, q = optimiser.start(p, r), adam.init(p), p
    for step in range(4):
        grads = jax.tree.map(lambda a: jax.random.normal(getkey(), a.shape), p)
        q, moments = optimiser.update(q, moments, grads, r, jnp.int32(step), key=getkey())
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            change, theirs = adam.update(grads, theirs)
        p = optax.apply_updates(p, change)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(p), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_unit_rows_stay_unit_and_move_along_the_sphere(getkey):
    r = recipe("topk", learning_rate=1e-2)
    p, *_ = problem(getkey, "topk")
    p = p._replace(W_dec=base.unit_rows(p.W_dec))
    along = jax.tree.map(jnp.zeros_like, p)._replace(W_dec=3 * p.W_dec)  # nothing but length
    q, _ = optimiser.update(p, optimiser.start(p, r), along, r, jnp.int32(0), key=getkey())
    np.testing.assert_allclose(jnp.linalg.norm(q.W_dec, axis=1), 1, rtol=1e-5)
    first = optimiser.update(p, optimiser.start(p, r), along, r, jnp.int32(0), key=getkey())[1].first
    np.testing.assert_allclose(first.W_dec, 0, atol=1e-6)


def test_rounding_to_bfloat16_is_right_on_average(getkey):
    value = jnp.full(20_000, 1 + 2**-10)  # a quarter of the way between two bfloat16 numbers 2^-8 ... apart
    rounded = optimiser.round_to(value, jnp.bfloat16, key=getkey()).astype(jnp.float32)
    assert set(np.unique(rounded)) == {1.0, 1 + 2**-7}
    assert float(rounded.mean()) == pytest.approx(1 + 2**-10, abs=2e-4)
    assert optimiser.round_to(value, jnp.float32, key=getkey()) is value


def test_resampling_touches_the_dead_alone(getkey):
    p, x, y = problem(getkey, "gated")
    r = recipe("gated", beta1=0.9)
    moments = jax.tree.map(jnp.ones_like, optimiser.start(p, r))
    dead = jnp.arange(D_SAE) < 4
    q, m = optimiser.resample(p, moments, dead, x, y, r, key=getkey())
    np.testing.assert_array_equal(q.W_dec[4:], p.W_dec[4:])
    np.testing.assert_array_equal(q.W_enc[:, 4:], p.W_enc[:, 4:])
    assert (
        float(m.second.W_enc[:, :4].sum()) == 0
        and float(m.first.W_dec[4:].min()) == 1
        and float(m.second.b_dec.min()) == 1
    )
    cosine = base.unit_rows(q.W_dec[:4]) @ base.unit_rows(y - p.b_dec[None]).T
    np.testing.assert_allclose(jnp.max(cosine, axis=1), 1, rtol=1e-5)  # each points to a target
    pre = x @ q.W_enc[:, :4] + q.b_enc[None, :4]
    assert bool(jnp.all(jnp.max(pre, axis=0) > 0)), "a latent fires on the token it was made of"


def test_a_resampled_jumprelu_latent_has_a_threshold_that_it_passes(getkey):
    p, x, y = problem(getkey, "jumprelu")
    p = p._replace(log_threshold=jnp.full(D_SAE, 9.0))  # nothing fires
    dead, r = jnp.arange(D_SAE) < 4, recipe("jumprelu", threshold=1e-4)
    q, _ = optimiser.resample(p, optimiser.start(p, r), dead, x, y, r, key=getkey())
    np.testing.assert_array_equal(q.log_threshold[4:], 9)
    pre = x @ q.W_enc[:, :4] + q.b_enc[None, :4]
    assert bool(jnp.all(jnp.max(pre, axis=0) > jnp.exp(q.log_threshold[:4])))


def test_schedules():
    r = recipe("standard", warmup=10, sparsity_warmup=20, learning_rate=1.0)
    rates = np.asarray([r.rate(jnp.int32(i)) for i in range(100)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:80], 1)
    assert (np.diff(rates[80:]) < 0).all() and 0 < rates[-1] < 0.06
    assert float(r.ramp(jnp.int32(4))) == pytest.approx(0.25) and float(r.ramp(jnp.int32(50))) == 1
    cosine = recipe("icl-sfc", learning_rate=1.0, period=100)
    assert float(cosine.rate(jnp.int32(99))) == pytest.approx(0.1, rel=1e-3)
    published = make_recipe("icl-sfc", n_steps=150_000, batch_size=2048)
    assert float(published.rate(jnp.int32(149_999))) == pytest.approx(0.55 * 1e-3, rel=1e-3), (
        "half of a period of twice the run"
    )


def test_recipes_are_checked():
    with pytest.raises(TrainingError, match="recipe must be one of batchtopk, gated, icl-sfc, jumprelu"):
        make_recipe("relu", n_steps=1, batch_size=1)
    with pytest.raises(TrainingError, match="a recipe has no learnign_rate; it has aux, "):
        make_recipe("topk", n_steps=1, batch_size=1, learnign_rate=1)
    for name, value in (
        ("learning_rate", 0.0),
        ("beta2", 1.0),
        ("dtype", "float16"),
        ("warmup", -1),
        ("decay", "sudden"),
    ):
        with pytest.raises(TrainingError, match=name):
            recipe("topk", **{name: value})
    assert dataclasses.replace(recipe("topk"), k_aux=0) != recipe("topk")


def test_a_field_that_an_objective_makes_nothing_of_is_refused():
    for objective, changes, why in [
        ("standard", {"k_aux": 4}, "k_aux is not for standard, which has no auxiliary loss"),
        ("topk", {"threshold": 0.1}, "threshold is not for topk, which learns no thresholds"),
        ("gated", {"centred_start": True}, "centred_start is not for gated, which has one start"),
        ("batchtopk", {"resample_every": 5}, "resample_every is not for batchtopk, whose auxiliary loss"),
    ]:
        with pytest.raises(TrainingError, match=why):
            make_recipe(objective, n_steps=1, batch_size=1, **changes)


def test_each_file_of_the_folder_is_an_objective():
    files = {path.stem for path in Path(base.__file__).parent.glob("[a-z]*.py")} - {"base"}
    assert {name.replace("-", "_") for name in OBJECTIVES} == files
