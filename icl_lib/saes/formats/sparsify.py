"""Files of the library sparsify, all topk: a folder named after its hookpoint, with `cfg.json` and `sae.safetensors`.

`write` adds our sites and metadata to `cfg.json`, which sparsify skips over: a folder of any name is then read back.

Source: eai-sparsify 1.3.3, with which tests/golden compares. (sae-lens transposes the decoder of these by mistake.)
"""

from pathlib import Path

from icl_lib.models import Site
from icl_lib.saes.formats import common
from icl_lib.saes.formats.places import Sites, located, name_of, no_site, site_named
from icl_lib.saes.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
FILES = (CONFIG, WEIGHTS)
_SPEC = {"encoder.weight": "W_enc F d", "encoder.bias": "b_enc F", "W_dec": "W_dec F o", "b_dec": "b_dec o"}


def read(folder: Path, site: Sites | None = None, variant: str | None = None) -> SAE:
    """The SAE or transcoder in a folder of sparsify; see `load_sae`. An SAE encodes x - b_dec, a transcoder x."""
    path = folder / CONFIG
    cfg = common.read_json(path)
    transcoder = bool(cfg.get("transcode", False))
    d_in, k = common.size(cfg, "d_in", path), common.size(cfg, "k", path)
    d_sae = cfg.get("num_latents") or d_in * common.size(cfg, "expansion_factor", path)
    common.check_settings(cfg, path, "topk")
    spec = _SPEC | ({"W_skip": "W_skip o d"} if cfg.get("skip_connection", False) else {})
    w = common.take(common.read_safetensors(folder / WEIGHTS), spec, folder / WEIGHTS, d=d_in, F=d_sae, o=d_in)
    w = w if transcoder else common.fold_input_shift(w, w["b_dec"])
    named = {key: cfg[key] for key in cfg if key != "site_out" or "site_in" in cfg}
    sites, module = (site, "") if site else located(named, path)
    sites, module = (sites, module) if sites else _sites(folder, transcoder)
    meta = {key: value for key, value in (cfg.get("metadata") or {}).items() if key != "module" or not site}
    return common.build(w, sites, "topk", folder, meta, k, module)


def write(sae: SAE, folder: str | Path, dtype: str = "float32") -> Path:
    """Write a topk SAE or transcoder as sparsify does, matrices in `dtype`, by its custom into `layers.3` or
    `layers.3.mlp`. Raises `ValueError` on another form, on a transcoder between widths, or if a weight overflows."""
    if sae.architecture != "topk" or sae.d_in != sae.d_out:
        has = f"a {sae.architecture} one, {sae.d_in} to {sae.d_out}"
        raise ValueError(f"sparsify's files are for topk SAEs of one width, got {has}")
    folder = Path(folder)
    w = common.arrays(sae)
    w = w if sae.is_transcoder else common.fold_input_shift(w, -w["b_dec"])
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    tensors |= {"W_skip": w["W_skip"].T} if "W_skip" in w else {}
    cfg = {"activation": "topk", "expansion_factor": 1, "num_latents": sae.d_sae, "k": sae.k, "d_in": sae.d_in}
    cfg |= {"multi_topk": False, "normalize_decoder": False}
    cfg |= {"skip_connection": "W_skip" in w, "transcode": sae.is_transcoder}
    cfg |= {"site_in": name_of(sae.site_in), "site_out": name_of(sae.site_out), "metadata": dict(sae.metadata)}
    return common.save(folder / WEIGHTS, tensors, folder / CONFIG, cfg, dtype)


def _sites(folder: Path, transcoder: bool) -> tuple[Sites, str]:
    name = folder.absolute().name
    found = site_named(name)
    if transcoder:
        if found is None or found.name != "mlp_out":
            raise ValueError(f"{folder}: transcoders other than layers.N.mlp have no default: pass site=(in, out)")
        return (Site("mlp_in", found.layer), found), name
    if found is None:
        raise no_site(folder)
    return (found, found), name
