"""Names of sites, and what taps may do at them."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import icl_lib.models
from icl_lib.models import Site, Transformer, compose, perturb, record, replace, run_with_cache, tiny_config
from icl_lib.models.sites import GLOBAL_SITES, LAYER_SITES, as_layers, as_site
from icl_lib.vectors import steer

ALL_SITES = [Site(name, layer) for name in LAYER_SITES for layer in (0, 7, 123)] + [Site(name) for name in GLOBAL_SITES]
# What a reader of TransformerLens expects, written out by hand.
HOOK_NAMES = {
    Site("resid_pre", 3): "blocks.3.hook_resid_pre", Site("resid_mid", 0): "blocks.0.hook_resid_mid",
    Site("resid_post", 25): "blocks.25.hook_resid_post", Site("attn_out", 1): "blocks.1.hook_attn_out",
    Site("mlp_out", 1): "blocks.1.hook_mlp_out", Site("q", 2): "blocks.2.attn.hook_q",
    Site("k", 2): "blocks.2.attn.hook_k",
    Site("v", 2): "blocks.2.attn.hook_v", Site("z", 2): "blocks.2.attn.hook_z",
    Site("pattern", 2): "blocks.2.attn.hook_pattern", Site("rot_q", 2): "blocks.2.attn.hook_rot_q",
    Site("rot_k", 2): "blocks.2.attn.hook_rot_k", Site("embed"): "hook_embed",
    Site("final_norm"): "ln_final.hook_normalized", Site("mlp_normalized", 4): "blocks.4.ln2.hook_normalized",
}  # fmt: skip


@pytest.fixture
def model(getkey):
    return Transformer.init(tiny_config(), key=getkey())


@pytest.fixture
def tokens(getkey):
    return jax.random.randint(getkey(), (2, 6), 0, 40)


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
def test_parse_is_the_inverse_of_str(site):
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(("site", "name"), HOOK_NAMES.items(), ids=str)
def test_names_are_those_of_transformer_lens(site, name):
    assert str(site) == name


def test_sites_are_keys_that_sort_by_layer():
    assert len(set(map(str, ALL_SITES))) == len(set(ALL_SITES)) == len(ALL_SITES)
    assert sorted([Site("resid_pre", 10), Site("resid_pre", 9)]) == [Site("resid_pre", 9), Site("resid_pre", 10)]
    assert jax.tree.leaves({Site("resid_pre", 10): 1, Site("resid_pre", 9): 2, Site("embed"): 3}) == [3, 2, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Site("resid_prr", 1),
            r"unknown site 'resid_prr'; did you mean 'resid_pre'\? Sites are resid_pre, .*logits",
        ),
        (lambda: Site("mpl_out", 1), r"did you mean 'mlp_out'"),
        (lambda: Site("xyz", 1), r"unknown site 'xyz'\. Sites are resid_pre"),
        (lambda: Site("resid_pre"), r"site 'resid_pre' needs a layer, got None"),
        (lambda: Site("logits", 2), r"site 'logits' takes no layer, got 2"),
        (
            lambda: Site.parse("blocks.3.hook_resid_prr"),
            r"'blocks.3.hook_resid_prr' names no site; examples are blocks",
        ),
        (lambda: Site.parse("blocks.x.hook_resid_pre"), "names no site"),
        (lambda: Site.parse("blocks.-1.hook_resid_pre"), "names no site"),
        (lambda: Site.parse("blocks.3.resid_pre"), "names no site"),
        (lambda: Site.parse(""), "names no site"),
        (lambda: Site.parse("hook_resid_pre"), "needs a layer"),
        (lambda: Site.parse("blocks.3.hook_embed"), "takes no layer, got 3"),
    ],
)
def test_a_wrong_name_is_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tap_sees_every_site_once_in_order_of_computation(model, tokens):
    seen = []
    model(tokens, tap=lambda site, x: (seen.append((site, x.shape)), x)[1])
    order = "resid_pre attn_in q k v rot_q rot_k pattern z attn_out resid_mid".split()
    order += "mlp_normalized mlp_in mlp_out resid_post".split()
    assert [site for site, _ in seen] == [
        Site("embed"), *(Site(name, layer) for layer in range(2) for name in order), Site("final_norm"), Site("logits"),
    ]  # fmt: skip
    shapes = dict(seen)
    assert shapes[Site("q", 1)] == shapes[Site("rot_q", 1)] == (2, 6, 2, 8)
    assert shapes[Site("z", 1)] == (2, 6, 16)
    assert shapes[Site("k", 1)] == shapes[Site("rot_k", 1)] == shapes[Site("v", 1)] == (2, 6, 1, 8)
    assert shapes[Site("pattern", 1)] == (2, 2, 6, 6)
    assert shapes[Site("resid_post", 1)] == shapes[Site("mlp_in", 0)] == shapes[Site("embed")] == (2, 6, 16)
    assert shapes[Site("logits")] == (2, 6, 40)


def test_a_tap_that_changes_nothing_changes_nothing(model, tokens):
    np.testing.assert_array_equal(model(tokens, tap=lambda site, x: x), model(tokens))
    np.testing.assert_array_equal(model(tokens, tap=perturb({})), model(tokens))


def test_run_from_shows_only_the_sites_after_its_input(model):
    seen = []
    model.run_from(1, jnp.ones((1, 3, 16)), tap=lambda site, x: (seen.append(site), x)[1])
    assert seen == [*(Site(name, 1) for name in LAYER_SITES), Site("final_norm"), Site("logits")]


def test_the_residual_adds_up(model, tokens):
    _, c = run_with_cache(model, tokens, [Site(n, i) for i in range(2) for n in LAYER_SITES] + [Site("embed")])
    total = c[Site("embed")] + sum(c[Site(name, i)] for i in range(2) for name in ("attn_out", "mlp_out"))
    np.testing.assert_allclose(total, c[Site("resid_post", 1)], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(c[Site("resid_post", 0)], c[Site("resid_pre", 1)])
    np.testing.assert_array_equal(c[Site("resid_pre", 0)] + c[Site("attn_out", 0)], c[Site("resid_mid", 0)])


def test_run_with_cache_gives_what_a_recording_tap_sees(model, tokens):
    cache = {}
    expected = model(tokens, tap=record([Site("z", 1), Site("logits")], cache))
    logits, ours = run_with_cache(model, tokens, iter([Site("z", 1), Site("logits")]))
    assert set(ours) == set(cache) == {Site("z", 1), Site("logits")}
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours[Site("logits")], logits)
    np.testing.assert_allclose(ours[Site("z", 1)], cache[Site("z", 1)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [2, -1])
def test_run_with_cache_refuses_a_layer_that_is_not_there(model, tokens, layer):
    with pytest.raises(ValueError, match=rf"layer of site blocks.{layer}.hook_resid_pre must be in 0..1 .*got {layer}"):
        run_with_cache(model, tokens, [Site("resid_pre", 0), Site("resid_pre", layer)])


def test_replacing_freezes_what_comes_after(model, tokens, getkey):
    """With patterns and MLP outputs of a clean run put in, the run no longer depends on queries and keys."""
    frozen = [Site("pattern", i) for i in range(2)]
    logits, cache = run_with_cache(model, tokens, frozen)
    noise = {Site("rot_q", i): jax.random.normal(getkey(), (2, 6, 2, 8)) for i in range(2)}
    assert not np.allclose(model(tokens, tap=perturb(noise)), logits, atol=1e-3)
    np.testing.assert_allclose(model(tokens, tap=compose(perturb(noise), replace(cache))), logits, rtol=0, atol=1e-5)


def test_compose_goes_from_left_to_right(model, tokens):
    site, seen = Site("mlp_out", 0), {}
    zero, one = replace({site: jnp.zeros((2, 6, 16))}), perturb({site: jnp.ones((2, 6, 16))})
    model(tokens, tap=compose(zero, one, record([site], seen)))
    assert (seen[site] == 1).all()
    model(tokens, tap=compose(one, zero, record([site], seen)))
    assert (seen[site] == 0).all()


def test_a_perturbation_takes_the_dtype_of_the_site(model, tokens):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model)
    seen, site = {}, Site("resid_mid", 1)
    half(tokens, tap=compose(perturb({site: jnp.ones((2, 6, 16))}), record([site], seen)))
    assert seen[site].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("returned", "message"), [(lambda x: x[0], r"shape: \(2, 6, 16\) at blocks.0.hook_attn_out, got shape \(6, 16\)"),
                              (lambda x: None, "at blocks.0.hook_attn_out, got NoneType")],
)  # fmt: skip
def test_a_tap_that_loses_the_shape_is_named(model, tokens, returned, message):
    with pytest.raises(ValueError, match=message):
        model(tokens, tap=lambda site, x: returned(x) if site == Site("attn_out", 0) else x)


def test_the_example_of_a_tap_runs():
    names = {"jax": jax, "jnp": jnp} | vars(icl_lib.models)
    (example,) = doctest.DocTestFinder().find(Transformer.__call__, "__call__", globs=names)
    assert len(example.examples) >= 6 and doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
def test_a_site_may_be_a_text(site):
    short = site.name if site.layer is None else f"{site.name}.{site.layer}"
    assert as_site(short) == as_site(str(site)) == as_site(site) == site


@pytest.mark.parametrize(
    ("text", "message"),
    [("resid_prr.3", "did you mean 'resid_pre'"), ("resid_pre", "needs a layer"), ("embed.2", "takes no layer"),
     ("blocks.3.hook_resid_prr", "names no site"), ("", "unknown site"), ("resid_pre.-1", "unknown site"),
    ],
)  # fmt: skip
def test_a_text_of_no_site_is_explained(text, message):
    with pytest.raises(ValueError, match=message):
        as_site(text)


def test_texts_of_sites_at_the_entry_points(model, tokens, getkey):
    four = ["resid_pre.1", "blocks.1.hook_mlp_out", Site("embed"), "resid_pre.1"]
    logits, cache = run_with_cache(model, tokens, four)
    assert set(cache) == {Site("resid_pre", 1), Site("mlp_out", 1), Site("embed")}
    assert set(run_with_cache(model, tokens, "resid_pre.1")[1]) == {Site("resid_pre", 1)}
    with pytest.raises(ValueError, match="layer of site .* must be in 0..1"):
        run_with_cache(model, tokens, "resid_pre.7")
    vector = jax.random.normal(getkey(), (16,))
    shift = jnp.broadcast_to(vector, (2, 6, 16))
    steered = steer(model, tokens, "resid_pre.1", vector, jnp.ones((2, 6), bool))
    np.testing.assert_allclose(model(tokens, tap=perturb({"resid_pre.1": shift})), steered, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        model(tokens, tap=replace({"blocks.1.hook_resid_pre": cache[Site("resid_pre", 1)] + shift})),
        steered, rtol=0, atol=1e-5,
    )  # fmt: skip


def test_one_layer_is_layers_too():
    assert as_layers(4) == as_layers([4]) == (4,)
    assert as_layers(range(2)) == as_layers(i for i in (0, 1)) == (0, 1)
