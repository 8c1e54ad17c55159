"""The Transformer against transformers' PyTorch Gemma, and against what a causal model with taps must satisfy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import (
    Past,
    Site,
    Transformer,
    load_model,
    perturb,
    replace,
    run_with_cache,
    save_model,
    tiny_config,
)
from icl_lib.models.sites import LAYER_SITES

torch = pytest.importorskip("torch", reason="torch is the oracle of the model tests: install the extra icl-lib[test]")

torch.set_num_threads(1)  # the tensors are tiny, and the tests may run side by side

# (query heads, key-value heads): one shared key head, groups of two, one key head for each query head
HEADS = [(4, 1), (4, 2), (2, 2)]


def all_sites(n_layers):
    return [
        Site("embed"),
        *(Site(n, i) for i in range(n_layers) for n in LAYER_SITES),
        Site("final_norm"),
        Site("logits"),
    ]


def random_model(getkey, **sizes):
    """A small model whose norm gains are not zero, so that a forgotten (1 + gain) shows."""
    model = Transformer.init(tiny_config(**{"n_layers": 3, "n_heads": 4, "n_kv_heads": 2} | sizes), key=getkey())
    return jax.tree.map(lambda w: w + 0.3 * jax.random.normal(getkey(), w.shape) if w.ndim == 1 else w, model)


run = eqx.filter_jit(lambda model, tokens, tap=None: model(tokens, tap=tap))  # compiled once, not op by op


def random_tokens(getkey, model, batch=3, seq=11):
    return jax.random.randint(getkey(), (batch, seq), 0, model.config.d_vocab)


def torch_gemma(n_heads, n_kv_heads):
    """transformers' own Gemma with random weights; d_model is no square and rope_theta not the default."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=8,
        intermediate_size=40, vocab_size=50, max_position_embeddings=64, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(n_heads + 10 * n_kv_heads)
    theirs = GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.normal_(std=0.5)
    return theirs


