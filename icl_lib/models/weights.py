"""Reading and writing models as Hugging Face folders: `config.json`, `*.safetensors`, `tokenizer.json`.

Every tensor's name and shape is checked against the model that the config describes before any data is read. Then each
device gets its own part of each weight: only these rows and columns are read, converted and handed over, part by part.
"""

import dataclasses
import json
import math
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from icl_lib.files.hub import fetch_folder
from icl_lib.files.processes import is_writer, to_host
from icl_lib.files.write import replace_file, write_json
from icl_lib.models.config import ModelConfig
from icl_lib.models.families import family_of, from_hf, to_hf
from icl_lib.models.sharding import auto_mesh, check_mesh, shardings
from icl_lib.models.tensors import abstract, ignored, leaf_path, sources, tensor_shapes
from icl_lib.models.transformer import Transformer

GATE = "icl_gate.json"  # recorded logits, where the folder has them: see `gate`
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FILES = [
    "config.json", "*.safetensors", _INDEX, "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", GATE,
]  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
_PIECE = 1 << 23  # elements of the file read at once, so that no whole tensor passes through host memory


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself if it is one, else a snapshot of that hub repository. Raises
    `FileNotFoundError`, which says what to do, if neither exists or the hub refuses or cannot be reached."""
    return fetch_folder(name, revision, _FILES, "config.json, *.safetensors and tokenizer.json")


def load_config(name: str | Path, revision: str | None = None) -> ModelConfig:
    """The config of a model folder or hub id, without its weights; where it names no padding, the tokenizer does.
    `tied` is what config.json says: only `load_model` sees a head in the weights that differs from the embedding."""
    folder = fetch(name, revision)
    path = folder / "config.json"
    if not path.is_file():
        hint = "if saving a model was interrupted here, save it again"
        raise FileNotFoundError(f"{path} does not exist: a model folder holds config.json beside its weights; {hint}")
    raw = _read_json(path)
    return from_hf(raw, str(path), _tokenizer_pad(folder) if raw.get("pad_token_id") is None else None)


def _tokenizer_pad(folder: Path) -> int | None:
    """The id of the token that the folder's tokenizer pads with; None where there is none."""
    files = (folder / file for file in ("tokenizer_config.json", "special_tokens_map.json"))
    token = next(filter(None, (_read_json(file).get("pad_token") for file in files if file.is_file())), None)
    token = token.get("content") if isinstance(token, dict) else token
    if token is None or not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = _read_json(folder / "tokenizer.json")
    ids = {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}
    vocab = tokenizer.get("model", {}).get("vocab", {})
    ids |= {} if token in ids else vocab if isinstance(vocab, dict) else {row[0]: i for i, row in enumerate(vocab)}
    return ids.get(token)


def load_model(
    name: str | Path, revision: str | None = None, dtype: str = "float32", mesh: Mesh | str | None = None
) -> Transformer:
    """The model of a Hugging Face folder or hub id, its weights converted to `dtype`.

    With a mesh (`make_mesh`) each device holds its part of the weights and reads no more than that; "auto" makes a mesh
    of all devices, as far as the model can be cut; without one, the first device of each process holds all. Raises
    `FileNotFoundError` or `ValueError` with the name of what is absent, unknown, misshapen or unreadable, or if the
    mesh does not divide the model. Where the config ties the embedding to an output matrix that is in the files and
    differs, the model has both, as in transformers, and a warning says so.
    """
    folder = fetch(name, revision)
    config = load_config(folder)
    if isinstance(mesh, str):
        if mesh != "auto":
            raise ValueError(f"mesh must be a Mesh (make_mesh), 'auto' or None, got {mesh!r}")
        mesh = auto_mesh(config)
    if mesh is not None:
        check_mesh(config, mesh)
    config, files = _find_tensors(folder, config)
    model = abstract(config)
    one = SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: one, model) if mesh is None else shardings(config, mesh)
    where = sources(config)

    def read(path, leaf, place):
        source = where[leaf_path(path)]
        return _read_leaf(files[source.name], source.name, source.rows, leaf.shape, jnp.dtype(dtype), place)

    return jax.tree_util.tree_map_with_path(read, model, places)


