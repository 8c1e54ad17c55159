"""Circuits against independent answers: finite differences, masks made by hand, an exactly linear model."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from icl_lib.circuits import (
    Circuit,
    Groups,
    OnLogits,
    brute_force_effects,
    edge_effects,
    faithfulness,
    node_effects,
    nodes_to_halve,
    prepare,
    random_ranking,
    rank_nodes,
    task_matrix,
)
from icl_lib.circuits.effects import clean_pass, suite_in_layers
from icl_lib.circuits.ranking import UNRANKED, compact
from icl_lib.figures import circuit_graph
from icl_lib.models import Site, Transformer, compose, perturb, record, tiny_config
from icl_lib.saes import SAE
from icl_lib.tasks import Prompts, Role, Template, stack_prompts
from icl_lib.tasks.metrics import pair_logprob
from icl_lib.tasks.prompts import _Label

P, X, A, Y, N = Role.PROMPT, Role.INPUT, Role.ARROW, Role.OUTPUT, Role.NEWLINE
LAYERS = (1, 2)
LOGPROB = OnLogits(pair_logprob)
node_roles = lambda prompts: Groups.by_role(prompts).index


def make(seed: int, batch: int = 3) -> Prompts:
    """Random tokens in the layout of two shots, with inputs of two tokens, then padding."""
    pair = [X, X, A, Y, N]
    roles = np.array([Role.OTHER, P, P, *pair, *pair, *pair[:-1], Role.OTHER])
    index = np.array([-1, -1, -1, *[0] * 5, *[1] * 5, *[2] * 4, -1])
    tokens = np.random.default_rng(seed).integers(3, 40, (batch, len(roles)))
    rows = lambda a: jnp.asarray(np.tile(a, (batch, 1)), jnp.int32)
    answer = jnp.asarray(np.tile((index == 2) & (roles == Y), (batch, 1)))
    return Prompts(
        jnp.asarray(tokens, jnp.int32), rows(roles), rows(index), answer, 2, Template(), 0, _Label((), f"task {seed}")
    )


def make_sae(key, site, out, d=16, d_sae=24) -> SAE:
    k = jax.random.split(key, 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) * 0.3
    return SAE(
        normal(k[0], d, d_sae), normal(k[1], d_sae), normal(k[2], d_sae, d), normal(k[3], d), site, out, "jumprelu",
        threshold=jnp.full(d_sae, 0.2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def world():
    """A random model of three layers with all three kinds of SAE in layers 1 and 2, and prompts of three tasks."""
    keys = iter(jax.random.split(jax.random.key(11), 9))
    model = Transformer.init(tiny_config(n_layers=3), key=next(keys))
    # A random model is nearly indifferent to its residual; larger weights make effects that can be measured.
    model = jax.tree.map(lambda w: w * 1.5, model)
    suite = {}
    for layer in LAYERS:
        for name, out in (("resid_pre", "resid_pre"), ("attn_out", "attn_out"), ("mlp_in", "mlp_out")):
            suite[Site(name, layer)] = make_sae(next(keys), Site(name, layer), Site(out, layer))
    return model, suite, stack_prompts([make(i) for i in range(3)])


@pytest.fixture(scope="module")
def effects(world):
    return node_effects(*world, LAYERS, metric=LOGPROB)


@pytest.fixture(scope="module")
def setting(world):
    model, suite, prompts = world
    return prepare(model, suite, prompts, layers=LAYERS, metric=LOGPROB)


@pytest.fixture(scope="module")
def clean(world):
    """The clean pass of the first task."""
    model, suite, prompts = world
    return clean_pass(model, suite_in_layers(model, suite, LAYERS), first_task(prompts), LOGPROB)


def first_task(prompts: Prompts) -> Prompts:
    return jax.tree.map(lambda a: a[0], prompts)


@eqx.filter_jit
def spliced_by_hand(model, suite, prompts, masks, scale):
    """Mean metric with `scale` times the latents masks[site] (b, s, d_sae) taken out of the output of every SAE."""
    taken = {}

    def tap(site, x):
        if site in suite:
            sae = suite[site]
            taken[sae.site_out] = scale * jnp.where(masks[site], sae.encode(x), 0.0) @ sae.W_dec
        return x - taken.pop(site) if site in taken else x

    return pair_logprob(model(prompts.tokens, tap=tap), prompts).mean()


def empty_masks(suite, prompts):
    return {site: np.zeros((*prompts.tokens.shape, sae.d_sae), bool) for site, sae in suite.items()}


def values_at(logits, cache, batch):
    """A probe: the square of a direction of the residual stream at layer 2, mean over tokens; it reads no logits."""
    return jnp.mean(cache[Site("resid_pre", 2)][..., 3] ** 2, axis=-1)


values_at.sites = (Site("resid_pre", 2),)


@eqx.filter_jit
def probed_by_hand(model, suite, tokens, masks, scale):
    """`values_at` with `scale` times the latents masks[site] taken out, each SAE on its own."""
    taken, seen = {}, {}

    def tap(site, x):
        if site in suite:
            sae = suite[site]
            taken[sae.site_out] = scale * jnp.where(masks[site], sae.encode(x), 0.0) @ sae.W_dec
        x = x - taken.pop(site) if site in taken else x
        seen[site] = x
        return x

    model(tokens, tap=tap)
    return values_at(None, seen, None).mean()


@dataclasses.dataclass(frozen=True)
class Plain:
    """A batch that knows nothing of in-context learning: tokens, and which of them count."""

    tokens: jax.Array
    real: jax.Array


jax.tree_util.register_dataclass(Plain, data_fields=["tokens", "real"], meta_fields=[])


@pytest.mark.parametrize("by", ["by_position", "all_tokens"])
def test_a_probe_on_activations_with_any_groups(world, by):
    """Effects against finite differences, single ablations against masks, and edges that end in the same nodes."""
    model, suite, prompts = world
    batch = Plain(first_task(prompts).tokens, first_task(prompts).real)
    with pytest.raises(ValueError, match="has no roles"):
        node_effects(model, suite, batch, LAYERS, metric=values_at)
    groups = getattr(Groups, by)(batch)
    real = np.asarray(batch.real)
    assert (np.asarray(groups.index)[~real] == 0).all() and (np.asarray(groups.index)[real] > 0).all()
    assert groups.names == (("none", "all") if by == "all_tokens" else ("none", *map(str, range(18))))
    effects, eps = node_effects(model, suite, batch, LAYERS, metric=values_at, groups=groups), 0.02
    assert np.abs(effects.latents[Site("resid_pre", 2)]).max() > 1e-3
    assert not np.asarray(effects.latents[Site("mlp_in", 2)]).any()  # written after what the probe reads
    nodes = Circuit.from_effects(effects, n=6).nodes
    stack = lambda tree: jax.tree.map(lambda a: a[None], tree)
    setting = prepare(model, suite, stack(batch), layers=LAYERS, metric=values_at, groups=stack(groups))
    exact = brute_force_effects(setting, nodes)
    folded = suite_in_layers(model, suite, LAYERS)
    for node, found in zip(nodes.itertuples(), exact, strict=True):
        (site,) = (s for s in folded if (s.layer, s.kind) == (node.layer, node.kind))
        masks = empty_masks(folded, batch)
        masks[site][..., node.latent] = np.asarray(groups.index) == groups.names.index(node.group)
        run = lambda scale, masks=masks: probed_by_hand(model, folded, batch.tokens, masks, jnp.float32(scale))
        np.testing.assert_allclose((run(-eps) - run(eps)) / (2 * eps), node.effect, rtol=0.03, atol=2e-4)
        np.testing.assert_allclose(found, run(0) - run(1), rtol=0.03, atol=1e-5)
    circuit = Circuit.from_effects(effects, n=6)
    edges = edge_effects(model, suite, batch, circuit, metric=values_at, groups=groups)
    assert set(edges.target) <= set(circuit.nodes.index) and len(edges)
    assert Circuit.from_json(circuit.to_json()).nodes.group.tolist() == circuit.nodes.group.tolist()


def test_a_probe_before_what_is_ablated_is_refused(world):
    model, suite, prompts = world
    with pytest.raises(ValueError, match="before layer 2"):
        early = lambda logits, cache, batch: cache[Site("resid_pre", 1)].mean(axis=(1, 2))
        early.sites = (Site("resid_pre", 1),)
        prepare(model, suite, prompts, layers=[2], metric=early)


def test_a_task_that_ablation_leaves_alone_has_no_faithfulness(setting, effects):
    flat = eqx.tree_at(lambda s: s.empty, setting, setting.full.at[1:].set(setting.empty[1:]))
    share = np.asarray(flat.faithfulness(flat.full[:, None]))
    assert np.isnan(share[0]).all() and not np.isnan(share[1:]).any()
    count, reached = nodes_to_halve(flat, rank_nodes(effects), max_nodes=3)
    assert not reached[0] and count[0] == 3


def test_prompts_longer_than_the_context_are_refused(world):
    model, suite, prompts = world
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, n_ctx=12))
    with pytest.raises(ValueError, match="12"):
        node_effects(model, suite, first_task(prompts), LAYERS, metric=LOGPROB)
    with pytest.raises(ValueError, match="12"):
        prepare(model, suite, prompts, layers=LAYERS, metric=LOGPROB)


def test_node_roles_take_the_last_token_of_words_and_leave_the_answer_out():
    roles = np.asarray(node_roles(make(0)))[0]
    assert roles.tolist() == [0, P, P, 0, X, A, Y, N, 0, X, A, Y, N, 0, X, A, 0, 0]


def test_effects_agree_with_finite_differences(world, effects):
    model, suite, prompts = world
    prompts = first_task(prompts)
    effects = effects.task(0)
    roles, eps = np.asarray(node_roles(prompts)), 0.02
    for site in suite:
        table = np.asarray(effects.latents[site])
        for role, latent in np.argwhere(np.abs(table) >= np.sort(np.abs(table).ravel())[-2]):
            masks = empty_masks(suite, prompts)
            masks[site][..., latent] = roles == role
            more, less = (spliced_by_hand(model, suite, prompts, masks, jnp.float32(s)) for s in (-eps, eps))
            np.testing.assert_allclose((more - less) / (2 * eps), table[role, latent], rtol=0.03, atol=2e-4)


def test_effects_are_complete(world, effects, clean):
    """Latents, error and decoder bias together are gradient times output, for every kind and role."""
    model, suite, prompts = world
    prompts = first_task(prompts)
    effects = effects.task(0)
    roles = np.asarray(node_roles(prompts))
    for site, sae in suite.items():
        y, grad = np.asarray(clean.writes[site]), np.asarray(clean.grads[site])
        for role in (P, X, A, Y, N):
            here = (roles == role)[..., None]
            bias = (grad * here * np.asarray(sae.b_dec)).sum()
            total = effects.latents[site][role].sum() + effects.errors[site][role] + bias
            np.testing.assert_allclose(total, (grad * y * here).sum(), rtol=1e-3, atol=1e-5)


def test_mean_patch_compares_with_the_mean_over_the_role(world, effects, clean):
    model, suite, prompts = world
    mean = node_effects(model, suite, prompts, LAYERS, metric=LOGPROB, patch="mean")
    one = first_task(prompts)
    site, here = Site("mlp_in", 2), np.asarray(node_roles(one)) == A
    f, g = (
        np.asarray(suite[site].encode(clean.reads[site])),
        np.asarray(clean.grads[site]) @ np.asarray(suite[site].W_dec).T,
    )
    expected = (g[here] * (f[here] - f[here].mean(axis=0))).sum(axis=0)
    np.testing.assert_allclose(mean.latents[site][0, A], expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(effects.means[site][0, A], f[here].mean(axis=0), rtol=1e-5, atol=1e-6)


def linear_logits(logits, prompts):
    """A metric without softmax: the logit of token 5 at the last arrow."""
    return logits[:, 15, 5]


def test_brute_force_equals_the_estimate_where_the_model_is_linear(world, getkey):
    """With a huge epsilon RMSNorm is a constant, without queries attention averages, without `down` there is no MLP."""
    _, suite, prompts = world
    model = Transformer.init(tiny_config(n_layers=3, norm_eps=1e12), key=getkey())
    silent = lambda m: [w for block in m.blocks for w in (block.attn.q, block.mlp.down)]
    model = eqx.tree_at(silent, model, [jnp.zeros_like(w) for w in silent(model)])
    gains = lambda m: [m.norm.weight, *[w for b in m.blocks for w in (b.ln1.weight, b.ln2.weight)]]
    model = eqx.tree_at(gains, model, [w + 1e6 for w in gains(model)])
    one = stack_prompts([first_task(prompts)])
    circuit = Circuit.from_effects(node_effects(model, suite, one, LAYERS, metric=OnLogits(linear_logits)).task(0))
    circuit = Circuit(circuit.nodes.iloc[:: max(1, len(circuit.nodes) // 25)])
    setting = prepare(model, suite, one, layers=LAYERS, metric=OnLogits(linear_logits))
    exact = brute_force_effects(setting, circuit.nodes)
    assert np.abs(exact).max() > 0.01
    np.testing.assert_allclose(exact, circuit.nodes.effect, rtol=2e-3, atol=2e-5)


def test_faithfulness_ends_at_one_and_zero(world, effects, setting):
    model, suite, prompts = world
    ranking = rank_nodes(effects)
    positive = prepare(model, suite, prompts, layers=LAYERS, metric=LOGPROB, empty="positive", effects=effects)
    plain = pair_logprob(model(prompts.tokens[0]), first_task(prompts)).mean()
    np.testing.assert_allclose(setting.full[0], plain, rtol=1e-5)
    n = int(ranking.n.max())
    np.testing.assert_allclose(faithfulness(setting, ranking, [0])[:, 0], 0, atol=1e-4)
    np.testing.assert_allclose(faithfulness(setting, ranking, [0], "inverse")[:, 0], 1, atol=1e-4)
    np.testing.assert_allclose(faithfulness(positive, ranking, [n], "inverse")[:, 0], 0, atol=1e-4)


def test_spliced_pass_equals_masks_made_by_hand(world, effects, setting):
    model, suite, prompts = world
    ranking = rank_nodes(effects)
    one, roles = first_task(prompts), np.asarray(node_roles(first_task(prompts)))
    for mode in ("keep", "inverse"):
        masks = {}
        for site in suite:
            chosen = np.asarray(ranking.rank[site][0] < 20)
            masks[site] = (chosen if mode == "inverse" else ~chosen)[roles] & (roles != 0)[..., None]
        expected = spliced_by_hand(model, suite, one, masks, jnp.float32(1))
        expected = (expected - setting.empty[0]) / (setting.full[0] - setting.empty[0])
        np.testing.assert_allclose(faithfulness(setting, ranking, [20], mode)[0, 0], expected, rtol=1e-3, atol=1e-4)


def test_ranking_orders_positive_effects_and_compact_keeps_the_first(effects):
    ranking = rank_nodes(effects)
    values, ranks = (
        np.concatenate([np.asarray(t[1]).ravel() for t in d.values()]) for d in (effects.latents, ranking.rank)
    )
    assert (ranks < UNRANKED).sum() == (values > 0).sum() == int(ranking.n[1])
    ordered = values[np.argsort(ranks)][: int(ranking.n[1])]
    assert (np.diff(ordered) <= 0).all()
    small = compact(ranking, 5)
    assert sum(int((t[1] < 5).sum()) for t in small.rank.values()) == 5
    assert max(t.shape[-1] for t in small.rank.values()) < 24


def nodes_per_cell(ranking, site, n) -> np.ndarray:
    """Nodes of a site among the first n of every task, by role (tasks, n_groups)."""
    return (np.asarray(ranking.rank[site]) < np.minimum(n, np.asarray(ranking.n))[:, None, None]).sum(axis=-1)


def test_a_control_matches_sites_and_roles_at_every_size(effects, getkey):
    """As far as active nodes suffice; 120 nodes exhaust some roles here, which must not move other ranks."""
    ranking, n = rank_nodes(effects), np.array([120, 25, 0], np.int32)
    control = random_ranking(ranking, effects, jnp.asarray(n), key=getkey())
    short = 0
    for site in effects.latents:
        circuit = np.asarray(ranking.rank[site]) < n[:, None, None]
        drawn = np.asarray(control.rank[site]) < UNRANKED
        spare = (np.asarray(effects.means[site]) > 0) & ~circuit
        assert (drawn <= spare).all()
        for k in range(121):
            wanted = nodes_per_cell(ranking, site, np.minimum(k, n))
            np.testing.assert_array_equal(nodes_per_cell(control, site, k), np.minimum(wanted, spare.sum(axis=-1)))
        short += (circuit.sum(axis=-1) > spare.sum(axis=-1)).sum()
    assert short > 0 and control.n.tolist() == n.tolist()
    assert ranking.count(n).tolist() == n.tolist()
    assert control.count(n)[0] < 120 and control.count(n)[1:].tolist() == [25, 0]


def test_a_matched_control_pushes_about_as_far_as_the_circuit(world, effects, getkey):
    """Each stand-in is of the node's site and group; together they are nearer in push than those drawn at large."""
    _, suite, _ = world
    ranking, n = rank_nodes(effects), jnp.full(3, 20, jnp.int32)
    sizes = {site: np.linalg.norm(np.asarray(suite[site].W_dec), axis=-1) for site in effects.latents}
    total = lambda order: sum(
        (np.asarray(effects.means[s]) * sizes[s] * (np.asarray(order.rank[s]) < 20)).sum() for s in effects.latents
    )
    matched = random_ranking(ranking, effects, n, key=getkey(), suite=suite)
    again = random_ranking(ranking, effects, n, key=getkey(), suite=suite)
    for site in effects.latents:
        circuit, drawn = (np.asarray(order.rank[site]) < 20 for order in (ranking, matched))
        assert not (circuit & drawn).any() and (np.asarray(effects.means[site])[drawn] > 0).all()
        assert (nodes_per_cell(matched, site, 20) <= nodes_per_cell(ranking, site, 20)).all()
    assert matched.count(n).min() >= 15
    own, plain = total(ranking), np.mean([total(random_ranking(ranking, effects, n, key=getkey())) for _ in range(5)])
    assert abs(total(matched) - own) < abs(plain - own) and 0.6 < total(matched) / own < 1.4
    assert any((matched.rank[s] != again.rank[s]).any() for s in effects.latents)


