r"""Llama Scope: a folder with `hyperparams.json` and `checkpoints/final.safetensors`.

JumpReLU with one threshold for all latents, trained on inputs scaled to a mean norm of $\sqrt d$. With $n$ that scale,
$f = \mathrm{JumpReLU}_{n\theta}(n x W_{enc} + b_{enc})$ and $\hat x = (f W_{dec} + b_{dec}) / n_{out}$, as in sae-lens.
Source: He et al. (2024), "Llama Scope"; the loader of sae-lens 6.54, with which tests/golden compares.
"""

import math
from pathlib import Path

import numpy as np

from icl_lib.saes.formats import common
from icl_lib.saes.formats.places import Sites, name_of, settle
from icl_lib.saes.sae import SAE

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
FILES = (CONFIG, WEIGHTS)
_SPEC = {"encoder.weight": "W_enc F d", "encoder.bias": "b_enc F"}
_SPEC |= {"decoder.weight": "W_dec o F", "decoder.bias": "b_dec o"}


def read(folder: Path, site: Sites | None = None, variant: str | None = None) -> SAE:
    """The SAE in a folder of Llama Scope; see `load_sae`."""
    path = folder / CONFIG
    cfg = common.read_json(path)
    common.check_settings(
        cfg, path, "jumprelu", "sparsity_include_decoder_norm", norm_activation=("dataset-wise",),
        sae_type=(None, "sae"),
        use_decoder_bias=(None, True),
    )  # fmt: skip
    theta, norms = cfg.get("jump_relu_threshold"), cfg.get("dataset_average_activation_norm")
    scaled = isinstance(norms, dict) and all(norms.get(key, 0) > 0 for key in ("in", "out"))
    if not isinstance(theta, int | float) or theta < 0 or not scaled:
        wanted = "jump_relu_threshold and dataset_average_activation_norm with in and out"
        raise ValueError(f"{path} must give {wanted}, got {theta} and {norms}")
    d, d_sae, weights = common.size(cfg, "d_model", path), common.size(cfg, "d_sae", path), folder / WEIGHTS
    w = common.take(common.read_safetensors(weights), _SPEC, weights, d=d, o=d, F=d_sae)
    # 1 where decoder rows have norm 1, as in the published files
    size = np.linalg.norm(w["W_dec"], axis=1) if cfg.get("sparsity_include_decoder_norm") else np.float32(1)
    scale, scale_out = (math.sqrt(d) / norms[key] for key in ("in", "out"))
    w = common.fold_scales(w, scale, 1 / scale_out)
    w = w | {"threshold": np.full(len(w["b_enc"]), theta * scale, np.float32) / size}
    sites, module = settle(site, cfg, path)
    return common.build(w, sites, "jumprelu", folder, module=module)


def write(sae: SAE, folder: str | Path, threshold: float, mean_norm: float = 1.0) -> Path:
    """Write a jumprelu SAE as Llama Scope does, for inputs of that mean norm. All thresholds must be `threshold`."""
    sae, folder, scale = sae.fold(), Path(folder), math.sqrt(sae.d_in) / mean_norm
    if not np.allclose(sae.threshold, threshold):
        low, high = float(sae.threshold.min()), float(sae.threshold.max())
        raise ValueError(f"Llama Scope has one threshold for all latents, not {low} to {high}")
    w = common.fold_scales(common.arrays(sae), 1 / scale, scale)
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    tensors |= {"decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}
    cfg = {"d_model": sae.d_in, "d_sae": sae.d_sae, "act_fn": "jumprelu", "jump_relu_threshold": threshold / scale}
    cfg |= {"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": mean_norm, "out": mean_norm}}
    cfg |= {"hook_point_in": name_of(sae.site_in), "hook_point_out": name_of(sae.site_out)}
    cfg |= {"apply_decoder_bias_to_pre_encoder": False}
    return common.save(folder / WEIGHTS, tensors, folder / CONFIG, cfg)
