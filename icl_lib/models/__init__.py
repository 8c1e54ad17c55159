"""Language models with named sites: read from Hugging Face folders, run and changed through taps, on any devices."""

from icl_lib.models.config import ModelConfig
from icl_lib.models.families import tiny_config
from icl_lib.models.generate import generate
from icl_lib.models.sharding import check_mesh, make_mesh, mesh_of, shard_batch, shard_model, shardings
from icl_lib.models.sites import Site, Tap, compose, perturb, record, replace, run_with_cache
from icl_lib.models.tensors import tensor_shapes
from icl_lib.models.transformer import Past, Transformer
from icl_lib.models.weights import fetch, load_config, load_model, load_tokenizer, save_model

__all__ = [
    "ModelConfig", "Past", "Site", "Tap", "Transformer", "check_mesh", "compose", "fetch", "generate", "load_config",
    "load_model", "load_tokenizer", "make_mesh", "mesh_of", "perturb", "record", "replace", "run_with_cache",
    "save_model", "shard_batch", "shard_model", "shardings", "tensor_shapes", "tiny_config",
]  # fmt: skip
