"""The families of models, one file each: configs in and out, names and rows of tensors, and what each refuses."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl_lib.models.config import ModelConfig
from icl_lib.models.families import gemma, gemma2, gpt_neox, llama, phi3, qwen2
from icl_lib.models.families.base import Family

_MODULES = (gemma, gemma2, phi3, gpt_neox, qwen2, llama)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def family_of(name: Any, source: str = "ModelConfig.family") -> Family:
    """The family of this name. Raises `ValueError` for one that we do not have."""
    if name not in FAMILIES:
        raise ValueError(f"{source}: model_type is {name!r}; supported families are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def from_hf(raw: Mapping[str, Any], source: str = "config.json", pad_id: int | None = None) -> ModelConfig:
    """Read a Hugging Face config by its old and its new names; `pad_id` pads where the config names no token for it.

    Raises `ValueError` on an unknown family, a key that is missing or not what we compute with, and two that disagree.
    """
    return family_of(raw.get("model_type"), source).from_hf(raw, source, pad_id)


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` from which transformers builds the same model; `dtype` names the stored weights."""
    return family_of(config.family).to_hf(config, dtype)


def known_config(name: str) -> ModelConfig | None:
    """The config of one of the models that our cards name, without a network; None for any other. An instruction-tuned
    model ("-it", "-Instruct") has the sizes of its base model."""
    known = json.loads((Path(__file__).parent / "known_configs.json").read_text())
    raw = known.get(name, known.get(name.removesuffix("-it").removesuffix("-Instruct")))
    return None if raw is None else from_hf(raw, source=name)


def tiny_config(family: str = "gemma", **overrides) -> ModelConfig:
    """A model small enough for tests: 2 layers, d_model 16, 40 tokens in the vocabulary."""
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_head": 8, "d_mlp": 32, "d_vocab": 40}
    own = {"gpt_neox": {"n_kv_heads": 2, "rotary_dim": 4, "norm_eps": 1e-5}, "gemma2": {"attn_scale": 8**-0.5}}
    sizes |= {"family": family, "n_ctx": 64} | own.get(family, {})
    return ModelConfig(**(sizes | family_of(family).traits | overrides))
