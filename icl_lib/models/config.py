"""The sizes of a language model and what tells its family from others, read from a Hugging Face `config.json`.

Families differ in a dozen small ways (which norm, where, gated or not, what rotates). Each is one field here, so that one
`Transformer` is all of them.
"""

import dataclasses
import math
from typing import Any

# What a family is unless its config says otherwise. The dataclass's own defaults are Gemma's.
_LLAMA = {"norm_offset": 0.0, "activation": "silu", "scale_embed": False, "tied": False}
TRAITS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {"post_norms": True, "attn_softcap": 50.0, "logit_softcap": 30.0},
    "phi3": _LLAMA,
    "gpt_neox": {
        "norm": "layer", "norm_offset": 0.0, "activation": "gelu", "gated": False, "scale_embed": False, "tied": False,
        "parallel": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True,
    },
    "qwen2": _LLAMA | {"qkv_bias": True},
    "llama": _LLAMA,
}  # fmt: skip
FAMILIES = tuple(TRAITS)

# Hugging Face's names of the activations. The first Gemma configs say "gelu" and mean the tanh approximation.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's slower rotation for contexts longer than `original_n_ctx`: see `transformer.rotary_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_n_ctx: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    r"""What a decoder-only transformer is made of; hashable, so that it can be static under `jit`.

    Sizes: `d_mlp` is the hidden width of the MLP, `n_ctx` the longest sequence of training, `rotary_dim` how many
    dimensions of each head rotate (None: all of `d_head`).

    Form: `norm` "rms" or "layer" with `norm_eps`; the gain is `norm_offset` plus the weight; `post_norms` puts a norm
    behind each branch too (Gemma 2); `gated` MLPs multiply by a second projection; in a `parallel` block attention and
    MLP read the same residual (GPT-NeoX); scores are divided by $\sqrt{d_{head}}$ or multiplied by `attn_scale`; soft caps
    $c \tanh(x / c)$ act on scores and logits; `windows[i]` is how many keys layer i sees (None: all); `tied` models
    unembed with the embedding; `scale_embed` multiplies it by $\sqrt{d_{model}}$. A text ends at `eos_id`, where there is one, and at any
    id of `more_eos`.
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
    bos_id: int | None = 2
    eos_id: int | None = 1
    more_eos: tuple[int, ...] = ()
    pad_id: int = 0
    norm: str = "rms"
    norm_offset: float = 1.0
    post_norms: bool = False
    activation: str = "gelu_tanh"
    gated: bool = True
    parallel: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] | None = None
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    tied: bool = True
    scale_embed: bool = True

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
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.d_head):
            raise ValueError(f"rotary_dim must be even and in 2..{self.d_head}, got {self.rotary_dim}")
        if self.windows is not None and len(self.windows) != self.n_layers:
            raise ValueError(f"windows needs one entry a layer ({self.n_layers}), got {len(self.windows)}")

    @property
    def embed_scale(self) -> float:
        """What the token embedding is multiplied by: sqrt(d_model) in Gemma, 1 elsewhere."""
        return math.sqrt(self.d_model) if self.scale_embed else 1.0

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees, itself included; None for all."""
        return None if self.windows is None else self.windows[layer]

    def width(self, site: str) -> int:
        """Length of the last axis at the sites that an SAE can be trained on: "resid_pre", "z", "mlp_out", ...

        Raises `ValueError` on other sites.
        """
        if site == "z":
            return self.n_heads * self.d_head
        widths_of_model = (
            "embed",
            "resid_pre",
            "resid_mid",
            "resid_post",
            "attn_in",
            "attn_out",
            "mlp_in",
            "mlp_normalized",
            "mlp_out",
        )
        if site in (*widths_of_model, "final_norm"):
            return self.d_model
        raise ValueError(
            f"site {site!r} has no width of its own; those with one are {', '.join(widths_of_model)}, final_norm and z"
        )

    def check_layer(self, layer: int, what: str = "layer") -> int:
        """`layer` itself. Raises `ValueError` where the model has no such block."""
        if not 0 <= layer < self.n_layers:
            raise ValueError(
                f"{what} must be in 0..{self.n_layers - 1} for this model of {self.n_layers} layers, got {layer}"
            )
        return layer

    def check_length(self, n: int, what: str = "a sequence") -> int:
        """`n` itself. Raises `ValueError` where it is more tokens than the context that the model was trained on."""
        if n > self.n_ctx:
            raise ValueError(
                f"{what} of {n} tokens is longer than the context of this model, {self.n_ctx}: take fewer examples or shorter rows"
            )
        return n

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Read the fields of a Hugging Face config, by their old and their new names.

        Raises `ValueError` on an unknown family, a field that is missing or no number, or a rotary scaling or activation that is
        not ours.
        """
        family = raw.get("model_type")
        if family not in TRAITS:
            raise ValueError(f"{source}: model_type is {family!r}; supported families are {', '.join(FAMILIES)}")
        sizes = _sizes(raw, family, source)
        traits = TRAITS[family] | {
            "activation": _activation(raw, family, source),
            "windows": _windows(raw, family, source),
        }
        name, default = ("layer_norm_eps", 1e-5) if family == "gpt_neox" else ("rms_norm_eps", 1e-6)
        eps = _number(raw.get(name, default), name, source)
        rest = (
            _biases(raw, family) | _rope(raw, sizes["d_head"], source) | _ids(raw, source) | _caps(raw, family, source)
        )
        return cls(family=family, **(sizes | traits | rest), norm_eps=eps)

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The `config.json` from which transformers builds the same model; `dtype` names the stored weights."""
        from icl_lib.models.families import hf_config

        return hf_config(self, dtype)


def _number(value: Any, field: str, source: str, whole: bool = False) -> Any:
    """`value` itself. Raises `ValueError` with the name of the field unless it is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value <= 0:
        raise ValueError(f"{source}: {field} must be a {'whole ' if whole else ''}number above 0, got {value!r}")
    return value


