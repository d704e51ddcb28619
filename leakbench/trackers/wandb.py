"""Weights & Biases: a run of the project ``leakbench``; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are obeyed."""

import json
import os
from collections.abc import Mapping
from typing import Self

import wandb

from leakbench.trackers.base import RunOutcome, TrackedRun, Tracker


class WandB(Tracker):
    """The scores of every trial as history, the shares as summary, the results as a table, pictures and pages."""

    def __init__(self, run: "wandb.Run") -> None:
        self.run = run

    @classmethod
    def open(cls, run: TrackedRun) -> Self:
        """Begin the run of this id, or resume it."""
        own = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "leakbench"),
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.config),
            dir=run.folder,
        )
        own.define_metric("*", step_metric="trials")
        return cls(own)

    def log(self, step: int, scores: Mapping[str, float]) -> None:
        """Add a row to the history; a resumed run adds rows for the new trials only."""
        self.run.log({"trials": step, **scores})

    def finish(self, outcome: RunOutcome) -> None:
        """Set the summary, and add table, pictures and pages."""
        self.run.summary.update({f"recovered/{defense}": share for defense, share in outcome.shares.items()})
        pictures = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in outcome.pictures}
        rows = json.loads(outcome.table.to_json(orient="split"))  # plain numbers, text and None
        self.run.log({"results": wandb.Table(columns=rows["columns"], data=rows["data"]), **pictures})
        report = wandb.Artifact(f"report-{self.run.id}", type="report")
        for path in (*outcome.pages, *outcome.pictures):
            report.add_file(str(path), name=path.name)
        self.run.log_artifact(report)

    def close(self, *, completed: bool) -> None:
        """End the run."""
        self.run.finish(exit_code=0 if completed else 1)
