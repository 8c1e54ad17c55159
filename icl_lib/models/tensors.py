"""Where each weight of a `Transformer` lies in a Hugging Face checkpoint: name, rows and shape, without any data."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np

from icl_lib.models.config import ModelConfig
from icl_lib.models.families import family_of
from icl_lib.models.transformer import Transformer


class Source(NamedTuple):
    """Row i of a leaf is row `rows[i]` of the checkpoint's tensor `name`; `rows` None means all rows in their order."""

    name: str
    rows: np.ndarray | None = None


def abstract(config: ModelConfig) -> Transformer:
    """The model with shapes in the place of arrays: nothing is computed or allocated."""
    return eqx.filter_eval_shape(Transformer.init, config, key=jax.random.key(0))


def leaf_path(path) -> str:
    """The name of a leaf from its key path: "embed", "blocks.3.attn.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def sources(config: ModelConfig) -> dict[str, Source]:
    """Where every leaf of the model comes from, by the leaf's path."""
    family = family_of(config.family)
    rows = family.rows(config)
    found = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract(config)):
        leaf = leaf_path(path)
        if leaf.startswith("blocks."):
            _, layer, inside = leaf.split(".", 2)
            found[leaf] = Source(f"{family.prefix}.{layer}.{family.names[inside]}", rows.get(inside))
        else:
            found[leaf] = Source(family.names[leaf])
    return found


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds."""
    where, shapes = sources(config), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config)):
        name, rows = where[leaf_path(path)]
        before = shapes.get(name, (0,))[0] if rows is not None else 0
        shapes[name] = (before + leaf.shape[0], *leaf.shape[1:])
    return shapes


def n_params(config: ModelConfig) -> int:
    """Number of parameters, a tied embedding counted once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def ignored(config: ModelConfig, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has none: buffers, copies of a tied embedding."""
    family = family_of(config.family)
    return bool(family.buffers and family.buffers.search(name)) or (config.tied and name == family.names["unembed"])
