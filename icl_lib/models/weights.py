"""Reading and writing models as Hugging Face folders: `config.json`, `*.safetensors`, `tokenizer.json`.

Every tensor's name and shape is checked against the model that the config describes before any data is read.
"""

import json
import struct
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from icl_lib.models.config import ModelConfig
from icl_lib.models.transformer import Transformer

# Our path of a leaf -> name in the checkpoint; blocks.N. becomes model.layers.N. first.
_GEMMA = {
    "embed": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "ln1.weight": "input_layernorm.weight",
    "ln2.weight": "post_attention_layernorm.weight",
    **{f"attn.{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"mlp.{x}": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
_NAMES = {"gemma": _GEMMA}
_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json"]


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself if it is one, else a snapshot of that hub repository.

    Raises `FileNotFoundError` if neither exists or the hub cannot be reached, naming the folder that would do.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no folder {str(name)!r}, and the hub gave no model of that name ({type(error).__name__}): pass a folder "
            "with config.json and *.safetensors, or check the id, the network and, for gated models, your token"
        ) from error


def load_config(name: str | Path, revision: str | None = None) -> ModelConfig:
    """The config of a model folder or hub id, without its weights."""
    path = fetch(name, revision) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a model folder holds config.json beside its *.safetensors")
    return ModelConfig.from_hf(_read_json(path), source=str(path))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): is it cut short? Download it again") from error


def _abstract(config: ModelConfig) -> Transformer:
    return eqx.filter_eval_shape(Transformer.init, config, key=jax.random.key(0))


def _checkpoint_name(config: ModelConfig, path) -> str:
    parts = jax.tree_util.keystr(path, simple=True, separator=".")
    names = _NAMES[config.family]
    if parts.startswith("blocks."):
        _, layer, rest = parts.split(".", 2)
        return f"model.layers.{layer}.{names[rest]}"
    return names[parts]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds."""
    leaves = jax.tree_util.tree_leaves_with_path(_abstract(config))
    return {_checkpoint_name(config, path): leaf.shape for path, leaf in leaves}


def _tensor_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors: save the model in that format, pickles are not read")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which is not in the folder: download it again")
    return files


def _open(file: Path):
    try:
        return safe_open(file, framework="flax")
    except (SafetensorError, struct.error, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}): is it cut short? Download it again") from error


def _check_tensors(wanted: dict[str, tuple], found: dict[str, tuple], folder: Path):
    """Raises `ValueError` naming the first missing, extra or misshapen tensors."""
    missing = sorted(wanted.keys() - found.keys())
    # Tied checkpoints sometimes carry a copy of the embedding as output matrix; it is never a different one.
    extra = sorted(found.keys() - wanted.keys() - {"lm_head.weight"})
    shapes = [f"{n} has shape {found[n]}, expected {wanted[n]}" for n in sorted(wanted) if n in found and found[n] != wanted[n]]
    problems = [f"missing {n} {wanted[n]}" for n in missing] + [f"unknown {n}" for n in extra] + shapes
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{folder} does not hold the tensors that its config.json describes: {'; '.join(problems[:5])}{more}. "
            "Check that config and weights belong to the same model"
        )


def load_model(name: str | Path, revision: str | None = None, dtype: str = "float32") -> Transformer:
    """The model of a Hugging Face folder or hub id, its weights converted to `dtype`.

    Raises `FileNotFoundError` or `ValueError` with the name of what is absent, unknown or misshapen.
    """
    folder = fetch(name, revision)
    config = load_config(folder)
    handles = [_open(file) for file in _tensor_files(folder)]
    where = {key: handle for handle in handles for key in handle.keys()}
    found = {key: tuple(handle.get_slice(key).get_shape()) for key, handle in where.items()}
    abstract = _abstract(config)
    _check_tensors(tensor_shapes(config), found, folder)

    def read(path, leaf) -> Array:
        tensor_name = _checkpoint_name(config, path)
        return jnp.asarray(where[tensor_name].get_tensor(tensor_name), dtype)

    return jax.tree_util.tree_map_with_path(read, abstract)


def save_model(model: Transformer, folder: str | Path, dtype: str = "float16") -> Path:
    """Write `config.json` and `model.safetensors` so that transformers and `load_model` read them back."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(model)
    tensors = {_checkpoint_name(model.config, path): leaf.astype(dtype) for path, leaf in leaves}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_hf(dtype), indent=2) + "\n")
    return folder


def load_tokenizer(name: str | Path, revision: str | None = None):
    """The fast tokenizer of a model folder or hub id. Raises `ValueError` if it has no fast version.

    A fast tokenizer tells from which characters each token came, which our token roles are computed from.
    """
    folder = fetch(name, revision)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json: a fast tokenizer is needed for character offsets")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
