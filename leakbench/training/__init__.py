"""Trainings with and without a defense: the accuracy that it costs, and the accuracy of a stolen model."""

from leakbench.training.run import NullTrainingProgress, TrainingRecord, finished, records, train
from leakbench.training.settings import Accuracy, Arm, Recipe

__all__ = ["Accuracy", "Arm", "NullTrainingProgress", "Recipe", "TrainingRecord", "finished", "records", "train"]
