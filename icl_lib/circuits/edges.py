r"""Edges: how much of a node's effect reaches it straight from an upstream node.

Let n be a target node with latent f_n, group k and $\hat g_{b,t} = W_{dec,n} \cdot \nabla_{y_{b,t}} m$ held constant.
Its effect is $\sum_{b, t \in k} \hat g_{b,t} f_n$. We differentiate that sum in the residual that feeds n's module,

$$r = \nabla_{resid} \sum_{b,\,t \in k} \hat g_{b,t}\, f_n(x(resid)),$$

through the norm for a transcoder, through the whole attention (patterns included) for an attention output, directly for
a residual node. An upstream node u of group j that writes f_u W_dec,u into that residual gets the edge

$$e_{u \to n} = \sum_{b,\, t \in j} f_u(x_{b,t})\; W_{dec,u} \cdot r_{b,t},$$

and an error node the same with its err. For an SAE of the mixed values z, r is first taken back through the output
matrix (and Gemma 2's second norm). The path is the straight one along the residual stream; what passes through other
modules is not counted. Sources are at most `window` layers before the target. In units of the metric.

Source: ICL-SFC, App. E; SFC, Sec. 3.1 and App. A.1.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float

from icl_lib.circuits.circuit import EDGE_COLUMNS, ERROR, Circuit
from icl_lib.circuits.effects import (
    CleanPass,
    Metric,
    Suite,
    clean_pass,
    latents_and_error,
    suite_in_layers,
    write_order,
)
from icl_lib.circuits.groups import Groups
from icl_lib.models import Site, Transformer, compose, perturb, record


def feed_of(site: Site, parallel: bool) -> Site:
    """The residual that the module of a site reads; in a parallel block the MLP, too, reads the block's input."""
    return Site("resid_mid" if site.name.startswith("mlp") and not parallel else "resid_pre", site.layer)


def sources_of(target: Site, suite: Suite, window: int, parallel: bool = False) -> list[Site]:
    """The sites that write into the residual before `target` reads it, at most `window` layers earlier."""
    before = (
        write_order(Site("resid_pre", target.layer)) + 1 if parallel else write_order(target)
    )  # attention and MLP side by side
    return [s for s in suite if write_order(s) < min(before, write_order(target)) and s.layer >= target.layer - window]


def _pull(model: Transformer, site: Site, resid_pre: Array):
    """The map from cotangents at what the SAE at `site` reads to gradients in the residual that feeds its module."""
    feed = feed_of(site, model.config.parallel)

    def read(delta):
        cache: dict[Site, Array] = {}
        model.run_from(site.layer, resid_pre, tap=compose(perturb({feed: delta}), record([site], cache)))
        return cache[site].astype(jnp.float32)

    return jax.vjp(read, jnp.zeros(resid_pre.shape))[1]


def _lift(model: Transformer, site: Site, resid_pre: Array):
    """The map from gradients in the residual that a source writes into to gradients in what its SAE writes."""
    if site.name != "z":
        return lambda r: r

    def write(delta):
        cache: dict[Site, Array] = {}
        out = Site("attn_out", site.layer)
        model.run_from(site.layer, resid_pre, tap=compose(perturb({site: delta}), record([out], cache)))
        return cache[out].astype(jnp.float32)

    back = jax.vjp(write, jnp.zeros((*resid_pre.shape[:-1], model.config.width("z"))))[1]
    return lambda r: back(r)[0]


def _into(model, suite, target: Site, resid_pre, clean: CleanPass, indicator, nodes, sources):
    """Edges into the nodes (latent, group) of one site: for each source site (latents, groups) -> (n_targets,
    n_sources).
    """
    sae, x = suite[target], clean.reads[target]
    pull = _pull(model, target, resid_pre[target.layer])
    lift = {site: _lift(model, site, resid_pre[site.layer]) for site in sources}
    grad_f = clean.grads[target] @ sae.W_dec.astype(jnp.float32).T
    # A JumpReLU latent has the derivative W_enc where it is on and none where it is off.
    grad_pre = jnp.where(sae.encode(x.astype(sae.W_enc.dtype)) > 0, grad_f, 0.0)
    upstream = {s: latents_and_error(suite[s], clean.reads[s], clean.writes[s]) for s in sources}

    def strength(site, r, latent, group):
        """Edges from the named nodes of one source site; latent -1 is the error node."""
        f, err = upstream[site]
        own = jnp.maximum(latent, 0)
        from_latents = (r @ suite[site].W_dec[own].astype(jnp.float32).T) * f[:, :, own]
        from_error = jnp.sum(r * err, axis=-1, keepdims=True)
        value = jnp.where((latent == ERROR)[None, None, :], from_error, from_latents)
        return jnp.einsum("bsn,bsn->n", value, indicator[:, :, group])

    def one(node):
        latent, group = node
        weight = grad_pre[:, :, latent] * indicator[:, :, group]
        (r,) = pull(weight[:, :, None] * sae.W_enc[:, latent].astype(jnp.float32)[None, None, :])
        return {site: strength(site, lift[site](r), *sources[site]) for site in sources}

    return jax.lax.map(one, nodes)


