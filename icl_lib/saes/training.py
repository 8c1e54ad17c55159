"""Training a whole suite of SAEs at once: equal shapes are stacked, and every step of all of them is one compiled program.

Inside a chunk of steps nothing is read by the host: rows of the activations are drawn, each SAE takes one optimiser step,
dead latents are counted, statistics are summed. Between chunks a line of progress is printed and a NaN ends the run.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from icl_lib.models import Site
from icl_lib.saes import objectives
from icl_lib.saes.activations import needed_sites, output_site
from icl_lib.saes.objectives import Params
from icl_lib.saes.sae import SAE

NORM_DECAY = 0.99  # of the running mean norms
BETA2 = 0.99  # Adam's second decay; the first is 0, there is no momentum
_SAMPLE = 4096  # tokens that the start of training looks at

Activations = Mapping[Site, np.ndarray | Array]


class TrainingError(ValueError):
    """Training cannot start, or met a loss that is not finite."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train; hashable, because it is static under `jit`. Counts are in optimiser steps.

    `learning_rate` rises over `warmup` and falls along a cosine to a tenth; `sparsity` rises over `sparsity_warmup`;
    a latent that has not fired for `dead_after` gets ghost gradients. Gradients are clipped to norm `clip` SAE by SAE.
    """

    n_steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    sparsity_warmup: int
    dead_after: int
    clip: float

    def __post_init__(self):
        for name in ("n_steps", "batch_size", "learning_rate", "dead_after", "clip"):
            if getattr(self, name) <= 0:
                raise TrainingError(f"{name} must be above 0, got {getattr(self, name)}")

    def rate(self, step: Array) -> Array:
        """Learning rate at a step, from 0."""
        done = (step + 1).astype(jnp.float32)
        rise = jnp.minimum(1.0, done / max(1, min(self.warmup, self.n_steps // 4)))
        return self.learning_rate * rise * (0.55 + 0.45 * jnp.cos(jnp.pi * done / self.n_steps))


class State(NamedTuple):
    """What training carries from step to step; every leaf has a leading axis over SAEs."""

    params: Params
    second: Params  # running mean of squared gradients
    silent: Array  # (d_sae,) int32 steps since a latent last fired
    norm_in: Array  # () running mean norm of the input
    norm_out: Array  # () running mean norm of the target
    bad_step: Array  # () int32 first step with a loss that is not finite, or -1


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where training stands after a chunk. Per SAE, by site: `l0` and `fvu` are means over the chunk, `dead` a fraction."""

    step: int
    n_steps: int
    tokens_per_second: float
    l0: dict[Site, float]
    fvu: dict[Site, float]
    dead: dict[Site, float]

    def __str__(self) -> str:
        def span(values, digits):
            low, high = min(values.values()), max(values.values())
            return f"{low:.{digits}f} to {high:.{digits}f}"

        return (
            f"step {self.step:5d} / {self.n_steps}  {self.tokens_per_second:8.0f} tokens/s  "
            f"L0 {span(self.l0, 1)}  FVU {span(self.fvu, 3)}  dead {span(self.dead, 3)}"
        )


def train_suite(
    acts: Activations | Iterable[Activations],
    sites: Sequence[Site],
    *,
    d_sae: int,
    sparsity: float | Mapping[Site, float],
    key: PRNGKeyArray,
    n_steps: int = 1500,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    warmup: int = 128,
    sparsity_warmup: int | None = None,
    dead_after: int = 100,
    clip: float = 1.0,
    chunk: int = 100,
    metadata: Mapping[str, str | int | float | bool] | None = None,
    progress: Callable[[Progress], None] | None = print,
) -> dict[Site, SAE]:
    r"""Train one gated SAE for each site in `sites`, all of width `d_sae`, by the objective of objectives.py.

    `acts[site]` (n_tokens, d) in host memory, float32 or float16, row i the same token at every site, for the sites and
    their targets (`needed_sites`); or an iterator of such buffers, of which each chunk of steps takes the next. Batches are
    rows drawn at random with replacement. `sparsity` is $\lambda$, one for all or one a site.

    Inputs are divided by their running mean norm and multiplied by $\sqrt d$, targets likewise; at the end both are folded
    into the weights, and so are the norms of the decoder rows: the SAEs returned take and give raw activations, and a
    feature is in units of the norm that it writes.

    `progress` is called with a `Progress` after every `chunk` steps (`None` is silent, `list.append` keeps them).
    `sparsity_warmup` defaults to a fifth of the steps. `dead_after` (2,000 in the paper) suits short runs.
    Raises `TrainingError` before any step if an activation is missing or shapes differ; later, with step and site, on NaN.
    """
    ramp = n_steps // 5 if sparsity_warmup is None else sparsity_warmup
    recipe = Recipe(n_steps, batch_size, learning_rate, warmup, ramp, dead_after, clip)
    sites = list(sites)
    layout = _Layout(sites)
    lambdas = jnp.asarray([sparsity[s] if isinstance(sparsity, Mapping) else sparsity for s in sites], jnp.float32)
    buffers = _buffers(acts, layout)
    buffer = next(buffers)
    init_key, step_key = jax.random.split(key)
    state = _start(buffer, layout, d_sae, init_key)
    for first in range(0, n_steps, chunk):
        last, began = min(first + chunk, n_steps), time.perf_counter()
        state, sums = _run_chunk(state, buffer, lambdas, step_key, first, last, recipe, layout)
        _stop_if_bad(state, sites)
        if progress is not None:
            speed = (last - first) * batch_size / (time.perf_counter() - began)
            progress(_progress(state, sums, last, last - first, speed, recipe, sites))
        buffer = next(buffers) if last < n_steps else buffer
    meta = {"training_steps": n_steps, "training_batch": batch_size} | dict(metadata or {})
    return {site: _finish(state, i, site, meta, float(lambdas[i])) for i, site in enumerate(sites)}