def test_empty_ranks_of_a_control_are_passed_over(effects, setting, getkey):
    """All nodes of a control with gaps, ablated through `compact` and as the complement of what is kept."""
    ranking, n = rank_nodes(effects), jnp.full(3, 120, jnp.int32)
    control = random_ranking(ranking, effects, n, key=getkey())
    assert (control.count(n) < 120).any()
    closed = {
        site: np.where(np.asarray(table) < UNRANKED, 0, UNRANKED).astype(np.int32)
        for site, table in control.rank.items()
    }
    at_once = dataclasses.replace(control, rank=jax.tree.map(jnp.asarray, closed), n=jnp.ones(3, jnp.int32))
    for mode in ("keep", "inverse"):
        expected = faithfulness(setting, at_once, [1], mode)
        np.testing.assert_allclose(faithfulness(setting, control, [120], mode), expected, rtol=1e-5, atol=1e-5)
    assert (
        np.abs(
            np.asarray(
                faithfulness(setting, control, [60], "inverse") - faithfulness(setting, control, [120], "inverse")
            )
        ).max()
        > 1e-3
    )


def test_matrix_has_the_own_curve_on_its_diagonal(world):
    """Under mean ablation, where the means are those of the tested task."""
    model, suite, prompts = world
    effects = node_effects(model, suite, prompts, LAYERS, metric=LOGPROB, patch="mean")
    ranking = rank_nodes(effects)
    setting = prepare(model, suite, prompts, layers=LAYERS, metric=LOGPROB, patch="mean", effects=effects)
    matrix = task_matrix(setting, ranking, jnp.array([3, 15, 40], jnp.int32))
    own = faithfulness(setting, ranking, [3, 15, 40], "inverse")
    np.testing.assert_allclose(jnp.diagonal(matrix), jnp.diagonal(own), rtol=1e-3, atol=1e-4)
    assert np.abs(matrix - jnp.diagonal(matrix)[:, None]).max() > 0.01


