r"""Training of the embedded model: next-token prediction on the small language, in one compiled program per chunk.

Loss: mean cross-entropy in nats over all tokens but BOS and padding. Optimiser: Muon, linear warm-up, cosine decay.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PRNGKeyArray

from icl_lib.embedded.icl_tiny.language import BOS, EOS, PAD
from icl_lib.models import ModelConfig, Site, Tap, Transformer, compose


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Sizes and settings of a pretraining run. The defaults made the committed weights."""

    n_layers: int = 6
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 2
    d_head: int = 32
    d_mlp: int = 512
    seq: int = 80
    batch: int = 40
    steps: int = 1100
    lr: float = 0.02  # of the matrices inside the blocks, by Muon
    adam_lr: float = 4e-3  # of the embedding and the norms' gains, by Adam
    weight_decay: float = 0.1  # times the learning rate, on the matrices inside the blocks
    noise: float = 0.7  # strength of the branch noise
    residual_from: int = 450  # step at which the residual noise sets in: from the start, nothing is learnt under it
    residual_ramp: int = 100  # steps until it is at full strength
    prompt_share: float = 0.7
    seed: int = 0

    def model(self, d_vocab: int) -> ModelConfig:
        return ModelConfig(
            family="gemma", d_model=self.d_model, n_layers=self.n_layers, n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads, d_head=self.d_head, d_mlp=self.d_mlp, d_vocab=d_vocab, n_ctx=self.seq,
            bos_id=BOS, eos_id=EOS, pad_id=PAD,
        )  # fmt: skip


def branch_noise(strength: float, key: PRNGKeyArray) -> Tap:
    """A tap that multiplies what each branch adds to the residual, token by token, by a factor uniform in 1 +-
    strength.

    Like dropout it keeps the model from resting on finely balanced sums: an activation that is doubled or halved, as by
    adding a task vector to a residual that holds half of it already, should still be read in the same way.
    """

    def tap(site: Site, x: Array) -> Array:
        if site.name not in ("attn_out", "mlp_out"):
            return x
        place = jax.random.fold_in(key, 2 * site.layer + (site.name == "mlp_out"))
        return x * jax.random.uniform(place, (*x.shape[:-1], 1), x.dtype, 1 - strength, 1 + strength)

    return tap


def residual_noise(
    strength: Float[Array, ""], tokens: Int[Array, "batch seq"], config: ModelConfig, key: PRNGKeyArray
) -> Tap:
    r"""A tap that gives the residual of each row, at one layer picked for the row, another length and more of what its
    token always has.

    $x_t \to x_t + strength\,((s_t - 1)\, x_t + u_t\, m(tok_t))$ for every token of the row, with $s_t \sim U(0.8, 2)$,
    $u_t \sim U(0, 1.2)$ and $m$ the mean of this residual over the places of the batch with the same token, without
    gradient. At the first layer, where a token is all there is, nothing is changed.

    A task vector is a mean over arrows, so at an arrow it brings what every arrow holds a second time. A model that has
    only seen that once reads two of it as something else, and the vector then works worse than a part of it.
    """
    layer_key, scale_key, mean_key = jax.random.split(key, 3)
    layer = jax.random.randint(layer_key, tokens.shape[:1], 1, config.n_layers)
    scale = jax.random.uniform(scale_key, (*tokens.shape, 1), minval=0.8, maxval=2.0)
    share = jax.random.uniform(mean_key, (*tokens.shape, 1), maxval=1.2)
    flat = tokens.reshape(-1)
    count = jnp.bincount(flat, length=config.d_vocab)[flat][:, None].astype(scale.dtype)

    def tap(site: Site, x: Array) -> Array:
        if site.name != "resid_pre" or site.layer == 0:
            return x
        rows = jax.lax.stop_gradient(x).reshape(-1, x.shape[-1])
        mean = (jax.ops.segment_sum(rows, flat, config.d_vocab)[flat] / count).reshape(x.shape)
        here = (layer == site.layer).astype(x.dtype)[:, None, None]
        return x + strength * here * ((scale - 1) * x + share * mean)

    return tap


