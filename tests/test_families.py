"""The six families against the PyTorch classes of transformers, and real models against their published tensors."""

import json
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import Past, Site, Transformer, generate, load_model, run_with_cache, save_model, tiny_config
from icl_lib.models.config import RopeScaling
from icl_lib.models.families import FAMILIES, from_hf, known_config, to_hf
from icl_lib.models.tensors import ignored, n_params, sources, tensor_shapes

torch = pytest.importorskip("torch", reason="torch is the oracle of the model tests: install the extra icl-lib[test]")
torch.set_num_threads(1)  # the tensors are tiny, and the tests may run side by side

CONFIGS = Path(__file__).parents[1].parent / "shared" / "data" / "hf_configs"  # where a checkout comes with them
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 50,
    "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# Each family with its options turned to where they show: windows shorter than the sequence, caps that bite, few kv
# heads.
FORMS = {
    "gemma": {"num_key_value_heads": 1, "head_dim": 6},
    "gemma, untied": {"num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": False},
    "gemma2": {
        "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
    },
    "phi3": {"num_key_value_heads": 2, "sliding_window": 5},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox, serial": {"rotary_pct": 0.25, "use_parallel_residual": False},
    "qwen2": {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen2, untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama": {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "llama, biases, tied": {
        "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
}  # fmt: skip
# tensors and parameters as published
TOTALS = {
    "google/gemma-2b": (164, 2_506_172_416), "google/gemma-2-2b": (288, 2_614_341_888),
    "google/gemma-2-9b": (464, 9_241_705_984),
    "microsoft/Phi-3-mini-4k-instruct": (195, 3_821_079_552), "EleutherAI/pythia-70m-deduped": (76, 70_426_624),
    "Qwen/Qwen2.5-0.5B": (290, 494_032_768), "meta-llama/Llama-3.2-1B": (146, 1_235_814_400),
}  # fmt: skip


def torch_model(form, dtype=None):
    """transformers' own model of this family with random weights; biases and gains are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(form.split(",")[0], **SIZES, **FORMS[form])
    torch.manual_seed(sum(map(ord, form)))
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim == 1:
                weight.add_(0.4 * torch.randn_like(weight))
    return theirs if dtype is None else theirs.to(dtype)


def blocks(theirs):
    return theirs.gpt_neox.layers if hasattr(theirs, "gpt_neox") else theirs.model.layers


def branches(theirs):
    """Their modules whose outputs are our attn_out and mlp_out, by site."""
    modules = {}
    for i, layer in enumerate(blocks(theirs)):
        attn = getattr(layer, "attention", None) or layer.self_attn
        if hasattr(layer, "post_feedforward_layernorm"):
            modules |= {
                Site("attn_out", i): layer.post_attention_layernorm,
                Site("mlp_out", i): layer.post_feedforward_layernorm,
            }
        else:
            modules |= {Site("attn_out", i): attn, Site("mlp_out", i): layer.mlp}
    return modules


def readers(theirs):
    """Their norms whose inputs are our resid_mid and last resid_post, by site. In a parallel block no module reads
    resid_mid.
    """
    neox, layers = hasattr(theirs, "gpt_neox"), blocks(theirs)
    norms = {Site("resid_post", len(layers) - 1): theirs.gpt_neox.final_layer_norm if neox else theirs.model.norm}
    if not getattr(theirs.config, "use_parallel_residual", False):
        norms |= {
            Site("resid_mid", i): getattr(x, "pre_feedforward_layernorm", x.post_attention_layernorm)
            for i, x in enumerate(layers)
        }
    return norms


def torch_run(theirs, tokens, mask=None):
    """Logits and, by our sites, residuals, patterns, and what attention and MLP add."""
    seen, handles = {}, []
    for site, module in branches(theirs).items():
        keep = lambda _, __, out, site=site: seen.__setitem__(site, out[0] if isinstance(out, tuple) else out)
        handles.append(module.register_forward_hook(keep))
    for site, module in readers(theirs).items():
        keep = lambda _, given, site=site: seen.__setitem__(site, given[0])
        handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(np.asarray(mask))
        out = theirs(
            torch.tensor(np.asarray(tokens)), attention_mask=mask, output_attentions=True, output_hidden_states=True
        )
    for handle in handles:
        handle.remove()
    *residuals, last = out.hidden_states
    seen |= {Site("resid_pre", i): x for i, x in enumerate(residuals)} | {Site("final_norm"): last}
    seen |= {Site("pattern", i): x for i, x in enumerate(out.attentions)}
    seen = {Site("resid_mid", i): x + seen[Site("attn_out", i)] for i, x in enumerate(residuals)} | seen
    return out.logits.float().numpy(), {site: x.float().numpy() for site, x in seen.items()}


def relative(ours, theirs):
    return np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of transformers for each form, and the model that made it."""
    made = {}

    def get(form):
        if form not in made:
            theirs = torch_model(form)
            folder = tmp_path_factory.mktemp("model")
            theirs.save_pretrained(folder)
            made[form] = theirs, folder
        return made[form]

    return get


def some_tokens(rows=3, seq=17):
    return np.random.default_rng(0).integers(3, 50, (rows, seq))


@pytest.mark.parametrize("form", FORMS)
def test_a_family_agrees_with_transformers(form, folders):
    theirs, folder = folders(form)
    ours = load_model(folder)
    assert n_params(ours.config) == sum(weight.numel() for weight in theirs.parameters())
    tokens = some_tokens()
    expected_logits, expected = torch_run(theirs, tokens)
    assert (
        len(expected) == 2 * 5 + 2
    )  # resid_pre, pattern, attn_out, resid_mid, mlp_out of both blocks; the last resid_post, final_norm
    logits, cache = run_with_cache(ours, jnp.asarray(tokens), expected)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
    for site, value in expected.items():
        assert relative(cache[site], value) < 1e-5, site


def padded_tokens():
    """Rows of unequal length, zeros behind them, and where there is text."""
    length = np.array([17, 9, 4])
    mask = np.arange(17)[None] < length[:, None]
    return np.where(mask, some_tokens(), 0), mask


@pytest.mark.parametrize("form", FORMS)
def test_right_padded_batches_agree_where_there_is_text(form, folders):
    """Logits and every site; of a pattern the rows of real queries, which look at real keys alone."""
    theirs, folder = folders(form)
    tokens, mask = padded_tokens()
    expected_logits, expected = torch_run(theirs, tokens, mask.astype(int))
    logits, cache = run_with_cache(load_model(folder), jnp.asarray(tokens), expected)
    np.testing.assert_allclose(np.asarray(logits)[mask], expected_logits[mask], rtol=0, atol=1e-4)
    for site, value in expected.items():
        assert relative(real(site, cache[site], mask), real(site, value, mask)) < 1e-5, site


def real(site, x, mask):
    """The part of a site where there is text: (n, ...), patterns with the query's position before the heads."""
    x = np.asarray(x, np.float32)
    return (np.moveaxis(x, 2, 1) if site.name == "pattern" else x)[mask]


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_as_close_to_float32_as_torch_is(form, tmp_path):
    """At every site, of a padded batch. The rounding of the weights is shared; that of the activations must not be
    larger than torch's.
    """
    theirs = torch_model(form, torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    tokens, mask = padded_tokens()
    their_logits, their_sites = torch_run(theirs, tokens, mask.astype(int))
    half, full = (
        run_with_cache(load_model(tmp_path, dtype=dtype), jnp.asarray(tokens), their_sites)
        for dtype in ("bfloat16", "float32")
    )
    assert half[0].dtype == jnp.float32
    assert half[1][Site("resid_pre", 1)].dtype == jnp.bfloat16
    error = lambda x, exact: np.abs(np.asarray(x, np.float32) - np.asarray(exact, np.float32)).mean()
    assert error(half[0][mask], full[0][mask]) < 1.5 * error(their_logits[mask], full[0][mask])
    for site, value in their_sites.items():
        exact = real(site, full[1][site], mask)
        ours, torchs = error(real(site, half[1][site], mask), exact), error(real(site, value, mask), exact)
        assert relative(real(site, half[1][site], mask), exact) < 0.1, site
        assert ours <= 1.5 * torchs, (site, ours, torchs)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_model_is_read_by_transformers_and_by_us(form, folders, tmp_path):
    from transformers import AutoModelForCausalLM

    first, folder = folders(form)
    ours = load_model(folder)
    save_model(ours, tmp_path, dtype="float32")
    again = load_model(tmp_path)
    assert again.config == ours.config
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    expected, found = (torch_run(model, some_tokens())[0] for model in (first, theirs))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", ["gemma2", "phi3", "gpt_neox"])
def test_a_past_is_cut_off_by_the_window_too(form, folders):
    """A suffix run with the keys of its prefix, at a place where the window (5) ends inside the prefix."""
    ours = load_model(folders(form)[1])
    tokens, length, n_suffix = jnp.asarray(some_tokens()), jnp.array([12, 7, 1]), 4
    site = Site("resid_pre", 1)
    logits, cache = run_with_cache(ours, tokens, [site])
    take = lambda x: jnp.take_along_axis(x, (length[:, None] + jnp.arange(n_suffix)[None, :])[:, :, None], axis=1)
    past = Past.record(ours, tokens, length)
    suffix = eqx.filter_jit(lambda x: ours.run_from(1, x, past=past))(take(cache[site]))
    np.testing.assert_allclose(suffix, take(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TOTALS)
def test_real_models_have_their_published_tensors(name):
    config = known_config(name)
    shapes = tensor_shapes(config)
    assert (len(shapes), n_params(config)) == TOTALS[name]
    if CONFIGS.is_dir():
        stem = name.split("/")[1]
        assert config == from_hf(json.loads((CONFIGS / f"{stem}.json").read_text()))
        published = json.loads((CONFIGS / "tensors" / f"{stem}.tensors.json").read_text())
        assert {tensor: list(shape) for tensor, shape in shapes.items()} == published


def test_a_known_model_is_found_by_its_tuned_names_and_others_are_not():
    assert known_config("google/gemma-2-9b-it") == known_config("google/gemma-2-9b")
    assert known_config("Qwen/Qwen2.5-0.5B-Instruct") == known_config("Qwen/Qwen2.5-0.5B")
    assert known_config("google/gemma-7b") is None


def test_what_the_real_configs_say_of_windows_and_rotation():
    gemma, phi, pythia = (
        known_config(n)
        for n in ("google/gemma-2-2b", "microsoft/Phi-3-mini-4k-instruct", "EleutherAI/pythia-70m-deduped")
    )
    assert gemma.windows == (4096, None) * 13
    assert phi.windows == (2047,) * 32
    assert known_config("Qwen/Qwen2.5-0.5B").windows is None  # present in its config, but not in use
    assert (pythia.rotary_dim, pythia.d_head, pythia.parallel) == (16, 64, True)
    assert gemma.attn_scale == 1 / 16
    raw = json.loads((Path(__file__).parents[1] / "icl_lib/models/families/known_configs.json").read_text())[
        "google/gemma-2-2b"
    ]
    assert from_hf({k: v for k, v in raw.items() if k != "sliding_window"}) == gemma  # as transformers fills it in
    assert from_hf(raw | {"sliding_window": None}).windows is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_a_checkpoint_is_used_once(family):
    config = tiny_config(family, n_heads=4, n_kv_heads=4 if family == "gpt_neox" else 2)
    shapes, used = tensor_shapes(config), {}
    for source in sources(config).values():
        rows = np.arange(shapes[source.name][0]) if source.rows is None else source.rows
        used.setdefault(source.name, []).extend(rows.tolist())
    assert {name: sorted(rows) for name, rows in used.items()} == {
        name: list(range(shape[0])) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_hugging_face_names(family):
    config = tiny_config(family, rope_theta=123.0, norm_eps=1e-4, bos_id=5)
    assert from_hf(json.loads(json.dumps(to_hf(config, "float16")))) == config


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "google/gemma-2b",
            {"model_type": "mamba"},
            "'mamba'; supported families are gemma, gemma2, phi3, gpt_neox, qwen2, llama",
        ),
        (
            "meta-llama/Llama-3.2-1B",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rotary scaling of type 'yarn' is not supported",
        ),
        (
            "microsoft/Phi-3-mini-4k-instruct",
            {"rope_scaling": {"type": "longrope", "long_factor": []}},
            "type 'longrope' is not supported",
        ),
        (
            "meta-llama/Llama-3.2-1B",
            {"rope_scaling": {"rope_type": "llama3", "factor": 32.0}},
            "needs the field 'low_freq_factor'",
        ),
        ("Qwen/Qwen2.5-0.5B", {"hidden_act": "relu"}, "activation of a qwen2 model must be one of .*got 'relu'"),
        ("EleutherAI/pythia-70m-deduped", {"rotary_pct": 0.05}, "rotary_dim must be even"),
        ("EleutherAI/pythia-70m-deduped", {"rotary_pct": None}, "rotary_pct.* must be a number above 0, got None"),
        ("meta-llama/Llama-3.2-1B", {"rope_scaling": "linear"}, "rope_scaling must be an object .*got 'linear'"),
        ("meta-llama/Llama-3.2-1B", {"rope_parameters": ["llama3"]}, "rope_parameters must be an object"),
        (
            "meta-llama/Llama-3.2-1B",
            {"rope_scaling": LLAMA3 | {"factor": None}},
            "factor of the rotary scaling must be a number",
        ),
        (
            "google/gemma-2-2b",
            {"query_pre_attn_scalar": None},
            "query_pre_attn_scalar must be a number above 0, got None",
        ),
        ("google/gemma-2-2b", {"sliding_window": "4096"}, "sliding_window must be a whole number above 0, got '4096'"),
        ("google/gemma-2b", {"num_hidden_layers": None}, "num_hidden_layers must be a whole number above 0, got None"),
        ("google/gemma-2b", {"vocab_size": 256000.0}, "vocab_size must be a whole number above 0, got 256000.0"),
        ("google/gemma-2b", {"head_dim": "256"}, "head_dim must be a whole number above 0"),
        ("google/gemma-2b", {"rms_norm_eps": None}, "rms_norm_eps must be a number above 0"),
        ("google/gemma-2b", {"rope_theta": None}, "rope_theta .*must be a number above 0"),
        (
            "google/gemma-2b",
            {"eos_token_id": [1, "<eos>"]},
            "eos_token_id must be a token id, a list of them, or null, got '<eos>'",
        ),
    ],
)
def test_a_config_that_is_not_ours_is_refused(name, fields, message):
    raw = json.loads((Path(__file__).parents[1] / "icl_lib/models/families/known_configs.json").read_text())[name]
    with pytest.raises(ValueError, match=message):
        from_hf(raw | fields)


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_a_model_without_an_end_of_text_writes_on(family, getkey):
    raw = to_hf(tiny_config(family), "float32") | {"eos_token_id": None, "pad_token_id": None}
    config = from_hf(raw)
    assert (config.eos_id, config.more_eos, config.pad_id) == (None, (), 0)
    assert from_hf(json.loads(json.dumps(to_hf(config, "float32")))) == config
    model, tokens, length = Transformer.init(config, key=getkey()), jnp.array([[3, 4, 5]]), jnp.array([3])
    np.testing.assert_array_equal(generate(model, tokens, length, 4), generate(model, tokens, length, 4, stop=()))


def test_llama_3_slows_long_waves_only():
    from icl_lib.models.rotary import rotary_frequencies

    config = known_config("meta-llama/Llama-3.2-1B")
    scaled = np.asarray(rotary_frequencies(config))
    plain = config.rope_theta ** (-np.arange(32) / 32)
    wavelength = 2 * math.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4], rtol=1e-5)
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 32, rtol=1e-5)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    blend = (8192 / wavelength - 1) / (4 - 1)
    np.testing.assert_allclose(scaled[between], ((1 - blend) * plain / 32 + blend * plain)[between], rtol=1e-5)
    assert between.any()


