"""Per-layer transcoders as circuit-tracer reads them: a `layer_3.safetensors` for each MLP, e.g. mwhanna's for Qwen3.

The encoder is stored as (d_sae, d_in), and a `W_skip` may be there. `config.yaml` (or another of `common.BESIDE`) says
what is read and written (`feature_input_hook`, `feature_output_hook`), the `activation` and `k`; without, or with none
of these in it, it is a ReLU from what the MLP reads to what it adds. `activation_function.threshold` or `k` among the
tensors say JumpReLU and topk. (circuit-tracer's topk keeps negative values where fewer than k are positive, ours keeps
none.) Sources: circuit-tracer, single_layer_transcoder.py; the loader of sae-lens 6.54, with which tests/golden
compares.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from icl_lib.files.write import replace_file
from icl_lib.models import Site
from icl_lib.saes.formats import common
from icl_lib.saes.formats.places import Sites, settle
from icl_lib.saes.sae import SAE

NAME = re.compile(r"layer_(\d+)\.safetensors")
PATTERNS = tuple(f"layer_{'[0-9]' * digits}.safetensors" for digits in (1, 2, 3))  # the same, as the hub takes it
_SPEC = {"W_enc": "W_enc F d", "b_enc": "b_enc F", "W_dec": "W_dec F o", "b_dec": "b_dec o"}
_OPTIONAL = {"W_skip": "W_skip o d", "activation_function.threshold": "threshold F", "k": "k"}


def read(path: Path, site: Sites | None = None, variant: str | None = None) -> SAE:
    """The transcoder in one file, as the settings beside it say; see `load_sae`."""
    layer = int(NAME.fullmatch(path.name)[1])
    found, (cfg, file) = common.read_safetensors(path), common.read_beside(path.parent)
    form, k = _activation(found, cfg, path, file)
    common.check_settings(
        cfg, file, {"standard": "relu"}.get(form, form), model_kind=(None, "transcoder_set", "transcoder"),
        skip_connection=(None, "W_skip" in found),
        architecture=(None, "transcoder", "skip_transcoder", "jumprelu_transcoder"),
    )  # fmt: skip
    sites, module = settle(site, cfg, file, (Site("mlp_in", layer), Site("mlp_out", layer)), layer)
    spec = _SPEC | {name: entry for name, entry in _OPTIONAL.items() if name in found}
    w = common.take(found, spec, path)
    w.pop("k", None)
    if (w.get("threshold", np.zeros(1)) < 0).any():
        raise ValueError(f"{path} has thresholds below 0, with which latents would be negative: ours are not")
    meta = {key: cfg[key] for key in ("model_name",) if key in cfg}
    return common.build(w, sites, form, path, meta, k, module)


def _activation(found: dict[str, np.ndarray], cfg: dict[str, Any], path: Path, file: Path) -> tuple[str, int | None]:
    """Our form and k, from the tensors and, for topk, from the settings."""
    named = {str(cfg[key]).lower() for key in common.ACTIVATIONS if cfg.get(key)}
    k = {int(value) for value in (found.get("k"), cfg.get("k"), cfg.get("top_k")) if value is not None}
    if named == {"topk"} or (not named and k):
        if len(k) != 1:
            raise ValueError(f"{file} has activation topk with k {sorted(k) or 'missing'}, {path.name} too: give one")
        return "topk", k.pop()
    if "k" in found:
        raise ValueError(f"{path} has k = {int(found['k'])} as a tensor, but {file} has activation {min(named)!r}")
    return "jumprelu" if "activation_function.threshold" in found else "standard", None


def write(sae: SAE, folder: str | Path) -> Path:
    """Write a ReLU transcoder to `folder/layer_N.safetensors`. Returns the file."""
    if sae.architecture != "standard" or not sae.is_transcoder:
        raise ValueError(f"these files are for standard transcoders, got a {sae.architecture} one at {sae.site_in}")
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors |= {} if sae.W_skip is None else {"W_skip": sae.W_skip.T}
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    path = Path(folder) / f"layer_{sae.site_in.layer}.safetensors"
    replace_file(path, lambda partial: save_file(tensors, partial))
    return path
