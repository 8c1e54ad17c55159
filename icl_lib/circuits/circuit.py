"""A circuit: a table of nodes, a table of edges, and the graph that they make."""

import dataclasses
import json

import networkx as nx
import numpy as np
import pandas as pd

from icl_lib.circuits.effects import Effects
from icl_lib.files.processes import to_host
from icl_lib.models import Site

NODE_COLUMNS = ["layer", "kind", "latent", "group", "effect"]
EDGE_COLUMNS = ["source", "target", "effect"]
ERROR = -1  # the latent number of an error node


def node_names(nodes: pd.DataFrame) -> list[str]:
    """Readable ids, e.g. "residual.3.512.ARROW", "transcoder.2.error.INPUT"."""
    number = ["error" if latent == ERROR else str(latent) for latent in nodes.latent]
    return [
        f"{kind}.{layer}.{i}.{group}"
        for kind, layer, i, group in zip(nodes.kind, nodes.layer, number, nodes.group, strict=True)
    ]


def _rows(table: np.ndarray, site: Site, names: tuple[str, ...], error: bool) -> pd.DataFrame:
    """The non-zero entries of one site's effects (n_groups, d_sae) as rows."""
    group, latent = np.nonzero(table)
    columns = (site.layer, site.kind, ERROR if error else latent, np.array(names, object)[group], table[group, latent])
    return pd.DataFrame(dict(zip(NODE_COLUMNS, columns, strict=True)))


def _between(nodes: pd.DataFrame, edges: pd.DataFrame) -> pd.DataFrame:
    """The edges that start and end at one of the nodes."""
    return edges[edges.source.isin(nodes.index) & edges.target.isin(nodes.index)]


@dataclasses.dataclass(frozen=True)
class Circuit:
    """Nodes and edges with their effects on the metric (positive helps), strongest first.

    `nodes` has the columns layer, kind (as `Site.kind`), latent (-1 for an error node), group (of tokens) and effect,
    and readable names as its index; `edges` has source, target (such names) and effect.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame = dataclasses.field(default_factory=lambda: pd.DataFrame(columns=EDGE_COLUMNS))

    def __post_init__(self):
        for frame, columns, what in ((self.nodes, NODE_COLUMNS, "nodes"), (self.edges, EDGE_COLUMNS, "edges")):
            if list(frame.columns) != columns:
                raise ValueError(f"{what} of a circuit has the columns {columns}, got {list(frame.columns)}")

    @classmethod
    def from_effects(cls, effects: Effects, n: int | None = None, errors: bool = False) -> "Circuit":
        """The n nodes of one task with the largest positive effects, or all with any effect; `errors` lists error nodes
        too.

        Raises `ValueError` for effects of stacked tasks.
        """
        if effects.metric.ndim:
            raise ValueError("a circuit belongs to one task: take effects.task(i) from effects of stacked tasks")
        parts = [_rows(to_host(t), site, effects.names, False) for site, t in effects.latents.items()]
        if errors:
            parts += [_rows(to_host(t)[:, None], site, effects.names, True) for site, t in effects.errors.items()]
        nodes = pd.concat(parts).sort_values("effect", ascending=False, kind="stable")
        circuit = cls(nodes.set_axis(node_names(nodes)))
        return circuit if n is None else circuit.top(n)

    def top(self, n: int) -> "Circuit":
        """The n nodes that help most (fewer if fewer help), and the edges between them."""
        nodes = self.nodes[self.nodes.effect > 0].nlargest(n, "effect")
        return Circuit(nodes, _between(nodes, self.edges))

    def with_edges(self, edges: pd.DataFrame, per_node: int | float = 4) -> "Circuit":
        """The same nodes with the strongest of the `edges` between them, at most `per_node` times as many as nodes (the
        paper draws 4).

        `edges` may be all that `edge_effects` gives: those from error nodes that the circuit does not list are left
        out.
        """
        edges = _between(self.nodes, edges).sort_values("effect", key=np.abs, ascending=False, kind="stable")
        return Circuit(self.nodes, edges.head(int(per_node * len(self.nodes))).reset_index(drop=True))

    def to_networkx(self) -> nx.DiGraph:
        """A directed graph whose nodes carry the columns of `nodes` and whose edges carry `effect`."""
        graph = nx.DiGraph()
        graph.add_nodes_from(
            (name, row) for name, row in zip(self.nodes.index, self.nodes.to_dict("records"), strict=True)
        )
        graph.add_edges_from((e["source"], e["target"], {"effect": e["effect"]}) for e in self.edges.to_dict("records"))
        return graph

    def to_json(self) -> str:
        """Both tables as one JSON text."""
        records = lambda frame: json.loads(frame.to_json(orient="records", double_precision=12))
        return json.dumps({"nodes": records(self.nodes), "edges": records(self.edges)})

    @classmethod
    def from_json(cls, text: str) -> "Circuit":
        """The circuit that `to_json` wrote. Raises `ValueError` where a table or a column is missing."""
        data = json.loads(text)
        if set(data) != {"nodes", "edges"}:
            raise ValueError(f"a circuit's JSON has the keys nodes and edges, got {sorted(data)}")
        read = lambda rows, columns: pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
        nodes = read(data["nodes"], NODE_COLUMNS)
        return cls(nodes.set_axis(node_names(nodes)), read(data["edges"], EDGE_COLUMNS))
