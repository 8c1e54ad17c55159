"""What `test_sharding.py` runs in a process of its own, where the CPU plays eight devices: sharded equals unsharded."""

import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from icl_lib.models import (
    Site,
    Transformer,
    check_mesh,
    load_model,
    make_mesh,
    perturb,
    run_with_cache,
    save_model,
    shard_batch,
    shard_model,
    shardings,
    tiny_config,
)
from icl_lib.models.families import FAMILIES, to_hf
from icl_lib.models.sites import LAYER_SITES, compose, record

MESHES = [(1, 8), (2, 4), (8, 1)]
KV_HEADS = {"gemma": 1, "gemma2": 4, "phi3": 8, "gpt_neox": 8, "qwen2": 2, "llama": 4}  # of 8 heads
SITES = [Site(name, layer) for name in LAYER_SITES for layer in range(2)] + [
    Site("embed"),
    Site("final_norm"),
    Site("logits"),
]
TOKENS = np.random.default_rng(0).integers(0, 40, (8, 12))


def config_of(family, **overrides):
    windows = {"windows": (4, None)} if family == "gemma2" else {}
    heads = {"n_heads": 8, "n_kv_heads": KV_HEADS[family], "d_mlp": 64}
    if family == "gpt_neox":  # whose heads have no width of their own
        heads["d_model"] = 64
    return tiny_config(family, **(heads | windows | overrides))


@functools.cache
def model_of(family):
    """A random model in which biases and gains are random too, so that a misplaced one shows."""
    model = Transformer.init(config_of(family), key=jax.random.key(1))
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@eqx.filter_jit
def everything(model, tokens):
    """Logits, all activations, and the gradients of a loss by the weights and by what is added to the residuals."""

    def loss(weights_and_deltas, tokens):
        model, deltas = weights_and_deltas
        cache = {}
        logits = model(tokens, tap=compose(perturb(deltas), record(SITES, cache)))
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)), (logits, cache)

    zeros = jnp.zeros((*tokens.shape, model.config.d_model))
    deltas = {Site(name, layer): zeros for name in ("resid_pre", "attn_out", "mlp_out") for layer in range(2)}
    return eqx.filter_value_and_grad(loss, has_aux=True)((model, deltas), tokens)


