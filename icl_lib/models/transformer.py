r"""A decoder-only transformer with named sites, in the Gemma-1 architecture.

Block:  $x \leftarrow x + \mathrm{Attn}(\mathrm{RMS}_1 x)$, then  $x \leftarrow x + \mathrm{MLP}(\mathrm{RMS}_2 x)$.
Linear weights keep Hugging Face's (out, in) orientation, so that a checkpoint is read without a transposition.
Einsum letters: b batch, s query position, t key position, g key-value head, r query heads per g, h head, d width.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from icl_lib.models.config import ModelConfig
from icl_lib.models.sites import Site, Tap, record


class RMSNorm(eqx.Module):
    r"""$x / \sqrt{\overline{x^2} + \epsilon} \cdot (1 + w)$, computed in float32 (Gemma keeps the gain minus one)."""

    weight: Float[Array, " d_model"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        gain = 1.0 + self.weight.astype(jnp.float32)
        return (x32 * scale * jnp.broadcast_to(gain, x.shape)).astype(x.dtype)


class Past(eqx.Module):
    """Keys and values of a prefix that is not computed again, for all layers.

    Row `b` uses its first `length[b]` positions; the rest of the prefix axis is masked. An intervention at one late
    token leaves everything before it as it was, so only the tokens from there on have to be run.
    """

    k: tuple[Float[Array, "batch past n_kv_heads d_head"], ...]  # rotated
    v: tuple[Float[Array, "batch past n_kv_heads d_head"], ...]
    length: Int[Array, " batch"]

    @classmethod
    def record(cls, model: "Transformer", tokens: Int[Array, "batch seq"], length: Int[Array, " batch"]) -> "Past":
        """The past of `tokens[b, :length[b]]`, from one clean run."""
        layers = range(model.config.n_layers)
        cache: dict[Site, Array] = {}
        model(tokens, tap=record([Site(name, i) for name in ("rot_k", "v") for i in layers], cache))
        return cls(tuple(cache[Site("rot_k", i)] for i in layers), tuple(cache[Site("v", i)] for i in layers), length)


def rotate(
    x: Float[Array, "batch seq heads d_head"], positions: Int[Array, "#batch seq"], theta: float
) -> Float[Array, "batch seq heads d_head"]:
    r"""Rotary embedding: the pair $(x_i, x_{i + n/2})$ turns by $p\,\theta^{-2i/n}$ (Hugging Face's half split)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (positions.astype(jnp.float32)[..., None] * frequency[None, None, :])[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_mask(seq: int, past: Past | None) -> Array:
    """(1 or batch, seq, keys) booleans: token s sees the valid past and the tokens up to itself."""
    own = jnp.tril(jnp.ones((seq, seq), bool))[None]
    if past is None:
        return own
    batch, n_past = past.k[0].shape[:2]
    valid = jnp.arange(n_past)[None, :] < past.length[:, None]
    valid = jnp.broadcast_to(valid[:, None, :], (batch, seq, n_past))
    return jnp.concatenate([valid, jnp.broadcast_to(own, (batch, seq, seq))], axis=-1)


class Attention(eqx.Module):
    """Causal attention whose `n_heads` queries share `n_kv_heads` keys and values in equal groups."""

    q: Float[Array, "n_heads_d_head d_model"]
    k: Float[Array, "n_kv_d_head d_model"]
    v: Float[Array, "n_kv_d_head d_model"]
    o: Float[Array, "d_model n_heads_d_head"]

    def __call__(self, x, positions, mask, config: ModelConfig, layer: int, tap: Tap, past: Past | None):
        heads = lambda w: (x @ w.T).reshape(*x.shape[:-1], -1, config.d_head)  # noqa: E731
        q = tap(Site("q", layer), heads(self.q))
        k = tap(Site("k", layer), heads(self.k))
        v = tap(Site("v", layer), heads(self.v))
        q = tap(Site("rot_q", layer), rotate(q, positions, config.rope_theta))
        k = tap(Site("rot_k", layer), rotate(k, positions, config.rope_theta))
        if past is not None:
            k = jnp.concatenate([past.k[layer].astype(k.dtype), k], axis=1)
            v = jnp.concatenate([past.v[layer].astype(v.dtype), v], axis=1)
        batch, seq = x.shape[:2]
        q = q.reshape(batch, seq, config.n_kv_heads, -1, config.d_head) * config.d_head**-0.5
        scores = jnp.einsum("bsgrd,btgd->bgrst", q, k).astype(jnp.float32)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        pattern = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        pattern = tap(Site("pattern", layer), pattern.reshape(batch, config.n_heads, seq, -1))
        grouped = pattern.reshape(batch, config.n_kv_heads, -1, seq, pattern.shape[-1])
        z = jnp.einsum("bgrst,btgd->bsgrd", grouped, v)
        z = tap(Site("z", layer), z.reshape(batch, seq, config.n_heads, config.d_head))
        return z.reshape(batch, seq, -1) @ self.o.T


class MLP(eqx.Module):
    r"""$W_{down}(\mathrm{gelu}(W_{gate} x) \odot W_{up} x)$ with the tanh approximation of gelu."""

    gate: Float[Array, "d_mlp d_model"]
    up: Float[Array, "d_mlp d_model"]
    down: Float[Array, "d_model d_mlp"]

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        return (jax.nn.gelu(x @ self.gate.T, approximate=True) * (x @ self.up.T)) @ self.down.T


class Block(eqx.Module):
    """One layer: attention, then the gated MLP, each behind an RMSNorm and added to the residual."""

    ln1: RMSNorm
    attn: Attention
    ln2: RMSNorm
    mlp: MLP

    def __call__(self, x, positions, mask, config: ModelConfig, layer: int, tap: Tap, past: Past | None):
        x = tap(Site("resid_pre", layer), x)
        attn_in = tap(Site("attn_in", layer), self.ln1(x))
        attn_out = self.attn(attn_in, positions, mask, config, layer, tap, past)
        x = tap(Site("resid_mid", layer), x + tap(Site("attn_out", layer), attn_out))
        mlp_in = tap(Site("mlp_in", layer), self.ln2(x))
        return tap(Site("resid_post", layer), x + tap(Site("mlp_out", layer), self.mlp(mlp_in)))


def _checked(tap: Tap | None) -> Tap:
    """`tap`, held to the shape of each site: a vector that broadcasts would otherwise pass unseen."""

    def checked(site, x):
        y = x if tap is None else tap(site, x)
        if getattr(y, "shape", None) != x.shape:
            came = type(y).__name__ if getattr(y, "shape", None) is None else f"shape {y.shape}"
            raise ValueError(f"a tap must return an array of the site's shape: expected {x.shape} at {site}, got {came}")
        return y

    return checked


class Transformer(eqx.Module):
    """A language model: `model(tokens)` gives float32 logits, `model(tokens, tap=tap)` lets `tap` see every site.

    Right padding needs no mask, because attention is causal: what stands after a token does not change it.
    """

    embed: Float[Array, "d_vocab d_model"]
    blocks: tuple[Block, ...]
    norm: RMSNorm
    config: ModelConfig = eqx.field(static=True)

    @classmethod
    def init(cls, config: ModelConfig, *, key: PRNGKeyArray) -> "Transformer":
        r"""Random weights: normal with variance 1/fan-in, branches into the residual shrunk by $\sqrt{2 n_{layers}}$."""
        d, width = config.d_model, config.n_heads * config.d_head
        kv, branch = config.n_kv_heads * config.d_head, (2 * config.n_layers) ** -0.5

        def linear(key, out, into, gain=1.0):
            return jax.random.normal(key, (out, into)) * (gain * into**-0.5)

        def norm():
            return RMSNorm(jnp.zeros(d), config.norm_eps)

        def block(key):
            k = jax.random.split(key, 7)
            attn = Attention(linear(k[0], width, d), linear(k[1], kv, d), linear(k[2], kv, d), linear(k[3], d, width, branch))
            mlp = MLP(linear(k[4], config.d_mlp, d), linear(k[5], config.d_mlp, d), linear(k[6], d, config.d_mlp, branch))
            return Block(norm(), attn, norm(), mlp)

        key, embed_key = jax.random.split(key)
        blocks = tuple(block(k) for k in jax.random.split(key, config.n_layers))
        return cls(linear(embed_key, config.d_vocab, d), blocks, norm(), config)

    def __call__(self, tokens: Int[Array, "batch seq"], tap: Tap | None = None) -> Float[Array, "batch seq d_vocab"]:
        if tokens.ndim != 2:
            raise ValueError(f"the model takes tokens of shape (batch, seq), got {tokens.shape}; is tokens[None] meant?")
        # Gemma rounds the factor to the activation dtype before it multiplies.
        scale = jnp.asarray(self.config.embed_scale, self.embed.dtype)
        return self.run_from(0, _checked(tap)(Site("embed"), self.embed[tokens] * scale), tap)

    def run_from(
        self,
        layer: int,
        resid_pre: Float[Array, "batch seq d_model"],
        tap: Tap | None = None,
        past: Past | None = None,
    ) -> Float[Array, "batch seq d_vocab"]:
        """Logits from the input of block `layer` on; with `past`, token j of row b stands at `past.length[b] + j`."""
        self.config.check_layer(layer)
        tap = _checked(tap)
        seq = resid_pre.shape[1]
        positions = jnp.arange(seq)[None, :] + (0 if past is None else past.length[:, None])
        mask = causal_mask(seq, past)
        x = resid_pre
        for i, block in enumerate(self.blocks[layer:], start=layer):
            x = block(x, positions, mask, self.config, i, tap, past)
        x = tap(Site("final_norm"), self.norm(x))
        logits = (x @ self.embed.T).astype(jnp.float32)
        return tap(Site("logits"), logits)
