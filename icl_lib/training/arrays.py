"""Training on activations that are in memory: one call for SAEs of one width, by the recipe of ICL-SFC."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from icl_lib.models import Site
from icl_lib.saes.activations import needed_sites
from icl_lib.saes.sae import SAE
from icl_lib.training.plan import Member, Suite
from icl_lib.training.recipes import SHORT_RUN, TrainingError, make_recipe
from icl_lib.training.steps import Buffer, finish, init_state, run_steps, stop_if_bad

Activations = Mapping[Site, np.ndarray | Array]


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


def train_on(
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
    r"""Train one gated SAE for each site in `sites`, all of width `d_sae`, by the objective of icl_sfc.py.

    `acts[site]` (n_tokens, d) in host memory, float32 or float16, row i the same token at every site, for the sites and
    their targets (`needed_sites`); or an iterator of such buffers, of which each chunk of steps takes the next. Batches are
    rows drawn at random with replacement. `sparsity` is $\lambda$, one for all or one a site.

    Inputs are divided by their running mean norm and multiplied by $\sqrt d$, targets likewise; at the end both are folded
    into the weights, and so are the norms of the decoder rows: the SAEs returned take and give raw activations, and a
    feature is in units of the norm that it writes.

    `progress` is called with a `Progress` after every `chunk` steps (`None` is silent, `list.append` keeps them).
    `sparsity_warmup` defaults to a fifth of the steps. This and the start, schedule and `dead_after` (2,000 in the paper) suit
    short runs: see `recipes.SHORT_RUN`.
    Raises `TrainingError` before any step if an activation is missing or shapes differ; later, with step and site, on NaN.
    """
    ramp = n_steps // 5 if sparsity_warmup is None else sparsity_warmup
    recipe = make_recipe(
        "icl-sfc", n_steps=n_steps, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup, sparsity_warmup=ramp,
        dead_after=dead_after, clip=clip, **SHORT_RUN,
    )  # fmt: skip
    members = tuple(Member(s, d_sae, sparsity[s] if isinstance(sparsity, Mapping) else sparsity) for s in sites)
    buffers = _buffers(acts)
    buffer = next(buffers)
    suite = Suite(members, recipe, {site: buffer[site].shape[-1] for site in needed_sites(sites) if site in buffer})
    state = init_state(suite, buffer, key=key)
    for first in range(0, n_steps, chunk):
        last, began = min(first + chunk, n_steps), time.perf_counter()
        state, means = run_steps(state, buffer, last - first, suite)
        stop_if_bad(means, suite)
        if progress is not None:
            speed = (last - first) * batch_size / (time.perf_counter() - began)
            values = [dict(zip(sites, np.asarray(v).tolist(), strict=True)) for v in (means.l0, means.fvu, means.dead)]
            progress(Progress(last, n_steps, speed, *values))
        buffer = next(buffers) if last < n_steps else buffer
    return {member.site: sae for member, sae in finish(state, suite, metadata).items()}


def _buffers(acts) -> Iterator[Buffer]:
    """Device buffers, one for each chunk: the same one for ever, or the next of an iterator."""
    if isinstance(acts, Mapping):
        buffer = {site: jnp.asarray(a) for site, a in acts.items()}
        while True:
            yield buffer
    for each in acts:
        yield {site: jnp.asarray(a) for site, a in each.items()}
    raise TrainingError(
        "the iterator of activations ended before the last step: give more buffers, fewer steps or a longer chunk"
    )
