"""What all tests share: strict promotion, so that no dtype or rank changes silently, and a source of fresh PRNG keys."""

import itertools

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey():
    """A function that returns a new PRNG key at each call; the sequence is the same in every test."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(20250101), next(counter))
