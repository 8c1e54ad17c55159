"""The sizes and constants of a language model, read from a Hugging Face `config.json`."""

import dataclasses
import math
from typing import Any

FAMILIES = ("gemma",)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    r"""What a decoder-only transformer is made of; hashable, so that it can be static under `jit`.

    `d_mlp` is the hidden width of the gated MLP, `n_ctx` the longest sequence of training, `norm_eps` the
    $\epsilon$ of RMSNorm, `rope_theta` the base of the rotary frequencies.
    """

    family: str
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    bos_id: int = 2
    eos_id: int = 1
    pad_id: int = 0

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}: "
                "each key-value head serves an equal group of query heads"
            )
        if self.d_head % 2:
            raise ValueError(f"d_head must be even for rotary embeddings, got {self.d_head}")

    @property
    def embed_scale(self) -> float:
        """Gemma multiplies the token embedding by sqrt(d_model)."""
        return math.sqrt(self.d_model)

    def check_layer(self, layer: int, what: str = "layer") -> int:
        """`layer` itself. Raises `ValueError` where the model has no such block."""
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"{what} must be in 0..{self.n_layers - 1} for this model of {self.n_layers} layers, got {layer}")
        return layer

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Read the fields of a Hugging Face config. Raises `ValueError` on an unknown family or a missing field."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{source}: model_type is {family!r}; supported families are {', '.join(FAMILIES)}")
        # The first releases say hidden_act "gelu" and mean the tanh approximation.
        legacy = {"gelu": "gelu_pytorch_tanh"}
        act = raw.get("hidden_act", "gelu")
        activation = raw.get("hidden_activation") or legacy.get(act, act)
        if activation != "gelu_pytorch_tanh":
            raise ValueError(f"{source}: the activation must be 'gelu_pytorch_tanh' for Gemma, got {activation!r}")
        if raw.get("tie_word_embeddings", True) is not True:
            raise ValueError(f"{source}: Gemma ties its output matrix to the embedding, but tie_word_embeddings is false")
        rope = raw.get("rope_parameters") or {}
        scaling = raw.get("rope_scaling") or rope
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise ValueError(f"{source}: Gemma's rotary embedding is not scaled, but the config asks for {scaling}")
        eos = raw.get("eos_token_id", 1)
        try:
            return cls(
                family=family,
                d_model=raw["hidden_size"],
                n_layers=raw["num_hidden_layers"],
                n_heads=raw["num_attention_heads"],
                n_kv_heads=raw.get("num_key_value_heads", raw["num_attention_heads"]),
                d_head=raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"]),
                d_mlp=raw["intermediate_size"],
                d_vocab=raw["vocab_size"],
                n_ctx=raw["max_position_embeddings"],
                rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
                norm_eps=raw.get("rms_norm_eps", 1e-6),
                bos_id=raw.get("bos_token_id", 2),
                eos_id=eos[0] if isinstance(eos, list) else eos,  # chat models list several
                pad_id=raw.get("pad_token_id", 0),
            )
        except KeyError as missing:
            raise ValueError(f"{source}: field {missing} is missing; is this the config of a {family} model?") from None

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The `config.json` from which transformers builds the same model; `dtype` names the stored weights."""
        return {
            "architectures": ["GemmaForCausalLM"],
            "model_type": self.family,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.d_head,
            "intermediate_size": self.d_mlp,
            "vocab_size": self.d_vocab,
            "max_position_embeddings": self.n_ctx,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "pad_token_id": self.pad_id,
            "torch_dtype": dtype,
        }


def tiny_config(**overrides) -> ModelConfig:
    """A Gemma small enough for tests: 2 layers, d_model 16, 40 tokens in the vocabulary."""
    sizes = {
        "family": "gemma", "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_head": 8,
        "d_mlp": 32, "d_vocab": 40, "n_ctx": 64,
    }  # fmt: skip
    return ModelConfig(**(sizes | overrides))
