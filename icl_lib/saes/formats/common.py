"""What the readers and writers of SAE files share: checked JSON and tensors, files that appear whole, folding of normalisations.

A reader turns a file into `Weights`, numpy arrays of float32 by our names, and changes these until they take plain
activations: each `fold_*` here is one step of that, exact but for rounding.
"""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from icl_lib.models import Site
from icl_lib.saes.sae import SAE

Weights = dict[str, np.ndarray]
Sites = tuple[Site, Site]  # what is encoded, what is reconstructed
# The first axis of our matrices (d, F, o: width of the input, latents, width of the output). Others are transposed.
_FIRST_AXIS = {"W_enc": "d", "W_dec": "F", "W_skip": "d"}
# Names of modules and folders by which other libraries say where an SAE sits
_PLACES = (
    (r"resid_(?:post|out)_?layer_?(\d+)", "resid_post"),
    (r"resid_(?:pre|in)_?layer_?(\d+)", "resid_pre"),
    (r"(?:attn|attention)_out_?layer_?(\d+)", "attn_out"),
    (r"mlp_out_?layer_?(\d+)", "mlp_out"),
    (r"(?:model\.|gpt_neox\.)?layers[._](\d+)", "resid_post"),
    (r"(?:model\.|gpt_neox\.)?layers[._](\d+)\.(?:self_attn|attention|attn)", "attn_out"),
    (r"(?:model\.|gpt_neox\.)?layers[._](\d+)\.mlp", "mlp_out"),
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `FileNotFoundError` or `ValueError` naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: an SAE needs it beside its weights")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): is it cut short? Download or save it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object with the settings of an SAE")
    return value


def read_safetensors(path: Path) -> Weights:
    """All tensors of a file as float32. Raises `FileNotFoundError`, or `ValueError` if it is cut short."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it holds the weights of an SAE")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name).astype(np.float32, copy=False) for name in file.keys()}
    except (SafetensorError, struct.error, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): is it cut short? Save or download it again"
        ) from error


def size(cfg: Mapping[str, Any], key: str, path: Path) -> int:
    """`cfg[key]`, a positive whole number. Raises `ValueError` if it is missing or something else."""
    value = cfg.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path} must give {key} as a whole number of 1 or more, got {value!r}")
    return value


def take(found: Mapping[str, np.ndarray], spec: Mapping[str, str], path: Path, **sizes: int) -> Weights:
    """The tensors of `found` by our names and in our layout.

    `spec` maps a name in the file to ours and to its axes, e.g. {"encoder.weight": "W_enc F d"}; a scalar has none. `sizes`
    are lengths of axes known from elsewhere; others are set by the first tensor that has them. Raises `ValueError`
    naming every missing, unknown and misshapen tensor.
    """
    missing = [name for name in spec if name not in found]
    problems = [f"missing {name}" for name in missing]
    problems += [f"unknown {name} {value.shape}" for name, value in found.items() if name not in spec]
    weights = {}
    for theirs, entry in spec.items():
        ours, *axes = entry.split()
        if theirs in missing:
            continue
        value = found[theirs]
        if value.ndim == len(axes):
            for axis, length in zip(axes, value.shape, strict=True):
                sizes.setdefault(axis, length)
        expected = tuple(sizes.get(axis, -1) for axis in axes)
        if value.shape != expected:
            shape = ", ".join(f"{axis} = {sizes[axis]}" if axis in sizes else axis for axis in axes)
            expected = expected if -1 not in expected else f"({shape})"
            problems.append(f"{theirs} has shape {value.shape}, expected {expected}")
        weights[ours] = value.T if len(axes) == 2 and axes[0] != _FIRST_AXIS[ours] else value
    if problems:
        raise ValueError(f"{path} does not hold the tensors of its kind of SAE: {'; '.join(problems)}")
    return weights


def check_finite(weights: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` naming the weights that have NaN or inf in them."""
    bad = [name for name, w in weights.items() if not np.isfinite(np.asarray(w)).all()]
    if bad:
        raise ValueError(
            f"{where}: {', '.join(bad)} has values that are not finite: train it again or store it as float32"
        )


def build(
    w: Weights,
    sites: Sites,
    architecture: str,
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    k: int | None = None,
) -> SAE:
    """The SAE of these weights. Metadata keeps plain values only. Raises `ValueError` naming `path` if they do not make one."""
    check_finite(w, str(path))
    plain = {key: value for key, value in (metadata or {}).items() if isinstance(value, str | int | float | bool)}
    arrays = {name: jnp.asarray(np.ascontiguousarray(value, np.float32)) for name, value in w.items()}
    try:
        return SAE(
            **arrays,
            site_in=sites[0],
            site_out=sites[1],
            architecture=architecture,
            k=k,
            metadata=tuple(sorted(plain.items())),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fold_input_scale(w: Weights, scale: float) -> Weights:
    """Weights with which x does what x * scale did."""
    return w | {name: w[name] * np.float32(scale) for name in ("W_enc", "W_skip") if name in w}


def fold_input_shift(w: Weights, shift: np.ndarray) -> Weights:
    """Weights with which x does what x - shift did (in the encoder)."""
    moved = shift @ w["W_enc"]
    out = w | {"b_enc": w["b_enc"] - moved}
    return out | {"b_mag": w["b_mag"] - moved * np.exp(w["r_mag"])} if "b_mag" in w else out


def fold_output_scale(w: Weights, scale: float) -> Weights:
    """Weights whose reconstruction is multiplied by scale."""
    return w | {name: w[name] * np.float32(scale) for name in ("W_dec", "b_dec", "W_skip") if name in w}


def fold_feature_scale(w: Weights, scale: np.ndarray, path: Path) -> Weights:
    """The same function, its features multiplied by `scale` (F,), which must be positive. Not for gated SAEs."""
    if not (scale > 0).all():
        raise ValueError(f"{path}: latents {np.flatnonzero(scale <= 0)[:5].tolist()} have a scale that is not positive")
    scaled = {"W_enc": w["W_enc"] * scale[None, :], "W_dec": w["W_dec"] / scale[:, None]}
    return w | scaled | {name: w[name] * scale for name in ("b_enc", "threshold") if name in w}


def place(name: str) -> Site | None:
    """The site that a module or folder is named after, e.g. "resid_out_layer3" or "layers.3.mlp"; None for other names."""
    if name in ("embed", "embed_in", "embed_tokens", "model.embed_tokens", "gpt_neox.embed_in"):
        return Site("embed")
    for pattern, site in _PLACES:
        if match := re.fullmatch(pattern, name):
            return Site(site, int(match[1]))
    return None


def hook(name: Any, path: Path) -> Site:
    """The site of a TransformerLens hook. Raises `ValueError` naming the file if we have none."""
    try:
        return Site.parse(str(name))
    except ValueError as error:
        raise ValueError(
            f"{path}: its hook must name a site of ours ({error}); pass site= to say where it sits"
        ) from error


def no_site(path: Path) -> ValueError:
    """The error of a file that does not say where its SAE sits."""
    return ValueError(
        f'{path}: neither its settings nor its folder say where the SAE sits: pass site=Site("resid_post", 3) or the like'
    )
