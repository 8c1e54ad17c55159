"""Nulls with the same chances: sets of equal size and activity, the same choice, and a rate of false discoveries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.features import against_sets, best_of, discoveries, matched_sets, mean_activity, p_values
from icl_lib.models import Site, Transformer, run_with_cache, tiny_config
from icl_lib.saes import SAE


def test_sets_are_as_large_and_as_active_as_the_candidates(getkey):
    rng = np.random.default_rng(0)
    activity = np.where(rng.random(400) < 0.1, 0.0, rng.lognormal(0, 2, 400))
    candidates = np.argsort(-activity)[:60:2]
    sets = matched_sets(activity, candidates, 200, key=getkey())
    assert sets.shape == (200, 30) and (activity[sets] > 0).all() and not np.isin(sets, candidates).any()
    assert all(len(set(row)) == 30 for row in sets.tolist())
    assert abs(np.log(activity[sets]).mean() - np.log(activity[candidates]).mean()) < 0.9
    assert np.log(activity[activity > 0]).mean() < np.log(activity[sets]).mean() - 1, "not a draw from all latents"
    assert (matched_sets(activity, candidates, 200, key=jax.random.key(1)) != sets).any()


def test_too_few_active_latents_are_refused(getkey):
    with pytest.raises(ValueError, match="2 active latents are left beside 3 candidates"):
        matched_sets(np.array([1.0, 1, 1, 1, 1, 0]), np.arange(3), 10, key=getkey())


def test_the_whole_pool_is_drawn_where_it_is_just_enough(getkey):
    sets = matched_sets(np.ones(6), np.arange(3), 50, key=getkey())
    assert all(sorted(row) == [3, 4, 5] for row in sets.tolist())


def test_the_best_is_chosen_on_one_pool_and_judged_on_the_other():
    choosing = np.array([[0.1, 0.9, 0.5, np.nan], [0.3, 0.2, 0.8, np.nan]])
    judging = np.array([[0.7, 0.2, 0.4, np.nan], [0.6, 0.1, 0.5, np.nan]])
    assert best_of(choosing, judging, np.array([[0, 1], [2, 0]])).tolist() == [[0.2, 0.6], [0.4, 0.5]]


def test_p_counts_the_own_draw_and_discoveries_hold_their_rate():
    null = np.tile(np.arange(99.0)[:, None], (1, 3))
    p = p_values(np.array([200.0, 50.0, np.nan]), null)
    assert p[:2].tolist() == [0.01, 0.5] and np.isnan(p[2])
    assert discoveries(p).tolist() == [True, False, False]
    assert discoveries(np.array([0.04, 0.03, 0.04])).all() and not discoveries(np.array([0.04, 0.5, 0.9])).any()
    assert not discoveries(np.array([np.nan])).any()


def test_what_is_to_be_found_is_found_and_chance_is_measured():
    """Ten tasks, of which four have a latent of their own among twenty candidates; the others' are like any other."""
    rng = np.random.default_rng(1)
    choosing = rng.normal(0, 0.1, (10, 200))
    judging = choosing + rng.normal(0, 0.05, (10, 200))
    choosing[range(4), range(4)], judging[range(4), range(4)] = 1.0, 0.9
    found = against_sets(choosing, judging, np.ones(200), np.arange(20), key=jax.random.key(0), bar=0.5, draws=200)
    assert found.stands.tolist() == [True] * 4 + [False] * 6 and found.own[:4].tolist() == [0.9] * 4
    assert (found.p[:4] == 1 / 201).all() and found.null.shape == (200, 10) and found.by_chance.tolist() == [0] * 20


def test_with_too_few_latents_beside_the_candidates_nothing_is_known(getkey):
    effects = np.random.default_rng(0).normal(size=(2, 3, 8))
    found = against_sets(*effects, np.ones(8), np.arange(3), key=getkey())
    assert np.isnan(found.p).all() and not found.stands.any() and found.null.shape == (0, 3)
    assert np.isfinite(found.own).all() and found.by_chance.shape == (0,)


def test_candidates_like_any_other_do_no_better_than_the_pretenders():
    rng, ahead = np.random.default_rng(1), 0
    for world in range(20):
        effects = rng.normal(size=(2, 10, 120))
        one = against_sets(
            *effects, np.ones(120), np.arange(12), key=jax.random.key(world), bar=0.0, draws=50, pretenders=10
        )
        ahead += one.stands.sum() > one.by_chance.max()
    assert ahead <= 5  # of about 2; more than 5 has a chance of 1 in 100


def test_mean_activity_is_that_of_the_tokens_that_count(getkey):
    model = Transformer.init(tiny_config(n_layers=2), key=getkey())
    site = Site("resid_pre", 1)
    weights = jax.random.normal(getkey(), (2, 16, 12))
    sae = SAE(weights[0], jnp.zeros(12), weights[1].T, jnp.zeros(16), site, site, "standard")
    tokens = jax.random.randint(getkey(), (2, 3, 5), 3, 40)
    real = np.arange(30).reshape(2, 3, 5) % 3 > 0
    rows = run_with_cache(model, tokens.reshape(6, 5), [site])[1][site]
    expected = np.asarray(sae.encode(rows)).reshape(30, 12)[real.reshape(-1)].mean(axis=0)
    np.testing.assert_allclose(mean_activity(model, sae, tokens, jnp.asarray(real)), expected, rtol=1e-5)
