"""The SAE module: every form against its equation written out, folding, errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import Site
from icl_lib.saes import SAE
from icl_lib.saes.sae import ARCHITECTURES, top_k

SITE = Site("resid_pre", 2)


def make(architecture, getkey, d_in=6, d_sae=20, d_out=6, site_out=SITE, skip=False):
    def normal(*shape):
        return jax.random.normal(getkey(), shape)

    threshold = {"threshold": jnp.abs(normal(d_sae))}
    gate = {"r_mag": 0.5 * normal(d_sae), "b_mag": normal(d_sae)}
    extra = {"gated": gate, "jumprelu": threshold, "batchtopk": threshold, "topk": {"k": 4}}
    return SAE(
        W_enc=normal(d_in, d_sae), b_enc=normal(d_sae), W_dec=normal(d_sae, d_out), b_dec=normal(d_out),
        W_skip=normal(d_in, d_out) if skip else None, site_in=SITE, site_out=site_out, architecture=architecture,
        **extra.get(architecture, {}),
    )  # fmt: skip


def by_hand(sae, x):
    """Features in float64, token by token and latent by latent."""
    w = {k: np.asarray(v, np.float64) for k, v in vars(sae).items() if eqx.is_array(v)}
    f = np.zeros((len(x), sae.d_sae))
    for t, row in enumerate(np.asarray(x, np.float64)):
        for i in range(sae.d_sae):
            h = row @ w["W_enc"][:, i]
            if sae.architecture == "gated":
                f[t, i] = max(h * np.exp(w["r_mag"][i]) + w["b_mag"][i], 0) if h + w["b_enc"][i] > 0 else 0
            else:
                p = h + w["b_enc"][i]
                f[t, i] = p if p > w.get("threshold", np.zeros(sae.d_sae))[i] else 0
        if sae.architecture == "topk":
            f[t, np.argsort(f[t])[: -sae.k]] = 0
    return f, f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"] if "W_skip" in w else 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("skip", [False, True])
def test_encode_decode(architecture, skip, getkey):
    sae = make(architecture, getkey, d_out=5, site_out=Site("mlp_out", 2), skip=skip)
    x = jax.random.normal(getkey(), (50, 6))
    f, x_hat = by_hand(sae, x)
    assert 0.05 < (f > 0).mean() < 0.95
    np.testing.assert_allclose(sae.encode(x), f, atol=1e-5)
    np.testing.assert_allclose(sae(x), x_hat, atol=1e-4)
    np.testing.assert_allclose(sae.activate(sae.pre(x)), f, atol=1e-5)


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_fold_is_the_same_function(architecture, skip, getkey):
    sae = make(architecture, getkey, d_out=4, site_out=Site("mlp_out", 2), skip=skip)
    folded = sae.fold()
    x = jax.random.normal(getkey(), (3, 200, 6))
    assert folded.architecture == "jumprelu" and folded.site_out == sae.site_out
    assert (sae.encode(x) > 0).mean() > 0.1
    assert relative(folded.encode(x), sae.encode(x)) < 1e-5
    assert relative(folded(x), sae(x)) < 1e-5
    assert relative(folded.fold()(x), sae(x)) < 1e-5


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_take_is_the_same_latents(architecture, skip, getkey):
    """Encoded as the whole does, decoded to their part of the reconstruction beside bias and skip."""
    sae = make(architecture, getkey, d_out=5, site_out=Site("mlp_out", 2), skip=skip)
    x, some = jax.random.normal(getkey(), (30, 6)), jnp.asarray([3, 0, 17])
    f, few = sae.encode(x), sae.take(some)
    assert (few.d_sae, few.architecture, few.site_out) == (3, architecture, sae.site_out)
    np.testing.assert_allclose(few.encode(x), f[:, some], atol=1e-6)
    kept = jnp.zeros_like(f).at[:, some].set(f[:, some])
    np.testing.assert_allclose(few(x), sae.decode(kept, x), atol=1e-5)
    with pytest.raises(ValueError, match="latents of the topk SAE at blocks.2.hook_resid_pre compete"):
        make("topk", getkey).take(some)


def test_topk(getkey):
    """Never more than k, also with ties, and only k where more are positive; gradients pass where a latent is on."""
    sae = make("topk", getkey)
    tied = jnp.array([[1.0, 2.0, 2.0, 2.0, 2.0, 2.0, -1.0], [-1.0, -2.0, 0.5, -1.0, -1.0, -1.0, -1.0]])
    np.testing.assert_array_equal((top_k(tied, 3) > 0).sum(axis=1), [3, 1])
    np.testing.assert_array_equal(top_k(tied, 3)[1], jnp.maximum(tied[1], 0))
    x = jax.random.normal(getkey(), (40, 6))
    pre = sae.pre(x)
    np.testing.assert_array_equal(jax.grad(lambda p: sae.activate(p).sum())(pre), sae.activate(pre) > 0)
    with pytest.raises(ValueError, match="topk SAE at blocks.2.hook_resid_pre has no jumprelu form"):
        sae.fold()


def test_skip_needs_the_input(getkey):
    sae = make("standard", getkey, site_out=Site("mlp_out", 2), skip=True)
    x = jax.random.normal(getkey(), (3, 6))
    with pytest.raises(ValueError, match="skip matrix"):
        sae.decode(sae.encode(x))
    np.testing.assert_array_equal(sae.decode(sae.encode(x), x), sae(x))
    with pytest.raises(ValueError, match="W_skip is for transcoders"):
        make("standard", getkey, skip=True)


def test_gate_and_magnitude_disagree(getkey):
    """The folded threshold is not zero: some latents have a positive magnitude behind a closed gate."""
    sae = make("gated", getkey)
    x = jax.random.normal(getkey(), (50, 6))
    closed = (sae.pre(x) > 0) & (sae.encode(x) == 0)
    assert closed.any() and (sae.fold().threshold > 0).any()


def test_leading_axes_and_dtypes(getkey):
    sae = make("jumprelu", getkey)
    x = jax.random.normal(getkey(), (2, 3, 6))
    np.testing.assert_allclose(sae.encode(x)[1, 2], sae.encode(x[1, 2]), atol=1e-6)
    assert sae.encode(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert jax.jit(lambda s, x: s(x))(sae, x).shape == x.shape


def test_errors(getkey):
    sae = make("gated", getkey)
    with pytest.raises(ValueError, match="d_in = 6.*blocks.2.hook_resid_pre"):
        eqx.filter_jit(lambda x: sae.encode(x))(jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="d_sae = 20"):
        sae.decode(jnp.zeros((2, 6)))
    weights = {k: getattr(sae, k) for k in ("W_enc", "b_enc", "W_dec", "b_dec")}
    with pytest.raises(ValueError, match="needs threshold of shape"):
        SAE(**weights, site_in=SITE, site_out=SITE, architecture="jumprelu")
    with pytest.raises(ValueError, match="has no b_mag"):
        SAE(**weights, b_mag=sae.b_mag, site_in=SITE, site_out=SITE, architecture="standard")
    for k in (None, 0, 21):
        with pytest.raises(ValueError, match=r"needs k in 1\.\.20"):
            SAE(**weights, k=k, site_in=SITE, site_out=SITE, architecture="topk")
    with pytest.raises(ValueError, match="other architectures have none; got k = 3"):
        SAE(**weights, k=3, site_in=SITE, site_out=SITE, architecture="standard")
    with pytest.raises(ValueError, match="architecture must be one of"):
        SAE(**weights, site_in=SITE, site_out=SITE, architecture="temporal")