def loss_fn(model: Transformer, tokens: Int[Array, "batch seq"], tap: Tap | None = None) -> Float[Array, ""]:
    """Mean next-token cross-entropy in nats, padding left out."""
    targets = tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens, tap=tap)[:, :-1], targets)
    mask = (targets != PAD).astype(jnp.float32)
    return jnp.sum(losses * mask) / jnp.sum(mask)


def optimiser(config: PretrainConfig) -> optax.GradientTransformation:
    """Muon on the matrices of the blocks, Adam on the embedding and the norms.

    In 300 steps it reaches what AdamW does not in 1,000: the facts are many, the steps few.
    """

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, config.steps // 20), config.steps, peak * 0.02)

    def matrices(model):
        hidden = lambda path, leaf: leaf.ndim == 2 and path[0].name == "blocks"  # noqa: E731
        pick = lambda path, leaf: optax.contrib.MuonDimensionNumbers() if hidden(path, leaf) else None  # noqa: E731
        return jax.tree_util.tree_map_with_path(pick, model)

    return optax.contrib.muon(
        schedule(config.lr),
        weight_decay=config.weight_decay,
        adam_learning_rate=schedule(config.adam_lr),
        muon_weight_dimension_numbers=matrices,
    )


@partial(eqx.filter_jit, donate="all-except-first")
def _chunk(static, model, state, batches, strengths, keys):
    """Steps over `batches` (steps, batch, seq) with residual noise of `strengths` (steps,); gives the loss of each."""
    optim, noise = static

    def step(carry, step_input):
        model, state = carry
        tokens, strength, key = step_input
        branch_key, residual_key = jax.random.split(key)
        tap = compose(branch_noise(noise, branch_key), residual_noise(strength, tokens, model.config, residual_key))
        loss, grads = jax.value_and_grad(loss_fn)(model, tokens, tap)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
            updates, state = optim.update(grads, state, model)
        return (optax.apply_updates(model, updates), state), loss

    (model, state), losses = jax.lax.scan(step, (model, state), (batches, strengths, keys))
    return model, state, losses


def pretrain(
    config: PretrainConfig,
    tokens: Int[np.ndarray, "rows seq"],
    d_vocab: int,
    *,
    chunk: int = 50,
    progress: Callable[[str], None] = print,
) -> tuple[Transformer, np.ndarray]:
    """The trained model and the loss of every step. `tokens` are read once, in order, `config.batch` rows a step.

    Raises `ValueError` if there are too few rows, `FloatingPointError` with the step when the loss is not finite.
    """
    wanted = config.steps * config.batch
    if len(tokens) < wanted:
        raise ValueError(f"{config.steps} steps of {config.batch} rows need {wanted} rows, got {len(tokens)}")
    init_key, noise_key = jax.random.split(jax.random.key(config.seed))
    model = Transformer.init(config.model(d_vocab), key=init_key)
    keys = jax.random.split(noise_key, config.steps)
    optim = optimiser(config)
    state = optim.init(model)
    strengths = np.clip((np.arange(config.steps) - config.residual_from) / config.residual_ramp, 0, 1).astype(
        np.float32
    )
    batches = tokens[:wanted].reshape(config.steps, config.batch, -1)
    losses, start = [], time.perf_counter()
    for first in range(0, config.steps, chunk):
        part = slice(first, first + chunk)
        inputs = jnp.asarray(batches[part]), jnp.asarray(strengths[part]), keys[part]
        model, state, chunk_losses = _chunk((optim, config.noise), model, state, *inputs)
        losses.append(np.asarray(chunk_losses))
        if not np.isfinite(losses[-1]).all():
            bad = first + int(np.flatnonzero(~np.isfinite(losses[-1]))[0])
            raise FloatingPointError(f"loss is not finite at step {bad}: lower lr ({config.lr}) or look at the data")
        done = min(first + chunk, config.steps)
        seconds = time.perf_counter() - start
        rate = done * config.batch * config.seq / seconds
        progress(f"step {done}/{config.steps}  loss {losses[-1].mean():.3f}  {rate:,.0f} tokens/s  {seconds:.0f} s")
    return model, np.concatenate(losses)
