"""Features against plain NumPy sums, a corpus scored by hand, a detector that drives an executor by construction."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.circuits import Groups
from icl_lib.features import (
    LengthSweep,
    activation_mass,
    active_latents,
    best_lengths,
    detector_executor,
    display_strength,
    first_candidates,
    latent_decrease,
    latent_names,
    length_sweep,
    loss_decrease,
    mean_strength,
    percentile_of,
    random_latents,
    serves_one,
    stands_out,
    top_examples,
)
from icl_lib.models import Site, Transformer, run_with_cache, tiny_config
from icl_lib.saes import SAE
from icl_lib.tasks import Prompts, Role, Template, stack_prompts
from icl_lib.tasks.prompts import _Label
from icl_lib.text.tokens import token_windows
from icl_lib.vectors import cut, steer

P, X, A, Y, N = Role.PROMPT, Role.INPUT, Role.ARROW, Role.OUTPUT, Role.NEWLINE


def make(seed: int) -> Prompts:
    """Two prompts of random tokens: BOS, one word of instruction, two pairs with outputs of two tokens, padding."""
    roles = np.array([Role.OTHER, P, X, A, Y, Y, N, X, A, Y, Y, Role.OTHER])
    pair = np.array([-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, -1])
    tokens = np.random.default_rng(seed).integers(3, 40, (2, len(roles)))
    rows = lambda a: jnp.asarray(np.tile(a, (2, 1)), jnp.int32)
    answer = jnp.asarray(np.tile((pair == 1) & (roles == Y), (2, 1)))
    return Prompts(
        jnp.asarray(tokens, jnp.int32), rows(roles), rows(pair), answer, 1, Template(), 0, _Label((), f"task {seed}")
    )


def make_sae(key, layer: int, d_sae: int = 12) -> SAE:
    k = jax.random.split(key, 2)
    site, normal = Site("resid_pre", layer), lambda key, *shape: jax.random.normal(key, shape)
    return SAE(
        normal(k[0], 16, d_sae), jnp.zeros(d_sae), normal(k[1], d_sae, 16), jnp.zeros(16), site, site, "jumprelu",
        threshold=jnp.full(d_sae, 0.5),
    )  # fmt: skip


@pytest.fixture
def model(getkey):
    return Transformer.init(tiny_config(n_layers=3), key=getkey())


def test_mass_adds_tasks_that_share_a_latent_and_sums_to_one(model, getkey):
    sae, prompts = make_sae(getkey(), 1), stack_prompts([make(i) for i in range(3)])
    found = activation_mass(model, sae, prompts, [4, 7, 4])
    sums = np.zeros((3, len(Role)))
    for task, latent in enumerate([4, 7, 4]):
        _, cache = run_with_cache(model, prompts.tokens[task], [sae.site_in])
        f = np.asarray(sae.encode(cache[sae.site_in]))[..., latent]
        for role in (P, X, A, Y, N):
            sums[task, role] = f[np.asarray(prompts.roles[task]) == role].sum()
    expected = np.stack([sums[0] + sums[2], sums[1]])
    assert found.latents.tolist() == [4, 7]
    np.testing.assert_allclose(found.mass, expected / expected.sum(axis=1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(found.mass.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.mean, found.mass.mean(axis=0), rtol=1e-5)
    assert found.mean[Role.OTHER] == 0


def test_a_silent_latent_has_no_shares_and_does_not_enter_the_mean(model, getkey):
    sae, prompts = make_sae(getkey(), 1), stack_prompts([make(0), make(1)])
    sae = eqx.tree_at(lambda s: s.threshold, sae, sae.threshold.at[3].set(1e6))
    found = activation_mass(model, sae, prompts, [3, 5])
    assert np.isnan(found.mass[0]).all() and np.isclose(found.mean.sum(), 1)


def test_top_examples_are_those_of_the_whole_corpus(model, getkey):
    sae, corpus = make_sae(getkey(), 1), np.random.default_rng(0).integers(3, 40, (21, 9)).astype(np.int32)
    corpus[:, 0], corpus[3, 5:] = model.config.bos_id, model.config.pad_id
    found = top_examples(model, sae, corpus, [2, 9], k=4, batch=8)
    _, cache = run_with_cache(model, jnp.asarray(corpus), [sae.site_in])
    f = np.asarray(sae.encode(cache[sae.site_in]))[..., [2, 9]]
    f[(corpus == model.config.bos_id) | (corpus == model.config.pad_id)] = 0
    for i in range(2):
        order = np.argsort(-f[..., i].max(axis=1), kind="stable")[:4]
        assert found.window[i].tolist() == order.tolist()
        np.testing.assert_allclose(found.activation[i], f[order][..., i], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.tokens[i], corpus[order])
    assert (np.diff(found.peak, axis=1) <= 0).all()


def test_a_latent_is_named_by_its_words_and_by_what_it_writes(model, getkey):
    """Latent 0 fires on tokens 5 and 7, most on 7; latent 1 on 5 alone and writes token 9; latent 2 never fires."""

    class Letters:
        decode = staticmethod(lambda ids: f" {chr(97 + ids[0])}")

    sae = eqx.tree_at(lambda s: (s.b_enc, s.threshold), make_sae(getkey(), 0, 3), (jnp.zeros(3), jnp.full(3, 0.1)))
    rows = np.array([[2, 5, 7], [2, 5, 5]])
    at = run_with_cache(model, jnp.asarray(rows), [Site("resid_pre", 0)])[1][Site("resid_pre", 0)].reshape(-1, 16)
    wanted = np.array([[0, 0, -1], [0.5, 1, -1], [1, 0, -1], [0, 0, -1], [0.5, 1, -1], [0.5, 1, -1]])
    solved = np.linalg.lstsq(np.asarray(at), wanted, rcond=None)[0].astype(np.float32)
    matrix = model.embed if model.unembed is None else model.unembed
    sae = eqx.tree_at(lambda s: (s.W_enc, s.W_dec), sae, (jnp.asarray(solved), sae.W_dec.at[1].set(matrix[9])))
    writes = chr(97 + int(jnp.argmax(matrix @ model.norm(matrix[9]))))
    names = latent_names(model, sae, Letters, rows, [0, 1, 2], valid=rows != 2)
    assert names[0] == "0 h, f" and names[1].startswith(f"1 f : {writes}, ") and names[2] == "2 (silent)"
    assert latent_names(model, sae, Letters, rows, []) == []


def test_token_windows_begin_with_bos_and_cover_the_text():
    tokenizer = lambda text, add_special_tokens: {"input_ids": [int(w) for w in text.split()]}
    windows = token_windows(["5 6 7", "8 9 10 11"], tokenizer, length=4, bos_id=2)
    assert windows.tolist() == [[2, 5, 6, 7], [2, 8, 9, 10]]
    own = token_windows(["2 5 6 7", "2 2 8 9 10 11", "2 12 13"], tokenizer, length=4, bos_id=2)
    assert own.tolist() == [[2, 5, 6, 7], [2, 8, 9, 10], [2, 11, 2, 12]], "no BOS follows another, whoever brings it"
    plain = token_windows(["5 6 7", "8 9 10 11"], tokenizer, length=3, bos_id=None)
    assert plain.tolist() == [[5, 6, 7], [8, 9, 10]], "a model without BOS"
    with pytest.raises(ValueError, match="too few"):
        token_windows(["5"], tokenizer, length=4, bos_id=2)


@pytest.fixture
def planted(getkey):
    """Direction 15 marks outputs; block 1 copies what it attends to from direction 15 to direction 14.

    Detector 0 reads direction 15 at layer 1, executor 1 reads direction 14 at layer 2. Detector 2 and executor 3 read
    directions that the block leaves alone; with queries at zero every token attends evenly to all before it.
    """
    model = Transformer.init(tiny_config(n_layers=3, n_heads=1, norm_eps=1e8), key=getkey())
    block = model.blocks[1]
    v = jnp.zeros_like(block.attn.v).at[0, 15].set(1.0)
    o = jnp.zeros_like(block.attn.o).at[14, 0].set(1.0)
    parts = lambda m: (
        m.blocks[1].attn.q,
        m.blocks[1].attn.v,
        m.blocks[1].attn.o,
        m.blocks[1].mlp.down,
        m.blocks[1].ln1.weight,
    )
    new = (jnp.zeros_like(block.attn.q), v, o, jnp.zeros_like(block.mlp.down), block.ln1.weight + 1e4 - 1)
    model = eqx.tree_at(parts, model, new)
    silent = lambda m: (m.blocks[0].attn.o, m.blocks[0].mlp.down)
    model = eqx.tree_at(silent, model, tuple(jnp.zeros_like(w) for w in silent(model)))
    prompts = stack_prompts([make(0), make(1)])
    # Tokens 30 and above are outputs and carry direction 15; no token has anything in direction 14; all have some in
    # 13.
    tokens = jnp.where(prompts.roles == Y, 30 + prompts.tokens % 10, prompts.tokens % 27 + 3)
    prompts = eqx.tree_at(lambda p: p.tokens, prompts, tokens)
    embed = (model.embed * 0.01).at[:, 13:].set(0.0).at[30:, 15].set(0.5).at[:, 13].set(0.25)
    model = eqx.tree_at(lambda m: m.embed, model, embed)
    reads = jnp.zeros((16, 4)).at[15, 0].set(1.0).at[14, 1].set(1.0).at[12, 2].set(1.0).at[13, 3].set(1.0)
    make_at = lambda layer: SAE(
        reads, jnp.zeros(4), reads.T, jnp.zeros(16), Site("resid_pre", layer), Site("resid_pre", layer), "jumprelu",
        threshold=jnp.full(4, 1e-3),
    )  # fmt: skip
    return model, make_at(1), make_at(2), prompts


def test_a_planted_detector_silences_its_executor_and_no_other(planted):
    model, sae_d, sae_e, prompts = planted
    links = detector_executor(model, sae_d, sae_e, prompts, [0, 2], [1, 3], mode="ablate")
    assert links.effect.shape == (1, 2, 2, 2) and (links.detector_mean[:, 0] > 0.1).all()
    # At the first arrow no output has been seen, so only the query's arrow counts, where the executor was on.
    np.testing.assert_allclose(links.effect[0, :, 0], [[1, 0], [1, 0]], atol=1e-3)
    np.testing.assert_allclose(links.effect[0, :, 1], 0, atol=1e-2)
    np.testing.assert_allclose(display_strength(links.effect[0]), [[1, 0], [0, 0]], atol=1e-2)


def test_steering_takes_its_strength_times_the_mean_activation(planted):
    model, sae_d, sae_e, prompts = planted
    mean = detector_executor(model, sae_d, sae_e, prompts, [0], [1], mode="ablate").detector_mean[0, 0]
    # Outputs carry 0.5 x sqrt(16) = 2; in this linear block the executor falls by the share that is taken away.
    strengths = [0.0, 0.5, 1.0, 50.0]
    links = detector_executor(model, sae_d, sae_e, prompts, [0], [1], strengths=strengths)
    np.testing.assert_allclose(
        links.effect[:, 0, 0, 0], np.clip(np.array(strengths) * mean / 2, 0, 1), rtol=2e-2, atol=1e-3
    )


def test_a_push_has_its_own_length_whatever_is_pushed(planted):
    """The executor falls by the pushed length; a direction that is never active is pushed as far, and does nothing."""
    model, sae_d, sae_e, prompts = planted
    lengths = np.array([[0.0, 0.5, 1.0], [0.0, 1.0, 50.0]])
    links = detector_executor(model, sae_d, sae_e, prompts, [0, 2], [1], mode="push", lengths=lengths)
    np.testing.assert_allclose(links.effect[:, :, 0, 0], np.clip(lengths / 2, 0, 1).T, rtol=2e-2, atol=1e-3)
    np.testing.assert_allclose(links.effect[:, :, 1, 0], 0, atol=1e-2)
    for options in ({"mode": "push"}, {"lengths": lengths}, {"mode": "push", "lengths": lengths[:1]}):
        with pytest.raises(ValueError, match=r"mode 'push' takes lengths \(tasks = 2, n\)"):
            detector_executor(model, sae_d, sae_e, prompts, [0], [1], **options)


def test_an_executor_without_any_active_arrow_is_undefined(planted):
    model, sae_d, sae_e, prompts = planted
    deaf = eqx.tree_at(lambda s: s.threshold, sae_e, sae_e.threshold.at[1].set(1e6))
    links = detector_executor(model, sae_d, deaf, prompts, [0], [1, 3])
    assert np.isnan(links.effect[..., 0]).all() and not np.isnan(links.effect[..., 1]).any()


def test_links_cross_several_layers_with_frozen_patterns(model, getkey):
    """Against a run in which every pattern in between is put back by hand."""
    sae_d, sae_e, prompts = make_sae(getkey(), 0), make_sae(getkey(), 2), stack_prompts([make(0)])
    tokens, roles = prompts.tokens[0], np.asarray(prompts.roles[0])
    sites = [Site("resid_pre", 0), Site("resid_pre", 2), Site("pattern", 0), Site("pattern", 1)]
    _, cache = run_with_cache(model, tokens, sites)
    f, clean = (np.asarray(sae.encode(cache[sae.site_in])) for sae in (sae_d, sae_e))
    latent = int(f[roles == Y].sum(axis=0).argmax())
    shift = f[..., latent, None] * np.asarray(sae_d.W_dec)[latent]
    seen = {}

    def tap(site, x):
        seen[site] = x
        return cache[site] if site.name == "pattern" and site.layer < 2 else x

    model.run_from(0, cache[sites[0]] - jnp.asarray(np.where((roles == Y)[..., None], shift, 0), jnp.float32), tap=tap)
    after = np.asarray(sae_e.encode(seen[sites[1]]))
    links = detector_executor(model, sae_d, sae_e, prompts, [latent], list(range(12)), mode="ablate")
    for e in range(12):
        on = (roles == A) & (clean[..., e] > 0)
        expected = (1 - np.clip(after[on][:, e] / clean[on][:, e], 0, 1)).mean() if on.any() else np.nan
        np.testing.assert_allclose(links.effect[0, 0, 0, e], expected, rtol=1e-3, atol=1e-4)
    assert np.nanmax(links.effect) > 0.01


def test_the_paper_drops_pairs_that_lose_little_at_every_arrow():
    effect = np.array([[[0.6, 0.3], [0.06, np.nan]], [[0.0, 0.0], [0.04, 0.0]]], np.float32)
    peak = np.array([[[0.9, 0.4], [0.2, 0.0]], [[0.0, 0.0], [0.05, 0.0]]], np.float32)
    np.testing.assert_allclose(display_strength(effect), [[1, 0.5], [0.55, 0]], rtol=1e-5)
    # the second task has no pair left, so it no longer counts in the mean of the lower left pair
    np.testing.assert_allclose(display_strength(effect, peak), [[1, 0.5], [0.1, 0]], rtol=1e-5)
    np.testing.assert_allclose(mean_strength(effect), [[0.3, 0.15], [0.05, 0]], rtol=1e-5)


def test_the_peak_is_the_largest_loss_at_any_arrow(planted):
    model, sae_d, sae_e, prompts = planted
    links = detector_executor(model, sae_d, sae_e, prompts, [0], [1, 3], strengths=[0.5])
    assert links.peak.shape == links.effect.shape
    assert (links.peak >= np.nan_to_num(links.effect) - 1e-6).all() and (links.peak[..., 0] > 0.01).all()
    quiet = eqx.tree_at(lambda s: s.threshold, sae_d, sae_d.threshold.at[0].set(1e6))
    assert not detector_executor(model, quiet, sae_e, prompts, [0], [1], strengths=[50.0]).peak.any()


def test_a_latent_takes_the_length_that_is_best_for_its_task(model, getkey):
    sae, here = make_sae(getkey(), 1), cut(model, stack_prompts([make(0), make(1)]), 1)
    latents, lengths = np.array([2, 7, 5]), [0.5, 3.0, 9.0]
    each = np.stack([latent_decrease(model, sae, here, latents, s).max(axis=0) for s in lengths])
    found = best_lengths(model, sae, here, latents, lengths)
    np.testing.assert_array_equal(found, np.float32(lengths)[each.argmax(axis=0)])
    np.testing.assert_allclose(
        latent_decrease(model, sae, here, latents, found).max(axis=0), each.max(axis=0), rtol=1e-4
    )


def test_the_decrease_is_that_of_steering_the_whole_prompt(model, getkey):
    sae, prompts = make_sae(getkey(), 1), stack_prompts([make(0), make(1)])
    found = latent_decrease(model, sae, cut(model, prompts, 1), np.array([2, 7]), 3.0)

    def loss(task, vector):
        tokens, rows = prompts.tokens[task], np.arange(2)
        mask = jnp.zeros(tokens.shape, bool).at[rows, prompts.query_arrow[task]].set(True)
        logp = np.asarray(jax.nn.log_softmax(steer(model, tokens, sae.site_in, vector, mask), axis=-1))
        return -np.mean([logp[rows, at - 1, np.asarray(tokens)[:, at]] for at in (9, 10)], axis=1).sum()

    for task in range(2):
        base = loss(task, jnp.zeros(16))
        for i, latent in enumerate((2, 7)):
            row = np.asarray(sae.W_dec[latent])
            expected = 1 - loss(task, jnp.asarray(3 * row / np.linalg.norm(row))) / base
            np.testing.assert_allclose(found[task, i], expected, rtol=1e-3, atol=1e-5)


def test_directions_may_differ_between_tasks(model, getkey):
    here = cut(model, stack_prompts([make(0), make(1)]), 1)
    directions = jax.random.normal(getkey(), (2, 3, 16))
    each = loss_decrease(model, here, directions)
    for task in range(2):
        np.testing.assert_allclose(each[task], loss_decrease(model, here, directions[task])[task], rtol=1e-4, atol=1e-6)


def test_the_clearest_length_stands_highest_above_the_control(model, getkey):
    best, control = np.array([[0.5, 0.8, 0.2]]), np.array([[-3.0, 0.6, 0.1]])
    assert (
        LengthSweep(2.0, np.array([1.0, 2.0, 4.0]), best, control).clearest == 1.0
    )  # harm by the control is no credit: 0.5, 0.2, 0.1
    assert (
        LengthSweep(2.0, np.array([1.0, 2.0, 4.0]), np.array([[0.2, 0.595, 0.6]]), np.zeros((1, 3))).clearest == 2.0
    )  # a plateau
    sae, here = make_sae(getkey(), 1), cut(model, stack_prompts([make(0)]), 1)
    found = length_sweep(model, sae, here, np.array([1, 2]), np.array([3, 4, 5]), (0.5, 2.0))
    norm = float(jnp.linalg.norm(here.resid[:, :, 0], axis=-1).mean())
    np.testing.assert_allclose(found.lengths, [0.5 * norm, 2 * norm], rtol=1e-5)
    np.testing.assert_allclose(
        found.best[:, 1], latent_decrease(model, sae, here, np.array([1, 2]), 2 * norm).max(axis=1), rtol=1e-4
    )


def test_a_latent_stands_out_by_size_and_against_the_control():
    control = np.tile(np.linspace(-1, 0.3, 101), (3, 1))
    assert stands_out(np.array([0.4, 0.22, 0.1]), control).tolist() == [True, False, False]
    assert stands_out(np.array([0.19, 0.2, 0.5]), control - 1).tolist() == [False, True, True]


def test_serving_one_task_or_one_group():
    latents = np.array([5, 5, 7, 9, 9])
    assert serves_one(latents, list("abcde")).tolist() == [False, False, True, False, False]
    assert serves_one(latents, ["x", "x", "x", "x", "y"]).tolist() == [True, True, True, False, False]


def test_active_latents_fire_somewhere(model, getkey):
    sae, prompts = make_sae(getkey(), 1), stack_prompts([make(0), make(1)])
    sae = eqx.tree_at(lambda s: s.threshold, sae, sae.threshold.at[3].set(1e6))
    f = [np.asarray(sae.encode(run_with_cache(model, rows, [sae.site_in])[1][sae.site_in])) for rows in prompts.tokens]
    active = active_latents(model, sae, prompts.tokens)
    assert not active[3] and active.tolist() == (np.stack(f) > 0).any(axis=(0, 1, 2)).tolist()


def test_random_latents_are_active_and_new(getkey):
    active = np.zeros(20, bool)
    active[[1, 4, 6, 9]] = True
    assert sorted(random_latents(active, 3, [4], key=getkey())) == [1, 6, 9]
    assert len(random_latents(active, 2, [4], key=getkey())) == 2
    assert sorted(random_latents(active, 50, [4], key=getkey())) == [1, 6, 9]  # no more than there are
    assert random_latents(active, 4, [1, 4, 6, 9], key=getkey()).shape == (0,)


@pytest.mark.filterwarnings("error")
def test_without_latents_nothing_is_known_and_nothing_fails(model, getkey):
    sae, here, none = make_sae(getkey(), 1), cut(model, stack_prompts([make(0), make(1)]), 1), np.zeros(0, int)
    assert latent_decrease(model, sae, here, none, 3.0).shape == (2, 0)
    found = length_sweep(model, sae, here, none, none, (0.5, 1.0))
    assert np.isnan(found.best).all() and np.isnan(found.control).all() and np.isnan(found.margin).all()
    assert found.clearest == pytest.approx(found.norm)
    alone = length_sweep(model, sae, here, np.array([1]), none, (0.5, 1.0))
    assert not np.isnan(alone.margin).any() and alone.clearest in alone.lengths
    assert not stands_out(np.array([0.9, np.nan]), np.zeros((2, 0))).any()
    assert np.isnan(percentile_of(np.zeros((2, 0)), 95)).all()


@pytest.mark.filterwarnings("error")
def test_an_executor_that_no_task_wakes_has_no_strength():
    effect = np.array([[[0.5, np.nan]], [[0.2, np.nan]]], np.float32)
    for found in (display_strength(effect), display_strength(effect, np.ones_like(effect)), mean_strength(effect)):
        assert np.isnan(found[0, 1]) and found[0, 0] > 0


@pytest.mark.filterwarnings("error")
def test_latents_that_never_fire_have_no_mean_mass(model, getkey):
    sae = make_sae(getkey(), 1)
    found = activation_mass(
        model, eqx.tree_at(lambda s: s.threshold, sae, sae.threshold + 1e6), stack_prompts([make(0), make(1)]), [3, 5]
    )
    assert np.isnan(found.mass).all() and np.isnan(found.mean).all() and not found.total.any()


def test_mass_by_other_groups(model, getkey):
    sae, prompts = make_sae(getkey(), 1), stack_prompts([make(i) for i in range(2)])
    found = activation_mass(model, sae, prompts, [4, 7], Groups.by_position(prompts))
    assert found.mass.shape == (2, 1 + prompts.tokens.shape[-1])
    np.testing.assert_allclose(found.mass.sum(axis=1), 1, rtol=1e-5)


def test_active_latents_of_the_tokens_that_count(model, getkey):
    sae, prompts = make_sae(getkey(), 1), stack_prompts([make(0), make(1)])
    f = [np.asarray(sae.encode(run_with_cache(model, rows, [sae.site_in])[1][sae.site_in])) for rows in prompts.tokens]
    expected = (np.stack(f) > 0)[np.asarray(prompts.real)].any(axis=0)
    assert active_latents(model, sae, prompts.tokens, prompts.real).tolist() == expected.tolist()
    assert not active_latents(model, sae, prompts.tokens, jnp.zeros(prompts.tokens.shape, bool)).any()


def test_prompts_longer_than_the_context_are_refused(model, getkey):
    sae, high, prompts = make_sae(getkey(), 1), make_sae(getkey(), 2), stack_prompts([make(0)])
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, n_ctx=5))
    for run in (
        lambda: activation_mass(short, sae, prompts, [0]),
        lambda: detector_executor(short, sae, high, prompts, [0], [0]),
        lambda: top_examples(short, sae, np.asarray(prompts.tokens[0]), [0], k=1),
        lambda: active_latents(short, sae, prompts.tokens),
    ):
        with pytest.raises(ValueError, match="5"):
            run()


def test_bad_requests_end_with_one_message(model, getkey):
    low, high, prompts = make_sae(getkey(), 1), make_sae(getkey(), 2), stack_prompts([make(0)])
    with pytest.raises(ValueError, match="below that of the executors"):
        detector_executor(model, high, low, prompts, [0], [0])
    with pytest.raises(ValueError, match=r"latents \[12\] do not exist"):
        detector_executor(model, low, high, prompts, [12], [0])
    with pytest.raises(ValueError, match="stack_prompts"):
        activation_mass(model, low, make(0), [0])
    with pytest.raises(ValueError, match="one latent per task"):
        activation_mass(model, low, prompts, [0, 1])
    with pytest.raises(ValueError, match="must be in 0..2"):
        detector_executor(model, low, make_sae(getkey(), 5), prompts, [0], [0])
    with pytest.raises(ValueError, match="fewer than the 10"):
        top_examples(model, low, np.zeros((3, 5), np.int32), [0])


def test_there_is_always_a_candidate():
    """The fault: with none that survived cleaning or encoded a vector, the choice of executors ended in an error."""
    some, none = np.zeros((3, 300), bool), np.zeros((3, 300), bool)
    some[:, 100:250] = True
    assert first_candidates(some, none, ~none).tolist() == list(range(100, 250))  # of the wanted kind all
    assert first_candidates(none, some, ~none).tolist() == list(range(100, 200))  # of a stand-in a hundred
    assert first_candidates(none, none, some[0]).tolist() == list(range(100, 200))
    assert first_candidates(none, none, none[0]).tolist() == list(range(100))
    assert first_candidates(none[:, :7]).tolist() == list(range(7))


def test_links_without_detectors_are_none(planted):
    """A control may find no latent to draw."""
    model, detector, executor, prompts = planted
    links = detector_executor(model, detector, executor, prompts, np.zeros(0, int), [0], strengths=(1.0, 2.0))
    assert links.effect.shape[0] == 2 and links.effect.shape[2:] == (0, 1)
