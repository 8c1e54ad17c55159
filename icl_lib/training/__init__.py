"""Training SAEs: recipes, objectives, the steps of a whole suite as compiled programs, and the job around them."""

from icl_lib.training.arrays import train_on
from icl_lib.training.job import JobSettings, train_suite
from icl_lib.training.plan import Member, Plan
from icl_lib.training.progress import Progress
from icl_lib.training.recipes import Recipe, TrainingError, make_recipe

__all__ = [
    "JobSettings", "Member", "Plan", "Progress", "Recipe", "TrainingError", "make_recipe", "train_on", "train_suite",
]  # fmt: skip
