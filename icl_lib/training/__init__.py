"""Training SAEs: recipes, objectives, the steps of a whole suite as compiled programs, and the job around them."""

from icl_lib.training.arrays import Progress, train_on
from icl_lib.training.job import train_suite
from icl_lib.training.plan import Member
from icl_lib.training.recipes import Recipe, TrainingError, make_recipe

__all__ = ["Member", "Progress", "Recipe", "TrainingError", "make_recipe", "train_on", "train_suite"]
