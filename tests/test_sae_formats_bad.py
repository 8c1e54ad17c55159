"""Bad SAE files of every format: one clear error each, naming the file."""

import gc
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from icl_lib.models import Site
from icl_lib.saes import SAE, load_sae, load_suite, save_sae
from icl_lib.saes.formats import dictionary_learning, gemma_scope, layer_files, llama_scope, saex, sparsify
from icl_lib.saes.formats.torch_file import read_torch
from tests.test_sae_formats import edit_config, make, transcoder


def edit_weights(folder, file="sae_weights.safetensors", **changes):
    w = load_file(folder / file)
    save_file({k: v for k, v in (w | changes).items() if v is not None}, folder / file)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: edit_weights(p, r_mag=None), "missing r_mag"),
        (lambda p: edit_weights(p, scaling=np.ones(24, np.float32)), "unknown scaling"),
        (
            lambda p: edit_weights(p, W_dec=np.ones((16, 24), np.float32)),
            r"W_dec has shape \(16, 24\), expected \(24, 16\)",
        ),
        (lambda p: edit_weights(p, b_mag=np.full(24, np.nan, np.float32)), "b_mag has values that are not finite"),
        (lambda p: cut(p / "sae_weights.safetensors"), "cut short"),
        (lambda p: cut(p / "cfg.json"), "cut short"),
        (lambda p: edit_config(p, architecture="temporal"), "architecture 'temporal'"),
        (lambda p: edit_config(p, architecture=None), "architecture None"),
        (
            lambda p: edit_config(p, normalize_activations="layer_norm"),
            "'layer_norm': the SAE sees each token rescaled",
        ),
        (lambda p: edit_config(p, normalize_activations="constant_norm_rescale"), "rescaled by its own norm"),
        (
            lambda p: edit_config(p, normalize_activations="covariance_whitening"),
            "'covariance_whitening'; we read none and",
        ),
        (
            lambda p: edit_config(p, normalize_activations="expected_average_only_in"),
            "the scale is nowhere.*activation_scaler.json",
        ),
        (lambda p: edit_config(p, metadata=None), "lacks metadata"),
        (
            lambda p: edit_config(
                p, metadata=None, hook_point="blocks.1.hook_resid_pre", activation_fn_str="tanh-relu"
            ),
            "tanh-relu",
        ),
        (
            lambda p: edit_config(p, metadata={"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 3}),
            "single head 3",
        ),
        (lambda p: edit_config(p, d_sae="many"), "d_sae as a whole number of 1 or more, got 'many'"),
        (lambda p: edit_weights(p, scaling_factor=np.full(24, 2, np.float32)), "scaling_factor other than 1"),
        (lambda p: (p / "cfg.json").write_text("[]"), "holds list, expected an object"),
        (lambda p: edit_config(p, metadata={"hook_name": "blocks.1.hook_nothing"}), "must name a site"),
        (lambda p: edit_config(p, metadata={"hook_name": "model.layers.3.mlp.act_fn"}), "must name a site"),
        (
            lambda p: edit_config(p, metadata={"hook_name": "model.layers.3.mlp", "model_name": "gemma-2-9b"}),
            "before a second norm",
        ),
    ],
)
def test_bad_files(damage, message, getkey, tmp_path):
    save_sae(make(getkey), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_transcoder_of_one_module_is_refused(getkey, tmp_path):
    """By a module SAELens means what it returns, so that input and output would be the same."""
    save_sae(transcoder(getkey, architecture="standard"), tmp_path)
    edit_config(tmp_path, metadata={"hook_name": "model.layers.1.mlp", "hook_name_out": "model.layers.1.mlp"})
    with pytest.raises(
        ValueError, match=r"for a transcoder, but its input and its output are both blocks.1.hook_mlp_out: pass site="
    ):
        load_sae(tmp_path)
    assert load_sae(tmp_path, site=(Site("mlp_in", 1), Site("mlp_out", 1))).is_transcoder


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


def torch_file(path, **changes):
    state = torch.load(path / "ae.pt")
    torch.save({k: v for k, v in (state | changes).items() if v is not None}, path / "ae.pt")


def write_gemma(getkey, folder):
    return gemma_scope.write(
        make(getkey, "jumprelu"), folder / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_102"
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: cut(p / "params.npz"), "cut short"),
        (lambda p: (p / "params.npz").write_bytes(b""), "cut short"),
        (
            lambda p: np.savez(p / "params.npz", W_enc=np.ones((3, 4))),
            "missing b_enc; missing W_dec; missing b_dec; missing threshold",
        ),
        (
            lambda p: np.savez(p / "params.npz", **dict(np.load(p / "params.npz")) | {"b_dec": np.ones(3)}),
            r"b_dec has shape \(3,\), expected \(16,\)",
        ),
        (
            lambda p: np.savez(
                p / "params.npz", **dict(np.load(p / "params.npz")) | {"scaling_factor": np.full(24, 2.0)}
            ),
            "other than 1",
        ),
        (lambda p: np.savez(p / "params.npz", W_enc=np.array([{}], object)), "allow_pickle"),
    ],
)
def test_bad_gemma_scope(damage, message, getkey, tmp_path):
    folder = write_gemma(getkey, tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_sae(folder)
    assert "params.npz" in str(caught.value)


def test_canonical_that_is_not():
    widths = "16k, 32k, 65k, 131k, 262k, 524k, 1m"
    for name, message in {
        "google/gemma-scope-2b-pt-res/layer_12/width_4k/canonical": f"layer 12 has width {widths}",
        "google/gemma-scope-2b-pt-res/layer_26/width_16k/canonical": r"there are layers \[0, 1, .* 25\]",
        "google/gemma-scope-3b-pt-res/layer_1/width_16k/canonical": "there are releases gemma-scope-27b-pt-res",
        "owner/repository/canonical": "only SAEs of Gemma Scope have canonical",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_sae(name)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: cut(p / "ae.pt"), "cut short"),
        (lambda p: torch_file(p, **{"encoder.bias": None}), "missing encoder.bias"),
        (lambda p: torch_file(p, extra=torch.ones(2)), r"unknown extra \(2,\)"),
        (
            lambda p: torch_file(p, **{"decoder.weight": torch.ones(24, 16)}),
            r"decoder.weight has shape \(24, 16\), expected \(16, 24\)",
        ),
        (lambda p: torch_file(p, **{"b_dec": torch.full((16,), float("nan"))}), "b_dec has values that are not finite"),
        (lambda p: torch.save([1, 2], p / "ae.pt"), "no state dict .* but list"),
        (lambda p: torch.save(torch.nn.Linear(2, 3), p / "ae.pt"), "refused: it names torch.nn.modules.linear.Linear"),
        (lambda p: edit_config(p, "config.json", trainer={"dict_class": "CrossCoder"}), "names the class 'CrossCoder'"),
        (
            lambda p: edit_config(
                p, "config.json", trainer={"dict_class": "BatchTopKSAE", "submodule_name": "resid_post_layer_1"}
            ),
            "threshold was never set",
        ),
        (lambda p: edit_config(p, "config.json", trainer={"dict_class": "AutoEncoderTopK"}), "where the SAE sits"),
        (lambda p: (p / "config.json").unlink(), "TopK or a BatchTopK"),
    ],
)
def test_bad_dictionary_learning(damage, message, getkey, tmp_path):
    dictionary_learning.write(make(getkey, "topk"), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_closed(getkey, tmp_path):
    """Else it would stay open until memory is collected, and on some systems could not be replaced."""
    dictionary_learning.write(make(getkey, "topk"), tmp_path)
    torch.save(torch.nn.Linear(2, 3), tmp_path / "ae.pt")
    gemma = write_gemma(getkey, tmp_path)
    cut(gemma / "params.npz")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ResourceWarning)
        for folder in (tmp_path, gemma):
            with pytest.raises(ValueError, match="refused: it names|cut short"):
                load_sae(folder)
        gc.collect()
    assert not [str(each.message) for each in found]