def test_nodes_to_halve_is_a_crossing(world, effects):
    model, suite, prompts = world
    ranking = rank_nodes(effects)
    setting = prepare(model, suite, prompts, layers=LAYERS, metric=LOGPROB, empty="positive", effects=effects)
    count, reached = nodes_to_halve(setting, ranking, target=0.5)
    assert reached.all()
    curve = faithfulness(setting, ranking, range(int(count.max()) + 1), "inverse")
    for task, n in enumerate(np.asarray(count)):
        assert curve[task, n] < 0.5 <= curve[task, n - 1]
    limited, reached = nodes_to_halve(setting, ranking, target=-100.0, max_nodes=7)
    assert not reached.any() and (limited == 7).all()


def draw(world, effects) -> Circuit:
    """The two strongest nodes of each kind and layer, and the error nodes, with all edges between them."""
    model, suite, prompts = world
    nodes = Circuit.from_effects(effects.task(0), errors=True).nodes
    latents = nodes[nodes.latent >= 0].groupby(["layer", "kind"]).head(2)
    circuit = Circuit(pd.concat([latents, nodes[nodes.latent < 0]]))
    return circuit.with_edges(edge_effects(model, suite, first_task(prompts), circuit, metric=LOGPROB), per_node=100)


def test_edges_from_nodes_that_are_not_listed_are_left_out(world, effects):
    """All edges that `edge_effects` gives, those from error nodes among them, go in; what comes out can be drawn."""
    model, suite, prompts = world
    circuit = Circuit.from_effects(effects.task(0), n=12)
    edges = edge_effects(model, suite, first_task(prompts), circuit, metric=LOGPROB)
    assert edges.source.str.contains("error").any()
    kept = circuit.with_edges(edges, per_node=1).edges
    inside = edges[edges.source.isin(circuit.nodes.index)]
    assert 0 < len(kept) == min(12, len(inside)) and set(kept.source) <= set(circuit.nodes.index)
    assert kept.effect.abs().min() >= inside.effect.abs().nlargest(12).min() - 1e-9
    circuit_graph(circuit.nodes, kept)


