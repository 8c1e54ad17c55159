"""Firing rates against a count by hand, decoder cosines against the full matrix, the front against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import Site, Transformer, run_with_cache, tiny_config
from icl_lib.saes import SAE, quality, quality_table, survey

CONFIG = tiny_config()


def random_sae(site: Site, d_sae: int, key) -> SAE:
    keys = jax.random.split(key, 3)
    W_enc, W_dec = (
        jax.random.normal(keys[0], (CONFIG.d_model, d_sae)),
        jax.random.normal(keys[1], (d_sae, CONFIG.d_model)),
    )
    b_enc = 3 * jax.random.normal(keys[2], (d_sae,))
    return SAE(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=jnp.zeros(CONFIG.d_model),
        site_in=site,
        site_out=site,
        architecture="standard",
    )


@pytest.fixture
def setting(getkey):
    model = Transformer.init(CONFIG, key=getkey())
    tokens = np.array(jax.random.randint(getkey(), (5, 9), 3, CONFIG.d_vocab), np.int32)
    tokens[:, 0], tokens[3, 6:] = CONFIG.bos_id, CONFIG.pad_id
    suite = {
        (site, d): random_sae(site, d, getkey())
        for site in (Site("resid_pre", 1), Site("attn_out", 0))
        for d in (12, 40)
    }
    return model, tokens, suite


def test_firing_rates_by_hand(setting):
    model, tokens, suite = setting
    mask = (tokens != CONFIG.bos_id) & (tokens != CONFIG.pad_id)
    rates = survey.firing_rates(model, suite, tokens, batch_size=2)
    assert list(rates) == list(suite)
    for key, sae in suite.items():
        _, cache = run_with_cache(model, jnp.asarray(tokens), [sae.site_in])
        f = np.asarray(sae.encode(jnp.asarray(np.asarray(cache[sae.site_in])[mask])))
        np.testing.assert_allclose(rates[key], (f > 0).mean(axis=0), atol=1e-6)
    with pytest.raises(ValueError, match="drops every token"):
        survey.firing_rates(model, suite, np.full((2, 3), CONFIG.pad_id, np.int32))


def test_table_has_several_saes_at_a_site(setting):
    """Two widths at one site in one table give what each gives alone."""
    model, tokens, suite = setting
    table = quality_table(model, suite, tokens, batch_size=4)
    assert len(table) == 4 and list(table.d_sae) == [12, 40, 12, 40]
    for i, (key, sae) in enumerate(suite.items()):
        if i == 1:
            alone = quality_table(model, {key: sae}, tokens, batch_size=4).iloc[0]
            for column in ("l0", "fvu", "ce_sae"):
                assert table[column][i] == pytest.approx(alone[column], rel=1e-4)
        W = np.asarray(sae.W_dec)
        W = W / np.linalg.norm(W, axis=1, keepdims=True)
        assert table.decoder_cosine[i] == pytest.approx(np.median((W @ W.T - 3 * np.eye(len(W))).max(axis=1)), rel=1e-4)
    rates = survey.firing_rates(model, suite, tokens)
    for i, key in enumerate(suite):
        assert table.dense[i] == pytest.approx((rates[key] > quality.DENSE).mean())
        assert table.dead[i] == pytest.approx((rates[key] == 0).mean())


def test_decoder_cosine_over_blocks(getkey, monkeypatch):
    monkeypatch.setattr(survey, "_BLOCK", 16)
    W = np.array(jax.random.normal(getkey(), (50, 7)))
    W[31] = -2 * W[4]  # opposite, not alike
    W[40] = 3 * W[8]
    survey.decoder_cosine.clear_cache()
    got = np.asarray(survey.decoder_cosine(jnp.asarray(W)))
    survey.decoder_cosine.clear_cache()
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    np.testing.assert_allclose(got, (unit @ unit.T - 3 * np.eye(50)).max(axis=1), atol=1e-5)
    assert got[8] == pytest.approx(1, abs=1e-5) and got[40] == pytest.approx(1, abs=1e-5)


def test_rate_histogram():
    counts, edges, dead = survey.rate_histogram(np.array([0, 0, 1e-9, 0.02, 0.5, 1.0]), n_bins=6)
    np.testing.assert_allclose(edges, np.arange(-6, 1))
    assert counts.tolist() == [1, 0, 0, 0, 1, 2] and dead == 2
    with pytest.raises(ValueError, match="from 0 to 1"):
        survey.rate_histogram(np.array([0.1, 1.5]))


def test_undominated_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 8, (60, 3)).astype(float)
    points[7, 1] = np.nan
    front = survey.undominated(*points.T)
    for i, p in enumerate(points):
        beaten = any((q <= p).all() and (q < p).any() for q in points)
        assert front[i] == (not beaten and not np.isnan(p).any())
    assert 0 < front.sum() < 30
