"""What a report says of trained weights: which file, and how far it was trained in its own words."""

from __future__ import annotations

from collections.abc import Iterable

from leakbench.models.weights import Checkpoint
from leakbench.report.text import escape
from leakbench.store import Component

LEGEND = (
    "**Trained weights**: stage and test accuracy are as the file stated them when the run was started; they were not "
    "measured in this run. Unless it says that the network was trained behind the defense, they are of the "
    "network without a defense, and what a defense adds to it is untrained."
)


def trained(components: Iterable[Component]) -> dict[str, str]:
    """Return one sentence, in Markdown, on each model that has trained weights."""
    return {one.spec: _words(one.checkpoint) for one in components if one.checkpoint is not None}


def _words(checkpoint: Checkpoint) -> str:
    file, training = escape(checkpoint.file), checkpoint.training
    if training is None:
        return f"Trained weights: {file}; stage and accuracy not stated in the file."
    accuracy = f"{100 * training.test_accuracy:.2f} %"
    stage, dataset = escape(training.stage), escape(training.dataset)
    behind = f" behind {escape(training.defense)}, with that client's own secrets" if training.defense else ""
    return f"Trained weights: {file}, stage {stage}, test accuracy {accuracy} on {dataset}{behind}."
