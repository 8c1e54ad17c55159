"""SAE files: round trips through every writer, the SAELens layout, and suites."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from icl_lib.models import Site, tiny_config
from icl_lib.saes import SAE, load_sae, load_suite, sae_at, save_sae, save_suite
from icl_lib.saes.formats import dictionary_learning, gemma_scope, layer_files, llama_scope, saex, sparsify

RESIDUAL = Site("resid_pre", 1)


def make(getkey, architecture="gated", site_in=RESIDUAL, site_out=None, d=16, d_sae=24, skip=False):
    def normal(*shape):
        return jax.random.normal(getkey(), shape)

    threshold = {"threshold": jnp.abs(normal(d_sae))}
    gate = {"r_mag": 0.3 * normal(d_sae), "b_mag": normal(d_sae)}
    extra = {"gated": gate, "jumprelu": threshold, "batchtopk": threshold, "topk": {"k": 5}}
    extra = extra.get(architecture, {}) | ({"W_skip": normal(d, d)} if skip else {})
    return SAE(
        W_enc=normal(d, d_sae), b_enc=normal(d_sae), W_dec=normal(d_sae, d), b_dec=normal(d), site_in=site_in,
        site_out=site_out or site_in, architecture=architecture, metadata=(("sparsity", 0.5),), **extra,
    )  # fmt: skip


def edit_config(folder, file="cfg.json", **changes):
    cfg = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({k: v for k, v in (cfg | changes).items() if v is not None}))


def transcoder(getkey, layer=1, **kwargs):
    return make(getkey, site_in=Site("mlp_in", layer), site_out=Site("mlp_out", layer), **kwargs)


def same(again, sae, x):
    """The same function at the same sites."""
    assert (again.site_in, again.site_out) == (sae.site_in, sae.site_out)
    np.testing.assert_allclose(again.encode(x), sae.encode(x), atol=2e-5)
    np.testing.assert_allclose(again(x), sae(x), atol=2e-4)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_round_trip_is_exact(architecture, getkey, tmp_path):
    sae = make(getkey, architecture)
    again = load_sae(save_sae(sae, tmp_path / "a"))
    assert jax.tree.structure(again) == jax.tree.structure(sae)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(sae), strict=True))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
def test_round_trip_of_transcoders_is_exact(architecture, skip, getkey, tmp_path):
    sae = transcoder(getkey, architecture=architecture, skip=skip)
    again = load_sae(save_sae(sae, tmp_path))
    assert jax.tree.structure(again) == jax.tree.structure(sae)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(sae), strict=True))


def test_batchtopk_comes_back_as_jumprelu(getkey, tmp_path):
    sae, x = make(getkey, "batchtopk"), jax.random.normal(getkey(), (30, 16))
    again = load_sae(save_sae(sae, tmp_path))
    assert again.architecture == "jumprelu"
    np.testing.assert_array_equal(again(x), sae(x))


@pytest.mark.parametrize("skip", [False, True])
def test_topk_transcoders_are_written_as_sparsify_does(skip, getkey, tmp_path):
    sae, x = transcoder(getkey, architecture="topk", skip=skip), jax.random.normal(getkey(), (30, 16))
    again = load_suite(save_suite({sae.site_in: sae}, tmp_path / "a"), tiny_config())[sae.site_in]
    assert (tmp_path / "a" / "mlp_in.1" / "sae.safetensors").is_file() and (again.k, again.metadata) == (
        sae.k,
        sae.metadata,
    )
    same(again, sae, x)
    half = load_sae(save_sae(sae, tmp_path / "b", "bfloat16"))
    np.testing.assert_allclose(half.W_dec, sae.W_dec, rtol=1e-2)
    np.testing.assert_array_equal(half.b_dec, sae.b_dec)


@pytest.mark.parametrize("dtype, rtol", [("float16", 2e-3), ("bfloat16", 1e-2)])
def test_half_precision_on_disk(dtype, rtol, getkey, tmp_path):
    sae = make(getkey)
    again = load_sae(save_sae(sae, tmp_path, dtype))
    assert again.W_enc.dtype == jnp.float32
    np.testing.assert_allclose(again.W_dec, sae.W_dec, rtol=rtol, atol=1e-6)
    np.testing.assert_array_equal(again.b_mag, sae.b_mag)  # biases and thresholds stay float32


def test_saelens_layout(getkey, tmp_path):
    """Keys, shapes and config as sae-lens v6 wants them, and its gated encoder computed from the file."""
    sae = make(getkey)
    save_sae(sae, tmp_path)
    cfg, w = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    assert set(w) == {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    assert cfg["architecture"] == "gated" and cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_pre"
    assert (cfg["d_in"], cfg["d_sae"], cfg["apply_b_dec_to_input"], cfg["normalize_activations"]) == (
        16,
        24,
        False,
        "none",
    )
    x = np.asarray(jax.random.normal(getkey(), (30, 16)))
    active = x @ w["W_enc"] + w["b_gate"] > 0
    f = active * np.maximum(x @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
    np.testing.assert_allclose(sae.encode(jnp.asarray(x)), f, atol=1e-5)


def test_gated_transcoder_is_saved_folded(getkey, tmp_path):
    sae = transcoder(getkey)
    again = load_sae(save_sae(sae, tmp_path))
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu_transcoder" and cfg["d_out"] == 16
    assert cfg["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert (again.site_in, again.site_out) == (sae.site_in, sae.site_out)
    x = jax.random.normal(getkey(), (30, 16))
    np.testing.assert_allclose(again(x), sae(x), atol=1e-4)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_apply_b_dec_to_input_is_folded(architecture, getkey, tmp_path):
    sae = make(getkey, architecture)
    save_sae(sae, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"apply_b_dec_to_input": True}))
    x = jax.random.normal(getkey(), (30, 16))
    np.testing.assert_allclose(load_sae(tmp_path).encode(x), sae.encode(x - sae.b_dec[None]), atol=1e-4)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk", "transcoder"])
def test_without_apply_b_dec_to_input_the_default_is_that_of_sae_lens(kind, getkey, tmp_path):
    """True, and no part of a transcoder. tests/golden has what sae-lens makes of such files (`short_...`)."""
    sae = transcoder(getkey, architecture="standard") if kind == "transcoder" else make(getkey, kind)
    edit_config(save_sae(sae, tmp_path), apply_b_dec_to_input=None)
    x = jax.random.normal(getkey(), (30, 16))
    np.testing.assert_allclose(
        load_sae(tmp_path).encode(x), sae.encode(x if sae.is_transcoder else x - sae.b_dec[None]), atol=1e-4
    )


@pytest.mark.parametrize(
    "name, site, model",
    [
        ("model.layers.3", "resid_post", "meta-llama/Llama-3.2-1B"),
        ("model.layers.3", "resid_post", "google/gemma-2-2b"),
        ("model.layers.3.mlp", "mlp_out", "google/gemma-2b"),
        ("model.layers.3.self_attn", "attn_out", "Qwen/Qwen2.5-0.5B"),
        ("gpt_neox.layers.3.attention", "attn_out", "EleutherAI/pythia-70m"),
        ("gpt_neox.layers.3", "resid_post", "EleutherAI/pythia-70m"),
    ],
)
def test_modules_of_hugging_face_as_hooks(name, site, model, getkey, tmp_path):
    edit_config(save_sae(make(getkey), tmp_path), metadata={"hook_name": name, "model_name": model})
    assert load_sae(tmp_path).site_in == load_sae(tmp_path).site_out == Site(site, 3)


def test_suite(getkey, tmp_path):
    saes = [make(getkey), make(getkey, site_in=Site("attn_out", 0)), transcoder(getkey, layer=0)]
    save_suite({s.site_in: s for s in saes}, tmp_path, "float16")
    assert (tmp_path / "attn_out.0" / "cfg.json").is_file()
    suite = load_suite(tmp_path, tiny_config())
    assert set(suite) == {s.site_in for s in saes}
    assert suite[Site("mlp_in", 0)].site_out == Site("mlp_out", 0)


def test_suite_of_another_model(getkey, tmp_path):
    save_suite({s.site_in: s for s in [make(getkey, d=12)]}, tmp_path)
    with pytest.raises(ValueError, match=r"resid_pre\.1.*hook_resid_pre.*d_in = 12.*16 wide"):
        load_suite(tmp_path, tiny_config())
    with pytest.raises(ValueError, match="layer"):
        load_suite(
            save_suite({Site("resid_pre", 7): make(getkey, site_in=Site("resid_pre", 7))}, tmp_path / "b"),
            tiny_config(),
        )


GEMMA = "google/gemma-scope-2b-pt-"


@pytest.mark.parametrize(
    "name, site_in, site_out",
    [
        (GEMMA + "res/layer_1/width_16k/average_l0_102", "resid_post", "resid_post"),
        (GEMMA + "att/layer_1/width_16k/average_l0_79", "z", "z"),
        (GEMMA + "mlp/layer_1/width_16k/average_l0_105", "mlp_out", "mlp_out"),
        (GEMMA + "transcoders/layer_1/width_16k/average_l0_65", "mlp_normalized", "mlp_out"),
        (GEMMA + "res/embedding/width_4k/average_l0_44", "embed", "embed"),
    ],
)
def test_gemma_scope(name, site_in, site_out, getkey, tmp_path):
    sites = [Site(site, None if site == "embed" else 1) for site in (site_in, site_out)]
    sae, x = make(getkey, "jumprelu", *sites), jax.random.normal(getkey(), (30, 16))
    gemma_scope.write(sae, tmp_path / name)
    same(load_sae(tmp_path / name), sae, x)
    same(load_sae(tmp_path / name.rpartition("/")[0] / "canonical"), sae, x) if site_in != "embed" else None


def test_canonical_ids():
    """Spot checks against the registry of SAELens; a width without one of its own takes the nearest to 100."""
    wanted = {
        "2b-pt-res/layer_20/width_16k": 71, "2b-pt-res/layer_12/width_1m": 107, "2b-pt-res/layer_12/width_131k": 129,
        "2b-pt-att/layer_25/width_65k": 63, "2b-pt-mlp/layer_0/width_16k": 119,
        "2b-pt-transcoders/layer_11/width_16k": 5,
        "9b-pt-res/layer_20/width_65k": 55, "9b-pt-att/layer_41/width_131k": 92, "9b-it-res/layer_31/width_16k": 76,
        "27b-pt-res/layer_22/width_131k": 82, "9b-pt-res/embedding/width_4k": 80,
    }  # fmt: skip
    for name, l0 in wanted.items():
        assert (
            gemma_scope.resolve(f"google/gemma-scope-{name}/canonical") == f"google/gemma-scope-{name}/average_l0_{l0}"
        )
    table = gemma_scope.table()
    assert sum(bool(canonical) for canonical, _ in table.values()) == 455
    assert all(int(c) in l0s and all(abs(int(c) - 100) <= abs(n - 100) for n in l0s) for c, l0s in table.values() if c)


@pytest.mark.parametrize(
    "mean_norm, name", [(9.0, "it-l1-residual-test-run-1-2.00E-05"), (None, "l1-test-run-3-4e-05")]
)
def test_saex(mean_norm, name, getkey, tmp_path):
    sae, x = make(getkey, "gated"), jax.random.normal(getkey(), (30, 16))
    same(load_sae(saex.write(sae, tmp_path / name, mean_norm)), sae, x)
    same(
        load_sae(tmp_path / "it-l1-residual-test-run-*") if mean_norm else load_sae(tmp_path / "l1-test-run-3-*"),
        sae,
        x,
    )


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "batchtopk"])
def test_dictionary_learning(architecture, getkey, tmp_path):
    sae, x = make(getkey, architecture, Site("mlp_out", 1)), jax.random.normal(getkey(), (30, 16))
    again = load_sae(dictionary_learning.write(sae, tmp_path / "trainer_0"))
    assert again.architecture == {"batchtopk": "jumprelu"}.get(architecture, architecture)
    same(again, sae, x)
    (tmp_path / "trainer_0/checkpoints").mkdir()
    (tmp_path / "trainer_0/ae.pt").rename(tmp_path / "trainer_0/checkpoints/ae_500.pt")
    same(load_sae(tmp_path / "trainer_0/checkpoints/ae_500.pt"), sae, x)


def test_sparsify(getkey, tmp_path):
    x = jax.random.normal(getkey(), (30, 16))
    sae, skip = make(getkey, "topk", Site("resid_post", 1)), transcoder(getkey, architecture="topk", skip=True)
    same(load_sae(sparsify.write(sae, tmp_path / "layers.1")), sae, x)
    same(load_sae(sparsify.write(skip, tmp_path / "layers.1.mlp")), skip, x)


def test_llama_scope_and_layer_files(getkey, tmp_path):
    x = jax.random.normal(getkey(), (30, 16))
    sae = make(getkey, "standard", Site("resid_post", 1))
    same(load_sae(llama_scope.write(sae, tmp_path / "L1R", threshold=0.0, mean_norm=3.0)), sae, x)
    sae = transcoder(getkey, architecture="standard", skip=True)
    same(load_sae(layer_files.write(sae, tmp_path)), sae, x)


def test_site_can_be_given(getkey, tmp_path):
    sae = make(getkey, "jumprelu")
    gemma_scope.write(sae, tmp_path)
    with pytest.raises(ValueError, match="where the SAE sits: pass site="):
        load_sae(tmp_path)
    assert load_sae(tmp_path, site=Site("z", 4)).site_out == Site("z", 4)
    assert load_sae(tmp_path, site=(Site("mlp_in", 4), Site("mlp_out", 4))).is_transcoder


def test_suite_from_patterns(getkey, tmp_path):
    """Gemma Scope's residual of block 0 is "resid_pre" of block 1; the last block has no next."""
    config, name = tiny_config(), str(tmp_path / GEMMA) + "res/layer_{layer}/width_16k/canonical"
    l0s = {0: 105, 1: 102}
    for layer, l0 in l0s.items():
        folder = name.replace("{layer}", str(layer)).replace("canonical", f"average_l0_{l0}")
        gemma_scope.write(make(getkey, "jumprelu", Site("resid_post", layer)), folder)
    for layer in (0, 1):
        saex.write(
            make(getkey, "gated", Site("attn_out", layer)),
            tmp_path / f"nev/it-l{layer}-attn_out-test-run-1-2.00E-05",
            9.0,
        )
    attention = str(tmp_path / "nev/it-l{layer}-attn_out-test-run-1-*")
    assert list(load_suite(name, config)) == [Site("resid_post", 1), Site("resid_pre", 1)]
    assert list(load_suite(name, layers=[0])) == [Site("resid_post", 0)]
    assert list(load_suite([name, attention], config, layers=[0])) == [Site("attn_out", 0), Site("resid_pre", 1)]
    some = attention.replace("{layer}", "{layer:1-5}")  # where the first block has none
    assert list(load_suite([name, some], config, layers=[0, 1])) == [
        Site("attn_out", 1),
        Site("resid_post", 1),
        Site("resid_pre", 1),
    ]
    assert list(load_suite(some, config)) == [Site("attn_out", 1)]
    for bad in ("{layer:1}", "{layer:5-1}", "{layer1-5}"):
        with pytest.raises(ValueError, match=r"layers are written {layer}, or {layer:0-16}"):
            load_suite(attention.replace("{layer}", bad), config)
    assert list(load_suite(tmp_path, config)) == [
        Site("attn_out", 0),
        Site("attn_out", 1),
        Site("resid_post", 1),
        Site("resid_pre", 1),
    ]
    assert list(load_suite(tmp_path, config, layers=[0])) == [Site("attn_out", 0)]
    assert list(load_suite([name, tmp_path / "nev"], config, layers=[0])) == [Site("attn_out", 0), Site("resid_pre", 1)]
    with pytest.raises(FileNotFoundError, match="no SAE in layers"):
        load_suite(tmp_path, config, layers=[5])
    with pytest.raises(ValueError, match="say which with layers"):
        load_suite(name)
    with pytest.raises(ValueError, match="so does another SAE"):
        load_suite([name, name], config)


