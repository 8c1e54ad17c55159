"""Sparse feature circuits: which SAE latents carry a behaviour, found by gradients and checked by ablation."""

from icl_lib.circuits.ablation import Setting, faithfulness, nodes_to_halve, prepare, task_matrix
from icl_lib.circuits.brute_force import brute_force_effects
from icl_lib.circuits.circuit import Circuit
from icl_lib.circuits.edges import edge_effects
from icl_lib.circuits.effects import Effects, OnLogits, node_effects
from icl_lib.circuits.groups import Groups
from icl_lib.circuits.ranking import Ranking, random_ranking, rank_nodes

__all__ = [
    "Circuit", "Effects", "Groups", "OnLogits", "Ranking", "Setting", "brute_force_effects", "edge_effects",
    "faithfulness", "node_effects", "nodes_to_halve", "prepare", "random_ranking", "rank_nodes", "task_matrix",
]  # fmt: skip
