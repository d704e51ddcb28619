"""What a defense costs: networks trained with and without it, and what a stolen one is worth."""

from leakbench.training.run import NullTrainingProgress, TrainingRecord, finished, records, train
from leakbench.training.settings import Accuracy, Arm, Recipe

__all__ = ["Accuracy", "Arm", "NullTrainingProgress", "Recipe", "TrainingRecord", "finished", "records", "train"]
