"""Training on activations that are in memory: one call for SAEs of one width, by the recipe of ICL-SFC."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from icl_lib.models import Site
from icl_lib.models.sites import as_site, as_sites
from icl_lib.saes.activations import needed_sites
from icl_lib.saes.sae import SAE
from icl_lib.training.plan import Member, Plan
from icl_lib.training.progress import Progress, Reporter
from icl_lib.training.recipes import SHORT_RUN, TrainingError, make_recipe
from icl_lib.training.state import stop_if_bad
from icl_lib.training.steps import Buffer, finish, init_state, run_steps

Activations = Mapping[Site, np.ndarray | Array]


def train_on(
    acts: Activations | Iterable[Activations],
    sites: Iterable[Site | str] | Site | str,
    *,
    d_sae: int,
    sparsity: float | Mapping[Site | str, float],
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
) -> dict[Site, SAE]:  # fmt: skip
    r"""Train one gated SAE for each site in `sites`, all of width `d_sae`, by the objective of icl_sfc.py.

    `acts[site]` (n_tokens, d) in host memory, float32 or float16, row i the same token at every site, for the sites and
    their targets (`needed_sites`); or an iterator of such buffers, of which each chunk of steps takes the next. Batches
    are rows drawn at random with replacement. `sparsity` is $\lambda$, one for all or one a site.

    Inputs are divided by their running mean norm and multiplied by $\sqrt d$, targets likewise; at the end both are
    folded into the weights, and so are the norms of the decoder rows: the SAEs returned take and give raw activations,
    and a feature is in units of the norm that it writes.

    `progress` is called with a `Progress` after every `chunk` steps (`None` is silent, `list.append` keeps them).
    `sparsity_warmup` defaults to a fifth of the steps. This and the start, schedule and `dead_after` (2,000 in the
    paper) suit short runs: see `recipes.SHORT_RUN`. Raises `TrainingError` before any step if an activation is missing
    or shapes differ; later, with step and site, on NaN.
    """
    if chunk < 1:
        raise TrainingError(f"a chunk of steps must be at least 1, got {chunk}")
    ramp = n_steps // 5 if sparsity_warmup is None else sparsity_warmup
    recipe = make_recipe(
        "icl-sfc", n_steps=n_steps, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup,
        sparsity_warmup=ramp, dead_after=dead_after, clip=clip, **SHORT_RUN,
    )  # fmt: skip
    sites = as_sites(sites)
    if isinstance(sparsity, Mapping):
        sparsity = {as_site(site): value for site, value in sparsity.items()}
    members = tuple(Member(s, d_sae, sparsity[s] if isinstance(sparsity, Mapping) else sparsity) for s in sites)
    buffers = _buffers(acts)
    buffer = next(buffers)
    plan = Plan(members, recipe, {site: buffer[site].shape[-1] for site in needed_sites(sites) if site in buffer})
    state = init_state(plan, buffer, key=key)
    reporter = Reporter(plan, 0, progress, every=0.0)
    try:
        for first in range(0, n_steps, chunk):
            last = min(first + chunk, n_steps)
            state, means = run_steps(state, buffer, last - first, plan)
            stop_if_bad(means, plan)
            if reporter.due(last):
                reporter.report(last, means)
            buffer = next(buffers) if last < n_steps else buffer
    finally:
        reporter.close()
    return {member.site: sae for member, sae in finish(state, plan, metadata).items()}


def _buffers(acts) -> Iterator[Buffer]:
    """Device buffers, one for each chunk: the same one for ever, or the next of an iterator."""
    if isinstance(acts, Mapping):
        buffer = {as_site(site): jnp.asarray(a) for site, a in acts.items()}
        while True:
            yield buffer
    for each in acts:
        yield {as_site(site): jnp.asarray(a) for site, a in each.items()}
    raise TrainingError("the iterator of activations ended before the last step: give more, or fewer or longer chunks")
