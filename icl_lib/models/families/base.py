"""What a family of models is, and how one reads and writes its `config.json` as far as all of them do so alike.

A key that a config leaves out has the value that the family's config class in transformers gives it. Where two keys say
the same thing they have to agree; a key with another meaning than what we compute is refused by name.
"""

import dataclasses
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from icl_lib.models.config import ModelConfig, RopeScaling

# Hugging Face's names of the activations.
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
_SIZES = {
    "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "d_mlp": "intermediate_size", "d_vocab": "vocab_size",
}  # fmt: skip
# Our path of a leaf inside a block (or outside all) -> name in the checkpoint, as most families have it.
NAMES = {
    "embed": "model.embed_tokens.weight",
    "unembed": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "ln1.weight": "input_layernorm.weight",
    "ln2.weight": "post_attention_layernorm.weight",
    **{f"attn.{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attn.b_{x}": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"mlp.{x}": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"mlp.b_{x}": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a `config.json`; those left out have the family's defaults; `source` names the file in errors."""

    raw: Mapping[str, Any]
    defaults: Mapping[str, Any]
    source: str

    def __getitem__(self, key: str) -> Any:
        return self.raw.get(key, self.defaults.get(key))

    def number(self, key: str, whole: bool = False) -> Any:
        """The value of a key. Raises `ValueError` with its name unless it is a number above 0."""
        return self.above_zero(self[key], key, whole)

    def above_zero(self, value: Any, what: str, whole: bool = False) -> Any:
        """`value` itself. Raises `ValueError` unless it is a number above 0."""
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value <= 0:
            raise ValueError(f"{self.source}: {what} must be a {'whole ' * whole}number above 0, got {value!r}")
        return value

    def flag(self, key: str) -> bool:
        """The value of a key that is true or false. Raises `ValueError` for any other."""
        if not isinstance(self[key], bool):
            raise ValueError(f"{self.source}: {key} must be true or false, got {self[key]!r}")
        return self[key]

    def only(self, key: str, *computed: Any) -> None:
        """Raises `ValueError` where the config gives this key another value than what we compute with, or null."""
        if self[key] is not None and self[key] not in computed:
            ours = f"another computation than ours, which needs {' or '.join(map(reprlib.repr, computed))}"
            raise ValueError(f"{self.source}: {key} = {reprlib.repr(self[key])} is {ours}: this model is not supported")

    def agree(self, value: Any, **others: Any) -> Any:
        """`value` itself. Raises `ValueError` where another key for the same thing is there and says otherwise."""
        for key, other in others.items():
            if other is not None and other != value:
                raise ValueError(f"{self.source}: {key} = {other!r} contradicts the {value!r} of another key: fix one")
        return value

    def activation(self, key: str, *allowed: str) -> str:
        """Our name of the activation. Raises `ValueError` unless it is one of `allowed`, Hugging Face's names."""
        if self[key] not in allowed:
            wanted = f"the activation of a {self['model_type']} model must be one of {', '.join(allowed)}"
            raise ValueError(f"{self.source}: {wanted}, got {self[key]!r}")
        return ACTIVATIONS[self[key]]

    def windows(self, size: int | None, slides: list[bool]) -> tuple[int | None, ...] | None:
        """Keys that each layer sees, `size` where it slides; `layer_types`, where it is there, says which layers do.

        Raises `ValueError` where it has not one entry a layer, names another kind, or lets layers slide without a size.
        """
        kinds = self["layer_types"]
        if kinds is not None:
            known = ("full_attention", "sliding_attention")
            if not isinstance(kinds, list) or len(kinds) != len(slides) or any(kind not in known for kind in kinds):
                wanted = f"{' or '.join(known)} for each of the {len(slides)} layers of num_hidden_layers"
                raise ValueError(f"{self.source}: layer_types must name {wanted}, got {kinds!r}")
            slides = [kind == "sliding_attention" for kind in kinds]
        return tuple(size if slide else None for slide in slides) if size is not None and any(slides) else None


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models: what its configs say and where its checkpoints hold each weight."""

    name: str  # Hugging Face's model_type
    hf_class: str  # transformers' class of it, without "ForCausalLM"
    defaults: Mapping[str, Any]  # the value of each key that a config may leave out, as in transformers' config class
    traits: Mapping[str, Any]  # fields of `ModelConfig` in which the family differs from Gemma unless a config says so
    # From the keys and the sizes, the fields that are the family's own; refuses by name what it does not compute.
    read: Callable[[Keys, dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]  # the keys of these fields
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: NAMES)  # leaf -> tensor, as in `NAMES`
    prefix: str = "model.layers"  # what stands before the number of a block in the names of its tensors
    rows: Callable[[ModelConfig], dict[str, np.ndarray]] = lambda config: {}  # of fused tensors, the rows of each leaf
    buffers: re.Pattern | None = None  # tensors that are no weights and may be in a file
    eps: str = "rms_norm_eps"  # the key of `norm_eps`
    theta: str = "rope_theta"  # the key of `rope_theta` in configs without rope_parameters
    rotary_part: str | None = None  # the key of the rotating part of a head, where not all of it rotates

    def from_hf(self, raw: Mapping[str, Any], source: str, pad_id: int | None = None) -> ModelConfig:
        """The config that the keys of a `config.json` describe; `pad_id` pads where they name no token for it."""
        keys = Keys(raw, self.defaults, source)
        if missing := [key for key in _SIZES.values() if key not in raw]:
            raise ValueError(f"{source}: field {missing[0]!r} is missing; is this the config of a {self.name} model?")
        for key in ("quantization_config", "use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention"):
            keys.only(key, False)
        sizes = {ours: keys.number(key, whole=True) for ours, key in _SIZES.items()}
        sizes["n_ctx"] = keys.number("max_position_embeddings", whole=True)
        heads = keys["num_key_value_heads"]
        sizes["n_kv_heads"] = keys.above_zero(sizes["n_heads"] if heads is None else heads, "num_key_value_heads", True)
        sizes["d_head"] = self._d_head(keys, sizes)
        fields = self.traits | {"tied": keys.flag("tie_word_embeddings"), "norm_eps": keys.number(self.eps)}
        fields |= _ids(keys, pad_id) | self._rope(keys, sizes["d_head"]) | self.read(keys, sizes)
        if "windows" not in fields:
            keys.only("layer_types", ["full_attention"] * sizes["n_layers"])
        return ModelConfig(family=self.name, **sizes, **fields)

    def to_hf(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """The `config.json` from which transformers builds this model; `dtype` names the stored weights."""
        scaling = config.rope_scaling
        part = 1.0 if config.rotary_dim is None else config.rotary_dim / config.d_head
        raw = {"architectures": [f"{self.hf_class}ForCausalLM"], "model_type": self.name}
        sizes = [(key, getattr(config, ours)) for ours, key in _SIZES.items()]
        heads = [("num_key_value_heads", config.n_kv_heads), ("head_dim", config.d_head)]
        raw |= dict([*sizes[:3], *heads, *sizes[3:]]) | {  # in the order of the committed config, whose hash is kept
            "max_position_embeddings": config.n_ctx,
            self.theta: config.rope_theta,
            self.eps: config.norm_eps,
            "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
            "attention_bias": config.out_bias,
            "attention_dropout": 0.0,
            "tie_word_embeddings": config.tied,
            "bos_token_id": config.bos_id,
            "eos_token_id": [config.eos_id, *config.more_eos] if config.more_eos else config.eos_id,
            "pad_token_id": config.pad_id,
            "torch_dtype": dtype,
        }
        raw |= {self.rotary_part: part} if self.rotary_part else {}
        raw |= {"rope_scaling": _scaling_to_hf(scaling)} if scaling else {}
        return raw | self.write(config)

    def _d_head(self, keys: Keys, sizes: dict[str, int]) -> int:
        if keys["head_dim"] is not None:
            return keys.number("head_dim", whole=True)
        if sizes["d_model"] % sizes["n_heads"]:
            wanted = "without head_dim, hidden_size must be a multiple of num_attention_heads"
            raise ValueError(f"{keys.source}: {wanted}, got {sizes['d_model']} and {sizes['n_heads']}")
        return sizes["d_model"] // sizes["n_heads"]

    def _rope(self, keys: Keys, d_head: int) -> dict[str, Any]:
        new, old = (keys[field] or {} for field in ("rope_parameters", "rope_scaling"))
        for field, value in (("rope_parameters", new), ("rope_scaling", old)):
            if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
                wanted = "an object with rope_type and its numbers, the same for all layers, or null"
                raise ValueError(f"{keys.source}: {field} must be {wanted}, got {value!r}")
        if new and old:
            keys.agree(new, rope_scaling={"rope_theta": new.get("rope_theta")} | old if "rope_theta" in new else old)
        rope = old or new
        kind = rope.get("rope_type", rope.get("type", "default"))
        keys.agree(kind, **{"type of the rotary scaling": rope.get("type")})
        if kind not in ("default", "llama3"):
            wanted = f"rotary scaling of type {kind!r} is not supported, only none and 'llama3'"
            raise ValueError(f"{keys.source}: {wanted}; the config asks for {rope}")
        scaled = {"rope_scaling": _llama3(rope, keys)} if kind == "llama3" else {}
        theta = new.get("rope_theta", rope.get("rope_theta", keys.raw.get(self.theta, 10_000.0)))
        keys.agree(theta, **{key: keys[key] for key in {"rope_theta", self.theta}})
        theta = float(keys.above_zero(theta, "rope_theta (or rotary_emb_base)"))
        if self.rotary_part is None:
            keys.only("partial_rotary_factor", 1)
            Keys(rope, {}, keys.source).only("partial_rotary_factor", 1)
            return {"rope_theta": theta} | scaled
        part = rope.get("partial_rotary_factor", keys[self.rotary_part])
        keys.agree(part, **{key: keys.raw.get(key) for key in ("partial_rotary_factor", self.rotary_part)})
        part = keys.above_zero(part, "the rotating part (partial_rotary_factor or rotary_pct)")
        return {"rope_theta": theta, "rotary_dim": None if part == 1 else int(d_head * part)} | scaled


def _llama3(rope: dict, keys: Keys) -> RopeScaling:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in names if name not in rope]:
        raise ValueError(f"{keys.source}: rotary scaling 'llama3' needs the field {missing[0]!r}, got {rope}")
    *long, context = (keys.above_zero(rope[name], f"{name} of the rotary scaling") for name in names)
    return RopeScaling(*map(float, long), int(context))


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor, "original_max_position_embeddings": scaling.original_n_ctx,
    }  # fmt: skip


def _ids(keys: Keys, pad_id: int | None) -> dict[str, Any]:
    """Special tokens. Chat models list several ends of text; a model that only continues texts may have none (null).
    Padding is the config's token, else `pad_id`, else the end of text, else 0; old configs write -1 for none."""
    ends = keys["eos_token_id"]
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    bos, pad = keys["bos_token_id"], keys["pad_token_id"]
    for key, also, values in (("eos", ", a list of them", ends), ("bos", "", [bos]), ("pad", "", [pad])):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int if key == "eos" else int | None):
                raise ValueError(f"{keys.source}: {key}_token_id must be a token id{also}, or null, got {value!r}")
    eos, *more = ends or [None]
    pads = (token for token in (pad, pad_id, eos) if token is not None and token >= 0)
    return {"bos_id": bos, "eos_id": eos, "more_eos": tuple(more), "pad_id": next(pads, 0)}