class _Layout:
    """Which buffer row feeds which SAE; hashable by its sites, as it is static under `jit`."""

    def __init__(self, sites: Sequence[Site]):
        if not sites or len(set(sites)) != len(sites):
            raise TrainingError(f"sites must be different and at least one, got {[str(s) for s in sites]}")
        self.sites = tuple(sites)
        self.needed = tuple(needed_sites(sites))
        self.inputs = tuple(self.needed.index(s) for s in sites)
        self.targets = tuple(self.needed.index(output_site(s)) for s in sites)

    def __eq__(self, other):
        return isinstance(other, _Layout) and self.sites == other.sites

    def __hash__(self):
        return hash(self.sites)

    def rows(self, buffer: tuple[Array, ...], index: Array) -> tuple[Array, Array]:
        """Inputs and targets (n_saes, tokens, d) in float32 of the rows `index`."""
        picked = [a[index].astype(jnp.float32) for a in buffer]
        return jnp.stack([picked[i] for i in self.inputs]), jnp.stack([picked[i] for i in self.targets])


def _buffers(acts, layout: _Layout) -> Iterator[tuple[Array, ...]]:
    """Checked device buffers, one for each chunk: the same one for ever, or the next of an iterator."""
    if isinstance(acts, Mapping):
        buffer = _check_buffer(acts, layout)
        while True:
            yield buffer
    for each in acts:
        yield _check_buffer(each, layout)
    raise TrainingError("the iterator of activations ended before the last step: give more buffers, fewer steps or a longer chunk")


def _check_buffer(acts: Activations, layout: _Layout) -> tuple[Array, ...]:
    missing = [str(s) for s in layout.needed if s not in acts]
    if missing:
        raise TrainingError(f"no activations for {', '.join(missing)}: harvest needed_sites(sites), inputs and targets")
    shapes = {s: acts[s].shape for s in layout.needed}
    if any(len(shape) != 2 or shape[0] != shapes[layout.needed[0]][0] for shape in shapes.values()):
        raise TrainingError(f"every site needs activations (n_tokens, d) of the same tokens, got { {str(k): v for k, v in shapes.items()} }")
    if len({(shapes[s][1], shapes[output_site(s)][1]) for s in layout.sites}) > 1:
        widths = {str(s): shapes[s][1] for s in layout.needed}
        raise TrainingError(f"SAEs that are trained together need equal widths, got {widths}: call train_suite once per width")
    return tuple(jnp.asarray(acts[s]) for s in layout.needed)


def _mean_norm(x: Array) -> Array:
    return jnp.mean(jnp.linalg.norm(x, axis=-1), axis=-1)


@functools.partial(jax.jit, static_argnames=("layout", "d_sae"))
def _start(buffer, layout: _Layout, d_sae: int, key) -> State:
    """Data-dependent start from a sample of the first buffer; see `objectives.init`."""
    init_key, index_key = jax.random.split(key)
    index = jax.random.randint(index_key, (_SAMPLE,), 0, buffer[0].shape[0])
    x, y = layout.rows(buffer, index)
    norm_in, norm_out = _mean_norm(x), _mean_norm(y)

    def one(x, y, norm_in, norm_out, key):
        return objectives.init(_scale(x, norm_in), _scale(y, norm_out), d_sae, key=key)

    n = len(layout.sites)
    params = jax.vmap(one)(x, y, norm_in, norm_out, jax.random.split(init_key, n))
    second = jax.tree.map(jnp.zeros_like, params)
    return State(params, second, jnp.zeros((n, d_sae), jnp.int32), norm_in, norm_out, jnp.full(n, -1))


def _scale(x, norm):
    """To a mean norm of sqrt(d)."""
    return x * (math.sqrt(x.shape[-1]) / norm)


