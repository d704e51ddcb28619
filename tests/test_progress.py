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
from leakbench.plan.trial import Trial


def trials(images: int, **axes: list[str]) -> tuple[Trial, ...]:
    usual = {"attacks": ["ig(steps=2)"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"]}
    return tuple(Matrix(images=images, floors=False, **(usual | axes)).trials())


@pytest.mark.parametrize("width", [80, 120])
def test_progress_shortens_only_the_description(width: int) -> None:
    with Display(Console(file=io.StringIO(), force_terminal=True, width=width), part="matrix 1 of 2") as display:
        defense = "noise(scale=0.1, relative=true)"
        display.begin(1, trials(4, attacks=["ig(steps=20000, lr=0.02)"], defenses=[defense], models=["resnet20"]))
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
    every = trials(3, attacks=["random", "ig(steps=2)", "dlg(steps=2)"])
    by_attack = [[one for one in every if one.cell.attack.name == name] for name in ("random", "ig", "dlg")]
    display = Display(Console(file=io.StringIO()))

    def end(count: int, attack: int) -> str:
        ended = [by_attack[attack].pop() for _ in range(count)]
        results = [without_score(ClientData({}, {}, torch.zeros(1), 10), one, "error", "") for one in ended]
        display.finish([replace(one, seconds=2.0) for one in results])
        return display._left()

    display.start(every, 0)
    found = [display._left(), end(3, 0), end(1, 1), end(1, 2), end(2, 1), end(2, 2)]
    assert found == ["", "", "at least 4s left", "about 8s left", "about 4s left", "about 0s left"]


@pytest.mark.parametrize("terminal", [True, False])
def test_chunks_that_run_beside_each_other_are_shown_each(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    clock = iter(range(0, 4000, 45))
    monkeypatch.setattr("leakbench.engine.progress.time.monotonic", lambda: float(next(clock)))
    first, second = trials(4), trials(2, attacks=["dlg(steps=2)"])
    written = io.StringIO()
    with Display(Console(file=written, force_terminal=terminal, width=200), workers=2) as display:
        display.start([*first, *second], 0)
        display.begin(1, first)
        display.begin(2, second)
        display.move(1, 5, 10)
        display.move(2, 5, 10)
        assert display.bar.tasks[0].completed == (3 if terminal else 0)
        display.end(1)
        display.finish([without_score(ClientData({}, {}, torch.zeros(1), 10), one, "error", "") for one in first])
        assert display.bar.tasks[0].completed == 5  # 4 that ended, and half of the work on 2
    if not terminal:
        lines = [line.partition(" ")[2] for line in written.getvalue().splitlines() if ": step" in line]
        assert lines == [f"{one[0].cell.words}: step 5 of 10" for one in (first, second)]
