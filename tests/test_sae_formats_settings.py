"""Settings beside weights are honoured or refused in every format, and a site is taken only where it is the same
tensor.
"""

import json

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from icl_lib.models import Site, tiny_config
from icl_lib.saes import check_fit, load_sae, load_suite, save_sae, save_suite
from icl_lib.saes.formats import dictionary_learning, gemma_scope, layer_files, llama_scope, saex, sparsify
from tests.test_sae_formats import GEMMA, edit_config, make, same, transcoder


def beside(folder, file="config.yaml", **settings):
    (folder / file).write_text(yaml.safe_dump(settings) if file.endswith("yaml") else json.dumps(settings))


def test_the_layer_file_of_a_topk_transcoder(getkey, tmp_path):
    """The fault: it was read as a ReLU at mlp_in, whatever the config said."""
    sae, x = transcoder(getkey, architecture="standard"), jax.random.normal(getkey(), (40, 16))
    file = layer_files.write(sae, tmp_path)
    beside(tmp_path, activation="topk", k=2, feature_input_hook="hook_resid_mid", feature_output_hook="hook_mlp_out")
    again = load_sae(file)
    assert (again.architecture, again.k) == ("topk", 2)
    assert (again.site_in, again.site_out) == (Site("resid_mid", 1), Site("mlp_out", 1))
    f, two = np.asarray(again.encode(x)), np.asarray(sae.pre(x))
    assert ((f > 0).sum(axis=1) <= 2).all()
    np.testing.assert_allclose(f, np.where(two >= np.sort(two, axis=1)[:, -2:-1], np.maximum(two, 0), 0), atol=1e-5)
    assert list(load_suite(tmp_path, tiny_config())) == [Site("resid_mid", 1)]


def test_layer_files_with_thresholds_k_and_other_configs(getkey, tmp_path):
    sae, x = transcoder(getkey, architecture="standard"), jax.random.normal(getkey(), (40, 16))
    file = layer_files.write(sae, tmp_path)
    plain, theta = load_file(file), np.linspace(0, 1, 24, dtype=np.float32)
    save_file(plain | {"activation_function.threshold": theta}, file)
    f = np.asarray(sae.pre(x))
    np.testing.assert_allclose(load_sae(file).encode(x), np.where(f > theta, f, 0), atol=1e-5)
    save_file(plain | {"k": np.array(3)}, file)
    assert load_sae(file).k == 3
    save_file(plain, file)
    for name in ("config.json", "config.yaml"):
        beside(
            tmp_path, name, activation="relu", feature_input_hook="ln2.hook_normalized", note="unknown keys are fine"
        )
        assert load_sae(file).site_in == Site("mlp_normalized", 1)
        (tmp_path / name).unlink()
    beside(tmp_path, feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out")
    assert dict(load_sae(file).metadata)["module"] == "layers.1.mlp"
    check_fit(load_sae(file), tiny_config(), "it")
    with pytest.raises(ValueError, match="it at .*layers.1.mlp returns what lies before a second norm in gemma2"):
        check_fit(load_sae(file), tiny_config("gemma2"), "it")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"activation": "groupmax"}, "activation 'groupmax'; we read relu"),
        ({"activation": "jump_relu"}, "activation 'jump_relu'; we read relu"),
        ({"activation": "topk"}, "activation topk with k missing"),
        ({"act_fn": "gelu"}, "act_fn 'gelu'"),
        ({"activation": "topk", "k": 2, "top_k": 3}, r"k \[2, 3\]"),
        ({"model_kind": "cross_layer_transcoder"}, "model_kind 'cross_layer_transcoder'; we read transcoder_set"),
        ({"skip_connection": True}, "skip_connection True; we read"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"feature_input_hook": "hook_nothing"}, "must name a site"),
        ({"feature_output_hook": "hook_mlp_out"}, "but not what they read"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input True; we read none"),
    ],
)
def test_settings_of_layer_files_that_are_refused(settings, message, getkey, tmp_path):
    file = layer_files.write(transcoder(getkey, architecture="standard"), tmp_path)
    beside(tmp_path, **settings)
    with pytest.raises(ValueError, match=message) as caught:
        load_sae(file)
    assert str(tmp_path / "config.yaml") in str(caught.value)