def _sizes(raw: dict, family: str, source: str) -> dict[str, int]:
    names = {
        "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "d_mlp": "intermediate_size",
        "d_vocab": "vocab_size", "n_ctx": "max_position_embeddings",
    }  # fmt: skip
    if missing := [field for field in names.values() if field not in raw]:
        raise ValueError(f"{source}: field {missing[0]!r} is missing; is this the config of a {family} model?")
    sizes = {ours: _number(raw[field], field, source, whole=True) for ours, field in names.items()}
    others = {
        "n_kv_heads": ("num_key_value_heads", sizes["n_heads"]),
        "d_head": ("head_dim", sizes["d_model"] // sizes["n_heads"]),
    }
    return sizes | {
        ours: _number(raw.get(field) or default, field, source, whole=True) for ours, (field, default) in others.items()
    }


def _activation(raw: dict, family: str, source: str) -> str:
    default = {"gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gpt_neox": "gelu"}.get(family, "silu")
    name = raw.get("hidden_activation") or raw.get("hidden_act", default)
    if family == "gemma" and not raw.get("hidden_activation") and name == "gelu":
        name = "gelu_pytorch_tanh"
    if name not in _ACTIVATIONS or (family.startswith("gemma") and _ACTIVATIONS[name] != "gelu_tanh"):
        wanted = "gelu_pytorch_tanh" if family.startswith("gemma") else ", ".join(_ACTIVATIONS)
        raise ValueError(f"{source}: the activation of a {family} model must be one of {wanted}, got {name!r}")
    return _ACTIVATIONS[name]


def _windows(raw: dict, family: str, source: str) -> tuple[int | None, ...] | None:
    """Keys that each layer sees. New configs list `layer_types`; in old ones the family's rule applies."""
    default = {"gemma2": 4096, "qwen2": 4096}.get(family)  # as in transformers
    size, n = raw.get("sliding_window", default), raw["num_hidden_layers"]
    if (
        family not in ("gemma2", "phi3", "qwen2")
        or size is None
        or (family == "qwen2" and not raw.get("use_sliding_window"))
    ):
        return None
    size = _number(size, "sliding_window", source, whole=True)
    if "layer_types" in raw and raw["layer_types"] is not None:
        slides = [kind == "sliding_attention" for kind in raw["layer_types"]]
    else:
        first = raw.get("max_window_layers", 28)
        slides = [{"gemma2": i % 2 == 0, "phi3": True, "qwen2": i >= first}[family] for i in range(n)]
    return tuple(size if slide else None for slide in slides)


def _biases(raw: dict, family: str) -> dict[str, bool]:
    if family == "gpt_neox":
        both = raw.get("attention_bias", True)
        return {"qkv_bias": both, "out_bias": both, "parallel": raw.get("use_parallel_residual", True)}
    if family in ("llama", "gemma", "gemma2"):
        both = raw.get("attention_bias", False)
        return {"qkv_bias": both, "out_bias": both, "mlp_bias": raw.get("mlp_bias", False)}
    return {}


def _rope(raw: dict, d_head: int, source: str) -> dict[str, Any]:
    new, old = (raw.get(field) or {} for field in ("rope_parameters", "rope_scaling"))
    for field, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise ValueError(
                f"{source}: {field} must be an object with rope_type and its numbers, or null, got {value!r}"
            )
    scaling = new | old
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"{source}: rotary scaling of type {kind!r} is not supported, only none and 'llama3'; the config asks for {scaling}"
        )
    theta = new.get("rope_theta", raw.get("rope_theta", raw.get("rotary_emb_base", 10_000.0)))
    default = 0.25 if raw["model_type"] == "gpt_neox" else 1.0  # as in transformers
    part = new.get("partial_rotary_factor", raw.get("partial_rotary_factor", raw.get("rotary_pct", default)))
    part = _number(part, "the rotating part (partial_rotary_factor or rotary_pct)", source)
    theta = float(_number(theta, "rope_theta (or rotary_emb_base)", source))
    scaled = {"rope_scaling": _llama3(scaling, source)} if kind == "llama3" else {}
    return {"rope_theta": theta, "rotary_dim": None if part == 1 else int(d_head * part)} | scaled


