"""Files of the library dictionary_learning: a folder with `ae.pt`, the state of one of its classes, and `config.json`.

`ae.pt` is read without PyTorch, and nothing in it is run. Which class it is shows in the names of the tensors, so a
lone `ae.pt` is enough; `config.json` adds where it sits. Features are as the released version 0.1 computes them; two of
its classes multiplied them by the norms of the decoder rows before, with the same reconstruction.

Source: dictionary_learning 0.1.0, with which tests/golden compares.
"""

from pathlib import Path
from typing import Any

import numpy as np

from icl_lib.files.write import replace_file, write_json
from icl_lib.models import Site
from icl_lib.saes.formats import common
from icl_lib.saes.formats.common import Weights
from icl_lib.saes.formats.places import Sites, located, name_of, no_site, site_named
from icl_lib.saes.formats.torch_file import read_torch
from icl_lib.saes.sae import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
FILES = (CONFIG, WEIGHTS)
_LINEAR = {"encoder.weight": "W_enc F d", "encoder.bias": "b_enc F", "decoder.weight": "W_dec d F"}
_PLAIN = {"W_enc": "W_enc d F", "b_enc": "b_enc F", "W_dec": "W_dec F d", "b_dec": "b_dec d"}
_CUT = {"k": "k", "threshold": "threshold"}
# Its classes: the names of their tensors, ours, and axes. TopK and BatchTopK have the same; config.json tells which.
_CLASSES = {
    "AutoEncoder": _LINEAR | {"bias": "b_dec d"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias": "b_dec d"},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc F d", "decoder.weight": "W_dec d F", "decoder_bias": "b_dec d",
        "gate_bias": "b_enc F", "r_mag": "r_mag F", "mag_bias": "b_mag F",
    },
    "AutoEncoderTopK": _LINEAR | {"b_dec": "b_dec d"} | _CUT,
    "BatchTopKSAE": _LINEAR | {"b_dec": "b_dec d"} | _CUT,
    "MatryoshkaBatchTopKSAE": _PLAIN | _CUT | {"group_sizes": "group_sizes g"},
    "JumpReluAutoEncoder": _PLAIN | {"threshold": "threshold F"},
}  # fmt: skip
_FORMS = {
    "AutoEncoder": "standard", "AutoEncoderNew": "standard", "GatedAutoEncoder": "gated", "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip
_READ_BY = {"resid_post": "resid_pre", "attn_out": "attn_in", "mlp_out": "mlp_in"}
_INPUT_AS_IT_IS = ("AutoEncoderNew", "JumpReluAutoEncoder")  # the others encode x - b_dec


def read(path: Path, site: Sites | None = None, variant: str | None = None) -> SAE:
    """The SAE in a folder or in one `.pt` file; see `load_sae`.

    `variant="threshold"` reads a TopK SAE with the threshold that was recorded in training, as the library's
    `encode(x, use_threshold=True)` does: unlike topk it folds.
    """
    folder, file = (path, path / WEIGHTS) if path.is_dir() else (path.parent, path)
    folder = folder.parent if folder.name == "checkpoints" else folder  # of a run; its settings lie above
    config = common.read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    trainer = config.get("trainer", config)
    found = _state(file)
    name = _class(found, trainer.get("dict_class"), file)
    form = _FORMS[name]
    common.check_settings(config | trainer, folder / CONFIG, ("relu", name.lower(), form))
    sites, module = (site, "") if site else _sites(trainer, config.get("buffer") or {}, folder)
    spec = dict(_CLASSES[name])
    if name == "AutoEncoderTopK" and "threshold" not in found:  # an early one
        del spec["threshold"]
    w = common.take(found, spec, file)
    k = w.pop("k", None)
    w.pop("group_sizes", None)
    if form == "topk":
        if trainer.get("k", k) != k:
            raise ValueError(f"{folder / CONFIG} has k {trainer['k']}, and {file} has {int(k)}: which one was trained?")
        threshold = w.pop("threshold", np.float32(-1))
        if variant == "threshold":
            form, w = "batchtopk", w | {"threshold": threshold}
    if form == "batchtopk":
        w = _with_threshold(w, name, file)
    if name not in _INPUT_AS_IT_IS:
        w = common.fold_input_shift(w, w["b_dec"])
    if name == "AutoEncoder":  # from_pretrained gives its decoder rows norm 1
        w = common.fold_feature_scale(w, np.linalg.norm(w["W_dec"], axis=1), file)
    said = {"model_name": "lm_name", "k": "k"}
    meta = {"dict_class": name} | {ours: trainer[theirs] for ours, theirs in said.items() if theirs in trainer}
    return common.build(w, sites, form, file, meta, int(k) if form == "topk" else None, module)


def write(sae: SAE, folder: str | Path, dict_class: str | None = None) -> Path:
    """Write an SAE of one site as dictionary_learning does. Needs PyTorch, unlike reading.

    standard becomes AutoEncoderNew, gated GatedAutoEncoder, topk AutoEncoderTopK, jumprelu and batchtopk
    JumpReluAutoEncoder. `dict_class="AutoEncoder"` writes a standard SAE as SFC's dictionaries are, whose decoder rows
    must have norm 1. Raises `ValueError` on a transcoder, on another form than the class has, or without PyTorch.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ValueError("to write files of dictionary_learning PyTorch is needed: pip install -e '.[test]'") from error
    if sae.is_transcoder:
        raise ValueError(f"dictionary_learning has no class for a transcoder ({sae.site_in} to {sae.site_out})")
    sae = sae.fold() if sae.architecture == "batchtopk" else sae
    classes = {"standard": "AutoEncoderNew", "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK"}
    name, folder = dict_class or classes.get(sae.architecture, "JumpReluAutoEncoder"), Path(folder)
    if _FORMS[name] != sae.architecture:
        raise ValueError(f"{name} is for {_FORMS[name]} SAEs, got a {sae.architecture} one at {sae.site_in}")
    w = common.arrays(sae)
    if name not in _INPUT_AS_IT_IS:
        w = common.fold_input_shift(w, -w["b_dec"])
    state: dict[str, Any] = {}
    for theirs, entry in _CLASSES[name].items():
        ours, *axes = entry.split()
        if theirs == "k":
            state[theirs] = torch.tensor(sae.k, dtype=torch.int)
        elif theirs == "threshold" and not axes:
            state[theirs] = torch.tensor(-1.0)
        else:
            state[theirs] = torch.tensor(w[ours].T.copy() if len(axes) == 2 and "." in theirs else w[ours])
    trainer = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae, "layer": sae.site_in.layer}
    trainer |= {"lm_name": str(dict(sae.metadata).get("model_name", "unknown")), "submodule_name": name_of(sae.site_in)}
    trainer |= {"k": sae.k} if sae.k else {}
    replace_file(folder / WEIGHTS, lambda partial: torch.save(state, partial))
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {"d_submodule": sae.d_in, "ctx_len": 128}})
    return folder


def _state(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict as float32. Raises `ValueError` on anything else, e.g. a training run's state."""
    found = read_torch(file)
    if isinstance(found, dict) and "ae" in found:
        wanted = "take one of its checkpoints/ae_*.pt, or the state under 'ae' if activations were not normalised"
        raise ValueError(f"{file} is the backup of a training run (at step {found.get('step')}), no SAE: {wanted}")
    if not isinstance(found, dict) or not all(isinstance(value, np.ndarray) for value in found.values()):
        raise ValueError(f"{file} holds no state dict (names and tensors) but {type(found).__name__}")
    return {name: value.astype(np.float32) for name, value in found.items()}


def _class(found: dict[str, np.ndarray], named: str | None, file: Path) -> str:
    if named is not None:
        if named not in _CLASSES:
            raise ValueError(f"{file}: config.json names the class {named!r}; we read {', '.join(_CLASSES)}")
        return named
    tells = {"bias": "AutoEncoder", "decoder.bias": "AutoEncoderNew", "decoder_bias": "GatedAutoEncoder"}
    tells |= {"group_sizes": "MatryoshkaBatchTopKSAE", "k": "", "threshold": "JumpReluAutoEncoder"}
    name = next((name for key, name in tells.items() if key in found), None)
    if name is None:
        raise ValueError(f"{file} has tensors {', '.join(found) or 'none'}, those of no class of dictionary_learning")
    if not name:
        raise ValueError(f"{file} is a TopK or a BatchTopK SAE, of equal tensors: config.json, which tells, is missing")
    return name


def _with_threshold(w: Weights, name: str, file: Path) -> Weights:
    if w["threshold"] < 0:
        why = f"its threshold was never set ({float(w['threshold'])}): training stopped before threshold_start_step"
        raise ValueError(f"{file}: {why}; a {name} cannot be evaluated token by token without one")
    return w | {"threshold": np.full(len(w["b_enc"]), w["threshold"])}


def _sites(trainer: dict[str, Any], buffer: dict[str, Any], folder: Path) -> tuple[Sites, str]:
    """Where the SAE sits, and the module that says so: the settings', or else one of the folders' names."""
    named, io, path = trainer.get("submodule_name"), buffer.get("io", "out"), folder / CONFIG
    hooks = trainer | ({} if named in (None, "", "unknown") else {"feature_input_hook": named})
    sites, module = located(hooks, path)
    if sites is not None:
        site, last = sites
        if site != last:
            raise ValueError(f"{path} is for one site, but names {site} and {last}: pass site=(input, output)")
        if isinstance(layer := trainer.get("layer"), int) and layer >= 0 and site.layer not in (None, layer):
            raise ValueError(f"{path} has layer {layer}, but its submodule_name {named or module!r} is in {site.layer}")
    else:
        named_after = ((site_named(part), part) for part in reversed(folder.absolute().parts[-3:]))
        site, module = next((each for each in named_after if each[0]), (None, ""))
    if site is None:
        raise no_site(folder)
    if io == "in" and site.name in _READ_BY:  # the activations that go into the module
        site, module = Site(_READ_BY[site.name], site.layer), ""
    elif io != "out":
        raise ValueError(f"{path} has io {io!r} at {site}; we read out, and in of blocks, attention and MLPs")
    return (site, site), module