@pytest.fixture(scope="module")
def drawn(world, effects):
    return draw(world, effects)


@eqx.filter_jit
def seen_with(model, tokens, shift, at, wanted):
    """The activation at `wanted` when `shift` is added at the site `at`."""
    cache = {}
    model(tokens, tap=compose(perturb({at: shift}), record([wanted], cache)))
    return cache[wanted]


def check_edges(world, drawn, kinds, layers=LAYERS, every=2):
    """Move the residual by eps times what the source writes, and watch the target's activation through its own module.

    `kinds` gives for each kind of node, in the order of computation, the site its SAE reads and the residual it is fed
    by.
    """
    model, suite, prompts = world
    prompts = first_task(prompts)
    suite = suite_in_layers(model, suite, layers)
    clean = clean_pass(model, suite, prompts, LOGPROB)
    edges = drawn.edges.set_index(["source", "target"]).effect
    roles, eps = np.asarray(node_roles(prompts)), np.float32(1e-2)
    f = {site: np.asarray(sae.encode(clean.reads[site])) for site, sae in suite.items()}
    site_of = lambda node: Site(kinds[node.kind][0], node.layer)

    def written(node):
        site, here = site_of(node), (roles == int(Role[node.group]))[..., None]
        if node.latent >= 0:
            return here * f[site][..., node.latent, None] * np.asarray(suite[site].W_dec)[node.latent]
        return here * (np.asarray(clean.writes[site]) - np.asarray(suite[site].decode(jnp.asarray(f[site]))))

    def in_the_residual(node):
        step = eps * written(node).astype(np.float32)
        if site_of(node).name != "z":
            return step
        out = lambda sign: seen_with(model, prompts.tokens, sign * step, site_of(node), Site("attn_out", node.layer))
        return (out(1.0) - out(-1.0)) / 2

    def reaches(source, target):
        order = list(kinds)
        if source.layer != target.layer or model.config.parallel:
            return source.layer < target.layer or (
                source.layer == target.layer and source.kind == "residual" != target.kind
            )
        return order.index(source.kind) < order.index(target.kind)

    checked = 0
    for source in drawn.nodes.iloc[::every].itertuples():
        step = in_the_residual(source)
        for target in drawn.nodes[drawn.nodes.latent >= 0].itertuples():
            if not reaches(source, target):
                assert (source.Index, target.Index) not in edges.index
                continue
            site, feed = site_of(target), Site(kinds[target.kind][1], target.layer)
            weight = np.asarray(clean.grads[site]) @ np.asarray(suite[site].W_dec)[target.latent]
            weight = weight * (f[site][..., target.latent] > 0) * (roles == int(Role[target.group]))
            up, down = (suite[site].pre(seen_with(model, prompts.tokens, s * step, feed, site)) for s in (1.0, -1.0))
            slope = (np.asarray(up - down)[..., target.latent] / (2 * eps) * weight).sum()
            np.testing.assert_allclose(edges.get((source.Index, target.Index), 0.0), slope, rtol=0.03, atol=2e-4)
            checked += abs(slope) > 1e-3
    assert checked > 40 / every


