r"""Node effects: how much each SAE latent, at each group of tokens, adds to a metric.

A node is (site, group, latent). Its indirect effect under zero ablation, to first order at the clean run, is

$$\widehat{IE}_{g,i} = \frac{1}{B} \sum_b \sum_{t \in g} f_i(x_{b,t})\; W_{dec,i} \cdot \nabla_{y_{b,t}} m ,$$

with x what the SAE reads and y what it writes (for a transcoder x = mlp_in and y = mlp_out). STYLE defines IE as
m(patched) - m(clean); here the sign is turned, so that **positive means that the node helps** and that ablating it
would lower m by this much. The error node of a site and group is the same sum with y - decode(f) for f_i W_dec,i.
All gradients come from one backward pass through zero perturbations at the outputs of all SAEs.

Source: ICL-SFC, Sec. 4.1; SFC (Marks et al. 2025), Sec. 3.1.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from icl_lib.circuits.groups import Groups
from icl_lib.models import Site, Transformer, compose, perturb, record
from icl_lib.models.batches import map_tasks
from icl_lib.models.sites import as_layers, as_site, check_sites
from icl_lib.saes import SAE

# (logits, cache, batch) -> (b,), larger is better; the cache has the activations at the sites in `metric.sites`, if any
Metric = Callable[[Array, dict[Site, Array], Any], Array]
Suite = dict[Site, SAE] | dict[str, SAE]  # keyed by site_in, which may be given as a text, "resid_pre.4"
Patch = Literal["zero", "mean"]

# Sites that the SAEs of a circuit may read, in the order in which the model computes what these write.
SITES = ("resid_pre", "z", "attn_out", "mlp_normalized", "mlp_in", "mlp_out")


@dataclasses.dataclass(frozen=True)
class OnLogits:
    """A metric of the logits alone: `OnLogits(pair_logprob)` calls `pair_logprob(logits, batch)`."""

    function: Callable[[Array, Any], Array]

    def __call__(self, logits: Array, cache: dict[Site, Array], batch: Any) -> Array:
        """The function's value for every prompt."""
        return self.function(logits, batch)


def sites_of(model: Transformer, metric: Metric) -> tuple[Site, ...]:
    """Sites whose activations a metric asks for. Raises `ValueError` on a layer that the model does not have."""
    return check_sites(model.config, getattr(metric, "sites", ()))


def write_order(site: Site) -> int:
    """When an SAE writes, counted along the residual stream: residual, attention, MLP of layer 0, 1, ..."""
    return len(SITES) * site.layer + SITES.index(site.name)


def suite_in_layers(model: Transformer, suite: Suite, layers: Iterable[int] | int) -> Suite:
    """The folded SAEs of `suite` that sit in `layers`, in the order in which the model meets them.

    Raises `ValueError` on a layer that the model does not have, a layer without any SAE, or an SAE of another width.
    """
    layers, suite = sorted(set(as_layers(layers))), {as_site(site): sae for site, sae in suite.items()}
    if not layers:
        raise ValueError("layers is empty: name at least one layer whose SAEs are to be used")
    for layer in layers:
        model.config.check_layer(layer)
    have = sorted({site.layer for site in suite})
    missing = [layer for layer in layers if layer not in have]
    if missing:
        raise ValueError(
            f"the suite has no SAE in layers {missing}, only in {have}: train or load these, or leave them out of "
            "layers"
        )
    if unknown := [str(site) for site in suite if site.name not in SITES]:
        raise ValueError(
            f"circuits use SAEs at {', '.join(SITES)}, but the suite has {', '.join(unknown)}: leave these out of it"
        )
    sites = sorted((s for s in suite if s.layer in layers), key=write_order)
    kinds: dict[tuple, Site] = {}
    for site in sites:
        if suite[site].d_in != model.config.width(site.name):
            raise ValueError(
                f"the SAE at {site} reads d_in = {suite[site].d_in}, but the model has {model.config.width(site.name)} "
                "there: was it trained on another model?"
            )
        if (twin := kinds.setdefault((site.layer, site.kind), site)) != site:
            raise ValueError(
                f"the SAEs at {twin} and {site} are both the {site.kind} of layer {site.layer}: leave one out of "
                "the suite"
            )
    return {site: suite[site].fold() for site in sites}


class CleanPass(eqx.Module):
    """What the SAEs of a suite see in the clean run; every dict is keyed by the site that the SAE reads."""

    reads: dict[Site, Float[Array, "b s _"]]  # x at site_in
    writes: dict[Site, Float[Array, "b s _"]]  # y at site_out
    grads: dict[Site, Float[Array, "b s _"]]  # gradient of the mean metric in y
    metric: Float[Array, ""]  # mean over prompts