def save_model(model: Transformer, folder: str | Path, dtype: str = "float16") -> Path:
    """Write `config.json` and `model.safetensors` so that transformers and `load_model` read them back.

    A model that lies in the folder goes when the new weights are on the disk: its config first and the new one last, so
    that an interruption leaves the old model, the new one, or a folder without a config, which no reader takes. With it
    go what was recorded of it, its gate and its generation_config.json; tokenizer files stay. Of several processes all
    have to call this, and the first one writes.
    """
    folder = Path(folder)
    shapes, where = tensor_shapes(model.config), sources(model.config)
    tensors = {name: np.empty(shape, jnp.dtype(dtype)) for name, shape in shapes.items()} if is_writer() else {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        (name, rows), whole = where[leaf_path(path)], to_host(leaf)
        if tensors:
            tensors[name][slice(None) if rows is None else rows] = whole.astype(jnp.dtype(dtype))

    def write(partial: Path) -> None:
        save_file(tensors, partial, metadata={"format": "pt"})
        for old in ("config.json", _INDEX, GATE, "generation_config.json"):
            (folder / old).unlink(missing_ok=True)

    replace_file(folder / _WEIGHTS, write)
    if is_writer():
        for shard in folder.glob("model-*-of-*.safetensors"):
            shard.unlink()
    write_json(folder / "config.json", to_hf(model.config, dtype))
    return folder


def load_tokenizer(name: str | Path, revision: str | None = None):
    """The fast tokenizer of a model folder or hub id.

    A fast tokenizer tells from which characters each token came, which our token roles are computed from. Raises
    `FileNotFoundError` if the folder has no tokenizer, `ValueError` if it cannot be read or has no fast version.
    """
    folder = fetch(name, revision)
    known = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / file).is_file() for file in known):
        without = f"{folder} holds no tokenizer ({', '.join(known)})"
        raise FileNotFoundError(f"{without}: copy tokenizer.json of the model into it")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise whatever their parsers meet
        fast = (folder / "tokenizer.json").is_file()
        remedy = "download it again" if fast else "add the tokenizer.json of the model, so that none has to be made"
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error}): {remedy}") from error
    if not tokenizer.is_fast:
        slow = f"a slow tokenizer ({type(tokenizer).__name__}), which does not tell where in the text a token came from"
        todo = "add the tokenizer.json of the model, or one converted by transformers.convert_slow_tokenizer"
        raise ValueError(f"{folder} has only {slow}: {todo}")
    return tokenizer


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): is it cut short? Download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}: download it again")
    return value


def _find_tensors(folder: Path, config: ModelConfig) -> tuple[ModelConfig, dict[str, Path]]:
    """The file of every tensor of the checkpoint, once all are known to be there with the right shapes, and the config.
    A tied model whose file has an output matrix of its own is not tied: the config comes back so."""
    files, found = {}, {}
    for file in _tensor_files(folder):
        with _open(file) as handle:
            for name in handle.keys():
                if name in files:
                    raise ValueError(f"{folder} holds {name} twice, in {files[name].name} and in {file.name}")
                files[name], part = file, handle.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    family = family_of(config.family)
    embed, head = family.names["embed"], family.names["unembed"]
    if config.tied and head in found and embed in found and not _same(files, found, embed, head):
        differ = f"config.json says tie_word_embeddings, but {head} and {embed} differ"
        warnings.warn(f"{folder}: {differ}; both are used, as in transformers", stacklevel=3)
        config = dataclasses.replace(config, tied=False)
    wanted = tensor_shapes(config)
    problems = [f"missing {name} {wanted[name]}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unknown {name}" for name in sorted(found.keys() - wanted.keys()) if not ignored(config, name)]
    for name in sorted(wanted.keys() & found.keys()):
        shape, dtype = found[name]
        problems += [f"{name} has shape {shape}, expected {wanted[name]}"] if shape != wanted[name] else []
        problems += [f"{name} has dtype {dtype}, expected one of {', '.join(_FLOATS)}"] if dtype not in _FLOATS else []
    if problems:
        some = "; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
        todo = "Check that config and weights belong to the same model, and that the weights are not quantised"
        raise ValueError(f"{folder} does not hold the tensors that its config.json describes: {some}. {todo}")
    return config, files


