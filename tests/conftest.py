"""What all tests share: strict promotion, so that no dtype or rank changes silently, quick compilation, and a source of
fresh PRNG keys.
"""

import itertools

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_disable_most_optimizations", True
)  # arrays are small here, and most of the time goes into compiling


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Those of one module are forgotten before the next: kept, they would fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that returns a new PRNG key at each call; the sequence is the same in every test."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(20250101), next(counter))
