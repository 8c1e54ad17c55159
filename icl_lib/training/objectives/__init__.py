"""What SAEs are trained for: one file an objective, each found here by itself.

`Objective` in base.py says what a file must hold.
"""

import importlib
import pkgutil

from icl_lib.training.objectives.base import Batch, Objective, Stats, Weights
from icl_lib.training.recipes import OBJECTIVES

for _module in pkgutil.iter_modules(__path__):
    for _kind in vars(importlib.import_module(f"{__name__}.{_module.name}")).values():
        if isinstance(_kind, type) and issubclass(_kind, Objective) and hasattr(_kind, "name"):
            OBJECTIVES.setdefault(_kind.name, _kind())

__all__ = ["OBJECTIVES", "Batch", "Objective", "Stats", "Weights"]