@functools.cache
def unsharded(family):
    return everything(model_of(family), jnp.asarray(TOKENS))


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        *(("gemma", shape) for shape in MESHES),
        ("gemma2", (1, 8)),
        *((family, (2, 4)) for family in FAMILIES if family != "gemma"),
    ],
)
def test_logits_sites_and_gradients_are_those_of_one_device(family, shape):
    mesh = make_mesh(*shape)
    ours = everything(shard_model(model_of(family), mesh), shard_batch(jnp.asarray(TOKENS), mesh))
    theirs = unsharded(family)
    (_, (logits, cache)), (_, by_site) = ours
    assert len(cache) == len(SITES) and len(by_site) == 6
    assert len(logits.sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    assert max(float(jnp.abs(x).max()) for x in by_site.values()) > 1e-3  # not all zero on both sides


def test_no_weight_is_gathered():
    """What the devices exchange are the sums behind the embedding and behind each branch, and nothing else."""
    mesh = make_mesh()
    run = eqx.filter_jit(lambda model, tokens: model(tokens))
    program = (
        run.lower(shard_model(model_of("gemma"), mesh), shard_batch(jnp.asarray(TOKENS), mesh))
        .compile()
        .compiled.as_text()
    )
    assert program.count(" all-reduce(") == 1 + 2 * 2
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_read_into_their_shards(family, shape, tmp_path):
    model, mesh = model_of(family), make_mesh(*shape)
    save_model(model, tmp_path, dtype="float32")
    loaded = load_model(tmp_path, mesh=mesh)
    assert loaded.config == model.config
    for ours, theirs, place in zip(*map(jax.tree.leaves, (loaded, model, shardings(model.config, mesh))), strict=True):
        assert ours.sharding == place
        np.testing.assert_array_equal(ours, theirs)
    half = load_model(tmp_path, dtype="bfloat16", mesh=mesh)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(half.blocks[1].attn.q, model.blocks[1].attn.q.astype(jnp.bfloat16))


def test_every_device_holds_its_share_of_each_weight():
    def shards(x):
        assert len(x.addressable_shards) == 8
        (shape,) = {shard.data.shape for shard in x.addressable_shards}
        return shape

    model = shard_model(
        model_of("gemma"), make_mesh(data=2)
    )  # 4 devices to a model of 8 heads of 8, d_mlp 64, 40 words
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    assert shards(model.embed) == (10, 16)
    assert (shards(attn.q), shards(attn.o)) == ((16, 16), (16, 16))
    assert shards(attn.k) == shards(attn.v) == (8, 16)  # the one key-value head is everywhere
    assert (shards(mlp.gate), shards(mlp.up), shards(mlp.down)) == ((16, 16), (16, 16), (16, 16))
    assert shards(model.norm.weight) == shards(model.blocks[0].ln1.weight) == (16,)
    attn, mlp = (block := shard_model(model_of("gpt_neox"), make_mesh()).blocks[1]).attn, block.mlp
    assert shards(attn.q) == shards(attn.k) == shards(attn.v) == (8, 64)
    assert shards(attn.b_q) == shards(attn.b_k) == shards(mlp.b_up) == (8,)
    assert shards(attn.b_o) == shards(mlp.b_down) == shards(block.ln2.bias) == (64,)
    assert (shards(attn.o), shards(mlp.down)) == ((64, 8), (64, 8))


def test_shared_and_cut_key_value_heads():
    place = shardings(config_of("gemma2"), make_mesh(data=2)).blocks[0].attn
    assert place.k.spec == place.v.spec == P("model")  # 4 heads on 4 devices
    place = shardings(config_of("gemma2"), make_mesh()).blocks[0].attn
    assert place.k.spec == P()  # 4 heads on 8 devices: two share one
    assert place.q.spec == P("model")


def test_a_vocabulary_that_does_not_divide_is_kept_whole():
    config, mesh = config_of("phi3", d_vocab=43), make_mesh()
    assert shardings(config, mesh).embed.spec == shardings(config, mesh).unembed.spec == P()
    model = Transformer.init(config, key=jax.random.key(0))
    tokens = jnp.asarray(TOKENS)
    np.testing.assert_allclose(
        run_with_cache(shard_model(model, mesh), tokens, [])[0], model(tokens), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"n_heads": 6, "n_kv_heads": 1},
            r"'model' axis of 8 devices does not divide n_heads = 6 .* 1, 2 would do: give the others",
        ),
        ({"d_mlp": 68}, "d_mlp = 68 "),
        ({"n_heads": 24, "n_kv_heads": 3}, "n_kv_heads = 3 .*1, 2, 4 would do|n_kv_heads = 3"),
        ({"n_heads": 6, "n_kv_heads": 6, "d_mlp": 68}, "n_heads = 6 and d_mlp = 68 and n_kv_heads = 6"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_before_reading(overrides, message, tmp_path):
    config, mesh = config_of("gemma", **overrides), make_mesh()
    with pytest.raises(ValueError, match=message):
        check_mesh(config, mesh)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config, "float32")))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, mesh=mesh)  # there are no weights: it does not come to that


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((3,), "data = 3 does not make up 8 cpu"), ((2, 2), "data x model = 2 x 2"), ((0,), "data = 0")],
)
def test_a_mesh_uses_every_device(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(*sizes)


@pytest.mark.parametrize(("heads", "kv", "shape"), [(8, 1, (1, 8)), (4, 2, (2, 4)), (6, 6, (4, 2)), (3, 3, (8, 1))])
def test_the_automatic_mesh_cuts_the_model_as_far_as_its_heads_go(heads, kv, shape, tmp_path):
    model = Transformer.init(config_of("gemma", n_heads=heads, n_kv_heads=kv), key=jax.random.key(0))
    loaded = load_model(save_model(model, tmp_path, dtype="float32"), mesh="auto")
    assert tuple(loaded.blocks[0].attn.q.sharding.mesh.shape.values()) == shape
    np.testing.assert_array_equal(loaded.blocks[0].attn.q, model.blocks[0].attn.q)
    with pytest.raises(ValueError, match="'auto' or None, got 'all'"):
        load_model(tmp_path, mesh="all")


def test_a_mesh_of_other_axes_is_refused():
    with pytest.raises(ValueError, match="axes 'data' and 'model', got .*make_mesh"):
        check_mesh(config_of("gemma"), jax.make_mesh((8,), ("x",)))


def test_a_batch_is_spread_over_data():
    mesh = make_mesh(data=4)
    batch = shard_batch({"tokens": TOKENS, "weight": np.ones(8, np.float32)}, mesh)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 12)}
    np.testing.assert_array_equal(batch["tokens"], TOKENS)
    for bad in (TOKENS[:6], np.float32(1.0)):
        with pytest.raises(ValueError, match=r"spread over 4 devices along its first axis, .*got shape"):
            shard_batch(bad, mesh)
