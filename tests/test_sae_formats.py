"""SAE files: round trips, the SAELens layout as sae-lens reads it, and every kind of bad file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from icl_lib.models import Site, tiny_config
from icl_lib.saes import SAE, load_sae, load_suite, save_sae, save_suite

RESIDUAL = Site("resid_pre", 1)


def make(getkey, architecture="gated", site_in=RESIDUAL, site_out=None, d=16, d_sae=24):
    def normal(*shape):
        return jax.random.normal(getkey(), shape)

    extra = {"gated": {"r_mag": 0.3 * normal(d_sae), "b_mag": normal(d_sae)}, "jumprelu": {"threshold": jnp.abs(normal(d_sae))}}
    return SAE(
        W_enc=normal(d, d_sae), b_enc=normal(d_sae), W_dec=normal(d_sae, d), b_dec=normal(d), site_in=site_in,
        site_out=site_out or site_in, architecture=architecture, metadata=(("sparsity", 0.5),), **extra.get(architecture, {}),
    )  # fmt: skip


def transcoder(getkey, layer=1, **kwargs):
    return make(getkey, site_in=Site("mlp_in", layer), site_out=Site("mlp_out", layer), **kwargs)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_round_trip_is_exact(architecture, getkey, tmp_path):
    sae = make(getkey, architecture)
    again = load_sae(save_sae(sae, tmp_path / "a"))
    assert jax.tree.structure(again) == jax.tree.structure(sae)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(sae), strict=True))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


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
    assert (cfg["d_in"], cfg["d_sae"], cfg["apply_b_dec_to_input"], cfg["normalize_activations"]) == (16, 24, False, "none")
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


def test_suite(getkey, tmp_path):
    saes = [make(getkey), make(getkey, site_in=Site("attn_out", 0)), transcoder(getkey, layer=0)]
    save_suite({s.site_in: s for s in saes}, tmp_path, "float16")
    assert (tmp_path / "attn_out.0" / "cfg.json").is_file()
    suite = load_suite(tmp_path, tiny_config())
    assert set(suite) == {s.site_in for s in saes}
    assert suite[Site("mlp_in", 0)].site_out == Site("mlp_out", 0)


def test_suite_of_another_model(getkey, tmp_path):
    save_suite({s.site_in: s for s in [make(getkey, d=12)]}, tmp_path)
    with pytest.raises(ValueError, match=r"resid_pre\.1.*hook_resid_pre.*d_in = 12.*d_model = 16"):
        load_suite(tmp_path, tiny_config())
    with pytest.raises(ValueError, match="layer"):
        load_suite(save_suite({Site("resid_pre", 7): make(getkey, site_in=Site("resid_pre", 7))}, tmp_path / "b"), tiny_config())


def edit_weights(folder, **changes):
    w = load_file(folder / "sae_weights.safetensors")
    save_file({k: v for k, v in (w | changes).items() if v is not None}, folder / "sae_weights.safetensors")


def edit_config(folder, **changes):
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in (cfg | changes).items() if v is not None}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: edit_weights(p, r_mag=None), "missing r_mag"),
        (lambda p: edit_weights(p, scaling=np.ones(24, np.float32)), "unknown scaling"),
        (lambda p: edit_weights(p, W_dec=np.ones((16, 24), np.float32)), r"W_dec has shape \(16, 24\), expected \(24, 16\)"),
        (lambda p: edit_weights(p, b_mag=np.full(24, np.nan, np.float32)), "b_mag has values that are not finite"),
        (lambda p: cut(p / "sae_weights.safetensors"), "cut short"),
        (lambda p: cut(p / "cfg.json"), "cut short"),
        (lambda p: edit_config(p, architecture="temporal"), "architecture 'temporal'"),
        (lambda p: edit_config(p, normalize_activations="layer_norm"), "normalize_activations"),
        (lambda p: edit_config(p, metadata=None), "lacks metadata"),
        (lambda p: edit_config(p, metadata={"hook_name": "blocks.1.hook_nothing"}), "must name a site"),
    ],
)
def test_bad_files(damage, message, getkey, tmp_path):
    save_sae(make(getkey), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_and_unstorable(getkey, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_sae(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="save_suite"):
        load_suite(tmp_path)
    save_sae(make(getkey), tmp_path / "a")
    (tmp_path / "a" / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="sae_weights.safetensors"):
        load_sae(tmp_path / "a")
    big = make(getkey)
    big = SAE(**{k: v for k, v in vars(big).items() if k != "W_enc"}, W_enc=big.W_enc * 1e6)
    with pytest.raises(ValueError, match="W_enc has values that are not finite"):
        save_sae(big, tmp_path / "b", "float16")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="dtype must be one of"):
        save_sae(big, tmp_path / "b", "int8")
