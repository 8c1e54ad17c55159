"""Language models with named sites: read from Hugging Face folders, run, recorded and changed through taps."""

from icl_lib.models.config import ModelConfig, tiny_config
from icl_lib.models.sites import Site, Tap, compose, perturb, record, replace, run_with_cache
from icl_lib.models.transformer import Past, Transformer
from icl_lib.models.weights import fetch, load_config, load_model, load_tokenizer, save_model, tensor_shapes

__all__ = [
    "ModelConfig", "Past", "Site", "Tap", "Transformer", "compose", "fetch", "load_config", "load_model",
    "load_tokenizer", "perturb", "record", "replace", "run_with_cache", "save_model", "tensor_shapes", "tiny_config",
]  # fmt: skip
