"""What readers and writers of SAE files share: checked JSON and tensors, files that appear whole, normalisations.

A reader turns a file into `Weights`, numpy arrays of float32 by our names, and changes these until they take plain
activations: each `fold_*` here is one step of that, exact but for rounding.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from icl_lib.files.write import replace_file, write_json
from icl_lib.saes.formats.places import Sites, check_named
from icl_lib.saes.sae import SAE

Weights = dict[str, np.ndarray]
# The first axis of our matrices (d, F, o: width of the input, latents, width of the output). Others are transposed.
_FIRST_AXIS = {"W_enc": "d", "W_dec": "F", "W_skip": "d"}
_NO = (None, False, "none", "no", "", 0)
ACTIVATIONS = ("activation", "activation_fn", "activation_fn_str", "activation_function", "act_fn")
# What a config of any format may say that no reader of ours does: only these values are no change of what is computed.
_NEUTRAL = dict.fromkeys(
    (
        "normalize_activations", "norm_activation", "normalize_input", "normalize_inputs", "input_normalization",
        "layer_norm",
        "normalize", "apply_b_dec_to_input", "apply_decoder_bias_to_pre_encoder", "rescale_acts_by_decoder_norm",
        "sparsity_include_decoder_norm", "use_glu_encoder", "embed_skip", "gram_lookup", "signed",
    ),
    _NO,
)  # fmt: skip
BESIDE = ("cfg.json", "config.json", "config.yaml", "config.yml")  # where a lone file of weights may have its settings


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON or YAML file. Raises `FileNotFoundError` or `ValueError` naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: an SAE needs it beside its weights")
    kind = path.suffix.lstrip(".").upper()
    try:
        value = json.loads(path.read_text()) if kind == "JSON" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not {kind} ({error}): is it cut short? Download or save it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object with the settings of an SAE")
    return value


def read_beside(folder: Path) -> tuple[dict[str, Any], Path]:
    """The settings that lie beside a file of weights, of all files that there may be, and the last that was read.
    Raises `ValueError` if two of the files disagree."""
    cfg, path = {}, folder
    for path in (folder / name for name in BESIDE if (folder / name).is_file()):
        found = read_json(path)
        for key in (key for key in cfg.keys() & found.keys() if cfg[key] != found[key]):
            raise ValueError(f"{path} has {key} = {found[key]!r}, and another file beside it {cfg[key]!r}")
        cfg |= found
    return cfg, path


def check_settings(
    cfg: Mapping[str, Any], path: Path, activation: str | Sequence[str], *handled: str, **allowed
) -> None:
    """Holds a config to what is read: no setting in it may say that something else is computed.

    `activation` names those that are read, whatever the key is called; `handled` keys are the reader's own business;
    `allowed` are further keys and their values. Keys that are not known cannot change the result. Raises `ValueError`
    naming the file, the key, its value and what we read.
    """
    names = (None, activation) if isinstance(activation, str) else (None, *activation)
    rules = _NEUTRAL | dict.fromkeys(ACTIVATIONS, names) | allowed
    for key in (key for key in rules if key in cfg and key not in handled):
        value = cfg[key].lower().replace("jump_relu", "jumprelu") if isinstance(cfg[key], str) else cfg[key]
        if value not in rules[key]:
            wanted = ", ".join(str(known) for known in rules[key] if known not in _NO) or "none"
            raise ValueError(f"{path} has {key} {cfg[key]!r}; we read {wanted}")


def arrays(sae: SAE) -> Weights:
    """The weights of an SAE as a writer takes them."""
    return {key: np.asarray(value, np.float32) for key, value in vars(sae).items() if hasattr(value, "shape")}


def read_safetensors(path: Path) -> Weights:
    """All tensors of a file as float32. Raises `FileNotFoundError`, or `ValueError` if it is cut short."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it holds the weights of an SAE")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name).astype(np.float32, copy=False) for name in file.keys()}
    except (SafetensorError, struct.error, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): is it cut short? Get it again") from error


def drop_ones(found: dict[str, np.ndarray], path: Path) -> None:
    """Takes out `scaling_factor`, an old addition. Raises `ValueError` unless it is 1: the SAE is fine-tuned then."""
    if not np.allclose(found.pop("scaling_factor", 1), 1):
        raise ValueError(f"{path} has a scaling_factor other than 1: we read no fine-tuned features")


