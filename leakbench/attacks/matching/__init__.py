"""Gradient matching: an image whose gradient is the observed one. The engine behind most attacks.

An attack is a choice of search space, distance, prior, labels, secrets and solver; everything here acts on all trials
at once. The search space is the image itself, or whatever else an image can be rendered from.
"""

from leakbench.attacks.matching.attack import Found, GradientMatching
from leakbench.attacks.matching.objective import FINAL_EVALUATION, ROUGHNESS, MatchingObjective
from leakbench.attacks.matching.problem import analytic_labels
from leakbench.attacks.matching.tensors import double, pack, root, scaled, total_variation
from leakbench.core.component import Count, NonNegative, Positive

__all__ = [
    "FINAL_EVALUATION",
    "ROUGHNESS",
    "Count",
    "Found",
    "GradientMatching",
    "MatchingObjective",
    "NonNegative",
    "Positive",
    "analytic_labels",
    "double",
    "pack",
    "root",
    "scaled",
    "total_variation",
]
