"""What the notebooks of a card compute: which costly functions of the library each calls, on what, and how often.

What one call costs is said where the function is (`cost.py` in the rooms of the library).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl_lib.behaviours.cost import answers_cost
from icl_lib.circuits.cost import ablation_cost, node_effects_cost
from icl_lib.files.paths import resolve
from icl_lib.models import ModelConfig
from icl_lib.models.cost import Cost, Part, forward_cost
from icl_lib.planning.dictionaries import dictionaries
from icl_lib.saes.cost import encoding_cost, quality_cost, recording_cost
from icl_lib.tasks import Role
from icl_lib.tasks.tasks import task_files
from icl_lib.vectors.cost import ANSWER_TOKENS, cleaning_cost, insertion_cost, steering_cost, task_vector_cost

# Tokens of a pair with its arrow and newline, of the longest task of each source: prompts are padded to that.
PAIR_TOKENS = {"embedded": 6, "paper": 16, "function_vectors": 40}
PREFIX_TOKENS = 12
TEXT_TOKENS = 128  # of a row on which notebook 01 judges SAEs, where the context has room
N_TASKS = {"embedded": 28, "paper": 23, "function_vectors": 53}
CANDIDATES = 50  # latents that survive cleaning in some task, as far as it can be said beforehand
SHARE_OF_STEPS = 0.5  # of a cleaning's most steps, that it takes until its last lane has stopped


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of the table: a notebook calls a function of this cost `times` times."""

    notebook: str
    what: str
    cost: Cost
    times: float | int

    @property
    def flops(self) -> float | int:
        """FLOPs of all calls, on all devices together."""
        return self.times * self.cost.flops


def n_tasks(source: str) -> int:
    """Tasks of a source or folder. Raises `ValueError` if it is neither."""
    if source in N_TASKS:
        return N_TASKS[source]
    if not (found := task_files(Path(resolve(source)))):
        raise ValueError(f"no task source {source!r}: there are {', '.join(N_TASKS)}, or a folder of .json or .tsv")
    return len(found)


def steps(card: Mapping[str, Any], config: ModelConfig, part: Part) -> list[Step]:
    """The computations of all notebooks that decide memory or time, on one `part` of the model's devices."""
    saes, tasks = dictionaries(card, config), n_tasks(card["tasks"])
    pair = PAIR_TOKENS.get(card["tasks"], PAIR_TOKENS["paper"])  # of a folder's words nothing is known
    seq = lambda shots: min((shots + 1) * pair + PREFIX_TOKENS, config.n_ctx)
    n, executor, detector = (card[key] for key in ("n_prompts", "layer_executor", "layer_detector"))
    long = seq(card["n_shots"])
    behind = lambda layer: config.n_layers - layer  # layers that run from there on

    def insert(layer, vectors, suffix=ANSWER_TOKENS):
        return insertion_cost(config, n, suffix, seq(0), behind(layer), tasks, vectors, part)

    def clean(layer, rows, n_l1, n_steps, suffix=ANSWER_TOKENS):
        return cleaning_cost(config, rows, suffix, seq(0), behind(layer), tasks, n_l1, SHARE_OF_STEPS * n_steps, part)

    text, d_sae = min(TEXT_TOKENS, config.n_ctx), max((d.d_sae for d in saes), default=0)
    swept = [d.site.layer for d in saes if d.site.name == "resid_pre" and d.site.layer >= 2]
    tvc = lambda layer, n_l1: clean(layer, card["tvc_prompts"], n_l1, card["tvc_steps"])
    rate_rows = card["rate_rows"]
    dummy = pair + ANSWER_TOKENS  # from the dummy's output to the answer
    shots, prompts = seq(card["circuit_shots"]), card["circuit_prompts"]
    circuit = [d for d in saes if d.site.layer in card["circuit_layers"] and d.site.name != "resid_post"]
    below = behind(min(card["circuit_layers"]))
    ablate = lambda whole: ablation_cost(config, prompts, shots, below, tasks * len(Role), circuit, part, whole)
    between = forward_cost(config, 6, long, part, layers=executor - detector, logits=False)
    effects = node_effects_cost(config, card["effect_prompts"], shots, below, tasks * len(Role), circuit, part)
    table = [
        ("00", "accuracy by shots", answers_cost(config, n, seq(card["max_shots"]), part), 3 * tasks),
        ("00", "controls", answers_cost(config, n, seq(5), part), 15 * tasks),
        ("01", "activations of all SAE sites", recording_cost(config, 16, text, part, len(saes)), rate_rows / 16),
        *(("01", "firing rates", encoding_cost(rate_rows, text, sae), 1) for sae in saes),
        ("01", "quality with each SAE in place", quality_cost(config, 16, text, part, saes), card["quality_rows"] / 16),
        ("02", "task vectors", task_vector_cost(config, n, long, part), 8 * tasks),
        # 5 of methods and the choice, 8 by shots, 7 of controls, 3 of differences; all from layer 0 on
        ("02", "vectors inserted at every layer", insert(0, config.n_layers), 23),
        *(("03", f"cleaning at layer {layer}", tvc(layer, len(card["tvc_l1"])), 1) for layer in swept),
        # stability, and the SAEs that notebook 01 trained
        ("03", "cleaning, one penalty", tvc(executor, 1), 3 + len(card["sweep_widths"]) * len(card["sweep_sparsity"])),
        # at five lengths with the control of 100, on either pool, and at each latent's own lengths
        ("04", "latents one by one", insert(executor, CANDIDATES + 100), 7 + len(card["latent_scales"])),
        ("04", "random sets", insert(executor, min(1000, d_sae) + CANDIDATES), 2),
        ("04", "latents that fire", answers_cost(config, n, long, part), 2 * tasks),
        ("04", "activation mass", recording_cost(config, n, long, part, encoders=saes[:1]), 3 * tasks),
        ("05", "activation mass", recording_cost(config, n, long, part, encoders=saes[:1]), 3 * tasks),
        ("04", "executors taken away", steering_cost(config, 4, long, behind(executor), tasks, tasks, part), 1),
        ("05", "detectors cleaned", clean(detector, n, 1, card["detector_steps"], dummy), 1),
        ("05", "detectors one by one", insert(detector, CANDIDATES + 20, dummy), 8),
        ("05", "random sets", insert(detector, min(400, d_sae) + CANDIDATES, dummy), 2),
        # half as many detectors as tasks, at six strengths and in two controls, and twice at six lengths
        ("05", "detectors to executors", between, 12 * tasks**2),
        ("06", "node effects", effects, 2 * tasks),
        # nodes kept, at seven counts and at random, and both ends of four settings
        ("06", "ablation", ablate(True), (2 * 7 + 4 * 2) * tasks),
        # nodes taken away likewise, two halvings, two matrices and their controls, means; 2 x 200 nodes in one task
        ("06", "ablation of few nodes", ablate(False), (2 * 7 + 2 * 20 + 2 * tasks + 3 + 2 * 7) * tasks + 400),
    ]
    return [Step(*line) for line in table]
