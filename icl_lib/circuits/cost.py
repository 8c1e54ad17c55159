"""What node effects and ablations cost."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from icl_lib.circuits.effects import clean_pass
from icl_lib.models import ModelConfig, Site
from icl_lib.models.cost import Cost, Part, abstract_array, backward_bytes, forward_cost, token_flops
from icl_lib.saes import SAE
from icl_lib.saes.cost import Dictionary, latents_bytes


class _Batch(eqx.Module):
    """All that a metric of the logits asks of a batch."""

    tokens: Int[Array, "b s"] | jax.ShapeDtypeStruct


def _tables(count: int, n_rows: int, saes: Sequence[Dictionary]) -> int:
    """Bytes of `count` tables with a number for every latent in each of `n_rows` rows. The first device holds them."""
    return 4 * count * n_rows * sum(d.d_sae for d in saes)


def _logprobs(logits: Array, tokens: Array) -> Array:
    """Log-probability of each token after the first."""
    logits = logits[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _metric(logits: Array, cache: dict, batch: _Batch) -> Array:
    return _logprobs(logits, batch.tokens).mean(axis=-1)


def _abstract_suite(config: ModelConfig, dtype) -> dict[Site, SAE]:
    """A residual SAE of one latent at every layer: its gradient is asked for, its own size is counted apart."""
    d, one = config.d_model, jnp.zeros(1, dtype)
    sae = lambda site: SAE(
        jnp.zeros((d, 1), dtype), one, jnp.zeros((1, d), dtype), jnp.zeros(d, dtype), site, site, "standard"
    )
    return {site: eqx.filter_eval_shape(sae, site) for site in (Site("resid_pre", i) for i in range(config.n_layers))}


def node_effects_cost(
    config: ModelConfig, batch: int, seq: int, layers: int, n_rows: int, saes: Sequence[Dictionary], part: Part
) -> Cost:
    """`node_effects` on one task: a pass, and its gradient back through the last `layers` layers, below which none is
    asked for. Tables have `n_rows` rows, tasks times groups.

    Each SAE runs, and its decoder once more for the gradient by the latents. Tables of two metrics, two each, and a
    ranking are held.
    """

    def program(model):
        run = lambda model, suite, prompts: clean_pass(model, suite, prompts, _metric)
        return run, _abstract_suite(model.config, model.embed.dtype), _Batch(abstract_array((batch, seq)))

    flops = batch * seq * (token_flops(config, seq) + token_flops(config, seq, layers=layers))
    return Cost(
        batch, seq, layers, flops, backward_bytes(config, seq, layers, part), program,
        other_flops=batch * seq * sum(d.flops + d.decode_flops for d in saes), other_row=latents_bytes(seq, saes),
        fixed=_tables(5, n_rows, saes),
    )  # fmt: skip


def ablation_cost(
    config: ModelConfig,
    batch: int,
    seq: int,
    layers: int,
    n_rows: int,
    saes: Sequence[Dictionary],
    part: Part,
    whole: bool,
) -> Cost:
    """One pass of an ablation on one task from the first SAE on, with all latents (`whole`) or a number that costs next
    to nothing.

    Held are tables of effects by two metrics (2 each) and means, a ranking, eight random ones, and one of a setting.
    """

    def program(model):
        run = lambda model, resid, tokens: _logprobs(model.run_from(0, resid), tokens)
        resid = abstract_array((batch, seq, model.config.d_model), model.embed.dtype)
        return run, resid, abstract_array((batch, seq))

    return forward_cost(
        config,
        batch,
        seq,
        part,
        layers=layers,
        program=program,
        other_flops=sum(d.flops for d in saes) if whole else 0,
        other_row=latents_bytes(seq, saes, copies=4),
        fixed=_tables(15, n_rows, saes),
    )
