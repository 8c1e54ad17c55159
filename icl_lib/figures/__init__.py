"""Figures and tables of the notebooks, from plain arrays: `figures.use_style()` once, then one call per figure."""

from icl_lib.figures.circuits import (
    ablation_matrix,
    faithfulness_curve,
    faithfulness_panels,
    halving_bars,
    ie_scatter,
    node_counts,
)
from icl_lib.figures.features import (
    diagonal_order,
    displayed,
    latent_control,
    link_heatmap,
    role_mass,
    role_mass_table,
    scale_sweep,
    task_latent_heatmap,
)
from icl_lib.figures.graph import circuit_graph
from icl_lib.figures.html import style_table
from icl_lib.figures.models import accuracy_vs_shots, group_bars, sae_quality, training_curve, width_lines
from icl_lib.figures.page import say, show
from icl_lib.figures.prompts import examples_figure, prompt_roles
from icl_lib.figures.schematics import cleaning_overview, schematic
from icl_lib.figures.style import KIND_COLOURS, OKABE_ITO, ROLE_COLOURS, use_style
from icl_lib.figures.vectors import (
    effect_vs_shots,
    equal_l0,
    l0_bars,
    layer_curves,
    pareto,
    pareto_front,
    sweep_panels,
    sweep_scatter,
)

__all__ = [
    "CYCLE", "KIND_COLOURS", "OKABE_ITO", "ROLE_COLOURS", "ablation_matrix", "accuracy_vs_shots", "circuit_graph",
    "cleaning_overview", "diagonal_order", "displayed", "effect_vs_shots", "equal_l0", "examples_figure",
    "faithfulness_curve", "faithfulness_panels", "group_bars", "halving_bars", "ie_scatter", "l0_bars",
    "latent_control", "layer_curves", "link_heatmap", "node_counts", "pareto", "pareto_front", "prompt_roles",
    "role_mass", "role_mass_table", "sae_quality", "say", "scale_sweep", "schematic", "show", "style_table",
    "sweep_panels", "sweep_scatter", "task_latent_heatmap", "training_curve", "use_style", "width_lines",
]  # fmt: skip
