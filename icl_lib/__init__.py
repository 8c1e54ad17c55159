"""icl_lib: how language models learn in context, in JAX and Equinox.

The rooms, from the ground up: `models` and `tasks`; `saes`; `vectors`, `features`, `circuits`; `figures` and `runs`; `tiny`.
"""

import warnings

from icl_lib.embedded import catalogue as _catalogue  # noqa: F401 (so that names of embedded models are known everywhere)

# tqdm, which transformers imports, asks for widgets that nobody needs here; its warning would put a path of the machine into notebooks
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