def _same(files: dict[str, Path], found: dict[str, tuple], a: str, b: str) -> bool:
    """Whether two matrices of the checkpoint are equal, read in pieces."""
    shape = found[a][0]
    if found[a] != found[b] or len(shape) != 2 or not all(shape):
        return found[a] == found[b]
    rows, width = shape
    parts = ([slice(*cut), slice(0, width)] for cut in _runs(slice(0, rows), None, max(1, _PIECE // width)))
    read = lambda name, part: _read_part(files[name], name, None, part, width, np.dtype("float32"))
    return all(np.array_equal(read(a, part), read(b, part)) for part in parts)


def _tensor_files(folder: Path) -> list[Path]:
    """The files of one whole set of weights: those of the index, or model.safetensors, or all that there are."""
    single, index = folder / _WEIGHTS, folder / _INDEX
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{index} has no weight_map, which says in which file each tensor is: download it again")
        files = [folder / name for name in sorted(set(names.values()))]
        if single.is_file() and single not in files:
            two = f"{_WEIGHTS} and the files of {_INDEX}"
            raise ValueError(f"{folder} holds two sets of weights, {two}: delete the older")
    else:
        files = [single] if single.is_file() else sorted(folder.glob("[!.]*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors: save the model in that format, pickles are not read")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which is not in the folder: download it again")
    return files


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, struct.error, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}): is it cut short? Get it again") from error


def _read_leaf(file: Path, name: str, rows: np.ndarray | None, shape: tuple, dtype: np.dtype, place: Sharding) -> Array:
    """One weight in its place. Devices that hold the same part share one reading of it."""
    holders: dict[tuple, list] = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        part = tuple(cut.indices(size) for cut, size in zip(index, shape, strict=True))
        holders.setdefault(part, []).append(device)
    shards = []
    for index, devices in holders.items():
        part = _read_part(file, name, rows, [slice(*bounds) for bounds in index], math.prod(shape[1:]), dtype)
        # Wait, so that the host's copy is gone before the next one is read.
        shards += [jax.block_until_ready(jax.device_put(part, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, place, shards)


def _read_part(
    file: Path, name: str, rows: np.ndarray | None, index: list[slice], width: int, dtype: np.dtype
) -> np.ndarray:
    """Rows `index[0]` of a weight (and columns `index[1]`), converted to `dtype`; a whole row has `width` elements."""
    out = np.empty([part.stop - part.start for part in index], dtype)
    done = 0
    for start, stop in _runs(index[0], rows, most=max(1, _PIECE // width)):
        # Opened anew for each piece: the pages of a file that stays mapped would add up to the whole file.
        with _open(file) as handle:
            piece = handle.get_slice(name)[(slice(start, stop), *index[1:])]
        out[done : done + stop - start] = piece
        done += stop - start
    return out


def _runs(cut: slice, rows: np.ndarray | None, most: int) -> Iterator[tuple[int, int]]:
    """Rows of the checkpoint's tensor that hold rows `cut` of ours: neighbours together, at most `most` at once."""
    if rows is None:
        runs = [(cut.start, cut.stop)]
    else:
        wanted = rows[cut]
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, breaks)]
    for start, stop in runs:
        for first in range(start, stop, most):
            yield first, min(first + most, stop)
