"""How an SAE is trained, as plain data: the published recipes by name, and what may be changed in them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

OBJECTIVES: dict[str, Any] = {}  # name -> `Objective`, of each file in objectives/, which fills it
# Fields that mean something to some objectives only, and why the others refuse to have them changed
SPECIAL = {
    "resample_every": "whose auxiliary loss (k_aux, aux) revives dead latents",
    "k_aux": "which has no auxiliary loss",
    "aux": "which has no auxiliary loss",
    "bandwidth": "which learns no thresholds",
    "threshold": "which learns no thresholds",
    "skip": "as {name} has no skip matrix: take another objective for transcoders with skip",
    "centred_start": "which has one start",
    "loss_scale": "whose loss is as published",
}


class TrainingError(ValueError):
    """Training cannot start, or met a loss that is not finite."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    r"""How to train; hashable, because it is static under `jit`.

    `make_recipe` gives the published settings of each objective. Counts are in optimiser steps. Inputs and targets
    are scaled to a mean norm of $\sqrt d$. Raises `TrainingError` on a value that cannot be, or on a changed field that
    the objective makes nothing of.
    """

    objective: str  # name of a file in objectives/
    n_steps: int  # of every SAE
    batch_size: int  # rows in a step
    learning_rate: float  # of Adam, after its warmup
    beta1: float = 0.9  # of Adam; 0: no first moments are kept
    beta2: float = 0.999  # of Adam
    warmup: int = 1000  # the learning rate rises over so many, and at most a quarter of the run
    decay: str = "linear"  # it stays, then falls to 0 over the last fifth; "cosine": falls to a tenth after `period`
    period: int = 0  # of the cosine; 0: `n_steps`
    sparsity_warmup: int = 0  # the penalty rises over so many
    clip: float = 1.0  # largest norm of an SAE's gradient; 0: any
    norm_decay: float = 1.0  # of the running mean norm that scales; 1: the norm in the first buffer
    dead_after: int = 1000  # a latent is dead that has not fired for so many
    dead_rate: float = 0.0  # or that fires on less than this part of the tokens, by a running mean over `dead_after`
    resample_every: int = 0  # dead latents start anew; 0: never
    unit_norm: bool = False  # whether decoder rows are held at norm 1
    k_aux: int = 0  # dead latents a token that the auxiliary loss uses; 0: there is none
    aux: float = 1 / 32  # weight of the auxiliary loss
    bandwidth: float = 0.001  # of the straight-through gradient, for inputs of mean norm 1
    threshold: float = 0.001  # at the start, for inputs of mean norm 1
    skip: bool = False  # a linear map from input to output, for transcoders
    dtype: str = "float32"  # of the two matrices; sums are float32
    centred_start: bool = False  # see icl_sfc.py
    loss_scale: float = 0.0  # see icl_sfc.py

    def __post_init__(self):
        choices = {"objective": OBJECTIVES, "decay": ("cosine", "linear"), "dtype": ("float32", "bfloat16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise TrainingError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("n_steps", "batch_size", "learning_rate", "dead_after", "bandwidth", "threshold"):
            if getattr(self, name) <= 0:
                raise TrainingError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in "warmup period sparsity_warmup clip resample_every k_aux aux loss_scale dead_rate".split():
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name, high in (("beta1", 1), ("beta2", 1), ("norm_decay", 1 + 1e-9)):
            if not 0 <= getattr(self, name) < high:
                raise TrainingError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for field in dataclasses.fields(self):
            changed = field.name in SPECIAL and getattr(self, field.name) != field.default
            if changed and field.name not in OBJECTIVES[self.objective].own:
                why = SPECIAL[field.name].format(name=self.objective)
                raise TrainingError(f"{field.name} is not for {self.objective}, {why}")

    @property
    def top(self) -> bool:
        """Whether sparsity is a number of latents, k."""
        return OBJECTIVES[self.objective].top

    def rate(self, step: Array) -> Array:
        """Learning rate at a step, from 0."""
        done = (step + 1).astype(jnp.float32)
        rise = jnp.minimum(1.0, done / max(1, min(self.warmup, self.n_steps // 4)))
        if self.decay == "cosine":
            return self.learning_rate * rise * (0.55 + 0.45 * jnp.cos(jnp.pi * done / (self.period or self.n_steps)))
        return self.learning_rate * rise * jnp.clip((self.n_steps - done + 1) / max(1, self.n_steps // 5), 0, 1)

    def ramp(self, step: Array) -> Array:
        """The part of the sparsity penalty that acts at a step."""
        return jnp.minimum(1.0, (step + 1) / max(1, self.sparsity_warmup))


# Changes to icl-sfc for a run of some thousand steps: a learning rate that comes down, no latent born dead (icl_sfc.py)
SHORT_RUN = {"period": 0, "centred_start": True, "loss_scale": 0.0, "dead_rate": 0.0}


def make_recipe(name: str, *, n_steps: int, batch_size: int, **changes) -> Recipe:
    """The recipe published under the name of its objective, for a run of `n_steps`, with `changes` to its fields.

    It is what the papers state; where they give none (learning rate by width), the value of their released trainers.

    Raises `TrainingError` on an unknown name or field.
    """
    if name not in OBJECTIVES:
        raise TrainingError(f"recipe must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    known = {f.name for f in dataclasses.fields(Recipe)} - {"objective", "n_steps", "batch_size"}
    if unknown := sorted(set(changes) - known):
        raise TrainingError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    values = OBJECTIVES[name].published | changes
    values = {field: value(n_steps, batch_size) if callable(value) else value for field, value in values.items()}
    return Recipe(name, n_steps, batch_size, **values)