@eqx.filter_jit
def clean_pass(model: Transformer, suite: Suite, batch, metric: Metric) -> CleanPass:
    """One forward and one backward pass; `batch` of one task."""
    outs = [sae.site_out for sae in suite.values()]

    def forward(deltas):
        cache: dict[Site, Array] = {}
        # The perturbation comes first, so that a site reads what the rest of the model reads.
        sites = {*suite, *outs, *sites_of(model, metric)}
        logits = model(batch.tokens, tap=compose(perturb(deltas), record(sites, cache)))
        return jnp.mean(metric(logits, cache, batch)), cache

    zeros = {sae.site_out: jnp.zeros((*batch.tokens.shape, sae.W_dec.shape[1])) for sae in suite.values()}
    (value, cache), grads = jax.value_and_grad(forward, has_aux=True)(zeros)
    pick = lambda values, attribute: {site: values[attribute(site)].astype(jnp.float32) for site in suite}
    reads = pick(cache, lambda site: site)
    writes, grads = (pick(values, lambda site: suite[site].site_out) for values in (cache, grads))
    return CleanPass(reads, writes, grads, value)


def latents_and_error(sae: SAE, x: Float[Array, "b s d_in"], y: Float[Array, "b s d_out"]) -> tuple[Array, Array]:
    """f (b, s, d_sae) and what the SAE does not explain of its output, err = y - decode(f) (b, s, d_out)."""
    f = sae.encode(x.astype(sae.W_enc.dtype))
    return f.astype(jnp.float32), y - sae.decode(f, x).astype(jnp.float32)


class Effects(eqx.Module):
    """Effects of all nodes, in units of the metric; rows of the tables are groups, in the order of `names`.

    Sums over the tokens of the group, averaged over prompts; positive means that the node helps. `means` is the mean
    activation over the tokens of the group (also what mean ablation puts in; 0 for a group without tokens). Error nodes
    have one number a group. With stacked prompts every array has a leading task axis.
    """

    latents: dict[Site, Float[Array, "*tasks n_groups _"]]
    errors: dict[Site, Float[Array, "*tasks n_groups"]]
    means: dict[Site, Float[Array, "*tasks n_groups _"]]
    metric: Float[Array, "*tasks"]
    names: tuple[str, ...] = eqx.field(static=True)

    def task(self, index: int) -> "Effects":
        """The effects of one task of a stack."""
        return jax.tree.map(lambda a: a[index], self)


def _site_effects(
    sae: SAE, x: Array, y: Array, grad: Array, indicator: Array, patch: Patch
) -> tuple[Array, Array, Array]:
    """Effects (n_groups, d_sae), error effects (n_groups,) and mean activations (n_groups, d_sae) of one SAE."""
    f, err = latents_and_error(sae, x, y)
    total = lambda values: jnp.einsum("bsf,bsr->rf", values, indicator)
    count = jnp.maximum(jnp.sum(indicator, axis=(0, 1)), 1.0)[:, None]
    mean = total(f) / count
    grad_f = grad @ sae.W_dec.astype(jnp.float32).T
    effect, effect_err = total(grad_f * f), jnp.sum(total(grad * err), axis=-1)
    if patch == "mean":
        effect = effect - total(grad_f) * mean
        effect_err = effect_err - jnp.sum(total(grad) * total(err) / count, axis=-1)
    return effect, effect_err, mean


def _task_effects(model: Transformer, suite: Suite, batch, groups: Groups, metric: Metric, patch: Patch) -> Effects:
    """Effects on one task."""
    clean = clean_pass(model, suite, batch, metric)
    indicator = groups.indicator()
    parts = {
        s: _site_effects(suite[s], clean.reads[s], clean.writes[s], clean.grads[s], indicator, patch) for s in suite
    }
    latents, errors, means = ({site: part[i] for site, part in parts.items()} for i in range(3))
    return Effects(latents, errors, means, clean.metric, groups.names)


@eqx.filter_jit
def _effects(model, suite, batch, groups, metric, patch):
    one = lambda batch, groups: _task_effects(model, suite, batch, groups, metric, patch)
    return map_tasks(one, batch, groups, lead=batch.tokens.shape[:-2])


def node_effects(
    model: Transformer,
    suite: Suite,
    batch: Any,
    layers: Iterable[int] | int,
    *,
    metric: Metric,
    groups: Groups | None = None,
    patch: Patch = "zero",
) -> Effects:
    r"""Effects of the latents and error nodes of every SAE in `layers`, for one task or a stack of tasks.

    `batch` is a pytree with `tokens`, such as prompts; `groups` (default: by role) says which tokens share a node.
    `patch` names what a node would be replaced by: "zero" gives $\nabla m \cdot f$, "mean"
    $\nabla m \cdot (f - \bar f)$ with $\bar f$ the mean over the tokens of the group in this batch. Raises `ValueError`
    on a layer out of range, a layer without SAEs, an unknown patch, a batch longer than the model's context, or prompts
    too short for the metric.
    """
    if patch not in ("zero", "mean"):
        raise ValueError(f"patch must be 'zero' or 'mean', got {patch!r}")
    groups = Groups.by_role(batch) if groups is None else groups
    return _effects(model, suite_in_layers(model, suite, layers), batch, groups, metric, patch)
