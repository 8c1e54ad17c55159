"""Configs and checkpoints as others write them, and what is said when they are not what they should be."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from icl_lib.files.paths import root
from icl_lib.models import (
    Transformer,
    fetch,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
    tensor_shapes,
    tiny_config,
    weights,
)
from icl_lib.models.families import FAMILIES, from_hf, to_hf

# google/gemma-2b's config.json as released; note "gelu", and that neither tying nor hidden_activation is named.
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000.0, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
DATA = Path(__file__).parents[1].parent / "shared" / "data"  # where a checkout comes with it
CONFIGS, SENTENCEPIECE = DATA / "hf_configs", DATA / "tokenizers" / "mistral_v1_sentencepiece" / "tokenizer.model"


def gemma_2b_tensors():
    """The tensor list of gemma-2b, written out: linear weights are (out, in), and there is no lm_head."""
    layer = {
        "input_layernorm": [2048], "post_attention_layernorm": [2048], "self_attn.q_proj": [2048, 2048],
        "self_attn.k_proj": [256, 2048], "self_attn.v_proj": [256, 2048], "self_attn.o_proj": [2048, 2048],
        "mlp.gate_proj": [16384, 2048], "mlp.up_proj": [16384, 2048], "mlp.down_proj": [2048, 16384],
    }  # fmt: skip
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(18) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": [256000, 2048], "model.norm.weight": [2048], **layers}


@pytest.fixture
def folder(tmp_path, getkey):
    return save_model(Transformer.init(tiny_config(), key=getkey()), tmp_path / "model", dtype="float32")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def header(file):
    """The header of a safetensors file, read by hand: a little-endian length, then JSON."""
    data = file.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def test_gemma_2b_has_its_published_tensors():
    raw, wanted = GEMMA_2B, gemma_2b_tensors()
    if CONFIGS.is_dir():
        raw = json.loads((CONFIGS / "gemma-2b.json").read_text())
        wanted = json.loads((CONFIGS / "tensors" / "gemma-2b.tensors.json").read_text())
        assert wanted == gemma_2b_tensors()
    config = from_hf(raw)
    assert config == from_hf(GEMMA_2B)
    shapes = tensor_shapes(config)
    assert {name: list(shape) for name, shape in shapes.items()} == wanted
    assert len(shapes) == 164
    assert sum(math.prod(shape) for shape in shapes.values()) == 2_506_172_416
    assert (config.n_ctx, config.rope_theta, config.norm_eps, config.bos_id) == (8192, 10_000.0, 1e-6, 2)


def test_new_field_names_mean_the_same_as_the_old():
    new = {k: v for k, v in GEMMA_2B.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype", "hidden_act")}
    new |= {
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        "dtype": "bfloat16",
        "hidden_act": "gelu_pytorch_tanh",
    }
    assert from_hf(new) == from_hf(GEMMA_2B | {"rope_theta": 500.0})
    assert from_hf(new).rope_theta == 500.0
    several = from_hf(new | {"eos_token_id": [1, 107]})
    assert (several.eos_id, several.more_eos) == (1, (107,)) and from_hf(to_hf(several, "float32")) == several


def test_to_hf_is_the_inverse_of_from_hf():
    config = tiny_config(rope_theta=123.0, norm_eps=1e-5, bos_id=5)
    assert from_hf(json.loads(json.dumps(to_hf(config, "float16")))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, r"model_type is 'mamba'; supported families are gemma"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "silu"}, "gelu_pytorch_tanh.*got 'silu'"),
        ({"hidden_activation": "gelu"}, "got 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling of type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not supported, only none and 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs the field 'low_freq_factor'"),
        ({"num_key_value_heads": 3}, "multiple of n_kv_heads, got 8 and 3"),
        ({"head_dim": 7}, "d_head must be even.*got 7"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        from_hf(GEMMA_2B | fields)


def test_a_missing_field_is_named_with_its_file(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"config.json: field 'intermediate_size' is missing"):
        load_config(folder)


@pytest.mark.parametrize(("dtype", "code"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_save_and_load_keep_the_weights(dtype, code, tmp_path, getkey):
    model = Transformer.init(tiny_config(n_heads=4, n_kv_heads=2), key=getkey())
    save_model(model, tmp_path, dtype=dtype)
    stored = {k: v for k, v in header(tmp_path / "model.safetensors").items() if k != "__metadata__"}
    assert {v["dtype"] for v in stored.values()} == {code}
    assert {k: tuple(v["shape"]) for k, v in stored.items()} == tensor_shapes(model.config)
    back = load_model(tmp_path)
    assert back.config == model.config == load_config(tmp_path)
    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, np.asarray(theirs).astype(numpy_dtype).astype(np.float32))
    assert {w.dtype for w in jax.tree.leaves(load_model(tmp_path, dtype=dtype))} == {jnp.dtype(dtype)}


def test_shards_of_transformers_are_read_through_their_index(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="8KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for ours, theirs in zip(*(jax.tree.leaves(load_model(f)) for f in (sharded, folder)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"index.json names {lost.name}, which is not in the folder"):
        load_model(sharded)


def test_a_copy_of_the_tied_output_matrix_is_passed_over(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert load_model(folder).embed.shape == (40, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing model.norm.weight \(16,\)"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros(3, "f")}),
            "unknown model.layers.2.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": np.zeros((16, 40), "f")}),
            r"model.embed_tokens.weight has shape \(16, 40\), expected \(40, 16\)",
        ),
        (lambda t: [t.pop(name) for name in list(t)[:8]], r"missing .* and 3 more\. Check that config and weights"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_weights_of_another_config_are_refused(folder):
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match="unknown model.layers.1"):
        load_model(folder)


def test_quantised_weights_are_refused(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(
        ValueError, match=r"model.norm.weight has dtype I8, expected one of F64, F32, F16, BF16.*not quantised"
    ):
        load_model(folder)


def test_buffers_of_pythia_are_passed_over(tmp_path, getkey):
    model = Transformer.init(tiny_config("gpt_neox"), key=getkey())
    folder = save_model(model, tmp_path, dtype="float16")
    layer = "gpt_neox.layers.1.attention"
    buffers = {
        f"{layer}.bias": np.ones((1, 1, 64, 64), np.uint8), f"{layer}.masked_bias": np.full((), -np.inf, np.float16),
        f"{layer}.rotary_emb.inv_freq": np.ones(2, np.float32),
    }  # fmt: skip
    edit_tensors(folder, lambda t: t.update(buffers))
    np.testing.assert_array_equal(
        load_model(folder).blocks[1].attn.b_o, model.blocks[1].attn.b_o.astype(jnp.float16).astype(jnp.float32)
    )
    edit_tensors(folder, lambda t: t.pop(f"{layer}.dense.bias"))  # a weight whose name ends like a buffer's
    with pytest.raises(ValueError, match=f"missing {layer}.dense.bias"):
        load_model(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_tensor_read_in_pieces_is_the_same(family, tmp_path, getkey, monkeypatch):
    model = Transformer.init(tiny_config(family), key=getkey())
    save_model(model, tmp_path, dtype="float32")
    monkeypatch.setattr(weights, "_PIECE", 40)  # two rows of d_model, one of what is wider
    for ours, theirs in zip(*map(jax.tree.leaves, (load_model(tmp_path), model)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_header_that_is_not_json_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F32}', 1))
    with pytest.raises(ValueError, match="model.safetensors cannot be read as safetensors"):
        load_model(folder)


def test_an_index_without_files_is_named(folder):
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match="index.json has no weight_map"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -7])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as safetensors .*cut short"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json_is_named(folder, name):
    (folder / name).write_text('{"model_type": "gem')
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON"):
        load_model(folder)
    (folder / name).write_text("[1, 2]")
    with pytest.raises(ValueError, match=rf"{name} must hold a JSON object, got list"):
        load_model(folder)


def test_what_a_folder_lacks_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer .*copy tokenizer.json of the model into it"):
        load_tokenizer(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist: a model folder holds config.json"):
        load_model(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": '{"version": "1.0", "trunc'}, "the tokenizer in .* cannot be read .*: download it again"),
        ({"tokenizer.json": "{}"}, "the tokenizer in .* cannot be read"),
        ({"tokenizer.model": "no sentencepiece"}, "cannot be read .*add the tokenizer.json of the model"),
        (
            {"vocab.json": '{"a": 0}', "tokenizer_config.json": '{"tokenizer_class": "CanineTokenizer"}'},
            r"only a slow .*\(CanineTokenizer\)",
        ),
    ],
)
def test_an_unusable_tokenizer_is_refused(folder, files, message):
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


def sentencepiece_model() -> bytes:
    """A published tokenizer.model where one is at hand, else one of five pieces: text (1), score (2) and kind (3) of
    each in a field 1.
    """
    if SENTENCEPIECE.is_file():
        return SENTENCEPIECE.read_bytes()
    sized = lambda tag, content: bytes([tag, len(content)]) + content
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("▁a", -1, 1), ("a", -2, 1)]
    parts = [
        sized(0x0A, text.encode()) + struct.pack("<Bf", 0x15, score) + bytes([0x18, kind])
        for text, score, kind in pieces
    ]
    return b"".join(sized(0x0A, part) for part in parts)


def test_a_sentencepiece_file_alone_asks_for_the_fast_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    with pytest.raises(ValueError, match="add the tokenizer.json of the model"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder/at-all", "../missing"])
def test_a_name_that_is_nowhere_says_what_would_do(name, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=rf"no folder '{name}' here, .*pass (a|the path of a) folder with config.json"
    ):
        fetch(name)


def test_the_import_is_light():
    """transformers, torch and the hub client take seconds to import; only the calls that need them may do so."""
    heavy = ("torch", "transformers", "huggingface_hub")
    code = f"import sys, icl_lib.models; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma"])
def test_an_output_matrix_that_differs_from_the_tied_embedding_is_used_as_in_transformers(family, tmp_path, getkey):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = Transformer.init(tiny_config(family, tied=False), key=getkey())
    folder = save_model(model, tmp_path, dtype="float32")
    edit_config(folder, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="says tie_word_embeddings, but .* differ; both are used, as in transformers"):
        ours = load_model(folder)
    assert not ours.config.tied
    np.testing.assert_array_equal(ours.unembed, model.unembed)
    tokens = np.arange(3, 9)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(eqx.filter_jit(ours)(jnp.asarray(tokens, jnp.int32)), expected, rtol=0, atol=1e-4)


def test_an_output_matrix_of_another_family_or_shape_is_not_passed_over(folder):
    edit_tensors(folder, lambda t: t.update({"embed_out.weight": t["model.embed_tokens.weight"]}))
    with pytest.raises(ValueError, match="unknown embed_out.weight"):
        load_model(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")[:30]}))
    with (
        pytest.warns(UserWarning, match="differ"),
        pytest.raises(ValueError, match=r"lm_head.weight has shape \(30, 16\)"),
    ):
        load_model(folder)


@pytest.fixture
def sharded(folder, tmp_path):
    """A model in shards with all that transformers and we write beside it, and another model."""
    from transformers import AutoModelForCausalLM

    place = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(place, max_shard_size="8KB")
    for name in ("icl_gate.json", "tokenizer.json", "generation_config.json"):
        (place / name).write_text("{}")
    return place, Transformer.init(tiny_config(rope_theta=9.0), key=jax.random.key(5))


def assert_equal(model, other):
    assert model.config == other.config
    for ours, theirs in zip(*map(jax.tree.leaves, (model, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_model_saved_over_another_replaces_all_of_it(sharded):
    place, new = sharded
    save_model(new, place, dtype="float32")
    assert_equal(load_model(place), new)
    assert sorted(file.name for file in place.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("step", range(7))
def test_an_interrupted_save_leaves_one_model_or_says_what_to_do(sharded, step, monkeypatch):
    """Stopped at each change of the folder in turn: what is read is the old model or the new one, or an error helps."""
    place, new = sharded
    old, left = load_model(place), step
    for method in ("unlink", "replace"):
        module = os if method == "replace" else Path
        plain = getattr(module, method)

        def stopped(*args, plain=plain, **kwargs):
            nonlocal left
            if ".partial" not in str(args[0]) or plain is os_replace:
                left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, method, stopped)
    with pytest.raises(KeyboardInterrupt):
        save_model(new, place, dtype="float32")
    monkeypatch.undo()
    if step == 0:
        assert_equal(load_model(place), old)
    else:
        with pytest.raises(FileNotFoundError, match="config.json does not exist.*interrupted here, save it again"):
            load_model(place)
    save_model(new, place, dtype="float32")
    assert_equal(load_model(place), new)


os_replace = os.replace


def test_two_sets_of_weights_in_one_folder_are_refused(sharded, folder):
    place, _ = sharded
    (place / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match="two sets of weights, model.safetensors and the files of .*: delete the older"
    ):
        load_model(place)
    (place / "model.safetensors.index.json").unlink()
    assert_equal(load_model(place), load_model(folder))  # the single file is a whole set, the shards are not asked
    (place / "model.safetensors").rename(place / "copy.safetensors")
    with pytest.raises(ValueError, match="twice, in copy.safetensors and in model-00001-of"):
        load_model(place)


def test_a_tokenizer_s_padding_serves_where_the_config_has_none(folder):
    words = {"<pad>": 3, "a": 4, "</s>": 6}
    edit_config(folder, pad_token_id=None, eos_token_id=6)
    assert load_config(folder).pad_id == 6
    (folder / "tokenizer_config.json").write_text('{"pad_token": {"content": "<pad>"}}')
    assert load_config(folder).pad_id == 6  # a name alone is no id
    for vocab, added in (
        (words, []),
        ([["</s>", 0.0]] * 3 + [["<pad>", 0.0]], []),
        ({}, [{"id": 3, "content": "<pad>"}]),
    ):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
        assert load_config(folder).pad_id == load_model(folder).config.pad_id == 3
    edit_config(folder, pad_token_id=5)
    assert load_config(folder).pad_id == 5


def test_names_and_relative_paths_count_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "icl-tiny").mkdir()  # what lies in the current folder is not asked
    assert fetch("icl-tiny") == fetch("assets/icl-tiny") == root() / "assets" / "icl-tiny"
    assert load_config("icl-tiny") == load_model("icl-tiny").config
    assert len(load_tokenizer("icl-tiny")) == load_config("icl-tiny").d_vocab
    for name in ("./no-model", "~/no-model", str(tmp_path / "no-model")):
        with pytest.raises(FileNotFoundError, match=r"no folder '.*no-model' here, where /.*no-model would be"):
            load_model(name)