def write(kind, getkey, folder):
    """An SAE of a format, and the file that has its settings."""
    if kind == "saelens":
        return save_sae(make(getkey, "standard"), folder), "cfg.json"
    if kind == "sparsify":
        return sparsify.write(make(getkey, "topk", Site("resid_post", 1)), folder / "layers.1"), "cfg.json"
    if kind == "llama_scope":
        return llama_scope.write(make(getkey, "standard"), folder, threshold=0.0), "hyperparams.json"
    if kind == "saex":
        return saex.write(make(getkey, "gated"), folder / "it-l1-residual-test-run-1-2.00E-05", 9.0), "cfg.json"
    if kind == "gemma_scope":
        folder = gemma_scope.write(make(getkey, "jumprelu"), folder / (GEMMA + "res/layer_1/width_16k/average_l0_102"))
        (folder / "cfg.json").write_text("{}")
        return folder, "cfg.json"
    folder = dictionary_learning.write(make(getkey, "topk"), folder)
    return folder, "config.json"


@pytest.mark.parametrize(
    "kind, key, value",
    [
        ("saelens", "reshape_activations", "other"),
        ("saelens", "rescale_acts_by_decoder_norm", True),
        ("saelens", "activation_fn", "topk"),
        ("saelens", "activation_fn_str", "gelu"),
        ("sparsify", "activation", "groupmax"),
        ("sparsify", "signed", True),
        ("sparsify", "embed_skip", True),
        ("sparsify", "gram_lookup", True),
        ("sparsify", "normalize_activations", "layer_norm"),
        ("llama_scope", "use_glu_encoder", True),
        ("llama_scope", "use_decoder_bias", False),
        ("llama_scope", "sae_type", "crosscoder"),
        ("llama_scope", "apply_decoder_bias_to_pre_encoder", True),
        ("saex", "normalize_activations", "layer_norm"),
        ("saex", "activation", "topk"),
        ("gemma_scope", "activation_fn", "topk"),
        ("gemma_scope", "architecture", "gated"),
        ("gemma_scope", "normalize_activations", "expected_average_only_in"),
        ("gemma_scope", "apply_b_dec_to_input", True),
        ("dictionary_learning", "activation", "gelu"),
        ("dictionary_learning", "normalize_activations", True),
    ],
)
def test_settings_that_change_the_function_are_refused(kind, key, value, getkey, tmp_path):
    """By file, key and value; the same key with a harmless value, and keys that nobody knows, are read over."""
    folder, file = write(kind, getkey, tmp_path)

    def put(**changes):
        if kind == "dictionary_learning":
            changes = {"trainer": json.loads((folder / file).read_text())["trainer"] | changes}
        edit_config(folder, file, **changes)

    put(seed=3, wandb_project="x")
    load_sae(folder)
    put(**{key: value})
    with pytest.raises(ValueError, match=f"{key} '?{value}'?; we read") as caught:
        load_sae(folder)
    assert str(folder / file) in str(caught.value)


def test_settings_that_are_honoured(getkey, tmp_path):
    """The hook beside an npz; io of dictionary_learning's buffer; thresholds that Llama Scope compares with norms."""
    folder, _ = write("gemma_scope", getkey, tmp_path / "a")
    beside(folder, "cfg.json", hook_name="blocks.3.hook_mlp_out")
    assert load_sae(folder).site_in == Site("mlp_out", 3)
    folder = dictionary_learning.write(make(getkey, "standard", Site("mlp_out", 1)), tmp_path / "b")
    edit_config(folder, "config.json", buffer={"io": "in"})
    assert load_sae(folder).site_in == Site("mlp_in", 1)
    edit_config(folder, "config.json", buffer={"io": "in_and_out"})
    with pytest.raises(ValueError, match="io 'in_and_out'"):
        load_sae(folder)
    sae, x = make(getkey, "jumprelu"), jax.random.normal(getkey(), (40, 16))
    sae = jax.tree.map(lambda leaf: leaf * 0 + 0.7 if leaf is sae.threshold else leaf, sae)
    folder = llama_scope.write(sae, tmp_path / "c", threshold=0.7)
    same(load_sae(folder), sae, x)
    edit_config(folder, "hyperparams.json", sparsity_include_decoder_norm=True)
    f = np.asarray(sae.pre(x))
    got = np.asarray(load_sae(folder).encode(x))
    theta = 0.7 / np.linalg.norm(
        np.asarray(load_file(folder / "checkpoints/final.safetensors")["decoder.weight"]), axis=0
    )
    np.testing.assert_allclose(got, np.where(f > theta, f, 0), atol=1e-4)


