"""One model on many devices: a mesh of two axes, and the place of every weight and batch on it.

Along `data` each device holds other rows of the batch; along `model` it holds other heads, MLP channels and words. The
weights carry their places with them, so the model's code is the same on one device and on many: XLA adds the
communication.
"""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from icl_lib.models.config import ModelConfig
from icl_lib.models.tensors import abstract, leaf_path
from icl_lib.models.transformer import Transformer

Tree = TypeVar("Tree")

# Weights are (out, in). A matrix that begins a branch is cut by its outputs (heads, channels), the one that ends it by
# its inputs, so that between the two nothing is exchanged and behind them one sum over devices makes the branch whole.
_ROWS = {"q", "b_q", "k", "v", "b_k", "b_v", "gate", "up", "b_gate", "b_up", "embed", "unembed"}
_COLUMNS = {"o", "down"}


def make_mesh(data: int = 1, model: int | None = None) -> Mesh:
    """All devices as a (`data`, `model`) mesh; `model` None takes as many as `data` leaves. Raises `ValueError` unless
    the two multiply to the number of devices."""
    n = jax.device_count()
    if data < 1 or n % data or data * (n // data if model is None else model) != n:
        sizes = f"data = {data}" if model is None else f"data x model = {data} x {model}"
        raise ValueError(f"a mesh uses every device: {sizes} does not make up {n} {jax.default_backend()} device(s)")
    # Automatic axes: the library says where weights and batches lie and leaves the rest to the compiler.
    return jax.make_mesh((data, n // data), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raises `ValueError`, before anything is read, where the model cannot be cut along the mesh's `model` axis.

    Query heads and MLP channels have to divide evenly. Key-value heads do too, or several devices share one (and each
    keeps all of them). Words that do not divide are no error: every device then keeps the whole embedding.
    """
    if set(mesh.axis_names) != {"data", "model"}:
        raise ValueError(f"a model's mesh has the axes 'data' and 'model', got {mesh.axis_names}: use make_mesh")
    n, heads = mesh.shape["model"], config.n_kv_heads
    problems = [f"{name} = {size}" for name, size in (("n_heads", config.n_heads), ("d_mlp", config.d_mlp)) if size % n]
    problems += [f"n_kv_heads = {heads}"] if heads % n and n % heads else []
    if problems:
        fitting = [k for k in range(1, mesh.size + 1) if _divides(config, k)]
        bad = f"a 'model' axis of {n} devices does not divide {' and '.join(problems)} of this {config.family} model"
        good = f"up to {mesh.size} devices, {', '.join(map(str, fitting))} would do"
        raise ValueError(f"{bad}; {good}: give the others to the 'data' axis")


def _divides(config: ModelConfig, n: int) -> bool:
    heads = config.n_kv_heads
    return not (config.n_heads % n or config.d_mlp % n or (heads % n and n % heads))


def largest_split(config: ModelConfig, count: int) -> int:
    """Over how many of `count` devices one model can be cut, so that the others hold equal copies."""
    return max(n for n in range(1, count + 1) if count % n == 0 and _divides(config, n))


def auto_mesh(config: ModelConfig) -> Mesh | None:
    """A mesh of all devices, its `model` axis as long as this model can be cut; None where there is one device."""
    n = jax.device_count()
    return None if n == 1 else make_mesh(n // largest_split(config, n))


def mesh_of(model: Transformer) -> Mesh | None:
    """The mesh that a model's weights lie on; None where one device holds them."""
    place = getattr(model.embed, "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) else None


def shardings(config: ModelConfig, mesh: Mesh) -> Transformer:
    """The place of every weight: a `Transformer` with a `NamedSharding` for each array. Raises as `check_mesh` does."""
    check_mesh(config, mesh)
    place = lambda path, _: NamedSharding(mesh, _spec(config, mesh, leaf_path(path)))
    return jax.tree_util.tree_map_with_path(place, abstract(config))


def _spec(config: ModelConfig, mesh: Mesh, leaf: str) -> P:
    name, n = leaf.rsplit(".", 1)[-1], mesh.shape["model"]
    shared = name in ("k", "v", "b_k", "b_v") and config.n_kv_heads % n
    # Cut the other way, an embedding would turn every logit into a sum over devices: dearer than a copy of the few
    # vocabularies that do not divide, which are small ones.
    uneven = name in ("embed", "unembed") and config.d_vocab % n
    if name in _ROWS and not shared and not uneven:
        return P("model")
    return P(None, "model") if name in _COLUMNS else P()


def shard_model(model: Transformer, mesh: Mesh) -> Transformer:
    """A model that is in memory, put on the mesh. (`load_model(..., mesh=mesh)` reads straight into place.)"""
    return jax.tree.map(_put, model, shardings(model.config, mesh))


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Arrays (or trees of them) with the first axis spread over `data`. Every process passes the same whole batch.
    Raises `ValueError` if that axis does not divide."""
    place = NamedSharding(mesh, P("data"))
    for x in jax.tree.leaves(batch):
        if not np.ndim(x) or len(x) % mesh.shape["data"]:
            wanted = f"a batch is spread over {mesh.shape['data']} devices along its first axis, a multiple of that"
            raise ValueError(f"{wanted}; got shape {np.shape(x)}: choose another batch size, or pad the batch")
    return jax.tree.map(lambda x: _put(x, place), batch)


def _put(x, place: NamedSharding) -> jax.Array:
    # Not device_put: with several processes that would compare the whole array between them first.
    if jax.process_count() == 1:
        return jax.device_put(x, place)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])
