"""SAEs on disk, in the layout of SAELens (v6): a folder with `cfg.json` and `sae_weights.safetensors`.

A suite is a folder of such folders, one per SAE, named after the site that is encoded: `resid_pre.3`, `mlp_in.0`.
Names, shapes and finiteness are checked against `cfg.json` before an SAE is made; nothing in a file is executed.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from icl_lib.models import ModelConfig, Site
from icl_lib.saes.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# SAELens' architectures that we read: our form, and the name of each of our weights in the file
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_JUMP = _PLAIN | {"threshold": "threshold"}
_GATED = {**_PLAIN, "b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}
_LAYOUTS = {
    "standard": ("standard", _PLAIN),
    "jumprelu": ("jumprelu", _JUMP),
    "gated": ("gated", _GATED),
    "transcoder": ("standard", _PLAIN),
    "jumprelu_transcoder": ("jumprelu", _JUMP),
}
_DTYPES = ("float32", "float16", "bfloat16")


def save_sae(sae: SAE, folder: str | Path, dtype: str = "float32") -> Path:
    """Write an SAE so that `load_sae` and SAELens read it; the matrices in `dtype`, the vectors always in float32.

    SAELens knows no gated transcoder: one is written as the `jumprelu_transcoder` it folds to. Files appear whole or not
    at all. Raises `ValueError` if `dtype` is not float32, float16 or bfloat16, or if a weight is not finite in it.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    folder = Path(folder)
    sae = sae.fold() if sae.is_transcoder and sae.architecture == "gated" else sae
    architecture = sae.architecture
    if sae.is_transcoder:
        architecture = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}[architecture]
    _, names = _LAYOUTS[architecture]
    weights = {theirs: getattr(sae, ours) for ours, theirs in names.items()}
    weights = {name: w.astype(dtype if w.ndim == 2 else "float32") for name, w in weights.items()}
    _check_finite(weights, f"{folder} (as {dtype})")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, lambda path: save_file(weights, path))
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(_config(sae, architecture, dtype), indent=2) + "\n"))
    return folder