class Harm:
    """A pickle of this runs a command when an ordinary reader opens it."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def rewrite(path, pickled=None, storage=None):
    """The zip at `path` with another pickle, or with the first storage replaced."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for name in parts:
        if pickled is not None and name.endswith("data.pkl"):
            parts[name] = pickled
        if storage is not None and name.endswith("data/0"):
            parts[name] = storage
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    "function, args", [(os.system, ("touch {}",)), (eval, ("open('{}', 'w')",)), (getattr, ("a", "upper"))]
)
def test_a_pickle_with_code_in_it_is_refused(function, args, getkey, tmp_path):
    dictionary_learning.write(make(getkey, "standard"), tmp_path)
    trace = tmp_path / "trace"
    rewrite(
        tmp_path / "ae.pt", pickle.dumps({"bias": Harm(function, *(text.format(trace) for text in args))}, protocol=2)
    )
    with pytest.raises(ValueError, match=f"refused: it names .*{function.__name__}.*nothing but tensors"):
        load_sae(tmp_path)
    assert not trace.exists()


def test_a_pickle_cannot_reach_outside_its_tensors(tmp_path):
    """Strides past the numbers, storages of another length, and attributes set on what it may call."""
    path = tmp_path / "ae.pt"
    torch.save({"a": torch.ones(3, 2)}, path)
    assert read_torch(path)["a"].shape == (3, 2)
    with zipfile.ZipFile(path) as archive:
        good = archive.read("ae/data.pkl")
    shape = b"K\x03K\x02\x86"  # the tuple (3, 2)
    assert good.count(shape) == 1
    rewrite(path, good.replace(shape, b"K\x09K\x09\x86"))
    with pytest.raises(ValueError, match=r"refused: a tensor of shape \(9, 9\) reaches past its 6 numbers"):
        read_torch(path)
    rewrite(path, good, storage=b"1234")
    with pytest.raises(ValueError, match="has 1 numbers, 6 were announced"):
        read_torch(path)
    rewrite(path, b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\x00\x00\x00nameK\x01s\x86b.")
    with pytest.raises(ValueError, match="it sets name of a function"):
        read_torch(path)


def test_every_kind_of_tensor_is_read_like_torch_does(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": base.T,
        "part": base[1:3, ::2],
        "scalar": torch.tensor(5, dtype=torch.int),
        "parameter": torch.nn.Parameter(base),
    }
    tensors |= {
        str(kind): base.to(kind)
        for kind in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    }
    tensors["empty"] = torch.ones(0, 3)
    torch.save(tensors, tmp_path / "a.pt")
    for name, value in read_torch(tmp_path / "a.pt").items():
        np.testing.assert_array_equal(value.astype(np.float32), tensors[name].detach().to(torch.float32).numpy())


@pytest.mark.parametrize(
    "write, damage, message",
    [
        ("sparsify", lambda p: edit_config(p, activation="groupmax"), "activation 'groupmax'"),
        ("sparsify", lambda p: edit_config(p, k=0), "must give k as a whole number"),
        (
            "sparsify",
            lambda p: edit_weights(p, "sae.safetensors", W_skip=np.ones((16, 16), np.float32)),
            "unknown W_skip",
        ),
        ("sparsify", lambda p: cut(p / "sae.safetensors"), "cut short"),
        ("sparsify", lambda p: edit_config(p, transcode=True, site_in=None), "other than layers.N.mlp"),
        ("llama_scope", lambda p: edit_config(p, "hyperparams.json", act_fn="topk"), "act_fn 'topk'"),
        (
            "llama_scope",
            lambda p: edit_config(p, "hyperparams.json", norm_activation="token-wise"),
            "'token-wise'; we read dataset-wise",
        ),
        (
            "llama_scope",
            lambda p: edit_config(p, "hyperparams.json", norm_activation="inference"),
            "'inference'; we read dataset-wise",
        ),
        (
            "llama_scope",
            lambda p: edit_config(p, "hyperparams.json", dataset_average_activation_norm={"in": 1.0}),
            "with in and out",
        ),
        (
            "llama_scope",
            lambda p: edit_config(p, "hyperparams.json", hook_point_in="blocks.1.hook_nothing"),
            "must name a site",
        ),
        ("saex", lambda p: edit_weights(p, s_gate=None), "both s_gate and b_gate or neither"),
        ("saex", lambda p: edit_weights(p, b_dec=None), "missing b_dec"),
        ("saex", lambda p: edit_weights(p, scaling_factor=np.zeros(24, np.float32)), "not positive at"),
        ("saex", lambda p: edit_config(p, d_sae=23), r"b_enc has shape \(24,\), expected \(23,\)"),
    ],
)
def test_bad_files_of_other_formats(write, damage, message, getkey, tmp_path):
    folder = (
        tmp_path / {"sparsify": "layers.1", "llama_scope": "L1R", "saex": "it-l1-residual-test-run-1-2.00E-05"}[write]
    )
    if write == "sparsify":
        sparsify.write(make(getkey, "topk", Site("resid_post", 1)), folder)
    elif write == "llama_scope":
        llama_scope.write(make(getkey, "standard"), folder, threshold=0.0)
    else:
        saex.write(make(getkey, "gated"), folder, 9.0)
    damage(folder)
    name = folder.rename(tmp_path / "other") if "layers.N" in message else folder
    with pytest.raises(ValueError, match=message) as caught:
        load_sae(name)
    assert str(tmp_path) in str(caught.value)


def test_names_variants_and_writers(getkey, tmp_path):
    gated, reads = make(getkey, "gated"), save_sae(make(getkey), tmp_path / "a")
    with pytest.raises(
        ValueError, match="variant 'paper' is not one of saelens.*'paper' of saex, 'threshold' of dictionary_learning"
    ):
        load_sae(reads, variant="paper")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no SAE that we can read: expected one of cfg.json"):
        load_sae(tmp_path / "empty")
    for write, message in {
        lambda p: sparsify.write(gated, p): "topk SAEs of one width, got a gated",
        lambda p: saex.write(make(getkey, "standard"), p): "suites are gated",
        lambda p: layer_files.write(gated, p): "for standard transcoders",
        lambda p: dictionary_learning.write(transcoder(getkey), p): "no class for a transcoder",
        lambda p: gemma_scope.write(transcoder(getkey, architecture="standard", skip=True), p): "no skip matrices",
        lambda p: llama_scope.write(make(getkey, "jumprelu"), p, threshold=0.1): "one threshold for all",
    }.items():
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "never")
    assert not (tmp_path / "never").exists()
