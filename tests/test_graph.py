"""Recording an objective as a CUDA graph changes no number, and is not done where it would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pytest
import torch
from torch import Tensor

from leakbench.optim import Evaluation, Unknowns, descend, graph, value_and_gradient
from leakbench.optim.graph import recorded

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass(frozen=True)
class Bowl:
    """|x - 1|^2 of each row; ``drift`` makes it another function at each evaluation."""

    drift: float = 0.0

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        assert isinstance(evaluation, int)
        return (unknowns["x"] - 1 - self.drift * evaluation).square().sum(1)

    def select(self, rows: Sequence[int]) -> Self:
        return self


def test_on_the_cpu_nothing_is_recorded() -> None:
    start = {"x": torch.rand(3, 4)}
    for evaluation in range(2):
        value, gradient = recorded(Bowl(drift=0.5), start)(start, evaluation)
        expected, slope = value_and_gradient(Bowl(drift=0.5), start, evaluation)
        assert torch.equal(value, expected)
        assert torch.equal(gradient["x"], slope["x"])


def test_agreement_is_of_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    value, slope, count = (
        torch.tensor([1.0, torch.nan, torch.inf]),
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        torch.arange(3),
    )
    for most in (1, 2**22):  # entries that are compared at a time
        monkeypatch.setattr(graph, "MAX_COMPARED", most)
        assert graph.agree([value, slope, count], [value + 1e-7, slope * (1 - 1e-7), count])
        for other in (torch.tensor([1.1, torch.nan, torch.inf]), torch.tensor([1.0, 2.0, torch.inf])):
            assert not graph.agree([value, slope, count], [other, slope, count])
        assert not graph.agree([value, slope, count], [value, slope + torch.tensor([[0.0, 0.0], [0.1, 0.0]]), count])
        assert not graph.agree([value, slope, count], [value, slope, count + 1])


@CUDA
def test_a_recorded_objective_gives_the_same_numbers_at_other_points() -> None:
    start = {"x": torch.rand(3, 4, device="cuda")}
    evaluate = recorded(Bowl(), start)
    assert evaluate.__name__ == "replay"
    other = {"x": torch.rand(3, 4, device="cuda")}
    value, gradient = evaluate(other, 7)
    expected, slope = value_and_gradient(Bowl(), other, 7)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient["x"], slope["x"])
    assert descend(Bowl(), start, steps=200, lr={"x": 0.1}).value.max() < 1e-3


@CUDA
def test_what_changes_with_the_evaluation_is_not_recorded() -> None:
    start = {"x": torch.rand(3, 4, device="cuda")}
    assert recorded(Bowl(drift=0.5), start).__name__ == "plain"