def torch_sites(theirs, tokens):
    """Logits, patterns and the activations that transformers exposes through module hooks, by our sites."""
    seen = {}

    def keep(site, index):
        def hook(module, args, kwargs, output):
            value = {"in": args[0] if args else kwargs.get("hidden_states"), "out": output}[index]
            seen[site] = value[0] if isinstance(value, tuple) else value

        return hook

    handles = []
    for i, layer in enumerate(theirs.model.layers):
        for name, module, index in [
            ("resid_pre", layer, "in"), ("attn_in", layer.self_attn, "in"), ("attn_out", layer.self_attn, "out"),
            ("z", layer.self_attn.o_proj, "in"), ("resid_mid", layer.post_attention_layernorm, "in"),
            ("q", layer.self_attn.q_proj, "out"), ("k", layer.self_attn.k_proj, "out"),
            ("v", layer.self_attn.v_proj, "out"),
            ("mlp_in", layer.mlp, "in"), ("mlp_out", layer.mlp, "out"), ("resid_post", layer, "out"),
        ]:  # fmt: skip
            handles.append(module.register_forward_hook(keep(Site(name, i), index), with_kwargs=True))
    with torch.no_grad():
        output = theirs(torch.tensor(np.asarray(tokens)), output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    seen[Site("embed")], seen[Site("final_norm")] = output.hidden_states[0], output.hidden_states[-1]
    seen |= {Site("pattern", i): pattern for i, pattern in enumerate(output.attentions)}
    return output.logits.numpy(), {site: value.numpy() for site, value in seen.items()}


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_agrees_with_transformers_at_every_site(n_heads, n_kv_heads, tmp_path, getkey):
    theirs = torch_gemma(n_heads, n_kv_heads)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.rope_theta == 500.0
    tokens = random_tokens(getkey, ours)
    expected_logits, expected = torch_sites(theirs, tokens)
    logits, cache = run_with_cache(ours, tokens, expected)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
    for site, value in expected.items():
        assert relative(cache[site].reshape(value.shape), value) < 1e-5, site


def test_transformers_reads_what_we_save(tmp_path, getkey):
    from transformers import AutoModelForCausalLM

    model = random_model(getkey)
    save_model(model, tmp_path, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = random_tokens(getkey, model)
    logits, sites = torch_sites(theirs, tokens)
    ours = run(model, tokens)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-4)
    assert relative(ours, logits) < 1e-5
    assert set(sites) < set(all_sites(3))


def test_bfloat16_is_as_close_to_float32_as_torch_is(tmp_path, getkey):
    """Rounding of the weights is shared; the rounding of the activations must not be larger than torch's."""
    theirs = torch_gemma(4, 1).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    half, full = load_model(tmp_path, dtype="bfloat16"), load_model(tmp_path)
    tokens = random_tokens(getkey, full)
    exact = np.asarray(run(full, tokens))
    logits, cache = run_with_cache(half, tokens, [Site("resid_post", 2)])
    with torch.no_grad():
        their_error = np.abs(theirs(torch.tensor(np.asarray(tokens))).logits.float().numpy() - exact).mean()
    assert logits.dtype == jnp.float32
    assert cache[Site("resid_post", 2)].dtype == jnp.bfloat16
    assert np.abs(np.asarray(logits) - exact).mean() < 1.5 * their_error


def test_right_padding_does_not_reach_the_prompt(getkey):
    model = random_model(getkey)
    tokens, length = random_tokens(getkey, model), jnp.array([11, 7, 2])
    real = jnp.arange(11)[None] < length[:, None]
    padded = lambda pad: run_with_cache(model, jnp.where(real, tokens, pad), all_sites(3))
    (a, cache_a), (b, cache_b) = padded(0), padded(17)
    a, b, real = np.asarray(a), np.asarray(b), np.asarray(real)
    np.testing.assert_array_equal(a[real], b[real])
    assert not np.allclose(a[~real], b[~real])
    residuals = [
        Site(n, i) for i in range(3) for n in ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
    ]
    for site in residuals:
        np.testing.assert_array_equal(np.asarray(cache_a[site])[real], np.asarray(cache_b[site])[real])
    alone = run(model, tokens[1:2, :7])
    np.testing.assert_allclose(a[1, :7], alone[0], rtol=0, atol=1e-5)


def test_logits_depend_on_no_later_token(getkey):
    model = random_model(getkey)
    tokens, seq = random_tokens(getkey, model, batch=1, seq=6), 6
    _, cache = run_with_cache(model, tokens, [Site("resid_pre", 0)])
    jacobian = jax.jit(jax.jacobian(lambda x: model.run_from(0, x)[0].mean(axis=-1)))(cache[Site("resid_pre", 0)])
    reach = np.abs(np.asarray(jacobian[:, 0])).max(axis=-1)  # (logit position, input position)
    assert (reach[np.triu_indices(seq, 1)] == 0).all()
    assert (reach[np.tril_indices(seq)] > 0).all()


def test_patterns_are_causal_distributions(getkey):
    model = random_model(getkey)
    _, cache = run_with_cache(model, random_tokens(getkey, model), [Site("pattern", 1)])
    pattern = np.asarray(cache[Site("pattern", 1)])
    assert pattern.shape == (3, 4, 11, 11)
    np.testing.assert_allclose(pattern.sum(axis=-1), 1, atol=1e-6)
    assert (np.triu(pattern, 1) == 0).all()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_replacing_resid_pre_equals_running_from_it(layer, getkey):
    model = random_model(getkey)
    tokens = random_tokens(getkey, model)
    x = jax.random.normal(getkey(), (*tokens.shape, model.config.d_model))
    replaced = jax.jit(lambda x: model(tokens, tap=replace({Site("resid_pre", layer): x})))(x)
    np.testing.assert_allclose(replaced, jax.jit(lambda x: model.run_from(layer, x))(x), rtol=0, atol=1e-5)
    assert not np.allclose(replaced, run(model, tokens))


@pytest.mark.parametrize("layer", [0, 2])
def test_past_equals_the_full_run(layer, getkey):
    """The suffix after prefixes of unequal lengths, with a vector added at its first token, against the tap form."""
    model = random_model(getkey)
    tokens, length, n_suffix = random_tokens(getkey, model), jnp.array([8, 3, 1]), 3
    vector = jax.random.normal(getkey(), (model.config.d_model,))
    site = Site("resid_pre", layer)
    at = jax.nn.one_hot(length, tokens.shape[1])
    full = jax.jit(lambda delta: model(tokens, tap=perturb({site: delta})))(at[:, :, None] * vector[None, None, :])

    clean, cache = run_with_cache(model, tokens, [site])
    where = length[:, None] + jnp.arange(n_suffix)[None, :]
    take = lambda x: jnp.take_along_axis(x, where[:, :, None], axis=1)
    steered = take(cache[site]).at[:, 0].add(vector[None, :])
    suffix = jax.jit(lambda x: model.run_from(layer, x, past=Past.record(model, tokens, length)))(steered)
    np.testing.assert_allclose(suffix, take(full), rtol=0, atol=1e-5)
    assert not np.allclose(suffix, take(clean), atol=1e-3)


def test_past_does_not_read_beyond_its_length(getkey):
    model = random_model(getkey)
    tokens, length = random_tokens(getkey, model), jnp.array([8, 3, 0])
    x = jax.random.normal(getkey(), (3, 2, model.config.d_model))
    other = jnp.where(jnp.arange(11)[None] < length[:, None], tokens, (tokens + 1) % model.config.d_vocab)
    after = jax.jit(lambda t: model.run_from(1, x, past=Past.record(model, t, length)))
    a, b = after(tokens), after(other)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(
        a[2], jax.jit(lambda x: model.run_from(1, x))(x)[2], rtol=0, atol=1e-5
    )  # an empty past is no past


def test_gradient_at_all_sites_is_the_finite_difference(getkey):
    """One backward pass through zero perturbations, against central differences along a random direction per site."""
    model = random_model(getkey, n_layers=2)
    tokens = random_tokens(getkey, model, batch=2, seq=5)
    _, cache = run_with_cache(model, tokens, all_sites(2))
    target = jax.nn.one_hot(tokens[:, -1], model.config.d_vocab)

    @jax.jit
    def loss(deltas):
        return -(jax.nn.log_softmax(model(tokens, tap=perturb(deltas))[:, -1]) * target).sum()

    zeros = {site: np.zeros(x.shape, x.dtype) for site, x in cache.items()}
    gradients = jax.device_get(jax.jit(jax.grad(loss))(zeros))
    random = np.random.default_rng(0)
    assert set(gradients) == set(all_sites(2))
    for site, gradient in gradients.items():
        step = 1e-2 * gradient / np.linalg.norm(gradient) + 1e-3 * random.standard_normal(gradient.shape, np.float32)
        difference = (loss(zeros | {site: step}) - loss(zeros | {site: -step})) / 2
        np.testing.assert_allclose((gradient * step).sum(), difference, rtol=2e-2, atol=2e-6, err_msg=str(site))
        assert np.abs(gradient).max() > 1e-5, f"no gradient at {site}"


def test_model_refuses_tokens_without_a_batch_axis(getkey):
    with pytest.raises(Exception, match=r"tokens"):
        random_model(getkey)(jnp.zeros(5, jnp.int32))


def test_run_from_refuses_a_layer_out_of_range(getkey):
    model = random_model(getkey)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.2 .* got 3"):
        model.run_from(3, jnp.zeros((1, 2, model.config.d_model)))


def test_vmap_over_the_value_of_a_tap(getkey):
    """A leading task axis of the value that a tap puts in, as steering and cleaning have."""
    model = random_model(getkey)
    tokens = random_tokens(getkey, model)
    values = jax.random.normal(getkey(), (2, *tokens.shape, model.config.d_model))
    replaced = jax.jit(lambda x: model(tokens, tap=replace({Site("resid_mid", 1): x})))
    for one, x in zip(jax.vmap(replaced)(values), values, strict=True):
        np.testing.assert_allclose(one, replaced(x), rtol=0, atol=1e-5)


def test_what_is_longer_than_the_context_is_refused_before_anything_is_computed(getkey):
    """Also under `filter_jit`, where the length is known when the program is traced."""
    model, seen = random_model(getkey, n_ctx=8), []
    tokens, message = (
        random_tokens(getkey, model, seq=9),
        "of 9 tokens is longer than the context of this model, 8: take",
    )
    x = jnp.zeros((3, 9, model.config.d_model))
    note = lambda site, value: seen.append(site) or value
    runs = [lambda: model(tokens, note), lambda: run(model, tokens, note), lambda: model.run_from(1, x, note)]
    runs += [lambda: run_with_cache(model, tokens, []), lambda: eqx.filter_jit(model.run_from)(0, x)]
    runs += [lambda: Past.record(model, tokens, jnp.array([1, 1, 1]))]
    for each in runs:
        with pytest.raises(ValueError, match=message):
            each()
    assert not seen
    assert run(model, tokens[:, :8]).shape == (3, 8, 40)