def test_two_sources_that_disagree(getkey, tmp_path):
    folder = dictionary_learning.write(make(getkey, "topk"), tmp_path / "a")
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    for change, message in ({"k": 7}, "has k 7, and .*ae.pt has 5"), ({"layer": 4}, "layer 4, but its submodule_name"):
        edit_config(folder, "config.json", trainer=trainer | change)
        with pytest.raises(ValueError, match=message):
            load_sae(folder)
    file = layer_files.write(transcoder(getkey, architecture="standard"), tmp_path / "b")
    beside(file.parent, activation="topk", k=2)
    beside(file.parent, "config.json", activation="relu")
    with pytest.raises(ValueError, match="has activation = 'topk', and another file beside it 'relu'"):
        load_sae(file)


FITS = {
    "layers.1": ("gemma", "gemma2", "llama", "qwen2", "phi3", "gpt_neox"),
    "model.layers.1": ("gemma", "gemma2", "llama", "qwen2", "phi3"),
    "gpt_neox.layers.1": ("gpt_neox",),
    "layers.1.mlp": ("gemma", "llama", "qwen2", "phi3", "gpt_neox"),
    "layers.1.self_attn": ("gemma", "llama", "qwen2", "phi3"),
    "layers.1.attention": ("gpt_neox",),
    "gpt_neox.layers.1.attention": ("gpt_neox",),
    "embed_tokens": ("llama", "qwen2", "phi3"),
    "embed_in": ("gpt_neox",),
    "attn_out_layer1": ("gemma", "llama", "qwen2", "phi3", "gpt_neox"),
    "mlp_out_layer1": ("gemma", "llama", "qwen2", "phi3", "gpt_neox"),
    "resid_out_layer1": ("gemma", "gemma2", "llama", "qwen2", "phi3", "gpt_neox"),
    "embed": ("llama", "qwen2", "phi3", "gpt_neox"),
}


@pytest.mark.parametrize("module", FITS)
def test_a_module_is_taken_only_where_it_is_our_site(module, getkey, tmp_path):
    """In sparsify's folder names and SAELens' hooks alike, also when what was read is saved and read again."""
    folder = sparsify.write(make(getkey, "topk", Site("resid_post", 1)), tmp_path / module)
    edit_config(folder, site_in=None, site_out=None)
    copy = save_suite({Site("resid_post", 1): load_sae(folder)}, tmp_path / "copy")
    hooked = save_sae(make(getkey, "standard"), tmp_path / "hooked")
    edit_config(hooked, metadata={"hook_name": module})
    for family in ("gemma", "gemma2", "llama", "qwen2", "phi3", "gpt_neox"):
        for path in (folder, copy, hooked):
            if family in FITS[module]:
                load_suite(path, tiny_config(family))
            else:
                with pytest.raises(ValueError, match=f"does not fit this model: {module} .*{family}"):
                    load_suite(path, tiny_config(family))


@pytest.mark.parametrize(
    "name", ["transformer.h.1", "h.1.mlp", "layers.1.attn", "layers.1.mlp.act", "ln_final.hook_normalized"]
)
def test_modules_of_no_family_of_ours(name, getkey, tmp_path):
    folder = save_sae(make(getkey, "standard"), tmp_path / "a")
    edit_config(folder, metadata={"hook_name": name})
    with pytest.raises(ValueError, match="must name a site|before the gain"):
        load_sae(folder)
    folder = dictionary_learning.write(make(getkey, "standard"), tmp_path / "resid_out_layer1")
    edit_config(folder, "config.json", trainer={"dict_class": "AutoEncoderNew", "submodule_name": name})
    with pytest.raises(ValueError, match="must name a site|before the gain"):  # not the folder's name instead
        load_sae(folder)


