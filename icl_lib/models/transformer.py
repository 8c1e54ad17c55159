r"""A decoder-only transformer with named sites; `ModelConfig` says of which family it is.

Block:  $x \leftarrow x + \mathrm{Attn}(\mathrm{Norm}_1 x)$, then  $x \leftarrow x + \mathrm{MLP}(\mathrm{Norm}_2 x)$.
Gemma 2 has a norm behind each branch too; in GPT-NeoX both branches read the block's input. Linear weights keep Hugging
Face's (out, in) orientation, so that a checkpoint is read without a transposition. Einsum letters: b batch, s query
position, t key position, g key-value head, r query heads per g, m = (r, s), d width.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from icl_lib.models.config import ModelConfig
from icl_lib.models.rotary import causal_mask, rotary_frequencies, rotate
from icl_lib.models.sites import Site, Tap, compose, record

_ACTIVATIONS = {
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}


class Norm(eqx.Module):
    r"""$n(x) \cdot (o + w) + b$ in float32, where $n(x) = x / \sqrt{\overline{x^2} + \epsilon}$.

    A layer norm takes the mean off x first and has a bias; an RMS norm does neither. The offset $o$ is 1 in Gemma,
    whose weight is the gain minus one, and 0 elsewhere.
    """

    weight: Float[Array, " d_model"]
    bias: Float[Array, " d_model"] | None
    eps: float = eqx.field(static=True)
    offset: float = eqx.field(static=True)
    centred: bool = eqx.field(static=True)

    @classmethod
    def init(cls, config: ModelConfig) -> "Norm":
        """A norm of gain 1."""
        centred = config.norm == "layer"
        weight = jnp.full(config.d_model, 1.0 - config.norm_offset)
        return cls(weight, jnp.zeros(config.d_model) if centred else None, config.norm_eps, config.norm_offset, centred)

    def normalize(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        """$n(x)$ in float32, before the gain."""
        x32 = x.astype(jnp.float32)
        if self.centred:
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)

    def scale(self, normalized: Float[Array, "*batch d_model"], dtype) -> Float[Array, "*batch d_model"]:
        """What follows `normalize`: gain and bias, then the model's dtype."""
        gain = self.offset + self.weight.astype(jnp.float32)
        y = normalized * jnp.broadcast_to(gain, normalized.shape)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(jnp.float32), y.shape)
        return y.astype(dtype)

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        return self.scale(self.normalize(x), x.dtype)


def linear(
    x: Float[Array, "*batch d_in"], w: Float[Array, "d_out d_in"], b: Float[Array, " d_out"] | None = None
) -> Float[Array, "*batch d_out"]:
    """$x W^T + b$."""
    y = x @ w.T
    return y if b is None else y + jnp.broadcast_to(b, y.shape)


