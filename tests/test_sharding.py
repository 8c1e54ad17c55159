"""Models on many devices and in many processes. Both need a JAX started for it, hence processes of their own."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import Site, Transformer, gate, load_model, perturb, record, save_model, tiny_config
from icl_lib.runs import devices
from icl_lib.runs.store import Store
from icl_lib.saes import load_suite

HERE = Path(__file__).parent
LAUNCHERS = (
    "JAX_",
    "SLURM_",
    "OMPI_",
    "TPU_",
    "MEGASCALE_",
    "KUBERNETES_",
    "JOB_COMPLETION_INDEX",
    "CUDA_VISIBLE",
    "XLA_FLAGS",
)


def environment(n_devices, **more):
    """This environment on a CPU that plays `n_devices`, without what a launcher may have put there. Little is
    optimised: it runs once.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    flags = f"--xla_force_host_platform_device_count={n_devices} --xla_backend_optimization_level=0"
    return (
        clean | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "32"} | more
    )  # threads to spare: see test_sae_training.py


def test_eight_devices_give_the_numbers_of_one():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "eight_devices.py")]
    run = subprocess.run(command, env=environment(8), capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 40 and "skipped" not in run.stdout


TOKENS = jnp.arange(48).reshape(4, 12) % 40


def log_prob(logits):
    """Mean log-probability of the next token of TOKENS."""
    return jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("data", [1, 2])
def test_two_processes_give_the_numbers_of_one_and_one_file(data, tmp_path, getkey):
    """With data = 1 every weight is cut between the processes; with data = 2 each has half of the batch."""
    config = tiny_config("gemma2", n_heads=4, n_kv_heads=2)
    model = Transformer.init(config, key=getkey())
    save_model(model, tmp_path / "model", dtype="float32")
    address = f"127.0.0.1:{free_port()}"

    def start(rank):
        variables = environment(2, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(rank))
        command = [
            sys.executable,
            HERE / "one_of_two.py",
            tmp_path / "run",
            tmp_path / f"own{rank}",
            tmp_path / "model",
            str(data),
        ]
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    runs = [start(rank) for rank in (0, 1)]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert [out.splitlines()[-1].split() for out, _ in said] == [["writer", "0", "2"], ["reader", "1", "2"]]

    arrays, _ = Store(tmp_path / "run", {"model": "random"}).load("first")
    cache = {}
    logits = model(TOKENS, tap=record([Site("resid_post", 1)], cache))
    np.testing.assert_allclose(arrays["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["resid"], cache[Site("resid_post", 1)], rtol=1e-4, atol=1e-5)
    grad = jax.grad(lambda delta: log_prob(model(TOKENS, tap=perturb({Site("resid_pre", 1): delta}))))(
        jnp.zeros((4, 12, 16))
    )
    np.testing.assert_allclose(arrays["gradient"], grad, rtol=1e-4, atol=1e-6)
    assert jnp.abs(grad).max() > 1e-3
    mean, meta = Store(tmp_path / "run", {"model": "random"}).load("second")
    np.testing.assert_allclose(mean["mean"], jnp.mean(logits), rtol=1e-3, atol=1e-6)
    assert meta == {"data": data}
    assert Store(tmp_path / "own0", {"model": "random"}).names() == ["kept"]
    assert json.loads((tmp_path / "own0" / "ledger" / "00.json").read_text())[0]["key"] == "mean"
    assert gate.check(model, lambda prompt: {"input_ids": [1, 2, 3]}, tmp_path / "own0" / "model") < 1e-4
    for ours, theirs in zip(*map(jax.tree.leaves, (load_model(tmp_path / "own0" / "model"), model)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert load_suite(tmp_path / "own0" / "saes", config)[Site("resid_pre", 1)].W_enc.shape == (16, 8)
    assert not [path for path in (tmp_path / "own1").rglob("*") if path.is_file()]


@pytest.fixture
def launched(monkeypatch):
    """`join_processes` in an environment with these launcher's variables alone: what JAX was called with, once for each
    call.
    """
    for name in [name for name in os.environ if name.startswith(LAUNCHERS[:-1])]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "_on_tpu_vm", lambda: False)
    devices._join_pod.cache_clear()
    joined = []

    def launch(variables, raises=None):
        def initialize(**given):
            joined.append(given)
            if raises is not None:
                raise raises

        monkeypatch.setattr(devices.jax.distributed, "initialize", initialize)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        devices.join_processes()
        return joined

    yield launch
    devices._join_pod.cache_clear()


FOUND = {"num_processes": None, "process_id": None, "local_device_ids": None}  # by JAX
SLURM = {"SLURM_STEP_NUM_TASKS": "4"}
MPI4 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1"}
MPI5 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "JAX_COORDINATOR_ADDRESS": "host:1",
}


@pytest.mark.parametrize(
    ("variables", "given"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM, {}),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host"}, {}),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, {}),
        ({"JAX_NUM_PROCESSES": "2"}, {"num_processes": 2}),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, {}),
        (MPI4, {}),
        (MPI5, {"num_processes": 4, "process_id": 3, "local_device_ids": [1]}),
        (
            MPI5 | {"JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "5"},
            {"num_processes": 8, "process_id": 5, "local_device_ids": [1]},
        ),
    ],
)
def test_processes_are_joined_where_a_launcher_started_several(variables, given, launched):
    assert launched(variables) == ([] if given is None else [FOUND | given])


@pytest.mark.parametrize(
    ("variables", "local"),
    [
        (SLURM | {"SLURM_STEP_NUM_NODES": "4"}, []),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, None),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0"}, []),
        (SLURM | {"SLURM_STEP_NUM_NODES": "4", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        (MPI4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        (MPI4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, None),
    ],
)
def test_a_process_alone_on_its_node_has_all_its_gpus(variables, local, launched):
    assert launched(variables) == [FOUND | {"local_device_ids": local}]


def test_an_empty_list_of_devices_leaves_all_of_them_visible():
    """As `devices` relies on: JAX alone would take the one GPU that SLURM_LOCALID names."""
    code = """
import jax
jax.distributed.initialize("127.0.0.1:{port}", 1, 0{more})
print(jax.config.values["jax_cuda_visible_devices"])
"""
    slurm = {f"SLURM_{name}": "1" for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")}
    seen = []
    for more in ("", ", local_device_ids=[]"):
        run = [sys.executable, "-c", code.format(port=free_port(), more=more)]
        seen.append(
            subprocess.run(run, env=environment(1, **slurm), capture_output=True, text=True, check=True).stdout.strip()
        )
    assert seen == ["1", "all"]


@pytest.mark.parametrize(
    "error", [ValueError("coordinator_address should be defined."), ConnectionError("metadata.google.internal")]
)
def test_a_tpu_machine_without_a_cluster_is_one_process(error, launched, monkeypatch):
    monkeypatch.setattr(devices, "_on_tpu_vm", lambda: True)
    assert launched({}, raises=error) == [{}]
    assert launched({}, raises=RuntimeError("must be called before any JAX calls")) == [
        {}
    ]  # a second cell does not ask again


def test_a_tpu_pod_that_cannot_be_joined_is_an_error(launched, monkeypatch):
    monkeypatch.setattr(devices, "_on_tpu_vm", lambda: True)
    with pytest.raises(RuntimeError, match="Failed to recognize"):
        launched({}, raises=RuntimeError("Failed to recognize coordinator address t1v-0"))
    with pytest.raises(ValueError, match="unsupported"):
        launched({}, raises=ValueError("unsupported worker-network-endpoints format"))
    with pytest.raises(ValueError, match="which of how many"):
        launched({"TPU_WORKER_HOSTNAMES": "a,b"}, raises=ValueError("coordinator_address should be defined."))


def test_open_mpi_5_needs_an_address_and_kubernetes_says_how(launched, monkeypatch):
    with pytest.raises(ValueError, match="one of 4 processes of Open MPI 5.*set JAX_COORDINATOR_ADDRESS to host:port"):
        launched({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"})
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    with pytest.raises(ValueError, match=r"jax\[k8s\].*JAX_NUM_PROCESSES=1 if it is the only one"):
        launched(pod, raises=ValueError("coordinator_address should be defined."))
    with pytest.raises(RuntimeError, match="headless service") as caught:
        launched(pod, raises=RuntimeError("Pods within a job need a headless service"))
    assert "set JAX_NUM_PROCESSES=1" in caught.value.__notes__[0]


def test_a_launch_that_says_too_little_is_refused(monkeypatch):
    code = """
import os
from icl_lib.runs import devices
for number, rank in (("", ""), ("2", ""), ("2", "2")):
    os.environ |= {name: value for name, value in (("JAX_NUM_PROCESSES", number), ("JAX_PROCESS_ID", rank)) if value}
    try:
        devices.join_processes()
    except ValueError as error:
        print(error)
"""
    env = environment(1, JAX_COORDINATOR_ADDRESS="127.0.0.1:1")
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    said = run.stdout.splitlines()
    assert len(said) == 3
    for line, reason in zip(said, ("Number of processes", "process id", "process_id < num_processes"), strict=True):
        assert re.search(f"which of how many .*{reason}.*set JAX_COORDINATOR_ADDRESS to host:port of the first", line)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a number, got 'two'"):
        devices.join_processes()