def test_the_name_of_the_model_tells_the_family_at_load(getkey, tmp_path):
    folder = dictionary_learning.write(make(getkey, "standard"), tmp_path)
    trainer = {"dict_class": "AutoEncoderNew", "submodule_name": "mlp_out_layer1", "lm_name": "google/gemma-2-2b"}
    edit_config(folder, "config.json", trainer=trainer)
    with pytest.raises(ValueError, match="of google/gemma-2-2b.*mlp_out_layer1 returns what lies before a second norm"):
        load_sae(folder)
    assert load_sae(folder, site=Site("mlp_out", 1)).site_in == Site("mlp_out", 1)
    edit_config(folder, "config.json", trainer=trainer | {"lm_name": "google/gemma-2b"})
    assert load_sae(folder).site_in == Site("mlp_out", 1)


def test_weights_that_transformer_lens_changed(getkey, tmp_path):
    """Centred weights move the residual where norms centre; folded value biases move z where there are any."""
    for site, key, bad in (("resid_pre", "center_writing_weights", "gpt_neox"), ("z", "fold_value_biases", "qwen2")):
        folder = save_sae(make(getkey, "standard", Site(site, 1)), tmp_path / key)
        hook = {"hook_name": str(Site(site, 1))}
        edit_config(folder, metadata=hook | {"model_from_pretrained_kwargs": {key: True}})
        check_fit(load_sae(folder), tiny_config("llama"), "it")
        with pytest.raises(ValueError, match=f"it at .*{key}"):
            check_fit(load_sae(folder), tiny_config(bad), "it")
        edit_config(folder, metadata=hook | {"model_from_pretrained_kwargs": {key: False}})
        check_fit(load_sae(folder), tiny_config(bad), "it")


def test_names_and_folders(getkey, tmp_path, monkeypatch):
    """The embedded suite from any folder; what the hub leaves in hidden folders is no SAE."""
    embedded = load_sae("assets/icl-tiny/saes/resid_pre.2")
    monkeypatch.chdir(tmp_path)
    assert load_sae("assets/icl-tiny/saes/resid_pre.2").site_in == embedded.site_in
    suite = load_suite("icl-tiny", layers=[2])
    assert Site("resid_pre", 2) in suite
    assert set(load_suite("assets/icl-tiny/saes/resid_pre.{layer}", layers=[2, 3])) == {
        Site("resid_pre", n) for n in (2, 3)
    }
    assert set(load_suite(["assets/icl-tiny/saes/resid_pre.2"])) == {Site("resid_pre", 2)}
    sae = make(getkey)
    save_suite({sae.site_in: sae}, tmp_path / "suite")
    save_suite({sae.site_in: sae}, tmp_path / "suite/.cache/huggingface/download")
    assert list(load_suite(tmp_path / "suite")) == [sae.site_in]


def test_sfcs_dictionaries_are_written_by_the_one_writer(getkey, tmp_path):
    sae, x = make(getkey, "standard", Site("resid_post", 1)), jax.random.normal(getkey(), (30, 16))
    norm = np.linalg.norm(sae.W_dec, axis=1)
    again = load_sae(dictionary_learning.write(sae, tmp_path, "AutoEncoder"))
    np.testing.assert_allclose(again.encode(x), np.asarray(sae.encode(x)) * norm, atol=1e-4)
    np.testing.assert_allclose(again(x), sae(x), atol=2e-4)
    with pytest.raises(ValueError, match="AutoEncoder is for standard SAEs, got a gated"):
        dictionary_learning.write(make(getkey, "gated"), tmp_path, "AutoEncoder")


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "batchtopk"])
def test_our_own_suite_at_every_site_of_the_residual_width(architecture, getkey, tmp_path):
    """The fault: what was saved at final_norm was refused, for it was written by TransformerLens' name."""
    layered = ("resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out", "mlp_normalized")
    sites = [Site("embed"), *(Site(name, 1) for name in layered), Site("final_norm")]
    save_suite({site: make(getkey, architecture, site) for site in sites}, tmp_path)
    for site in sites:
        assert load_sae(tmp_path / str(site.name + (".1" if site.layer else ""))).site_in == site
    (tmp_path / "resid_post.1").rename(tmp_path / ".resid_post.1")  # the same tensor as resid_pre of block 2
    for family in ("gemma", "gemma2", "llama", "qwen2", "phi3", "gpt_neox"):
        assert Site("final_norm") in load_suite(tmp_path, tiny_config(family))


