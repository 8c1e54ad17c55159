"""icl_lib: how language models learn in context, in JAX and Equinox.

The rooms, from the ground up: `models` and `tasks`; `saes`; `vectors`, `features`, `circuits`; `figures` and `runs`; `tiny`.
"""

__version__ = "0.1.0"
