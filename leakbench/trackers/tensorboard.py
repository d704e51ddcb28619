"""TensorBoard: event files in OUT/tensorboard; ``tensorboard --logdir OUT/tensorboard`` shows them."""

from collections.abc import Mapping
from typing import Self

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from leakbench.trackers.base import RunOutcome, TrackedRun, Tracker


class TensorBoard(Tracker):
    """Scalars for every trial, the shares as scalars too, the report as text, its pictures as images."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    @classmethod
    def open(cls, run: TrackedRun) -> Self:
        """Write beside the event files of earlier sessions, which TensorBoard joins."""
        own = cls(SummaryWriter(str(run.folder / "tensorboard")))
        rows = "\n".join(f"| {name} | {value} |" for name, value in run.config.items())
        own.writer.add_text("run", f"| | |\n|:--|:--|\n{rows}")
        return own

    def log(self, step: int, scores: Mapping[str, float]) -> None:
        """Write the scores as scalars."""
        for name, value in scores.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, outcome: RunOutcome) -> None:
        """Write shares, pictures and pages."""
        for defense, share in outcome.shares.items():
            self.writer.add_scalar(f"recovered/{defense}", share, outcome.step)
        for path in outcome.pictures:
            with Image.open(path) as picture:
                self.writer.add_image(path.stem, np.asarray(picture.convert("RGB")), outcome.step, dataformats="HWC")
        for path in outcome.pages:
            if path.suffix == ".md":
                self.writer.add_text(path.stem, path.read_text(encoding="utf-8"), outcome.step)

    def close(self, *, completed: bool) -> None:
        """Write what is left."""
        self.writer.close()
