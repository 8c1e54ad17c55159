"""The sizes of a language model and what tells its family from others, as plain data.

Families differ in a dozen small ways (which norm, where, gated or not, what rotates). Each is one field here, so that
one `Transformer` is all of them; `icl_lib.models.families` says which family has which, and reads them from a
`config.json`.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's slower rotation for contexts longer than `original_n_ctx`: see `rotary.rotary_frequencies`."""

    factor: float  # by how much the slowest pairs are slowed down
    low_freq_factor: float  # pairs that turn less often than this in the original context are slowed down in full
    high_freq_factor: float  # pairs that turn more often than this are left alone
    original_n_ctx: int  # the context before it was lengthened, in tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder-only transformer is made of; hashable, so that it can be static under `jit`. The defaults are
    Gemma's. Raises `ValueError` where the sizes do not go together."""

    family: str  # whose tensor names and config keys a folder of this model has: "gemma", "llama", ...
    d_model: int  # width of the residual
    n_layers: int  # how many blocks follow each other
    n_heads: int  # query heads of a layer
    n_kv_heads: int  # key-value heads of a layer, each shared by an equal group of query heads
    d_head: int  # width of a head
    d_mlp: int  # hidden width of the MLP
    d_vocab: int  # rows of the embedding, some of which may stand for no token
    n_ctx: int  # the longest sequence of training, in tokens; what is longer is refused
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # what is added to the mean square in a norm
    bos_id: int | None = 2  # the token that begins a text, None where the model was trained without
    eos_id: int | None = 1  # the token that ends a text, None where the model writes on
    more_eos: tuple[int, ...] = ()  # other tokens that end a text, as chat models have
    pad_id: int = 0  # the token that fills up a batch
    norm: str = "rms"  # "rms", or "layer", which takes the mean off first and has a bias
    norm_offset: float = 1.0  # the gain of a norm is this plus its weight
    post_norms: bool = False  # whether a norm stands behind each branch too (Gemma 2)
    activation: str = "gelu_tanh"  # of the MLP: "gelu_tanh", "gelu" or "silu"
    gated: bool = True  # whether the MLP multiplies by a second projection
    parallel: bool = False  # whether attention and MLP read the same residual (GPT-NeoX)
    qkv_bias: bool = False  # whether queries, keys and values have biases
    out_bias: bool = False  # whether the output of attention has one
    mlp_bias: bool = False  # whether the projections of the MLP have biases
    attn_scale: float | None = None  # what scores are multiplied by; None for 1 / sqrt(d_head)
    attn_softcap: float | None = None  # the c of c tanh(x / c) on scores; None for no cap
    logit_softcap: float | None = None  # the same on logits
    windows: tuple[int | None, ...] | None = None  # how many keys each layer sees, None for all; None for all in all
    rotary_dim: int | None = None  # how many dimensions of each head rotate; None for all
    rope_scaling: RopeScaling | None = None  # slower rotation for long contexts; None for none
    tied: bool = True  # whether the embedding serves as the output matrix too
    scale_embed: bool = True  # whether the embedding is multiplied by sqrt(d_model)

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            got = f"{self.n_heads} and {self.n_kv_heads}: each key-value head serves equally many query heads"
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {got}")
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
        """Length of the last axis at a site that an SAE can be trained on. Raises `ValueError` on other sites."""
        if site == "z":
            return self.n_heads * self.d_head
        widths = (
            "embed resid_pre resid_mid resid_post attn_in attn_out mlp_in mlp_normalized mlp_out final_norm".split()
        )
        if site in widths:
            return self.d_model
        raise ValueError(f"site {site!r} has no width of its own; those with one are {', '.join(widths)} and z")

    def check_layer(self, layer: int, what: str = "layer") -> int:
        """`layer` itself. Raises `ValueError` where the model has no such block."""
        if not 0 <= layer < self.n_layers:
            most = self.n_layers - 1
            raise ValueError(f"{what} must be in 0..{most} for this model of {self.n_layers} layers, got {layer}")
        return layer

    def check_length(self, n: int, what: str = "a sequence") -> int:
        """`n` itself. Raises `ValueError` where it is more tokens than the context that the model was trained on."""
        if n > self.n_ctx:
            longer = f"{what} of {n} tokens is longer than the context of this model, {self.n_ctx}"
            raise ValueError(f"{longer}: take fewer examples or shorter rows")
        return n