def test_buffers_and_copies_of_a_tied_embedding_are_passed_over():
    pythia, gemma = known_config("EleutherAI/pythia-70m-deduped"), known_config("google/gemma-2b")
    buffers = ["attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"]
    assert all(ignored(pythia, f"gpt_neox.layers.0.{name}") for name in buffers)
    assert not ignored(pythia, "gpt_neox.layers.0.attention.dense.bias")
    assert ignored(gemma, "lm_head.weight")
    assert not ignored(pythia, "embed_out.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_have_every_leaf_that_a_checkpoint_has(family, getkey):
    model = Transformer.init(tiny_config(family), key=getkey())
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == n_params(model.config)
    logits = eqx.filter_jit(model)(jnp.zeros((1, 3), jnp.int32))
    assert np.isfinite(logits).all() and np.asarray(logits).std() > 0


# Keys that a config may leave out, and how a folder without them is read by transformers.
OPTIONAL = (
    "bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps", "layer_norm_eps", "rope_theta", "rotary_emb_base",
    "rotary_pct", "partial_rotary_factor", "max_position_embeddings", "hidden_act", "hidden_activation", "head_dim",
    "num_key_value_heads", "tie_word_embeddings", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "attention_bias", "mlp_bias", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "use_parallel_residual", "rope_scaling", "torch_dtype",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_key_left_out_has_the_value_that_transformers_gives_it(family):
    """The config class of transformers fills the key in and writes all of them: read again, they mean the same."""
    from transformers import AutoConfig

    sizes = {"n_heads": 32, "n_kv_heads": 32, "d_model": 512, "d_head": 16, "n_layers": 30}
    own = {"qwen2": {"windows": (None,) * 28 + (9,) * 2}, "phi3": {"windows": (9,) * 30}}
    own["gemma2"] = {"windows": (9, None) * 15, "attn_scale": 0.5, "attn_softcap": 3.0, "logit_softcap": 4.0}
    odd = {"bos_id": 7, "eos_id": 8, "pad_id": 9, "rope_theta": 123.0, "norm_eps": 1e-3, "rotary_dim": None}
    odd |= {"gpt_neox": {"rotary_dim": 8}, "phi3": {"rotary_dim": 8}}.get(family, {}) | own.get(family, {})
    full = to_hf(tiny_config(family, **sizes, **odd), "float32")
    assert set(OPTIONAL) - {"max_window_layers", "rope_scaling"} >= set(full) - set(TOLD)
    for key in (None, *OPTIONAL):
        gone = (key, "layer_types") if key == "use_sliding_window" else (key,)
        raw = {name: value for name, value in full.items() if name not in gone}
        theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))
        told = theirs.to_dict() | {"pad_token_id": theirs.pad_token_id}
        if theirs.pad_token_id is None:  # what we fill in ourselves: the end of text, else 0
            told["pad_token_id"] = theirs.eos_token_id or 0
        ours = from_hf(raw)
        assert ours == from_hf(told), key
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id), key
        assert (ours.n_ctx, ours.tied) == (theirs.max_position_embeddings, theirs.tie_word_embeddings), key
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"], key


