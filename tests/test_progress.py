"""The display of a run: what stays in a narrow terminal, and when it estimates the time left."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from leakbench.engine.progress import Display
from leakbench.engine.worker import ClientData, without_score
from leakbench.plan.matrix import Matrix


@pytest.mark.parametrize("width", [80, 120])
def test_progress_shortens_only_the_description(width: int) -> None:
    with Display(Console(file=io.StringIO(), force_terminal=True, width=width), part="matrix 1 of 2") as display:
        display.begin("ig(steps=20000, lr=0.02) against noise(scale=0.1, relative=true), resnet20 on cifar10", 4)
        beside, left = "12 diverged", "at least 2h 05m left"
        display.bar.update(display.task, total=9600, completed=1200, beside=beside, left=left)
        lines = Console(file=io.StringIO(), width=width)
        lines.print(display.bar.get_renderable())
        shown = lines.file.getvalue()
    (line,) = shown.splitlines()
    assert len(line) <= width
    for part in ("matrix", "━", "1200/9600", beside, "0:00:00", left):
        assert part in line


def test_an_estimate_needs_a_measured_attack() -> None:
    axes = {"defenses": ["none"], "models": ["lenet"], "datasets": ["samples"], "images": 3, "floors": False}
    trials = Matrix(attacks=["random", "ig(steps=2)", "dlg(steps=2)"], **axes).trials()
    by_attack = [[one for one in trials if one.cell.attack.name == name] for name in ("random", "ig", "dlg")]
    display = Display(Console(file=io.StringIO()))

    def end(count: int, attack: int) -> str:
        ended = [by_attack[attack].pop() for _ in range(count)]
        results = [without_score(ClientData({}, {}, torch.zeros(1), 10), one, "error", "") for one in ended]
        display.finish([replace(one, seconds=2.0) for one in results])
        return display._left()

    display.start(trials, 0)
    found = [display._left(), end(3, 0), end(1, 1), end(1, 2), end(2, 1), end(2, 2)]
    assert found == ["", "", "at least 4s left", "about 8s left", "about 4s left", "about 0s left"]