def soft_cap(x: Array, cap: float | None) -> Array:
    r"""$c \tanh(x / c)$, or x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Past(eqx.Module):
    """Keys and values of a prefix that is not computed again, for all layers.

    Row `b` uses its first `length[b]` positions; the rest of the prefix axis is masked. An intervention at one late
    token leaves everything before it as it was, so only the tokens from there on have to be run.
    """

    k: tuple[Float[Array, "batch past n_kv_heads d_head"], ...]  # rotated
    v: tuple[Float[Array, "batch past n_kv_heads d_head"], ...]
    length: Int[Array, " batch"]

    @classmethod
    def record(
        cls, model: "Transformer", tokens: Int[Array, "batch seq"], length: Int[Array, " batch"], tap: Tap | None = None
    ) -> "Past":
        """The past of `tokens[b, :length[b]]`, from one run: a clean one, or that with a tap."""
        layers = range(model.config.n_layers)
        cache: dict[Site, Array] = {}
        seen = record([Site(name, i) for name in ("rot_k", "v") for i in layers], cache)
        model(tokens, tap=seen if tap is None else compose(tap, seen))
        return cls(tuple(cache[Site("rot_k", i)] for i in layers), tuple(cache[Site("v", i)] for i in layers), length)


class Attention(eqx.Module):
    """Causal attention whose `n_heads` queries share `n_kv_heads` keys and values in equal groups."""

    q: Float[Array, "n_heads_d_head d_model"]
    k: Float[Array, "n_kv_d_head d_model"]
    v: Float[Array, "n_kv_d_head d_model"]
    o: Float[Array, "d_model n_heads_d_head"]
    b_q: Float[Array, " n_heads_d_head"] | None = None
    b_k: Float[Array, " n_kv_d_head"] | None = None
    b_v: Float[Array, " n_kv_d_head"] | None = None
    b_o: Float[Array, " d_model"] | None = None

    def __call__(self, x, positions, mask, config: ModelConfig, layer: int, tap: Tap, past: Past | None):
        heads = lambda w, b: linear(x, w, b).reshape(*x.shape[:-1], -1, config.d_head)
        q = tap(Site("q", layer), heads(self.q, self.b_q))
        k = tap(Site("k", layer), heads(self.k, self.b_k))
        v = tap(Site("v", layer), heads(self.v, self.b_v))
        frequency = rotary_frequencies(config)
        q = tap(Site("rot_q", layer), rotate(q, positions, frequency))
        k = tap(Site("rot_k", layer), rotate(k, positions, frequency))
        if past is not None:
            k = jnp.concatenate([past.k[layer].astype(k.dtype), k], axis=1)
            v = jnp.concatenate([past.v[layer].astype(v.dtype), v], axis=1)
        batch, seq, groups = *x.shape[:2], config.n_kv_heads
        scale = config.d_head**-0.5 if config.attn_scale is None else config.attn_scale
        # The queries that share a key head go side by side into one product (r and s as one axis): few large products,
        # not many small.
        # r before s, because heads may lie on several devices: the joint axis is then still cut where they are.
        q = (q * scale).reshape(batch, seq, groups, -1, config.d_head).transpose(0, 2, 3, 1, 4)
        q = q.reshape(batch, groups, -1, config.d_head)
        scores = jnp.einsum("bgmd,btgd->bgmt", q, k, preferred_element_type=jnp.float32)
        scores = soft_cap(scores, config.attn_softcap).reshape(batch, config.n_heads, seq, k.shape[1])
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        pattern = tap(Site("pattern", layer), jax.nn.softmax(scores, axis=-1).astype(x.dtype))
        z = jnp.einsum("bgmt,btgd->bgmd", pattern.reshape(batch, groups, -1, k.shape[1]), v)
        z = z.reshape(batch, groups, -1, seq, config.d_head).transpose(0, 3, 1, 2, 4)
        z = tap(Site("z", layer), z.reshape(batch, seq, config.n_heads * config.d_head))
        return linear(z, self.o, self.b_o)


class MLP(eqx.Module):
    r"""$W_{down}(\sigma(W_{gate} x) \odot W_{up} x)$; without a gate $W_{down}\,\sigma(W_{up} x)$, plus any biases."""

    gate: Float[Array, "d_mlp d_model"] | None
    up: Float[Array, "d_mlp d_model"]
    down: Float[Array, "d_model d_mlp"]
    b_gate: Float[Array, " d_mlp"] | None = None
    b_up: Float[Array, " d_mlp"] | None = None
    b_down: Float[Array, " d_model"] | None = None

    def __call__(self, x: Float[Array, "*batch d_model"], activation: str) -> Float[Array, "*batch d_model"]:
        act, up = _ACTIVATIONS[activation], linear(x, self.up, self.b_up)
        hidden = act(up) if self.gate is None else act(linear(x, self.gate, self.b_gate)) * up
        return linear(hidden, self.down, self.b_down)


class Block(eqx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual.

    `attn_out` and `mlp_out` are what is added, behind Gemma 2's second norms. In a parallel block the MLP reads the
    block's input, and `resid_mid` is still the residual after attention alone.
    """

    ln1: Norm
    attn: Attention
    ln2: Norm
    mlp: MLP
    ln1_post: Norm | None = None
    ln2_post: Norm | None = None

    def __call__(self, x, positions, mask, config: ModelConfig, layer: int, tap: Tap, past: Past | None):
        x = tap(Site("resid_pre", layer), x)
        attn_in = tap(Site("attn_in", layer), self.ln1(x))
        attn_out = self.attn(attn_in, positions, mask, config, layer, tap, past)
        attn_out = attn_out if self.ln1_post is None else self.ln1_post(attn_out)
        mid = tap(Site("resid_mid", layer), x + tap(Site("attn_out", layer), attn_out))
        normalized = tap(Site("mlp_normalized", layer), self.ln2.normalize(x if config.parallel else mid))
        mlp_in = tap(Site("mlp_in", layer), self.ln2.scale(normalized, x.dtype))
        mlp_out = self.mlp(mlp_in, config.activation)
        mlp_out = mlp_out if self.ln2_post is None else self.ln2_post(mlp_out)
        return tap(Site("resid_post", layer), mid + tap(Site("mlp_out", layer), mlp_out))


def _init_block(config: ModelConfig, key: PRNGKeyArray) -> Block:
    d, width, kv = config.d_model, config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    hidden, branch = config.d_mlp, (2 * config.n_layers) ** -0.5
    k = jax.random.split(key, 7)
    norm = partial(Norm.init, config)
    zeros = lambda n, wanted: jnp.zeros(n) if wanted else None
    attn = Attention(
        _normal(k[0], width, d), _normal(k[1], kv, d), _normal(k[2], kv, d), _normal(k[3], d, width, branch),
        *(zeros(n, config.qkv_bias) for n in (width, kv, kv)), zeros(d, config.out_bias),
    )  # fmt: skip
    mlp = MLP(
        _normal(k[4], hidden, d) if config.gated else None, _normal(k[5], hidden, d), _normal(k[6], d, hidden, branch),
        zeros(hidden, config.mlp_bias and config.gated), zeros(hidden, config.mlp_bias), zeros(d, config.mlp_bias),
    )  # fmt: skip
    post = (norm(), norm()) if config.post_norms else (None, None)
    return Block(norm(), attn, norm(), mlp, *post)


