"""SAELens' files: a folder with `cfg.json` and `sae_weights.safetensors`, of version 6 or the flat form before it.

Source: the loaders of sae-lens 6.54, with which tests/golden compares.
"""

from pathlib import Path
from typing import Any

import numpy as np

from icl_lib.saes.formats import common
from icl_lib.saes.formats.common import Weights
from icl_lib.saes.formats.places import Sites, movers, name_of, settle
from icl_lib.saes.sae import SAE

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
FILES = (CONFIG, WEIGHTS, SCALER)
LAYOUT_VERSION = "6.0.0"  # without one, sae-lens takes the file for an old, flat one
_PLAIN = {"W_enc": "W_enc d F", "b_enc": "b_enc F", "W_dec": "W_dec F o", "b_dec": "b_dec o"}
_JUMP = _PLAIN | {"threshold": "threshold F"}
_GATED = {name: entry for name, entry in _PLAIN.items() if name != "b_enc"}
_GATED |= {"b_gate": "b_enc F", "r_mag": "r_mag F", "b_mag": "b_mag F"}
_SKIP = {"W_skip": "W_skip o d"}
# SAELens' architectures that we read: our form, and our name and the axes of each tensor in the file
_LAYOUTS = {
    "standard": ("standard", _PLAIN), "transcoder": ("standard", _PLAIN),
    "skip_transcoder": ("standard", _PLAIN | _SKIP), "topk": ("topk", _PLAIN), "gated": ("gated", _GATED),
    "jumprelu": ("jumprelu", _JUMP), "jumprelu_transcoder": ("jumprelu", _JUMP),
    "jumprelu_skip_transcoder": ("jumprelu", _JUMP | _SKIP),
}  # fmt: skip
_HANDLED = ("apply_b_dec_to_input", "normalize_activations")
# what the flat form says beside the metadata of version 6
_META = ("model_name", "dataset_path", "context_size", "prepend_bos", "neuronpedia_id", "model_from_pretrained_kwargs")
# sqrt(d) / mean norm of the activations, which the old files want and do not carry: as in sae-lens' registry
_KNOWN_SCALES = {"gemma_2b_blocks.12.hook_resid_post_16384": 0.21381938399317255}


def read(folder: Path, site: Sites | None = None, variant: str | None = None) -> SAE:
    """The SAE in a folder of SAELens; see `load_sae`."""
    path = folder / CONFIG
    cfg = _new_style(common.read_json(path), path)
    form, spec = _LAYOUTS[cfg["architecture"]]
    transcoder = "transcoder" in cfg["architecture"]
    d_in, d_sae = (common.size(cfg, key, path) for key in ("d_in", "d_sae"))
    common.check_settings(
        cfg, path, ("relu", form, cfg["architecture"]), *_HANDLED,
        *(["rescale_acts_by_decoder_norm"] if form == "topk" else []),
        reshape_activations=(None, "none", "hook_z"),
    )  # fmt: skip
    sites, module = _sites(site, cfg, path, transcoder)
    found = common.read_safetensors(folder / WEIGHTS)
    common.drop_ones(found, folder / WEIGHTS)
    w = common.take(found, spec, folder / WEIGHTS, d=d_in, F=d_sae, o=cfg.get("d_out", d_in))
    # SAELens' default is true, and no transcoder of its applies it, whose b_dec is as wide as the output
    if cfg.get("apply_b_dec_to_input", True) and not transcoder:
        w = common.fold_input_shift(w, w["b_dec"])
    if form == "topk" and cfg.get("rescale_acts_by_decoder_norm", False):
        w = common.fold_feature_scale(w, np.linalg.norm(w["W_dec"], axis=1), folder)
    w = _unscaled(w, cfg, folder)
    kept = cfg["metadata"].keys() - {"hook_name", "hook_name_out", "sae_lens_version", *(("module",) if site else ())}
    meta = {key: cfg["metadata"][key] for key in kept}  # `site` is in place of the module that the file names
    meta |= {} if site else movers(meta.get("model_from_pretrained_kwargs"))
    return common.build(w, sites, form, folder, meta, common.size(cfg, "k", path) if form == "topk" else None, module)


def write(sae: SAE, folder: str | Path, dtype: str = "float32") -> Path:
    """Write an SAE so that `load_sae` and SAELens read it; see `save_sae`."""
    folder = Path(folder)
    sae = sae.fold() if sae.architecture == "batchtopk" or (sae.is_transcoder and sae.architecture == "gated") else sae
    name = _name(sae)
    weights = {theirs: getattr(sae, entry.split()[0]) for theirs, entry in _LAYOUTS[name][1].items()}
    weights |= {"W_skip": sae.W_skip.T} if "W_skip" in weights else {}
    return common.save(folder / WEIGHTS, weights, folder / CONFIG, _config(sae, name, dtype), dtype)