def size(cfg: Mapping[str, Any], key: str, path: Path) -> int:
    """`cfg[key]`, a positive whole number. Raises `ValueError` if it is missing or something else."""
    value = cfg.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path} must give {key} as a whole number of 1 or more, got {value!r}")
    return value


def take(found: Mapping[str, np.ndarray], spec: Mapping[str, str], path: Path, **sizes: int) -> Weights:
    """The tensors of `found` by our names and in our layout.

    `spec` maps a name in the file to ours and to its axes, e.g. {"encoder.weight": "W_enc F d"}; a scalar has none.
    `sizes` are lengths of axes known from elsewhere; others are set by the first tensor that has them. Raises
    `ValueError` naming every missing, unknown and misshapen tensor.
    """
    problems = [f"missing {name}" for name in spec if name not in found]
    problems += [f"unknown {name} {value.shape}" for name, value in found.items() if name not in spec]
    weights = {}
    for theirs, entry in spec.items():
        if theirs not in found:
            continue
        value, (ours, *axes) = found[theirs], entry.split()
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
        raise ValueError(f"{where}: {', '.join(bad)} has values that are not finite: train again, or store float32")


def save(weights: Path, tensors: Mapping[str, Any], config: Path, cfg: Mapping[str, Any], dtype: str = "float32"):
    """Write tensors, matrices in `dtype` and all else in float32, and then the settings; the folder of the latter.
    Raises `ValueError` if a number is not finite in that form."""
    tensors = {name: jnp.asarray(value, dtype if np.ndim(value) == 2 else "float32") for name, value in tensors.items()}
    check_finite(tensors, f"{config.parent} (as {dtype})")
    replace_file(weights, lambda partial: save_file(tensors, partial))
    write_json(config, cfg)
    return config.parent


def build(
    w: Weights, sites: Sites, architecture: str, path: Path, metadata: Mapping[str, Any] | None = None,
    k: int | None = None, module: str = "",
) -> SAE:  # fmt: skip
    """The SAE of these weights. Metadata keeps plain values only, and `module` where its sites were named so.

    Raises `ValueError` naming `path` if they do not make one, or if the named site is not ours in the model of the
    metadata.
    """
    check_finite(w, str(path))
    metadata = dict(metadata or {}) | ({"module": module} if module else {})
    check_named(metadata, sites, path)
    plain = {key: value for key, value in metadata.items() if isinstance(value, str | int | float | bool)}
    w = {name: jnp.asarray(np.ascontiguousarray(value, np.float32)) for name, value in w.items()}
    try:
        kept = tuple(sorted(plain.items()))
        return SAE(**w, site_in=sites[0], site_out=sites[1], architecture=architecture, k=k, metadata=kept)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fold_scales(w: Weights, scale_in: float, scale_out: float) -> Weights:
    """Weights with which x does what x * scale_in did, their reconstruction multiplied by scale_out."""
    w = w | {name: w[name] * np.float32(scale_in) for name in ("W_enc", "W_skip") if name in w}
    return w | {name: w[name] * np.float32(scale_out) for name in ("W_dec", "b_dec", "W_skip") if name in w}


def fold_input_shift(w: Weights, shift: np.ndarray) -> Weights:
    """Weights with which x does what x - shift did (in the encoder)."""
    moved = shift @ w["W_enc"]
    out = w | {"b_enc": w["b_enc"] - moved}
    return out | {"b_mag": w["b_mag"] - moved * np.exp(w["r_mag"])} if "b_mag" in w else out


def fold_feature_scale(w: Weights, scale: np.ndarray, path: Path) -> Weights:
    """The same function, its features multiplied by `scale` (F,), which must be positive. Not for gated SAEs."""
    if not (scale > 0).all():
        raise ValueError(f"{path}: latents {np.flatnonzero(scale <= 0)[:5].tolist()} have a scale that is not positive")
    scaled = {"W_enc": w["W_enc"] * scale[None, :], "W_dec": w["W_dec"] / scale[:, None]}
    return w | scaled | {name: w[name] * scale for name in ("b_enc", "threshold") if name in w}