@eqx.filter_jit
def _edges(model, suite, batch, groups, metric, targets, sources):
    clean = clean_pass(model, suite, batch, metric)
    cache: dict[Site, Array] = {}
    model(batch.tokens, tap=record([Site("resid_pre", site.layer) for site in suite], cache))
    resid_pre = {site.layer: x for site, x in cache.items()}
    indicator = groups.indicator()
    return {
        site: _into(model, suite, site, resid_pre, clean, indicator, targets[site], sources[site]) for site in targets
    }


def _table(circuit: Circuit, site: Site) -> pd.DataFrame:
    return circuit.nodes[(circuit.nodes.layer == site.layer) & (circuit.nodes.kind == site.kind)]


def _with_errors(nodes: pd.DataFrame, site: Site, names: tuple[str, ...]) -> pd.DataFrame:
    """The rows of a site and the error node of each group, listed or not."""
    index = [f"{site.kind}.{site.layer}.error.{name}" for name in names[1:]]
    errors = pd.DataFrame({"latent": ERROR, "group": names[1:]}, index=index)
    return pd.concat([nodes.loc[nodes.latent != ERROR, ["latent", "group"]], errors])


def edge_effects(
    model: Transformer,
    suite: Suite,
    batch: Any,
    circuit: Circuit,
    *,
    metric: Metric,
    groups: Groups | None = None,
    window: int = 1,
) -> pd.DataFrame:
    """All edges into the latents of `circuit` from its other latents and from error nodes: source, target, effect.

    `batch` and `groups` (default: by role) are those of one task that gave the node effects. Error nodes are sources
    only, listed or not; `Circuit.with_edges` keeps the edges between its nodes. Raises `ValueError` on stacked
    prompts, an empty circuit, nodes where the suite has no SAE, or unknown groups.
    """
    if batch.tokens.ndim != 2:
        raise ValueError(f"edges are of one task: tokens must be (batch, seq), got shape {batch.tokens.shape}")
    if circuit.nodes.empty:
        raise ValueError("the circuit has no nodes, so it has no edges: take more nodes from the effects")
    suite = suite_in_layers(model, suite, sorted({int(layer) for layer in circuit.nodes.layer}))
    groups = Groups.by_role(batch) if groups is None else groups
    known = {(site.layer, site.kind) for site in suite}
    if lost := set(zip(circuit.nodes.layer, circuit.nodes.kind, strict=True)) - known:
        raise ValueError(f"the circuit has nodes at {sorted(lost)}, where the suite has no SAE")
    tables = {site: _table(circuit, site) for site in suite}
    targets = {site: table[table.latent != ERROR] for site, table in tables.items()}
    before = {site: sources_of(site, suite, window, model.config.parallel) for site in suite}
    targets = {site: table for site, table in targets.items() if len(table) and before[site]}
    sources = {site: {s: _with_errors(tables[s], s, groups.names) for s in before[site]} for site in targets}
    if not targets:
        return pd.DataFrame(columns=EDGE_COLUMNS)
    arrays = lambda nodes: (jnp.asarray(nodes.latent.to_numpy(np.int32)), jnp.asarray(groups.numbers(nodes.group)))
    to_arrays = lambda tree: jax.tree.map(arrays, tree, is_leaf=lambda node: isinstance(node, pd.DataFrame))
    values = _edges(model, suite, batch, groups, metric, to_arrays(targets), to_arrays(sources))
    parts = [_frame(targets[t], sources[t][s], values[t][s]) for t in targets for s in sources[t]]
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=EDGE_COLUMNS)


def _frame(targets: pd.DataFrame, sources: pd.DataFrame, values: Float[Array, "n_targets n_sources"]) -> pd.DataFrame:
    """Edges between two sites as rows; edges without any effect are left out."""
    values = np.asarray(values)
    to, start = np.nonzero(values)
    columns = (np.asarray(sources.index)[start], np.asarray(targets.index)[to], values[to, start])
    return pd.DataFrame(dict(zip(EDGE_COLUMNS, columns, strict=True)))
