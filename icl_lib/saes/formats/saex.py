r"""Files of saex, the library with which the authors of ICL-SFC trained: `cfg.json` and `sae_weights.safetensors`.

Their names are SAELens' but the contents are not. With $n = \sqrt d / \bar n_{in}$, $m = \bar n_{out} / \sqrt d$ and
$s = \mathrm{softplus}(s_{gate})\,c$, where $\bar n$ are mean norms and c is `scaling_factor`, what was trained is

$f = 1[n x W_{enc} + b_{enc} > 0]\,\mathrm{ReLU}(n x W_{enc}\,s + b_{gate})$,  $\hat x = m\,(f W_{dec} + b_{dec})$.

The authors' experiments used another form, `variant="paper"`: $p = (n x W_{enc} + b_{enc})\,s$, and f is p where it is
above $\max(0, b_{gate} - b_{enc} s)$. Its gate is not the one that was trained, and its magnitude lacks $b_{gate}$.

`mean_norm` is 1 exactly where training did not normalise (the suite for Phi-3); then, or without it, n = m = 1.
Sources: neverix/saex, saex/sae.py; neverix/micrlhf-progress, micrlhf/utils/load_sae.py.
"""

import math
import re
from pathlib import Path

import numpy as np

from icl_lib.models import Site
from icl_lib.saes.formats import common
from icl_lib.saes.formats.common import Weights
from icl_lib.saes.formats.places import Sites, settle
from icl_lib.saes.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VARIANTS = ("paper",)
_PLAIN = {"W_enc": "W_enc d F", "b_enc": "b_enc F", "W_dec": "W_dec F o", "b_dec": "b_dec o"}
_OPTIONAL = {"scaling_factor": "c F", "s_gate": "s_gate F", "b_gate": "b_mag F", "mean_norm": "n", "tgt_mean_norm": "m"}
_KINDS = {"residual": ("resid_pre",) * 2, "attn_out": ("attn_out",) * 2, "transcoder": ("mlp_in", "mlp_out")}


def read(folder: Path, site: Sites | None = None, variant: str | None = None) -> SAE:
    """The SAE in a folder of saex, in the form that was trained or in that of the paper; see `load_sae`."""
    path, config = folder / WEIGHTS, folder / CONFIG
    cfg = common.read_json(config)
    common.check_settings(cfg, config, ("relu", "gated"), architecture=(None, "gated", "standard"))
    found = common.read_safetensors(path)
    spec = _PLAIN | {name: entry for name, entry in _OPTIONAL.items() if name in found}
    if ("s_gate" in spec) != ("b_gate" in spec):
        raise ValueError(f"{path} must hold both s_gate and b_gate or neither, it has {', '.join(found)}")
    d = common.size(cfg, "d_in", config)
    w = _normalised(common.take(found, spec, path, d=d, F=common.size(cfg, "d_sae", config)))
    sites, module = settle(site, cfg, config, sites_in(folder))
    scale = w.pop("c", np.ones(w["b_enc"].shape, np.float32))
    meta = {"l1_coefficient": cfg.get("l1_coefficient"), "variant": variant or "trained"}
    meta |= {"folder": folder.name, "d_model": d}
    if "s_gate" not in w:  # plain ReLU, its features multiplied
        w = w | {"W_enc": w["W_enc"] * scale[None, :], "b_enc": w["b_enc"] * scale}
        return common.build(w, sites, "standard", folder, meta, module=module)
    s = np.logaddexp(0, w.pop("s_gate")) * scale
    if not (s > 0).all():
        bad = np.flatnonzero(s <= 0)[:5].tolist()
        raise ValueError(f"{path}: softplus(s_gate) * scaling_factor is not positive at {bad}")
    if variant == "paper":
        threshold = np.maximum(0, w.pop("b_mag") - w["b_enc"] * s)
        w = w | {"W_enc": w["W_enc"] * s[None, :], "b_enc": w["b_enc"] * s, "threshold": threshold}
        return common.build(w, sites, "jumprelu", folder, meta, module=module)
    return common.build(w | {"r_mag": np.log(s)}, sites, "gated", folder, meta, module=module)


def write(sae: SAE, folder: str | Path, mean_norm: float | None = None) -> Path:
    """Write a gated SAE as saex does, for inputs of that mean norm, or of a suite without normalisation (None)."""
    if sae.architecture != "gated":
        raise ValueError(f"saex' suites are gated, got a {sae.architecture} SAE at {sae.site_in}")
    folder = Path(folder)
    w = common.arrays(sae)
    if mean_norm is not None:
        w = common.fold_scales(w, mean_norm / math.sqrt(sae.d_in), math.sqrt(sae.d_in))
    tensors = {name: w[name] for name in _PLAIN} | {"b_gate": w["b_mag"]}
    tensors["s_gate"] = np.log(np.expm1(np.exp(w["r_mag"])))  # the inverse of softplus
    tensors["scaling_factor"] = np.ones(sae.d_sae, np.float32)
    tensors |= {"mean_norm": np.float32(mean_norm or 1.0), "tgt_mean_norm": np.float32(1.0)}
    cfg = {"d_in": sae.d_in, "dtype": "float32", "expansion_factor": sae.d_sae // sae.d_in, "l1_coefficient": 0.0}
    cfg |= {"train_batch_size": 1, "dead_feature_window": 1, "use_ghost_grads": True, "d_sae": sae.d_sae}
    return common.save(folder / WEIGHTS, tensors, folder / CONFIG, cfg)


def _normalised(w: Weights) -> Weights:
    """With the mean norms folded in and taken out."""
    root = math.sqrt(w["W_enc"].shape[0])
    norm = float(w.get("n", 1))
    target = float(w.get("m", norm))  # the oldest runs have one norm for both
    w = {name: value for name, value in w.items() if name not in ("n", "m")}
    return w if norm == 1 else common.fold_scales(w, root / norm, target / root)


def sites_in(folder: Path) -> Sites | None:
    """From a name like it-l12-attn_out-test-run-1-2.00E-05, or l16-test-run-3-4e-05 (the residual); None for others."""
    match = re.match(r"(?:it-)?l(\d+)-(?:(residual|attn_out|transcoder)-)?test-run", folder.absolute().name)
    return match and tuple(Site(name, int(match[1])) for name in _KINDS[match[2] or "residual"])
