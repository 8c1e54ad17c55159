"""The objective against its equations by hand, training on planted features, folding, ghost gradients, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import Site, Transformer, run_with_cache, tiny_config
from icl_lib.saes import TrainingError, harvest, icl_sfc, needed_sites, objectives, suite_sites, train_on, training

R0, R1, T0 = Site("resid_pre", 0), Site("resid_pre", 1), Site("mlp_in", 0)


def planted(key, n=6000, d=16, n_features=24, scale=3.0, dtype=np.float32):
    """Sparse non-negative combinations of unit directions, about two of them a token, and an offset."""
    keys = jax.random.split(key, 4)
    directions = jax.random.normal(keys[0], (n_features, d))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    on = jax.random.bernoulli(keys[1], 2 / n_features, (n, n_features))
    f = jnp.where(on, 1 + jax.random.uniform(keys[2], on.shape), 0)
    offset = jax.random.normal(keys[3], (1, d))
    return np.asarray(scale * (f @ directions + offset), dtype), np.asarray(directions)


def random_params(getkey, d=5, d_sae=12, d_out=4):
    shapes = [(d, d_sae), (d_sae, d_out), (d_sae,), (d_sae,), (d_sae,), (d_out,)]
    return objectives.Params(*(0.5 * jax.random.normal(getkey(), s) for s in shapes))


def test_loss_is_the_equation(getkey):
    p = random_params(getkey)
    x, y = jax.random.normal(getkey(), (7, 5)), jax.random.normal(getkey(), (7, 4))
    loss, stats = icl_sfc.loss(p, x, y, jnp.asarray(0.3))
    P, X, Y = [np.asarray(a, np.float64) for a in p[:6]], np.asarray(x, np.float64), np.asarray(y, np.float64)
    W_enc, W_dec, b_gate, b_mag, r_mag, b_dec = P
    total = fired = err2 = 0.0
    for t in range(7):
        pi = X[t] @ W_enc + b_gate
        f = (pi > 0) * np.maximum((X[t] @ W_enc) * np.exp(r_mag) + b_mag, 0)
        norm = np.linalg.norm(Y[t] - Y.mean(0))
        err = Y[t] - (f @ W_dec + b_dec)
        gate_err = Y[t] - (np.maximum(pi, 0) @ W_dec + b_dec)
        total += (err @ err + gate_err @ gate_err) / norm
        total += 2 * 0.3 * sum(max(pi[i], 0) * np.linalg.norm(W_dec[i]) for i in range(12))
        fired, err2 = fired + (f > 0).sum(), err2 + err @ err
    assert float(loss) == pytest.approx(total / 7, rel=1e-4)
    assert float(stats.l0) == pytest.approx(fired / 7)
    assert float(stats.fvu) == pytest.approx(err2 / ((Y - Y.mean(0)) ** 2).sum(), rel=1e-4)


def test_ghost_gradients_reach_only_dead_latents(getkey):
    p = random_params(getkey)
    x, y = jax.random.normal(getkey(), (8, 5)), jax.random.normal(getkey(), (8, 4))
    scale = objectives.target_norm(y)
    latents, dead = jnp.asarray([2, 5, 7]), jnp.asarray([True, True, False])
    loss, grads = jax.value_and_grad(icl_sfc.ghost_loss)(p, x, y, scale, latents, dead)
    assert float(loss) == pytest.approx(float(jnp.mean(jnp.sum(y**2, axis=1) / scale)), rel=1e-3)  # scaled to the reconstruction
    moved = np.asarray(jnp.any(grads.W_enc != 0, axis=0))
    assert set(np.flatnonzero(moved)) == {2, 5}
    step = jax.tree.map(lambda a, g: a - 0.05 * g, p, grads)
    g = jax.nn.softplus(x @ p.W_enc[:, 2:3] + p.b_enc[2]) @ p.W_dec[2:3]
    after = jax.nn.softplus(x @ step.W_enc[:, 2:3] + step.b_enc[2]) @ step.W_dec[2:3]
    cosine = lambda a: float(jnp.mean(jnp.sum(a * y, axis=1) / jnp.linalg.norm(a, axis=1)))
    assert cosine(after) > cosine(g)  # towards what is left unexplained


def test_dead_latents_switch_the_ghost_term_on(getkey):
    p = random_params(getkey)
    x, y = jax.random.normal(getkey(), (8, 5)), jax.random.normal(getkey(), (8, 4))
    lam = jnp.asarray(0.1)
    plain, _ = icl_sfc.loss(p, x, y, lam)
    none, _ = icl_sfc.loss(p, x, y, lam, jnp.zeros(12, bool), key=getkey())
    some, _ = icl_sfc.loss(p, x, y, lam, jnp.arange(12) < 6, key=getkey())
    assert float(plain) == float(none) < float(some)


def test_training_finds_planted_features(getkey):
    """Two scales and two lambdas in one stack: each recovers the directions that made its data, in raw units."""
    x0, d0 = planted(getkey())
    x1, d1 = planted(getkey(), scale=50.0, dtype=np.float16)
    log = []
    suite = train_on(
        {R0: x0, R1: x1}, [R0, R1], d_sae=32, sparsity={R0: 0.25, R1: 0.25}, key=getkey(), n_steps=900, batch_size=256,
        learning_rate=3e-3, chunk=400, progress=log.append,
    )  # fmt: skip
    assert [p.step for p in log] == [400, 800, 900] and "step   900 / 900" in str(log[-1])
    for sae, x, directions in ((suite[R0], x0, d0), (suite[R1], x1.astype(np.float32), d1)):
        x = jnp.asarray(x)
        f, x_hat = sae.encode(x), sae(x)
        residual = float(jnp.sum((x - x_hat) ** 2) / jnp.sum((x - x.mean(axis=0, keepdims=True)) ** 2))
        assert residual < 0.15 and float((f > 0).sum(axis=1).mean()) < 6, "normalisation is folded into the weights"
        cosines = np.abs(directions @ np.asarray(sae.W_dec).T).max(axis=1)
        assert np.mean(cosines > 0.9) > 0.75
        np.testing.assert_allclose(jnp.linalg.norm(sae.W_dec, axis=1), 1, rtol=1e-4)
    assert dict(suite[R1].metadata)["sparsity"] == pytest.approx(0.25)


def test_transcoder_learns_the_map(getkey):
    x, _ = planted(getkey())
    y = np.maximum(x @ np.asarray(jax.random.normal(getkey(), (16, 16))), 0)
    sae = train_on(
        {T0: x, Site("mlp_out", 0): y}, [T0], d_sae=64, sparsity=0.02, key=getkey(), n_steps=400, batch_size=256,
        learning_rate=3e-3, progress=None,
    )[T0]  # fmt: skip
    err = y - np.asarray(sae(jnp.asarray(x)))
    assert sae.site_out == Site("mlp_out", 0) and sae.is_transcoder
    assert (err**2).sum() / ((y - y.mean(0)) ** 2).sum() < 0.3


def test_one_after_the_other_equals_vmap(getkey, monkeypatch):
    """CPU and accelerators take different loops to the same place."""
    acts = {R0: planted(getkey(), n=500)[0], R1: planted(getkey(), n=500)[0]}
    settings = dict(d_sae=32, sparsity=0.1, key=getkey(), n_steps=20, batch_size=64, dead_after=5, progress=None)
    a = train_on(acts, [R0, R1], **settings)
    monkeypatch.setattr(training, "_over_saes", lambda f, *xs: jax.vmap(f)(*xs))
    training._run.clear_cache()
    b = train_on(acts, [R0, R1], **settings)
    training._run.clear_cache()
    np.testing.assert_allclose(a[R1].W_enc, b[R1].W_enc, atol=2e-3)


def test_stream_of_buffers(getkey):
    buffers = [{R0: planted(getkey(), n=300)[0]} for _ in range(3)]
    settings = dict(d_sae=32, sparsity=0.1, key=getkey(), batch_size=32, chunk=5, progress=None)
    assert train_on(iter(buffers), [R0], n_steps=15, **settings)[R0].d_sae == 32
    with pytest.raises(TrainingError, match="ended before the last step"):
        train_on(iter(buffers), [R0], n_steps=16, **settings)


def test_errors(getkey):
    x, _ = planted(getkey(), n=200)
    settings = dict(d_sae=32, sparsity=0.1, key=getkey(), n_steps=6, batch_size=32, chunk=2, progress=None)
    with pytest.raises(TrainingError, match="blocks.0.hook_mlp_out"):
        train_on({T0: x}, [T0], **settings)
    with pytest.raises(TrainingError, match="same tokens"):
        train_on({R0: x, R1: x[:100]}, [R0, R1], **settings)
    with pytest.raises(TrainingError, match="equal widths"):
        train_on({R0: x, R1: x[:, :8]}, [R0, R1], **settings)
    with pytest.raises(TrainingError, match="n_steps must be above 0"):
        train_on({R0: x}, [R0], **(settings | {"n_steps": 0}))
    bad = x.copy()
    bad[:, 3] = np.inf
    with pytest.raises(TrainingError, match=r"blocks.1.hook_resid_pre is not finite at step 0"):
        train_on({R0: x, R1: bad}, [R0, R1], **settings)


def test_harvest_drops_special_tokens(getkey):
    config = tiny_config()
    model = Transformer.init(config, key=getkey())
    tokens = np.array(jax.random.randint(getkey(), (5, 7), 3, config.d_vocab), np.int32)
    tokens[:, 0], tokens[2, 4:] = config.bos_id, config.pad_id
    sites = needed_sites(suite_sites(config.n_layers))
    acts = harvest(model, tokens, sites, batch_size=2)
    assert len(sites) == 8 and all(acts[s].shape == (27, config.d_model) for s in sites)
    _, cache = run_with_cache(model, jnp.asarray(tokens[2:3]), sites)
    for site in sites:  # rows 0 and 1 give six tokens each, row 2 three
        np.testing.assert_allclose(acts[site][12:15], cache[site][0, 1:4], atol=1e-5)
    with pytest.raises(ValueError, match="drops every token"):
        harvest(model, np.full((2, 3), config.pad_id), sites)
    with pytest.raises(ValueError, match="token ids must be in 0..39, got .*..99"):
        harvest(model, np.full((2, 3), 99), sites)
    with pytest.raises(ValueError, match="layer of site"):
        harvest(model, tokens, [Site("resid_pre", 9)])