def test_every_writer_names_final_norm_as_its_reader_does(getkey, tmp_path):
    site = Site("final_norm")
    folders = [
        sparsify.write(make(getkey, "topk", site), tmp_path / "a"),
        llama_scope.write(make(getkey, "standard", site), tmp_path / "b", threshold=0.0),
        dictionary_learning.write(make(getkey, "standard", site), tmp_path / "c"),
    ]
    assert [load_sae(folder).site_in for folder in folders] == [site] * 3


def test_the_flat_form_of_saelens_tells_which_weights_were_moved(getkey, tmp_path):
    """The fault: version 6 was refused, and the form before it taken."""
    folder = save_sae(make(getkey, "standard"), tmp_path)
    flat = {"metadata": None, "hook_point": "blocks.1.hook_resid_pre", "activation_fn_str": "relu"}
    edit_config(folder, **flat, model_from_pretrained_kwargs={"center_writing_weights": False})
    check_fit(load_sae(folder), tiny_config("gpt_neox"), "it")
    edit_config(folder, **flat, model_from_pretrained_kwargs={"center_writing_weights": True})
    check_fit(load_sae(folder), tiny_config("llama"), "it")
    with pytest.raises(ValueError, match="center_writing_weights"):
        check_fit(load_sae(folder), tiny_config("gpt_neox"), "it")


def test_hooks_and_normalisation_wherever_a_config_has_them(getkey, tmp_path):
    """A hook in the settings of saex and of a dictionary_learning trainer; a normalisation beside the trainer."""
    folder, file = write("saex", getkey, tmp_path / "a")
    edit_config(folder, file, hook_point_in="blocks.3.hook_resid_post", hook_point_out="blocks.3.hook_resid_post")
    assert load_sae(folder).site_in == Site("resid_post", 3)
    folder = dictionary_learning.write(make(getkey, "standard"), tmp_path / "resid_out_layer1")
    trainer = {"dict_class": "AutoEncoderNew", "hook_name": "blocks.2.hook_mlp_out"}
    edit_config(folder, "config.json", trainer=trainer)
    assert load_sae(folder).site_in == Site("mlp_out", 2)
    edit_config(folder, "config.json", trainer=trainer | {"feature_output_hook": "blocks.3.hook_mlp_out"})
    with pytest.raises(ValueError, match="is for one site, but names"):
        load_sae(folder)
    edit_config(folder, "config.json", trainer=trainer, normalize_activations=True)
    with pytest.raises(ValueError, match="normalize_activations True; we read none"):
        load_sae(folder)


def test_a_pattern_passes_hidden_folders_over(getkey, tmp_path):
    save_sae(make(getkey, "standard", Site("resid_pre", 2)), tmp_path / ".cache")
    save_sae(make(getkey), tmp_path / "resid_pre.1")
    assert load_sae(tmp_path / "*").site_in == Site("resid_pre", 1)


@pytest.mark.parametrize("module, neox", [("model.norm", False), ("gpt_neox.final_layer_norm", True)])
def test_the_last_norm_as_a_module_is_ours_in_its_family(module, neox, getkey, tmp_path):
    folder = save_sae(make(getkey, "standard"), tmp_path)
    edit_config(folder, metadata={"hook_name": module})
    assert load_sae(folder).site_in == Site("final_norm")
    check_fit(load_sae(folder), tiny_config("gpt_neox" if neox else "llama"), "it")
    with pytest.raises(ValueError, match=f"{module} is no module of the family"):
        check_fit(load_sae(folder), tiny_config("llama" if neox else "gpt_neox"), "it")