def test_width_of_z(getkey, tmp_path):
    """Attention SAEs are as wide as all heads, which need not be d_model."""
    config = tiny_config(n_heads=3)
    sae = make(getkey, "jumprelu", Site("z", 1), d=config.width("z"))
    assert list(load_suite(save_suite({sae.site_in: sae}, tmp_path / "a"), config)) == [Site("z", 1)]
    with pytest.raises(ValueError, match=r"z\.1 at blocks.1.attn.hook_z has d_in = 16"):
        load_suite(save_suite({Site("z", 1): make(getkey, "jumprelu", Site("z", 1))}, tmp_path / "b"), config)


def test_scale_that_an_old_file_does_not_carry(getkey, tmp_path):
    """One published SAE wants the average norm of its inputs, which only the registry of sae-lens knows."""
    sae, x = make(getkey, "standard"), jax.random.normal(getkey(), (30, 16))
    folder = save_sae(sae, tmp_path / "gemma_2b_blocks.12.hook_resid_post_16384")
    cfg = json.loads((folder / "cfg.json").read_text()) | {"normalize_activations": "expected_average_only_in"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    np.testing.assert_allclose(load_sae(folder)(x), sae(x * 0.21381938399317255) / 0.21381938399317255, atol=1e-3)


def test_sites_and_layers_of_a_suite_as_texts_and_a_number(getkey, tmp_path):
    sites = [Site("resid_pre", 0), Site("resid_pre", 1), Site("attn_out", 1)]
    save_suite({str(site): make(getkey, site_in=site) for site in sites}, tmp_path)
    kept = lambda **which: set(load_suite(tmp_path, **which))
    assert kept(layers=1) == set(sites[1:]) and kept(sites="resid_pre") == set(sites[:2])
    assert kept(sites=["resid_pre.1", "blocks.1.hook_attn_out"]) == set(sites[1:]) == kept(sites=sites[1:])
    with pytest.raises(ValueError, match="did you mean 'resid_pre'"):
        load_suite(tmp_path, sites=["resid_prr"])
    assert load_sae(tmp_path / "resid_pre.0", site="resid_pre.1").site_in == sites[1]


def test_an_sae_that_a_suite_lacks_is_named_with_those_it_has(getkey):
    sae = make(getkey)
    site = Site("resid_pre", 1)
    assert sae_at({site: sae}, site) is sae
    with pytest.raises(
        ValueError, match=r"no SAE at blocks.2.hook_resid_pre, the suite has blocks.1.hook_resid_pre: add"
    ):
        sae_at({site: sae}, Site("resid_pre", 2))