def _normal(key: PRNGKeyArray, out: int, into: int, gain: float = 1.0) -> Float[Array, "out into"]:
    return jax.random.normal(key, (out, into)) * (gain * into**-0.5)


def _checked(tap: Tap | None) -> Tap:
    """`tap`, held to the shape of each site: a vector that broadcasts would otherwise pass unseen."""

    def checked(site, x):
        y = x if tap is None else tap(site, x)
        if getattr(y, "shape", None) != x.shape:
            came = type(y).__name__ if getattr(y, "shape", None) is None else f"shape {y.shape}"
            raise ValueError(f"a tap must return an array of the site's shape: {x.shape} at {site}, got {came}")
        return y

    return checked


class Transformer(eqx.Module):
    """A language model: `model(tokens)` gives float32 logits, `model(tokens, tap=tap)` lets `tap` see every site. Right
    padding needs no mask, because attention is causal: what stands after a token does not change it."""

    embed: Float[Array, "d_vocab d_model"]
    blocks: tuple[Block, ...]
    norm: Norm
    unembed: Float[Array, "d_vocab d_model"] | None  # None where the embedding serves for it
    config: ModelConfig = eqx.field(static=True)

    @classmethod
    def init(cls, config: ModelConfig, *, key: PRNGKeyArray) -> "Transformer":
        r"""Random weights: normal, of variance 1/fan-in, branches into the residual shrunk by $\sqrt{2 n_{layers}}$."""
        key, embed_key = jax.random.split(key)
        blocks = tuple(_init_block(config, k) for k in jax.random.split(key, config.n_layers))
        embed = _normal(embed_key, config.d_vocab, config.d_model)
        unembed = None if config.tied else _normal(jax.random.fold_in(embed_key, 1), config.d_vocab, config.d_model)
        return cls(embed, blocks, Norm.init(config), unembed, config)

    def __call__(self, tokens: Int[Array, "batch seq"], tap: Tap | None = None) -> Float[Array, "batch seq d_vocab"]:
        """Logits of the next token, with `tap(site, x) -> x` called at every site in the order of computation.

        What the tap returns goes on in the place of x; it has to be of x's shape. So a tap steers, ablates, freezes or
        records, and `record`, `replace`, `perturb` and `compose` make the usual ones:

        >>> model = Transformer.init(tiny_config(), key=jax.random.key(0))
        >>> tokens = jnp.array([[2, 5, 7]])
        >>> def halve(site, x):
        ...     return x / 2 if site == Site("mlp_out", 1) else x
        >>> cache = {}
        >>> logits = model(tokens, tap=compose(halve, record(["resid_post.1"], cache)))
        >>> logits.shape, cache[Site("resid_post", 1)].shape
        ((1, 3, 40), (1, 3, 16))
        >>> bool((logits == model(tokens)).all())
        False

        Raises `ValueError` if tokens are not of the shape (batch, seq) or more than the model's context, or if the tap
        returns another shape.
        """
        if tokens.ndim != 2:
            raise ValueError(f"the model takes tokens (batch, seq), got {tokens.shape}; is tokens[None] meant?")
        self.config.check_length(tokens.shape[1])
        return self.run_from(0, _checked(tap)(Site("embed"), self.embedding(tokens)), tap)

    def embedding(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq d_model"]:
        """What the first block reads. Gemma rounds the factor to the activation dtype before it multiplies."""
        return self.embed[tokens] * jnp.asarray(self.config.embed_scale, self.embed.dtype)

    def run_from(
        self, layer: int, resid_pre: Float[Array, "batch seq d_model"], tap: Tap | None = None, past: Past | None = None
    ) -> Float[Array, "batch seq d_vocab"]:
        """Logits from the input of block `layer` on; with `past`, token j of row b stands at `past.length[b] + j`."""
        self.config.check_layer(layer)
        tap = _checked(tap)
        seq = self.config.check_length(resid_pre.shape[1])
        positions = jnp.arange(seq)[None, :] + (0 if past is None else past.length[:, None])
        masks = {
            window: causal_mask(seq, None if past is None else (past.k[0].shape[1], past.length), window)
            for window in set(map(self.config.window, range(layer, self.config.n_layers)))
        }
        x = resid_pre
        for i, block in enumerate(self.blocks[layer:], start=layer):
            x = block(x, positions, masks[self.config.window(i)], self.config, i, tap, past)
        x = tap(Site("final_norm"), self.norm(x))
        matrix = self.embed if self.unembed is None else self.unembed
        logits = jnp.einsum("bsd,vd->bsv", x, matrix, preferred_element_type=jnp.float32)
        return tap(Site("logits"), soft_cap(logits, self.config.logit_softcap))