def _name(sae: SAE) -> str:
    if not sae.is_transcoder:
        return sae.architecture
    if sae.architecture == "topk":
        raise ValueError(f"SAELens has no topk transcoder such as that at {sae.site_in}: formats.sparsify writes it")
    skip = "" if sae.W_skip is None else "skip_"
    return {"standard": "", "jumprelu": "jumprelu_"}[sae.architecture] + skip + "transcoder"


def _config(sae: SAE, architecture: str, dtype: str) -> dict[str, Any]:
    named = {"hook_name": name_of(sae.site_in), "hook_head_index": None, "sae_lens_version": LAYOUT_VERSION}
    meta = dict(sae.metadata) | named
    cfg = {"architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": dtype, "device": "cpu"}
    shape = "hook_z" if sae.site_in.name == "z" else "none"  # SAELens flattens the heads, as our site is
    cfg |= {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": shape}
    if sae.architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if sae.is_transcoder:
        meta["hook_name_out"] = name_of(sae.site_out)
        cfg |= {"d_out": sae.d_out, "hook_name_out": name_of(sae.site_out)}
    return cfg | {"metadata": meta}


def _new_style(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config in the form of version 6, with what we cannot read refused."""
    if not isinstance(cfg.get("metadata"), dict):
        hook = cfg.get("hook_name", cfg.get("hook_point"))
        if hook is None:
            raise ValueError(f"{path} lacks metadata with a hook_name, and hook_point: it is no config of SAELens")
        head = cfg.get("hook_head_index", cfg.get("hook_point_head_index"))
        activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
        meta = {key: cfg[key] for key in _META if key in cfg}
        cfg = {"architecture": "standard"} | cfg | {"metadata": meta | {"hook_name": hook, "hook_head_index": head}}
        if activation == "topk":
            cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {}).get("k")}
        elif activation != "relu":
            raise ValueError(f"{path} has the activation function {activation!r}; we read relu and topk")
    if cfg.get("architecture") not in _LAYOUTS:
        read = f"we read {', '.join(_LAYOUTS)}. sae-lens writes its others as jumprelu with save_inference_model"
        raise ValueError(f"{path} has architecture {cfg.get('architecture')!r}; {read}")
    if cfg["metadata"].get("hook_head_index") is not None:
        head = cfg["metadata"]["hook_head_index"]
        raise ValueError(f"{path} is for the single head {head} of its hook; we read SAEs of whole sites")
    return cfg


def _sites(site: Sites | None, cfg: dict[str, Any], path: Path, transcoder: bool) -> tuple[Sites, str]:
    """The sites of TransformerLens' hooks, or of Hugging Face's modules, for what the module returns."""
    named = {"hook_name": cfg["metadata"].get("hook_name")}
    named["hook_name_out"] = cfg["metadata"].get("hook_name_out") or cfg.get("hook_name_out")
    if transcoder and not site and not named["hook_name_out"]:
        raise ValueError(f"{path} is for a transcoder but names no hook_name_out: pass site=(input, output)")
    sites, module = settle(site, named, path)
    if transcoder and not site and sites[0] == sites[1]:
        raise ValueError(f"{path} is for a transcoder, but its input and its output are both {sites[0]}: pass site=")
    return sites, module


def _unscaled(w: Weights, cfg: dict[str, Any], folder: Path) -> Weights:
    """Folds the scaling of the input by its average norm, one number for all tokens.

    layer_norm and constant_norm_rescale divide each token by its own spread or norm and multiply the reconstruction by
    it: not an affine map of x, so that no weights do the same. They are refused, as is covariance_whitening, whose
    statistics no file carries.
    """
    how = cfg.get("normalize_activations")
    if how in (None, False, "none"):
        return w
    if how not in (True, "expected_average_only_in"):
        per_token = how in ("layer_norm", "constant_norm_rescale")
        why = ": the SAE sees each token rescaled by its own norm, which no weights do" if per_token else ""
        has = f"{folder / CONFIG} has normalize_activations = {how!r}{why}"
        raise ValueError(f"{has}; we read none and expected_average_only_in")
    scaler = folder / SCALER
    scale = common.read_json(scaler).get("scaling_factor") if scaler.is_file() else None
    scale = scale or cfg.get("norm_scaling_factor") or _KNOWN_SCALES.get(folder.name)
    if not isinstance(scale, float | int) or scale <= 0:
        wanted = f'write {{"scaling_factor": sqrt(d_in) / mean norm of the activations}} to {scaler}'
        has = f"{folder / CONFIG} has normalize_activations = expected_average_only_in"
        raise ValueError(f"{has}, but the scale is nowhere: {wanted}")
    return common.fold_scales(w, float(scale), 1 / float(scale))
