"""Quality numbers against plain numpy, and splicing against known cases: a perfect SAE, an SAE that is the ablation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from icl_lib.models import Site, Transformer, run_with_cache, tiny_config
from icl_lib.saes import SAE, harvest, quality, survey
from icl_lib.tasks import Prompts, Template
from icl_lib.tasks.prompts import _Label

CONFIG = tiny_config()


def perfect(site, site_out=None):
    """Positive and negative part of every coordinate: reconstructs anything."""
    eye = jnp.eye(CONFIG.d_model)
    W = jnp.concatenate([eye, -eye], axis=1)
    zero = jnp.zeros
    return SAE(
        W_enc=W, b_enc=zero(2 * CONFIG.d_model), W_dec=W.T, b_dec=zero(CONFIG.d_model),
        site_in=site, site_out=site_out or site, architecture="standard",
    )  # fmt: skip


def constant(site, value, site_out=None):
    """Writes `value` whatever it reads."""
    d = CONFIG.d_model
    return SAE(
        W_enc=jnp.zeros((d, 3)), b_enc=-jnp.ones(3), W_dec=jnp.zeros((3, d)), b_dec=value,
        site_in=site, site_out=site_out or site, architecture="standard",
    )  # fmt: skip


@eqx.filter_jit
def run(model, tokens, tap=None):
    return model(tokens, tap=tap)


@pytest.fixture
def setting(getkey):
    model = Transformer.init(CONFIG, key=getkey())
    tokens = np.array(jax.random.randint(getkey(), (5, 9), 3, CONFIG.d_vocab), np.int32)
    tokens[:, 0], tokens[3, 6:] = CONFIG.bos_id, CONFIG.pad_id
    return model, tokens, (tokens != CONFIG.bos_id) & (tokens != CONFIG.pad_id)


def test_numbers_by_hand(getkey):
    x, x_hat = jax.random.normal(getkey(), (4, 6, 5)) + 3, jax.random.normal(getkey(), (4, 6, 5)) + 3
    f = jax.nn.relu(jax.random.normal(getkey(), (4, 6, 10)) - 0.8).at[..., 0].set(0).at[..., 1].set(1)
    mask = jax.random.bernoulli(getkey(), 0.6, (4, 6))
    X, H, F = (np.asarray(a)[np.asarray(mask)] for a in (x, x_hat, f))
    assert float(quality.l0(f, mask)) == pytest.approx((F > 0).sum(1).mean())
    assert float(quality.fvu(x, x_hat, mask)) == pytest.approx(
        ((X - H) ** 2).sum() / ((X - X.mean(0)) ** 2).sum(), rel=1e-5
    )
    mean = jnp.broadcast_to(quality.masked_mean(x, mask), x.shape)
    assert float(quality.fvu(x, mean, mask)) == pytest.approx(1)
    freq = quality.frequency(f, mask)
    np.testing.assert_allclose(freq, (F > 0).mean(0), atol=1e-6)
    assert float(quality.dead_fraction(freq)) == pytest.approx(np.mean((F > 0).sum(0) == 0))
    assert float(quality.dense_fraction(freq)) == pytest.approx(np.mean((F > 0).mean(0) > 0.1))


def test_cross_entropy_by_hand(setting):
    model, tokens, mask = setting
    logits = np.asarray(run(model, jnp.asarray(tokens)), np.float64)
    total = 0.0
    for b in range(5):
        for s in range(8):
            if mask[b, s] and mask[b, s + 1]:
                total -= logits[b, s, tokens[b, s + 1]] - np.log(np.exp(logits[b, s]).sum())
    ce = quality.cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(tokens), jnp.asarray(mask))
    assert float(ce) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("site", [Site("resid_pre", 1), Site("attn_out", 0)])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_extremes_of_ce_recovered(site, ablation, setting):
    """Perfect reconstruction recovers 1; an SAE that writes what the ablation writes recovers 0."""
    model, tokens, mask = setting
    value = jnp.zeros(CONFIG.d_model)
    if ablation == "mean":
        _, cache = run_with_cache(model, jnp.asarray(tokens), [site])
        value = jnp.asarray(np.asarray(cache[site])[mask].mean(0))
    assert quality.ce_recovered(model, perfect(site), tokens, mask, ablation) == pytest.approx(1, abs=1e-3)
    assert quality.ce_recovered(model, constant(site, value), tokens, mask, ablation) == pytest.approx(0, abs=1e-3)


def test_table_equals_splicing_one_by_one(setting, getkey):
    """The switched program against a plain tap for each SAE, over batches with a filled-up last one."""
    model, tokens, mask = setting
    noisy = perfect(Site("resid_pre", 1))
    noisy = SAE(**(vars(noisy) | {"W_dec": noisy.W_dec + 0.2 * jax.random.normal(getkey(), noisy.W_dec.shape)}))
    coder = perfect(Site("mlp_in", 0), Site("mlp_out", 0))
    suite = {s.site_in: s for s in (noisy, coder, constant(Site("attn_out", 1), jnp.ones(CONFIG.d_model)))}
    table = quality.quality_table(model, suite, tokens, batch_size=2).set_index("site")
    pairs = float((mask[:, 1:] & mask[:, :-1]).sum())
    for sae in suite.values():
        spliced = run(model, jnp.asarray(tokens), tap=quality.splice(sae, jnp.asarray(mask)))
        ce = quality.cross_entropy(spliced, jnp.asarray(tokens), jnp.asarray(mask)) / pairs
        row = table.loc[str(sae.site_in)]
        assert row.ce_sae == pytest.approx(float(ce), rel=1e-4)
        zero = run(
            model, jnp.asarray(tokens), tap=quality.ablate(sae.site_out, jnp.zeros(CONFIG.d_model), jnp.asarray(mask))
        )
        assert row.ce_zero == pytest.approx(
            float(quality.cross_entropy(zero, jnp.asarray(tokens), jnp.asarray(mask)) / pairs), rel=1e-4
        )
        _, cache = run_with_cache(model, jnp.asarray(tokens), [sae.site_in, sae.site_out])
        x, y = (np.asarray(cache[s])[mask] for s in (sae.site_in, sae.site_out))
        f = np.asarray(sae.encode(jnp.asarray(x)))
        err = y - np.asarray(sae.decode(jnp.asarray(f)))
        assert row.l0 == pytest.approx((f > 0).sum(1).mean(), rel=1e-5)
        assert row.fvu == pytest.approx((err**2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-4)
        assert row.dead == pytest.approx(np.mean((f > 0).sum(0) == 0))
    assert list(table.kind) == ["residual", "transcoder", "attention"]


def test_bos_stays_clean(setting):
    """Splicing nonsense changes no prediction before the first token that counts."""
    model, tokens, mask = setting
    clean = run(model, jnp.asarray(tokens))
    broken = run(
        model,
        jnp.asarray(tokens),
        tap=quality.splice(constant(Site("resid_pre", 1), jnp.ones(CONFIG.d_model)), jnp.asarray(mask)),
    )
    np.testing.assert_allclose(broken[:, 0], clean[:, 0], atol=1e-5)
    assert float(jnp.abs(broken[:, 1] - clean[:, 1]).max()) > 1e-2


def test_errors(setting):
    model, tokens, mask = setting
    with pytest.raises(ValueError, match="ablation must be one of zero, mean"):
        quality.ce_recovered(model, perfect(Site("resid_pre", 1)), tokens, mask, "resample")
    wide = SAE(
        W_enc=jnp.zeros((7, 3)), b_enc=jnp.zeros(3), W_dec=jnp.zeros((3, 7)), b_dec=jnp.zeros(7),
        site_in=Site("resid_pre", 1), site_out=Site("resid_pre", 1), architecture="standard",
    )  # fmt: skip
    with pytest.raises(ValueError, match="blocks.1.hook_resid_pre.*d_in = 7.*d_model = 16"):
        quality.quality_table(model, {wide.site_in: wide}, tokens)
    with pytest.raises(ValueError, match="token ids must be in 0..39, got 40..40"):
        quality.quality_table(model, {}, np.full((2, 3), 40))
    with pytest.raises(ValueError, match="neighbouring true positions"):
        quality.quality_table(model, {}, tokens, np.zeros_like(mask))


def test_a_share_of_nothing_is_nan(setting):
    """Never an error, never infinite: constants, ablations that cost nothing, zero rows, no token."""
    model, tokens, mask = setting
    assert np.isnan(quality.fvu(jnp.full((4, 3), 3.3), jnp.zeros((4, 3))))
    none = jnp.zeros(4, bool)
    assert np.isnan(quality.fvu(jnp.ones((4, 3)), jnp.zeros((4, 3)), none)) and np.isnan(
        quality.l0(jnp.ones((4, 3)), none)
    )
    freq = quality.frequency(jnp.ones((4, 3)), none)
    assert np.isnan(freq).all() and np.isnan(quality.dead_fraction(freq)) and np.isnan(quality.dense_fraction(freq))
    assert np.isnan(quality.recovered(2.0, 2.0, 3.0)) and quality.recovered(4.0, 2.0, 3.0) == pytest.approx(0.5)
    site = Site("attn_out", 0)
    silent = eqx.tree_at(lambda m: [b.attn.o for b in m.blocks], model, replace_fn=jnp.zeros_like)
    row = quality.quality_table(silent, {site: constant(site, jnp.zeros(CONFIG.d_model))}, tokens).iloc[0]
    assert np.isnan([row.fvu, row.ce_recovered_zero, row.ce_recovered_mean, row.decoder_cosine]).all()
    assert np.isfinite([row.ce_clean, row.ce_sae, row.ce_zero, row.l0, row.dead]).all()
    W = jnp.asarray([[1.0, 0], [0, 0], [1, 1]])
    cosine = survey.decoder_cosine(W)
    assert np.isnan(cosine[1]) and cosine[0] == pytest.approx(cosine[2]) == pytest.approx(0.5**0.5)
    assert np.isnan(survey.decoder_cosine(W[:1])).all()


def test_prompts_carry_their_mask(setting):
    """Whatever ids BOS and padding have: stacked or single prompts, or the mask alone, count the real tokens."""
    model, tokens, _ = setting
    real = np.ones_like(tokens, bool)
    real[:, 0] = real[2, 5:] = False  # with another padding id than the model's
    fields = {name: jnp.zeros(tokens.shape, dtype) for name, dtype in (("pair", int), ("answer", bool))}
    prompts = Prompts(
        tokens=jnp.asarray(tokens), roles=jnp.asarray(real, int), **fields, n_shots=1, template=Template(),
        pad_id=7, label=_Label("a", ("",) * len(tokens)),
    )  # fmt: skip
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), prompts)
    site, sae = Site("resid_pre", 1), perfect(Site("resid_pre", 1))
    rows = harvest(model, tokens, [site], real)[site]
    assert len(rows) == real.sum()
    np.testing.assert_array_equal(harvest(model, prompts, [site])[site], rows)
    np.testing.assert_allclose(harvest(model, stacked, [site])[site], np.concatenate([rows, rows]), atol=1e-6)
    rates = survey.firing_rates(model, {site: sae}, tokens, real)[site]
    np.testing.assert_array_equal(survey.firing_rates(model, {site: sae}, prompts)[site], rates)
    table = quality.quality_table(model, {site: sae}, tokens, real)
    pd.testing.assert_frame_equal(quality.quality_table(model, {site: sae}, prompts), table)
    assert quality.ce_recovered(model, sae, stacked) == pytest.approx(table.ce_recovered_zero[0], rel=1e-4)


def test_rows_longer_than_the_context_are_refused(setting):
    model, _, _ = setting
    long, site = np.full((1, CONFIG.n_ctx + 1), 5), Site("resid_pre", 1)
    for run_it in (
        lambda: harvest(model, long, [site]),
        lambda: survey.firing_rates(model, {site: perfect(site)}, long),
        lambda: quality.quality_table(model, {site: perfect(site)}, long),
        lambda: quality.ce_recovered(model, perfect(site), long),
    ):
        with pytest.raises(ValueError, match="a row of 65 tokens is longer than the context of this model, 64"):
            run_it()
