"""Workers on a Ray cluster of two nodes: the numbers of one process, also where a node is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from conftest import TESTS
from test_engine import Counter, Thief, go, measured, no_assets, plan  # noqa: F401

from leakbench import LeakbenchError, Reconstruction
from leakbench.analysis.integrity import check
from leakbench.engine import ray_executor as rays
from leakbench.engine.executors import WorkerDied
from leakbench.engine.ray_executor import ENVIRONMENT
from leakbench.engine.worker import ChunkTask, WorkerContext
from leakbench.store.run_file import FILE, Store

pytestmark = [
    pytest.mark.ray,
    # of Ray itself, which leaves sockets and files to the end of the process
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@dataclass(frozen=True)
class Leisurely(Thief):
    name: ClassVar[str] = "leisurely"

    def give(self, images, observation, rng):
        time.sleep(0.4 * len(images))
        return Reconstruction(images)


@dataclass(frozen=True)
class Abandons(Thief):
    """Ends its process at one image, once."""

    name: ClassVar[str] = "abandons"
    folder: str = ""

    def give(self, images, observation, rng):
        if self.rows(rng, 2) and not list(Path(self.folder).iterdir()):
            (Path(self.folder) / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Reconstruction(images)


@dataclass(frozen=True)
class Stays(Thief):
    """Does not come back at one image."""

    name: ClassVar[str] = "stays"

    def give(self, images, observation, rng):
        if self.rows(rng, 2):
            time.sleep(1000)
        return Reconstruction(images)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), path])
    os.environ.update({"OMP_NUM_THREADS": "1", **ENVIRONMENT})
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    nodes.second = nodes.add_node(num_cpus=1, num_gpus=0)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    os.environ["PYTHONPATH"] = path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_nodes_give_the_bytes_of_one_process(cluster, tmp_path):
    (tmp_path / "deaths").mkdir()
    matrix = plan(attacks=["random", "ig(steps=2)", Abandons(str(tmp_path / "deaths"))], images=5)
    alone = go(plan(attacks=["random", "ig(steps=2)"], images=5), tmp_path / "1", chunk=2)
    seen = Counter()
    two = go(matrix, tmp_path / "2", chunk=2, executor="ray", ray_address=cluster.address, progress=seen)
    assert set(two["status"]) == {"ok"}
    assert sum(seen.chunks) == len(two) == 15
    assert [line for line in seen.notes if "with its actor" in line]
    pd.testing.assert_frame_equal(measured(two.loc[alone.index]), measured(alone))
    with Store.open(tmp_path / "2" / FILE) as store:
        assert [session.provenance.workers for session in store.sessions()] == [2]


def test_what_hangs_is_stopped(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("leakbench.engine.executors.LOADING_SECONDS", 8.0)
    options = {"executor": "ray", "ray_address": cluster.address, "workers": 1, "time_limit": 1}
    results = go(plan(attacks=[Stays()], images=[3, 2]), tmp_path, chunk=2, **options).set_index("image")
    assert results["status"].to_dict() == {3: "ok", 2: "error"}


def test_a_plugin_that_a_node_lacks_is_one_line(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("leakbench.engine.ray_executor.plugins", lambda: [tmp_path / "nowhere.py"])
    with pytest.raises(LeakbenchError, match=r"nowhere\.py") as told:
        go(plan(), tmp_path / "run", executor="ray", ray_address=cluster.address)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_an_actor_without_memory_is_replaced_and_a_lost_one_killed():
    """Ray's own errors, which no test can cause at will, from a stand-in for its module."""
    exceptions = pytest.importorskip("ray").exceptions
    killed: list[str] = []

    class Ray:
        def __init__(self) -> None:
            self.exceptions = exceptions
            self.raised = [exceptions.OutOfMemoryError("too much"), exceptions.ActorUnavailableError("gone", None)]

        def wait(self, asked: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
            return asked[:num_returns], []

        def get(self, asked: str) -> bytes:
            raise self.raised.pop(0)

        def kill(self, actor: str) -> None:
            killed.append(actor)

    pool = rays.RayExecutor(WorkerContext((), torch.device("cpu"), False), 1, 0.0, 1, None, "")
    pool._ray, pool._since, task = Ray(), time.monotonic(), ChunkTask((), 1, None)
    pool._start = lambda place: rays._Actor("next", "asked")
    for actor, words in (("first", "OutOfMemoryError: too much"), ("second", "ActorUnavailableError")):
        seat = rays._Actor(actor, "asked")
        seat.ready, seat.task, pool._slots = True, task, [seat]
        (event,) = pool.wait()
        assert isinstance(event, WorkerDied)
        assert words in event.reason
        assert (killed[-1], pool._slots[0].actor) == (actor, "next")


def test_a_lost_node_loses_nothing(cluster, tmp_path):
    """The last test: the cluster has one node less then."""
    matrix = plan(attacks=[Leisurely(), "random"], images=16)
    alone = go(matrix, tmp_path / "1", chunk=2)

    class Killer(Counter):
        def finish(self, results):
            super().finish(results)
            if len(self.chunks) == 3:
                threading.Thread(target=cluster.remove_node, args=(cluster.second, False)).start()

    seen = Killer()
    two = go(matrix, tmp_path / "2", chunk=2, executor="ray", ray_address=cluster.address, progress=seen)
    assert [line for line in seen.notes if "a worker died" in line]
    pd.testing.assert_frame_equal(measured(two), measured(alone))
    assert sum(seen.chunks) == len(two) == 32
    assert check(tmp_path / "2").code == 0


def test_a_cluster_that_cannot_be_used_is_one_line(cluster, tmp_path):
    with pytest.raises(LeakbenchError, match="GPUs") as told:
        go(plan(), tmp_path / "run", executor="ray", ray_address=cluster.address, gpus_per_worker=0.5)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()
