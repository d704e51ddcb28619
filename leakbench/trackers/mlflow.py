"""MLflow: a run of the experiment ``leakbench``; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are obeyed."""

import os
import re
from collections.abc import Mapping
from typing import Self

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.utils.time import get_current_time_millis

from leakbench.trackers.base import RunOutcome, TrackedRun, Tracker

TAG = "leakbench.run"
"""The tag by which a resumed run is found."""

PARAM_LENGTH = 6000
"""MLflow refuses longer values of parameters."""


class MLflow(Tracker):
    """The scores of every trial as metrics, the shares too, the report, its pictures and the results as artifacts."""

    def __init__(self, client: MlflowClient, run: str) -> None:
        self.client = client
        self.run = run

    @classmethod
    def open(cls, run: TrackedRun) -> Self:
        """Begin a run with this id as a tag, or resume the one that has it."""
        client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "leakbench")
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if found is None else found.experiment_id
        known = client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if known:
            client.update_run(known[0].info.run_id, status="RUNNING")
            return cls(client, known[0].info.run_id)
        own = cls(client, client.create_run(experiment, tags={TAG: run.id}, run_name=run.name).info.run_id)
        params = [Param(key, value[:PARAM_LENGTH]) for key, value in run.config.items()]
        client.log_batch(own.run, params=params)
        return own

    def log(self, step: int, scores: Mapping[str, float]) -> None:
        """Add the scores to the metrics."""
        now = get_current_time_millis()
        self.client.log_batch(self.run, [Metric(_name(key), value, now, step) for key, value in scores.items()])

    def finish(self, outcome: RunOutcome) -> None:
        """Add shares and artifacts."""
        self.log(outcome.step, {f"recovered/{defense}": share for defense, share in outcome.shares.items()})
        for path in outcome.pages:
            self.client.log_artifact(self.run, str(path))
        for path in outcome.pictures:
            self.client.log_artifact(self.run, str(path), "grids")

    def close(self, *, completed: bool) -> None:
        """End the run."""
        self.client.set_terminated(self.run, "FINISHED" if completed else "KILLED")


def _name(key: str) -> str:
    """Return a name that MLflow allows for a metric: without brackets, commas, and slashes that look like a path."""
    metric, _, words = key.partition("/")
    return f"{metric}/" + re.sub(r"[^\w\-. :]", "_", words)