TOLD = (
    "architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "vocab_size", "attention_dropout", "original_max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta = 6.0 contradicts the 5.0"),
        (
            "llama",
            {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 2.0}},
            "rope_scaling = .* contradicts",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "default", "type": "llama3"}},
            "type of the rotary scaling = 'llama3'",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is another computation"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types = .* is another computation"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = .* is another computation"),
        ("llama", {"attention_bias": None}, "attention_bias must be true or false, got None"),
        ("llama", {"head_dim": None, "hidden_size": 15}, "hidden_size must be a multiple of num_attention_heads"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is another"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is another"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "each of the 2 layers of num_hidden_layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types must name full_attention or"),
        ("gemma2", {"hidden_act": "silu"}, "gelu_pytorch_tanh, got 'silu'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types = .* is another computation"),
        ("phi3", {"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "layer_types = .* is another"),
        (
            "phi3",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 1.0 contradicts the 0.5",
        ),
        ("gpt_neox", {"rope_theta": 5.0}, "rope_theta = 5.0 contradicts the 10000.0"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "rotary_pct = 0.5 contradicts the 0.25"),
        ("gpt_neox", {"head_dim": 4}, "head_dim = 4 is another computation than ours, which needs 8"),
        ("gpt_neox", {"num_key_value_heads": 1}, "num_key_value_heads = 1 is another computation"),
        ("gpt_neox", {"bos_token_id": "<s>"}, "bos_token_id must be a token id, or null, got '<s>'"),
    ],
)
def test_what_contradicts_itself_or_asks_for_another_computation_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message):
        from_hf(to_hf(tiny_config(family), "float32") | fields)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt_neox"])
def test_every_family_writes_its_rotary_scaling(family):
    config = tiny_config(family, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16))
    assert from_hf(to_hf(config, "float32")) == config


def test_padding_is_the_config_s_else_the_tokenizer_s_else_the_end_of_text():
    raw = to_hf(tiny_config("llama", eos_id=5), "float32")
    assert from_hf(raw | {"pad_token_id": 3}, pad_id=7).pad_id == 3
    for none in (None, -1):  # old Llama configs write -1
        assert from_hf(raw | {"pad_token_id": none}, pad_id=7).pad_id == 7
        assert from_hf(raw | {"pad_token_id": none}).pad_id == 5
    assert from_hf(raw | {"pad_token_id": None, "eos_token_id": None}).pad_id == 0