def _llama3(scaling: dict, source: str) -> RopeScaling:
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [field for field in fields if field not in scaling]:
        raise ValueError(f"{source}: rotary scaling 'llama3' needs the field {missing[0]!r}, got {scaling}")
    *long, context = (_number(scaling[field], f"{field} of the rotary scaling", source) for field in fields)
    return RopeScaling(*map(float, long), int(context))


def _ids(raw: dict, source: str) -> dict[str, Any]:
    """Special tokens. Chat models list several ends of text, and a model that only continues texts may have none (null)."""
    ends = raw.get("eos_token_id", 1)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if strange := [end for end in ends if isinstance(end, bool) or not isinstance(end, int)]:
        raise ValueError(f"{source}: eos_token_id must be a token id, a list of them, or null, got {strange[0]!r}")
    eos, *more = ends or [None]
    pad = raw.get("pad_token_id")
    if pad is None:
        pad = 0 if raw["model_type"].startswith("gemma") or eos is None else eos
    return {"bos_id": raw.get("bos_token_id", 2), "eos_id": eos, "more_eos": tuple(more), "pad_id": pad}


def _caps(raw: dict, family: str, source: str) -> dict[str, Any]:
    tied = raw.get("tie_word_embeddings", TRAITS[family].get("tied", True))
    if family != "gemma2":
        return {"tied": tied}
    scale = _number(raw.get("query_pre_attn_scalar", 256), "query_pre_attn_scalar", source) ** -0.5
    return {
        "tied": tied, "attn_scale": scale,
        "attn_softcap": raw.get("attn_logit_softcapping", 50.0), "logit_softcap": raw.get("final_logit_softcapping", 30.0),
    }  # fmt: skip


def tiny_config(family: str = "gemma", **overrides) -> ModelConfig:
    """A model small enough for tests: 2 layers, d_model 16, 40 tokens in the vocabulary."""
    sizes = {
        "family": family, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_head": 8,
        "d_mlp": 32, "d_vocab": 40, "n_ctx": 64,
    }  # fmt: skip
    if family == "gpt_neox":
        sizes |= {"n_kv_heads": 2, "rotary_dim": 4, "norm_eps": 1e-5}
    if family == "gemma2":
        sizes["attn_scale"] = 8**-0.5
    return ModelConfig(**(sizes | TRAITS.get(family, {}) | overrides))
