"""icl_lib: how language models learn in context, in JAX and Equinox.

The rooms, from the ground up: `files`; `text`, `tasks`, `models`, and beside them `figures` and `runs`; `saes`;
`training`, `vectors`, `circuits`, `behaviours`; `features`; `cards`, `embedded`; `planning`; `commands`. A room imports
rooms below it.
"""

import warnings

# names of embedded models are known wherever any part of the package is imported
from icl_lib.embedded import catalogue as _catalogue  # noqa: F401

# tqdm, which transformers imports, asks for widgets that nobody needs here; its warning would put a path of the machine
# into notebooks
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