def test_edges_agree_with_a_change_along_the_residual_stream(world, drawn):
    fed = {
        "residual": ("resid_pre", "resid_pre"),
        "attention": ("attn_out", "resid_pre"),
        "transcoder": ("mlp_in", "resid_mid"),
    }
    check_edges(world, drawn, fed)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_edges_of_mixed_values_and_of_parallel_blocks(family):
    """SAEs as Gemma Scope has them (z, normalised MLP input) and as Pythia's (MLP output, both branches fed alike)."""
    config, layers = tiny_config(family, n_heads=2, n_kv_heads=2, d_head=6, rotary_dim=4), (0, 1)
    keys = iter(jax.random.split(jax.random.key(5), 9))
    model = jax.tree.map(lambda w: w * 1.5 if w.ndim == 2 else w, Transformer.init(config, key=next(keys)))
    mlp = ("transcoder", "mlp_normalized") if family == "gemma2" else ("mlp", "mlp_out")
    kinds = {
        "residual": ("resid_pre",) * 2,
        "attention": ("z", "resid_pre"),
        mlp[0]: (mlp[1], "resid_pre" if config.parallel else "resid_mid"),
    }
    suite = {}
    for site in (Site(name, layer) for layer in layers for name, _ in kinds.values()):
        out = Site("mlp_out", site.layer) if site.name.startswith("mlp") else site
        suite[site] = make_sae(next(keys), site, out, d=config.width(site.name))
    world = model, suite, stack_prompts([make(0)])
    check_edges(world, draw(world, node_effects(*world, layers, metric=LOGPROB)), kinds, layers, every=5)