def load_sae(name: str | Path, revision: str | None = None) -> SAE:
    """The SAE in a folder, or in `owner/repository/path` on the hub; its weights become float32.

    What SAELens does to the input is folded into the biases (`apply_b_dec_to_input`). Raises `FileNotFoundError` if
    a file is missing and `ValueError` on an architecture or normalisation that we do not know, on a missing, unknown or
    misshapen tensor, on values that are not finite, and on a file cut short.
    """
    folder = _fetch(str(name), revision)
    cfg = _read_config(folder / CONFIG)
    form, names = _LAYOUTS[cfg["architecture"]]
    found = _read_weights(folder / WEIGHTS, _shapes(cfg, names))
    weights = {ours: found[theirs].astype(jnp.float32) for ours, theirs in names.items()}
    meta = cfg["metadata"]
    try:
        site_in = Site.parse(meta["hook_name"])
        site_out = Site.parse(meta.get("hook_name_out") or cfg.get("hook_name_out") or meta["hook_name"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: metadata.hook_name must name a site of ours ({error})") from error
    if cfg.get("apply_b_dec_to_input", False) and site_in == site_out:
        weights |= _subtract_from_input(weights)
    extra = {k: v for k, v in meta.items() if k not in ("hook_name", "hook_name_out") and isinstance(v, str | int | float | bool)}
    return SAE(**weights, site_in=site_in, site_out=site_out, architecture=form, metadata=tuple(sorted(extra.items())))


def save_suite(suite: Mapping[Site, SAE], folder: str | Path, dtype: str = "float32") -> Path:
    """Write each SAE of a suite to `folder/<site>.<layer>`; see `save_sae`."""
    for site, sae in suite.items():
        save_sae(sae, Path(folder) / _folder_name(site), dtype)
    return Path(folder)


def load_suite(
    source: str | Path | Sequence[str | Path], config: ModelConfig | None = None, layers: Iterable[int] | None = None
) -> dict[Site, SAE]:
    """All SAEs in the sub-folders of a folder, or of several, keyed by the site they encode, in the order of sites.

    With `layers`, only the SAEs of these. With `config`, layers and widths are held to that model. Raises `FileNotFoundError`
    if there is no SAE, and `ValueError` if one does not fit the model or two encode the same site, besides what `load_sae` raises.
    """
    folders = [Path(f) for f in ([source] if isinstance(source, str | Path) else source)]
    wanted = None if layers is None else set(layers)
    paths = [path.parent for folder in folders for path in sorted(folder.glob(f"*/{CONFIG}"))]
    if not paths:
        raise FileNotFoundError(
            f"{', '.join(map(str, folders))} has no sub-folder with a {CONFIG}: a suite is what save_suite writes, one folder per SAE"
        )
    suite: dict[Site, SAE] = {}
    for path in paths:
        sae = load_sae(path)
        if wanted is not None and sae.site_in.layer not in wanted:
            continue
        if sae.site_in in suite:
            raise ValueError(f"{path} encodes {sae.site_in}, and so does another SAE of this suite: keep one per site")
        if config is not None:
            check_fit(sae, config, str(path))
        suite[sae.site_in] = sae
    return dict(sorted(suite.items()))


def check_fit(sae: SAE, config: ModelConfig, name: str) -> None:
    """Raises `ValueError` naming the SAE, its site and both sizes if it does not fit the model."""
    for what, size, site in (("d_in", sae.d_in, sae.site_in), ("d_out", sae.d_out, sae.site_out)):
        if site.layer is not None:
            config.check_layer(site.layer, f"layer of the SAE {name} at {site}")
        if size != config.d_model:
            raise ValueError(
                f"the SAE {name} at {site} has {what} = {size}, but the model has d_model = {config.d_model}: "
                "it was trained on another model; pass the suite of this one or train one with train_suite"
            )


def _folder_name(site: Site) -> str:
    return site.name if site.layer is None else f"{site.name}.{site.layer}"


def _config(sae: SAE, architecture: str, dtype: str) -> dict[str, Any]:
    meta = dict(sae.metadata) | {"hook_name": str(sae.site_in), "hook_head_index": None}
    cfg = {"architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": dtype, "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
    if sae.is_transcoder:
        meta["hook_name_out"] = str(sae.site_out)
        cfg |= {"d_out": sae.d_out, "hook_name_out": str(sae.site_out)}
    return cfg | {"metadata": meta}


def _replace(path: Path, write) -> None:
    """Write under another name first, so that an interrupted run leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def _fetch(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    parts = name.strip("/").split("/")
    if len(parts) < 2 or name.startswith(("/", ".")):
        raise FileNotFoundError(f"no folder {name!r}: pass a folder with {CONFIG} and {WEIGHTS}, or owner/repository/path on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, inside = "/".join(parts[:2]), "/".join(parts[2:])
    files = [f"{inside}/{file}".lstrip("/") for file in (CONFIG, WEIGHTS)]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files)) / inside
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no folder {name!r}, and the hub gave no repository {repo!r} ({type(error).__name__}): check the path, the id or the network"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: an SAE folder holds {CONFIG} beside {WEIGHTS}")
    try:
        cfg = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): is it cut short?") from error
    missing = [key for key in ("architecture", "d_in", "d_sae", "metadata") if key not in cfg]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is not a SAELens v6 config; load and save it with a current sae-lens")
    if cfg["architecture"] not in _LAYOUTS:
        raise ValueError(f"{path} has architecture {cfg['architecture']!r}; we read {', '.join(_LAYOUTS)}")
    for key in ("normalize_activations", "reshape_activations"):
        if cfg.get(key, "none") != "none":
            raise ValueError(f"{path} has {key} = {cfg[key]!r}; we read SAEs without it: fold it into the weights first")
    return cfg


def _shapes(cfg: dict[str, Any], names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    d_out = cfg.get("d_out", d_in)
    matrices = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    return {theirs: matrices.get(ours, (d_sae,)) for ours, theirs in names.items()}


def _read_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: an SAE folder holds it beside {CONFIG}")
    try:
        with safe_open(path, framework="flax") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in found]
            problems += [f"unknown {name} {shape}" for name, shape in found.items() if name not in shapes]
            problems += [f"{n} has shape {found[n]}, expected {s}" for n, s in shapes.items() if found.get(n, s) != s]
            if problems:
                raise ValueError(f"{path} does not hold what its {CONFIG} says: {'; '.join(problems)}")
            weights = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, struct.error, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): is it cut short? Save or download it again") from error
    _check_finite(weights, str(path))
    return weights


def _check_finite(weights: Mapping[str, Array], where: str) -> None:
    bad = [name for name, w in weights.items() if not bool(jnp.isfinite(w).all())]
    if bad:
        raise ValueError(f"{where}: {', '.join(bad)} has values that are not finite: train it again or store it as float32")


def _subtract_from_input(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Biases with which encoding x does what encoding x - b_dec did."""
    shift = weights["b_dec"] @ weights["W_enc"]
    biases = {"b_enc": weights["b_enc"] - shift}
    if "b_mag" in weights:
        biases["b_mag"] = weights["b_mag"] - shift * jnp.exp(weights["r_mag"])
    return biases