def _step_one(state: State, x, y, sparsity, step, key, recipe: Recipe) -> tuple[State, objectives.Stats]:
    """One optimiser step of one SAE on one batch."""
    norm_in = NORM_DECAY * state.norm_in + (1 - NORM_DECAY) * _mean_norm(x)
    norm_out = NORM_DECAY * state.norm_out + (1 - NORM_DECAY) * _mean_norm(y)
    dead = state.silent >= recipe.dead_after
    (loss, stats), grads = jax.value_and_grad(objectives.gated_loss, has_aux=True)(
        state.params, _scale(x, norm_in), _scale(y, norm_out), sparsity, dead, key=key
    )
    params, second = _adam(state.params, state.second, grads, recipe, step)
    silent = jnp.where(stats.fired, 0, state.silent + 1)
    bad_step = jnp.where((state.bad_step < 0) & ~jnp.isfinite(loss), step, state.bad_step)
    return State(params, second, silent, norm_in, norm_out, bad_step), stats


def _adam(params: Params, second: Params, grads: Params, recipe: Recipe, step) -> tuple[Params, Params]:
    """Adam with b1 = 0 on the clipped gradient of one SAE, bias-corrected."""
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in grads))
    shrink = jnp.minimum(1.0, recipe.clip / (norm + 1e-12))
    second = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * (shrink * g) ** 2, second, grads)
    correction = 1 - BETA2 ** (step + 1).astype(jnp.float32)
    rate = recipe.rate(step) * shrink
    return jax.tree.map(lambda p, g, s: p - rate * g / (jnp.sqrt(s / correction) + 1e-8), params, grads, second), second


def _over_saes(function, *stacked):
    """`vmap` on accelerators. On a CPU one SAE after the other, so that its (batch, d_sae) arrays stay in the cache: 2-3 x faster."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda args: function(*args), stacked)
    return jax.vmap(function)(*stacked)


@functools.partial(jax.jit, static_argnames=("recipe", "layout"), donate_argnames="state")
def _run_chunk(state: State, buffer, sparsity, key, first, last, recipe: Recipe, layout: _Layout):
    """Steps first .. last - 1 of all SAEs; also L0 and FVU summed over them, (n_saes,) each."""
    n_saes, n_tokens = len(layout.sites), buffer[0].shape[0]

    def step(i, carry):
        state, l0, fvu = carry
        index_key, ghost_key = jax.random.split(jax.random.fold_in(key, i))
        x, y = layout.rows(buffer, jax.random.randint(index_key, (recipe.batch_size,), 0, n_tokens))
        ramp = jnp.minimum(1.0, (i + 1) / max(1, recipe.sparsity_warmup))
        each = functools.partial(_step_one, step=i, recipe=recipe)
        keys = jax.random.split(ghost_key, n_saes)
        state, stats = _over_saes(lambda s, x, y, lam, k: each(s, x, y, lam * ramp, key=k), state, x, y, sparsity, keys)
        return state, l0 + stats.l0, fvu + stats.fvu

    # the bounds are traced, so that a last chunk of another length needs no second compilation
    state, l0, fvu = jax.lax.fori_loop(first, last, step, (state, jnp.zeros(n_saes), jnp.zeros(n_saes)))
    return state, (l0, fvu)


def _stop_if_bad(state: State, sites: Sequence[Site]) -> None:
    bad = np.asarray(state.bad_step)
    if (bad >= 0).any():
        i = int(np.argmin(np.where(bad >= 0, bad, np.iinfo(bad.dtype).max)))
        raise TrainingError(
            f"the loss of the SAE at {sites[i]} is not finite at step {bad[i]}: check its activations for inf or NaN "
            "(float16 overflows at 65504), or lower the learning rate; nothing was saved"
        )


def _progress(state: State, sums, step: int, n: int, speed: float, recipe: Recipe, sites) -> Progress:
    dead = np.mean(np.asarray(state.silent) >= recipe.dead_after, axis=1)
    l0, fvu = (np.asarray(s) / n for s in sums)
    by_site = [dict(zip(sites, map(float, values), strict=True)) for values in (l0, fvu, dead)]
    return Progress(step, recipe.n_steps, speed, *by_site)


def _finish(state: State, i: int, site: Site, meta: Mapping, sparsity: float) -> SAE:
    """SAE i with both normalisations and the norms of its decoder rows folded into the weights (exact)."""
    p = Params(*(w[i] for w in state.params))
    gain_in = math.sqrt(p.W_enc.shape[0]) / state.norm_in[i]
    gain_out = math.sqrt(p.W_dec.shape[1]) / state.norm_out[i]
    W_dec = p.W_dec / gain_out
    norms = jnp.linalg.norm(W_dec, axis=1) + 1e-12
    return SAE(
        W_enc=p.W_enc * gain_in,
        b_enc=p.b_gate,
        W_dec=W_dec / norms[:, None],
        b_dec=p.b_dec / gain_out,
        r_mag=p.r_mag + jnp.log(norms),
        b_mag=p.b_mag * norms,
        site_in=site,
        site_out=output_site(site),
        architecture="gated",
        metadata=tuple(sorted((dict(meta) | {"sparsity": sparsity}).items())),
    )
