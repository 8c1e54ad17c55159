"""Gradient pursuit against a slow loop in numpy, and on dictionaries where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.vectors import gradient_pursuit, pursuit_path


def slow_pursuit(v, dictionary, k):
    """Gradient pursuit (Smith 2024), one vector, one step at a time, in float64."""
    w = np.zeros(len(dictionary))
    for _ in range(k):
        residual = v - w @ dictionary
        c = dictionary @ residual
        support = set(np.flatnonzero(w)) | {int(np.argmax(c))}
        g = np.array([c[i] if i in support else 0.0 for i in range(len(c))])
        u = g @ dictionary
        w = np.maximum(w + (u @ residual) / (u @ u) * g, 0)
    return w


def test_matches_a_loop_in_numpy(getkey):
    v, dictionary = jax.random.normal(getkey(), (5, 16)), jax.random.normal(getkey(), (48, 16))
    ours = gradient_pursuit(v, dictionary, 8)
    theirs = np.stack([slow_pursuit(np.float64(x), np.float64(dictionary), 8) for x in v])
    assert np.allclose(ours, theirs, atol=1e-4)
    assert int((theirs > 0).sum(-1).max()) > 3, "the comparison should see several active rows"


@pytest.mark.parametrize("n_active", [1, 3, 6])
def test_orthonormal_dictionary_is_solved_exactly(getkey, n_active):
    """With orthonormal rows of equal weight, k steps find k true weights and stop there."""
    dictionary = jnp.linalg.qr(jax.random.normal(getkey(), (12, 12)))[0]
    truth = jnp.zeros(12).at[jnp.arange(n_active)].set(2.0)
    w = gradient_pursuit(truth @ dictionary, dictionary, n_active + 3)
    assert np.allclose(w, truth, atol=1e-4)


def test_weights_are_non_negative_and_sparse(getkey):
    v, dictionary = jax.random.normal(getkey(), (2, 3, 16)), jax.random.normal(getkey(), (64, 16))
    path = pursuit_path(v, dictionary, 10)
    assert path.shape == (10, 2, 3, 64)
    assert float(path.min()) >= 0
    active = np.asarray((path > 0).sum(-1))
    assert (active <= np.arange(1, 11)[:, None, None]).all()
    errors = np.linalg.norm(np.asarray(v[None] - path @ dictionary), axis=-1)
    assert errors[-1].max() < np.linalg.norm(v, axis=-1).min(), "ten rows should explain more than none"


def test_path_holds_every_shorter_run(getkey):
    v, dictionary = jax.random.normal(getkey(), (4, 16)), jax.random.normal(getkey(), (64, 16))
    path = pursuit_path(v, dictionary, 6)
    for k in (2, 6):
        assert np.allclose(path[k - 1], gradient_pursuit(v, dictionary, k), atol=1e-5)


def test_rows_are_not_normalised():
    """The longer of two parallel rows has the larger product with the residual, so it is chosen."""
    w = gradient_pursuit(jnp.array([1.0, 0.0]), jnp.array([[1.0, 0.0], [4.0, 0.0]]), 1)
    assert np.allclose(w, [0.0, 0.25])


def test_nothing_to_explain_gives_zero_not_nan():
    eye = jnp.eye(4)
    assert np.array_equal(gradient_pursuit(jnp.zeros(4), eye, 3), np.zeros(4))
    assert np.array_equal(gradient_pursuit(-jnp.ones(4), eye, 3), np.zeros(4))


def test_bad_input_is_named(getkey):
    v, dictionary = jax.random.normal(getkey(), (5,)), jax.random.normal(getkey(), (9, 5))
    with pytest.raises(ValueError, match=r"k must be in 1\.\.9.*got 10"):
        gradient_pursuit(v, dictionary, 10)
    with pytest.raises(ValueError, match=r"k must be in"):
        pursuit_path(v, dictionary, 0)
