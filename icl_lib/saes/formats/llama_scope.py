r"""Llama Scope: a folder with `hyperparams.json` and `checkpoints/final.safetensors`.

JumpReLU with one threshold for all latents, trained on inputs scaled to a mean norm of $\sqrt d$. With $n$ that scale,
$f = \mathrm{JumpReLU}_{n\theta}(n x W_{enc} + b_{enc})$ and $\hat x = (f W_{dec} + b_{dec}) / n_{out}$, as in sae-lens.
Source: He et al. (2024), "Llama Scope"; the loader of sae-lens 6.54, with which tests/golden compares.
"""

import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from icl_lib.files.write import replace_file, write_json
from icl_lib.saes.formats import common
from icl_lib.saes.formats.places import Sites, located, name_of, no_site
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
    if (
        not isinstance(theta, int | float)
        or theta < 0
        or not isinstance(norms, dict)
        or not all(norms.get(key, 0) > 0 for key in ("in", "out"))
    ):
        raise ValueError(
            f"{path} must give jump_relu_threshold and dataset_average_activation_norm with in and out, got {theta} "
            f"and {norms}"
        )
    d = common.size(cfg, "d_model", path)
    w = common.take(
        common.read_safetensors(folder / WEIGHTS), _SPEC, folder / WEIGHTS, d=d, o=d, F=common.size(cfg, "d_sae", path)
    )
    # 1 where decoder rows have norm 1, as in the published files
    size = np.linalg.norm(w["W_dec"], axis=1) if cfg.get("sparsity_include_decoder_norm") else np.float32(1)
    scale, scale_out = (math.sqrt(d) / norms[key] for key in ("in", "out"))
    w = common.fold_output_scale(common.fold_input_scale(w, scale), 1 / scale_out)
    w = w | {"threshold": np.full(len(w["b_enc"]), theta * scale, np.float32) / size}
    named, module = (site, "") if site else located(cfg, path)
    if named is None:
        raise no_site(folder)
    return common.build(w, named, "jumprelu", folder, module=module)


def write(sae: SAE, folder: str | Path, threshold: float, mean_norm: float = 1.0) -> Path:
    """Write a jumprelu SAE as Llama Scope does, for inputs of that mean norm. All thresholds must be `threshold`."""
    sae, folder, scale = sae.fold(), Path(folder), math.sqrt(sae.d_in) / mean_norm
    if not np.allclose(sae.threshold, threshold):
        raise ValueError(
            f"Llama Scope has one threshold for all latents, not {float(sae.threshold.min())} to "
            f"{float(sae.threshold.max())}"
        )
    w = common.arrays(sae)
    w = common.fold_output_scale(common.fold_input_scale(w, 1 / scale), scale)
    tensors = {"encoder.weight": w["W_enc"].T.copy(), "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T.copy()}
    cfg = {"d_model": sae.d_in, "d_sae": sae.d_sae, "act_fn": "jumprelu", "jump_relu_threshold": threshold / scale}
    cfg |= {"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": mean_norm, "out": mean_norm}}
    cfg |= {"hook_point_in": name_of(sae.site_in), "hook_point_out": name_of(sae.site_out)}
    cfg |= {"apply_decoder_bias_to_pre_encoder": False}
    replace_file(folder / WEIGHTS, lambda partial: save_file(tensors | {"decoder.bias": w["b_dec"]}, partial))
    write_json(folder / CONFIG, cfg)
    return folder