def test_two_saes_of_one_kind_and_layer_are_refused(world):
    model, suite, _ = world
    twin = make_sae(jax.random.key(0), Site("z", 1), Site("z", 1))
    with pytest.raises(ValueError, match=r"are both the attention of layer 1: leave one out"):
        suite_in_layers(model, suite | {Site("z", 1): twin}, LAYERS)


def test_circuit_tables_and_graph(world, effects, drawn):
    _, suite, _ = world
    effects = effects.task(0)
    circuit = Circuit.from_effects(effects, n=12)
    assert len(circuit.nodes) == 12 and (circuit.nodes.effect.diff().dropna() <= 0).all()
    row = circuit.nodes.iloc[0]
    site = Site({"residual": "resid_pre", "attention": "attn_out", "transcoder": "mlp_in"}[row.kind], int(row.layer))
    assert row.effect == max(float(t.max()) for t in effects.latents.values())
    assert np.isclose(effects.latents[site][Role[row.group], row.latent], row.effect)
    few = drawn.with_edges(drawn.edges, per_node=1)
    assert len(few.edges) == len(drawn.nodes) and drawn.edges.effect.abs().is_monotonic_decreasing
    assert set(drawn.to_networkx().edges) == set(zip(drawn.edges.source, drawn.edges.target, strict=True))
    again = Circuit.from_json(drawn.to_json())
    assert again.nodes.drop(columns="effect").equals(drawn.nodes.drop(columns="effect"))
    np.testing.assert_allclose(again.edges.effect, drawn.edges.effect, rtol=1e-6)
    errors = Circuit.from_effects(effects, errors=True).nodes.query("latent == -1")
    named = {str(site): sae for site, sae in suite.items()}  # sites as texts, and one layer as a number
    assert node_effects(world[0], named, first_task(world[2]), 2, metric=LOGPROB).latents.keys() == {
        site for site in suite if site.layer == 2
    }
    assert len(errors) == sum(int((t != 0).sum()) for t in effects.errors.values()) > len(suite)
    with pytest.raises(ValueError, match="keys nodes and edges"):
        Circuit.from_json("{}")


