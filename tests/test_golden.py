"""SAE files of every format, read by us, give what the original library computed; and what we write, sae-lens reads so.

The scripts in tests/golden made the files: sae-lens, dictionary_learning and sparsify themselves, and for saex and
circuit-tracer, which cannot be installed, their formulas written out.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from icl_lib.models import Site
from icl_lib.saes import load_sae, save_sae
from icl_lib.saes.formats import sparsify

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.rglob("expected.npz"))
# Where each sits, by the end of its path
SITES = {
    "average_l0_71": "resid_post.20", "average_l0_6": "embed", "average_l0_117": "z.3", "average_l0_72": "mlp_out.0",
    "average_l0_87": "mlp_normalized.5 mlp_out.5", "Llama3_1-8B-Base-L15R-8x": "resid_post.15",
    "qwen3-0.6b-transcoders-lowl0": "mlp_in.7 mlp_out.7", "AutoEncoderNew": "attn_out.3",
    "GatedAutoEncoder": "mlp_out.3",
    "AutoEncoder": "resid_post.3", "layers.2.mlp": "mlp_in.2 mlp_out.2", "embed_tokens": "embed", "hook_z": "z.3",
    "it-l12-attn_out-test-run-1-2.00E-05": "attn_out.12",
    "it-l12-transcoder-test-run-1-8.00E-06": "mlp_in.12 mlp_out.12",
    "it-l12-residual-test-run-1-2.00E-05": "resid_pre.12", "l12-test-run-5-3.00E-05": "resid_pre.12",
    "l16-test-run-3-4e-05": "resid_pre.16", "skip_transcoder": "mlp_in.3 mlp_out.3", "flat_standard": "resid_post.6",
    "gated": "resid_pre.3",
    "flat_gated": "resid_post.6", "batchtopk": "resid_pre.3", "it-l16-residual-test-run-1-2.00E-05": "resid_pre.16",
    "AutoEncoderTopK_early": "resid_post.3", "gated-z": "z.3", "gated-mlp_in-skip": "mlp_in.3 mlp_out.3",
    "skip-transcoders": "mlp_in.4 mlp_out.4", "short_standard": "resid_pre.3",
}  # fmt: skip


def relative(ours, theirs):
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


def load(folder, **kwargs):
    files = list(folder.glob("layer_*.safetensors"))
    return load_sae(files[0] if files else folder, **kwargs)


def test_there_is_one_for_every_format_and_architecture():
    assert {path.relative_to(GOLDEN).parts[0] for path in FOLDERS} == {
        "sae_lens", "google", "fnlp", "mwhanna", "dictionary_learning", "sparsify", "nev", "circuit_tracer", "written",
    }  # fmt: skip
    assert {load(path).architecture for path in FOLDERS} == {"standard", "gated", "jumprelu", "topk", "batchtopk"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(GOLDEN).as_posix())
def test_same_numbers_as_the_original(folder):
    with np.load(folder / "expected.npz") as expected:
        x, f, x_hat = (expected[key] for key in ("x", "f", "x_hat"))
    sae = load(folder)
    x = jnp.asarray(x.reshape(len(x), -1))  # sae-lens takes the heads of z apart
    assert 0.02 < (f > 0).mean() < 0.95
    np.testing.assert_array_equal(sae.encode(x) > 0, f > 0)
    assert relative(sae.encode(x), f) < 1e-5
    assert relative(sae(x), x_hat.reshape(len(x), -1)) < 1e-5
    if sae.architecture != "topk":
        assert relative(sae.fold()(x), sae(x)) < 1e-5


@pytest.mark.parametrize("folder", [path for path in FOLDERS if path.name in SITES], ids=lambda path: path.name)
def test_sites(folder):
    site_in, *site_out = [
        Site(*(int(p) if p.isdigit() else p for p in text.split("."))) for text in SITES[folder.name].split()
    ]
    sae = load(folder)
    assert (sae.site_in, sae.site_out) == (site_in, site_out[0] if site_out else site_in)


@pytest.mark.parametrize(
    "folder", [p for p in FOLDERS if "nev" in p.parts and "test-run-5" not in p.name], ids=lambda path: path.name
)
def test_the_papers_variant_of_saex(folder):
    with np.load(folder / "expected.npz") as expected:
        x, f, x_hat, trained = (expected[key] for key in ("x", "f_paper", "x_hat_paper", "f"))
    sae = load_sae(folder, variant="paper")
    assert sae.architecture == "jumprelu"
    np.testing.assert_array_equal(sae.encode(jnp.asarray(x)) > 0, f > 0)
    assert relative(sae.encode(jnp.asarray(x)), f) < 1e-5
    assert relative(sae(jnp.asarray(x)), x_hat) < 1e-5
    assert relative(f, trained) > 0.1  # the two forms are not the same function


WRITTEN = [path for path in FOLDERS if "written" in path.parts]


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda path: path.name)
def test_what_sae_lens_opened_is_what_we_write(folder, tmp_path):
    """`test_same_numbers_as_the_original` holds our numbers to those of sae-lens on the same files."""
    save_sae(load(folder), tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text()) == json.loads((folder / "cfg.json").read_text())
    again, golden = (load_file(path / "sae_weights.safetensors") for path in (tmp_path, folder))
    assert again.keys() == golden.keys() and all((again[name] == golden[name]).all() for name in golden)


@pytest.mark.parametrize("name", ["layers.3", "layers.2.mlp", "layers.4.mlp"])
def test_what_sparsify_wrote_is_what_we_write(name, tmp_path):
    folder = GOLDEN / "sparsify" / name
    sparsify.write(load(folder), tmp_path)
    theirs, ours = (json.loads((path / "cfg.json").read_text()) for path in (folder, tmp_path))
    skipped = ("expansion_factor", "normalize_decoder", "site_in", "site_out", "metadata")
    assert {k: v for k, v in ours.items() if k not in skipped} == {k: theirs[k] for k in ours if k not in skipped}
    again, golden = (load_file(path / "sae.safetensors") for path in (tmp_path, folder))
    assert again.keys() == golden.keys()
    for key in golden:
        np.testing.assert_allclose(again[key], golden[key], atol=1e-6)


def test_topk_with_its_threshold():
    folder = GOLDEN / "dictionary_learning" / "AutoEncoderTopK"
    with np.load(folder / "expected.npz") as expected:
        x, f = expected["x"], expected["f_threshold"]
    sae = load_sae(folder, variant="threshold")
    assert relative(sae.encode(jnp.asarray(x)), f) < 1e-5
    assert relative(sae.fold().encode(jnp.asarray(x)), f) < 1e-5
    with pytest.raises(ValueError, match="threshold was never set"):
        load_sae(GOLDEN / "dictionary_learning" / "AutoEncoderTopK_early", variant="threshold")


def test_backup_of_a_killed_run_is_named():
    with pytest.raises(ValueError, match="backup of a training run .at step 1200.*checkpoints"):
        load_sae(GOLDEN / "dictionary_learning" / "backup")
