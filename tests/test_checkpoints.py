"""What is said of a checkpoint that cannot be read, and that the job goes on from the one before."""

import re
import shutil

import jax
import numpy as np
import pytest

from icl_lib.training.checkpoints import CheckpointError, Checkpoints

STATE = {"w": jax.random.normal(jax.random.key(1), (5_000,))}


def saved(folder, steps):
    checkpoints = Checkpoints(folder, {"a": 1})
    for step in steps:
        checkpoints.save(step, {"w": STATE["w"] + step}, {"k": step})
    checkpoints.wait()
    checkpoints.close()


def read(folder):
    checkpoints = Checkpoints(folder, {"a": 1})
    try:
        return checkpoints.restore(STATE)
    finally:
        checkpoints.close()


def largest(folder):
    return max((path for path in [folder, *folder.rglob("*")] if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damaged", ["arrays/ocdbt.process_0", "job/metadata"])
def test_a_damaged_checkpoint_is_named(damaged, tmp_path):
    saved(tmp_path, [1, 2])
    last = tmp_path / "000000002"
    file = largest(last / damaged)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"could not read step 2 of {re.escape(str(tmp_path))}: ") as caught:
        read(tmp_path)
    assert f"delete the folder {last} and start again with the same settings: the job goes on from step 1" in str(
        caught.value
    )
    assert "disk" not in str(caught.value) and last.is_dir()
    shutil.rmtree(last)
    step, arrays, data = read(tmp_path)
    assert (step, data) == (1, {"k": 1})
    np.testing.assert_array_equal(arrays["w"], STATE["w"] + 1)


def test_the_only_checkpoint_is_damaged(tmp_path):
    saved(tmp_path, [3])
    shutil.rmtree(tmp_path / "000000003" / "job")
    with pytest.raises(CheckpointError, match="goes on from the beginning, for there is none before it"):
        read(tmp_path)
    shutil.rmtree(tmp_path / "000000003")
    assert read(tmp_path) is None
