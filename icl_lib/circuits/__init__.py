"""Sparse feature circuits: which SAE latents carry a task, found by gradients and checked by ablation."""

from icl_lib.circuits.ablation import Setting, brute_force_effects, faithfulness, nodes_to_halve, prepare, task_matrix
from icl_lib.circuits.circuit import Circuit
from icl_lib.circuits.edges import edge_effects
from icl_lib.circuits.effects import Effects, node_effects, node_roles
from icl_lib.circuits.ranking import Ranking, random_ranking, rank_nodes

__all__ = [
    "Circuit", "Effects", "Ranking", "Setting", "brute_force_effects", "edge_effects", "faithfulness", "node_effects",
    "node_roles", "nodes_to_halve", "prepare", "random_ranking", "rank_nodes", "task_matrix",
]  # fmt: skip
