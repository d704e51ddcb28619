"""Per-trial gradients of a network, batched over trials, with the slow and obvious version beside it."""

from leakbench.gradients.evaluate import Evaluator, Path, choose_path, plain_loss
from leakbench.gradients.precision import full_precision

__all__ = ["Evaluator", "Path", "choose_path", "full_precision", "plain_loss"]