def test_the_edges_of_a_circuit_can_be_drawn_as_they_are(world, effects):
    """Those from error nodes, which a circuit of latents does not list, are left out by circuit and figure alike."""
    model, suite, prompts = world
    circuit = Circuit.from_effects(effects.task(0), n=12)
    edges = edge_effects(model, suite, first_task(prompts), circuit, metric=LOGPROB)
    from_errors = edges.source.str.contains("error")
    assert from_errors.any() and not from_errors.all()
    with_edges = circuit.with_edges(edges)
    assert set(with_edges.edges.effect) == set(edges[~from_errors].effect)  # fewer than four for each node
    few = circuit.with_edges(edges, per_node=0.5).edges
    assert len(few) == 6 and set(few.effect) == set(edges[~from_errors].effect.sort_values(key=np.abs).tail(6))
    drawn = [len(circuit_graph(circuit.nodes, e).axes[0].patches) for e in (edges, with_edges.edges)]
    assert drawn[0] == drawn[1] > len(circuit.nodes) + len(with_edges.edges)
    assert set(with_edges.to_networkx().nodes) == set(circuit.nodes.index)
    plt.close("all")


def test_bad_requests_end_with_one_message(world, effects, setting):
    model, suite, prompts = world
    one = first_task(prompts)
    with pytest.raises(ValueError, match="must be in 0..2"):
        node_effects(model, suite, one, [7], metric=LOGPROB)
    with pytest.raises(ValueError, match=r"no SAE in layers \[0\]"):
        node_effects(model, suite, one, [0, 1], metric=LOGPROB)
    with pytest.raises(ValueError, match="n_shots >= 1"):
        node_effects(model, suite, dataclasses.replace(one, n_shots=0), LAYERS, metric=LOGPROB)
    with pytest.raises(ValueError, match="stack_prompts"):
        prepare(model, suite, one, layers=LAYERS, metric=LOGPROB)
    with pytest.raises(ValueError, match="pass effects"):
        prepare(model, suite, prompts, layers=LAYERS, metric=LOGPROB, patch="mean")
    with pytest.raises(ValueError, match="another model"):
        wide = {Site("resid_pre", 1): make_sae(jax.random.key(0), Site("resid_pre", 1), Site("resid_pre", 1), d=8)}
        node_effects(model, wide, one, [1], metric=LOGPROB)
    ranking = rank_nodes(effects)
    upper = dataclasses.replace(setting, suite={site: sae for site, sae in setting.suite.items() if site.layer == 2})
    with pytest.raises(ValueError, match="same layers"):
        faithfulness(upper, ranking, [3])
    with pytest.raises(ValueError, match="stack the same tasks"):
        task_matrix(setting, jax.tree.map(lambda a: a[:1], ranking), jnp.array([1], jnp.int32))
    with pytest.raises(ValueError, match="one task"):
        brute_force_effects(setting, Circuit.from_effects(effects.task(0), 3).nodes)
    with pytest.raises(ValueError, match="belongs to one task"):
        Circuit.from_effects(effects)


def test_nodes_without_any_edge_have_an_empty_table(world, drawn):
    """The fault: where no node had an effect on another one, there was nothing to join, and an error."""
    model, suite, prompts = world[:3]
    silent = lambda sae: eqx.tree_at(lambda s: (s.W_enc, s.b_enc), sae, (sae.W_enc * 0, sae.b_enc * 0 - 1))
    dead = {site: silent(sae) for site, sae in suite.items()}
    edges = edge_effects(model, dead, first_task(prompts), drawn, metric=LOGPROB)
    edges = edges[~edges.source.str.contains("error")]
    assert list(edges.columns) == ["source", "target", "effect"] and edges.empty
    assert drawn.with_edges(edges).edges.empty
