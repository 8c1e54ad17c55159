"""Task vectors against sums over a plain cache, and on the planted model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import Site, run_with_cache
from icl_lib.tasks import Role
from icl_lib.vectors import output_vector, subtract_corrupted, task_vector
from tests.planted import AT, N_TASKS, planted_model, planted_prompts, planted_stack


@pytest.fixture(scope="module")
def model():
    return planted_model()


def average(model, prompts, role, keep):
    """Mean of resid_pre over the tokens with `role` whose pair index satisfies `keep`, by looping over tokens."""
    _, cache = run_with_cache(model, prompts.tokens, [Site("resid_pre", i) for i in range(2)])
    roles, pair = np.asarray(prompts.roles), np.asarray(prompts.pair)
    found = [(b, s) for b, s in np.ndindex(roles.shape) if roles[b, s] == role and keep(pair[b, s])]
    return np.stack([np.mean([cache[Site("resid_pre", i)][b, s] for b, s in found], axis=0) for i in range(2)])


def test_task_vector_is_the_mean_over_all_arrows(model):
    prompts = planted_prompts(1, 5, 3)
    vector = task_vector(model, prompts)
    assert vector.shape == (2, 64)
    assert np.allclose(vector, average(model, prompts, Role.ARROW, lambda pair: True), atol=1e-5)
    # arrows of the three later pairs have seen an output, the first has not
    assert np.isclose(vector[1, AT.exe[1]], 3 / 4, atol=1e-2)
    assert np.allclose(vector[1, jnp.array([AT.exe[0], AT.exe[2]])], 0, atol=1e-3)


def test_dummy_line_is_no_example(model):
    prompts = planted_prompts(0, 4, 2, dummy=True)
    assert np.allclose(
        task_vector(model, prompts), average(model, prompts, Role.ARROW, lambda pair: pair >= 0), atol=1e-5
    )
    assert np.allclose(
        output_vector(model, prompts), average(model, prompts, Role.OUTPUT, lambda pair: 0 <= pair < 2), atol=1e-5
    )


def test_output_vector_leaves_out_the_query(model):
    prompts = planted_prompts(2, 4, 3)
    vector = output_vector(model, prompts)
    assert np.allclose(vector, average(model, prompts, Role.OUTPUT, lambda pair: pair < 3), atol=1e-5)
    assert float(vector[0, AT.det[2]]) > 1 > 1e-6 > abs(float(vector[0, AT.det[0]]))


def test_stack_of_tasks_equals_each_alone(model):
    stacked = task_vector(model, planted_stack(4, 2))
    alone = jnp.stack([task_vector(model, planted_prompts(t, 4, 2)) for t in range(N_TASKS)])
    assert stacked.shape == (N_TASKS, 2, 64)
    assert np.allclose(stacked, alone, atol=1e-6)
    assert np.allclose(task_vector(model, planted_stack(4, 2), layers=[1]), alone[:, 1:], atol=1e-6)


def test_subtracting_corrupted_prompts(getkey):
    vector, corrupted = jax.random.normal(getkey(), (3, 8)), jax.random.normal(getkey(), (3, 8))
    plain = subtract_corrupted(vector, corrupted)
    assert np.allclose(plain, vector - corrupted)
    strong = subtract_corrupted(vector, corrupted, restore_norm=True)
    assert np.allclose(np.linalg.norm(strong, axis=-1), np.linalg.norm(vector, axis=-1), rtol=1e-5)
    cosine = (strong * plain).sum(-1) / (jnp.linalg.norm(strong, axis=-1) * jnp.linalg.norm(plain, axis=-1))
    assert np.allclose(cosine, 1, atol=1e-5)
    assert np.array_equal(subtract_corrupted(vector, vector, restore_norm=True), np.zeros((3, 8)))


def test_corrupted_prompts_lose_the_format_only(model):
    """Here a corrupted prompt still holds outputs of the task, so the subtraction keeps nothing of the arrow."""
    clean = task_vector(model, planted_prompts(0, 8, 3))
    corrupted = task_vector(model, planted_prompts(0, 8, 3, corrupt=True))
    assert np.allclose(subtract_corrupted(clean, corrupted)[:, AT.const], 0, atol=1e-5)


def test_bad_input_is_named(model):
    prompts = planted_prompts(0, 2, 1)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.1.*got 7"):
        task_vector(model, prompts, layers=[0, 7])
    with pytest.raises(ValueError, match="no example output found"):
        output_vector(model, planted_prompts(0, 2, 0))
