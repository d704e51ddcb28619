"""Progress of a run: a live display in a terminal, plain lines elsewhere."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from leakbench.errors import one_line
from leakbench.plan.trial import Result, Trial

REFRESH_SECONDS = 0.5
"""How often a bar in a terminal moves within a chunk."""

WIDE = 100
"""The columns from which a terminal has room for a long bar."""

LINE_SECONDS = 60.0
"""How often, elsewhere, a line says how far a chunk is."""


class NullProgress:
    """No output; the base of displays."""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End."""

    def start(self, waiting: Sequence[Trial], done: int) -> None:
        """Report the trials to be run, and how many were done before."""

    def skip(self, trials: Sequence[Trial]) -> None:
        """Report trials that need not be run."""

    def note(self, line: str) -> None:
        """Report a line."""

    def begin(self, chunk: int, trials: Sequence[Trial]) -> None:
        """Report that a chunk, trials of one cell, begins, and by which number it is known until it ends."""

    def move(self, chunk: int, done: int, total: int) -> None:
        """Report how many evaluations of all the search of a chunk has made. Attacks reach it: it knows no trial."""

    def end(self, chunk: int) -> None:
        """Report that a chunk has ended, or is given up."""

    def finish(self, results: Sequence[Result]) -> None:
        """Report that the results of a chunk were stored."""


class Bar:
    """A live bar in a terminal with one more column; elsewhere only lines.

    In a narrow terminal the description is shortened; counts, bar and time keep their room.

    Args:
        console: the output.
        beside: the first text of the column beside the count.
    """

    def __init__(self, console: Console, beside: str) -> None:
        self.console = console
        fixed = Column(no_wrap=True)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            BarColumn(bar_width=24 if console.width >= WIDE else 8),
            MofNCompleteColumn(table_column=fixed),
            TextColumn("{task.fields[beside]}", table_column=fixed.copy()),
            TimeElapsedColumn(table_column=fixed.copy()),
            TextColumn("{task.fields[left]}", table_column=fixed.copy()),
            console=console,
            expand=True,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=None, beside=beside, left="")

    def __enter__(self) -> Self:
        """Start the live display."""
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the live display."""
        self.bar.stop()

    def note(self, line: str) -> None:
        """Print one line above the bar."""
        self.console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Chunk:
    """What is shown of a chunk that runs.

    Attributes:
        cell: in words.
        trials: how many it has.
        shown: when it was last shown, by the monotonic clock.
        done: how many trials' work is done.
    """

    cell: str
    trials: int
    shown: float
    done: float = 0.0


class Display(Bar, NullProgress):
    """Cell, trials done, failures and time left: a live bar in a terminal, elsewhere one line for each chunk.

    Args:
        console: the output.
        workers: how many work at once.
        part: the part of the run that the trials are, such as ``matrix 2 of 6``.
    """

    def __init__(self, console: Console, workers: int = 1, part: str = "") -> None:
        super().__init__(console, "0 diverged")
        self.workers = workers
        self.part = f"{part}: " if part else ""
        self.total = self.done = self.failures = self.unscored = 0
        self.left: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.trials: dict[str, int] = defaultdict(int)
        self.running: dict[int, _Chunk] = {}

    def start(self, waiting: Sequence[Trial], done: int) -> None:
        """Show the totals."""
        self.done, self.total = done, done + len(waiting)
        for trial in waiting:
            self.left[trial.cell.specs["attack"]] += 1
        self.bar.update(self.task, total=self.total, completed=done)
        again = f", {done} of them done before" if done else ""
        self.note(f"{self.part}{self.total} trial{'s' * (self.total != 1)}{again}")

    def skip(self, trials: Sequence[Trial]) -> None:
        """Take trials out of the totals."""
        self.total -= len(trials)
        for trial in trials:
            self.left[trial.cell.specs["attack"]] -= 1
        self.bar.update(self.task, total=self.total)

    def begin(self, chunk: int, trials: Sequence[Trial]) -> None:
        """Show the cell."""
        self.running[chunk] = _Chunk(trials[0].cell.words, len(trials), time.monotonic())
        self.bar.update(self.task, description=one_line(f"{self.part}{trials[0].cell.words}"))

    def move(self, chunk: int, done: int, total: int) -> None:
        """Move the bar within chunks; elsewhere, write a line a minute for each chunk."""
        terminal, own = self.console.is_terminal, self.running[chunk]
        own.done = own.trials * min(1.0, done / total)
        shown = max(one.shown for one in self.running.values()) if terminal else own.shown
        if time.monotonic() - shown < (REFRESH_SECONDS if terminal else LINE_SECONDS):
            return
        own.shown = time.monotonic()
        step = f"step {min(done, total)} of {total}"
        if terminal:
            words = one_line(f"{step}: {self.part}{own.cell}")  # what moves comes first: the end may have no room
            self.bar.update(self.task, description=words, completed=self._completed())
        else:
            self.note(f"{self.part}[{self.done}/{self.total}] {own.cell}: {step}")

    def end(self, chunk: int) -> None:
        """Forget how far it is: its results are shown by ``finish``."""
        del self.running[chunk]

    def _completed(self) -> float:
        """Return how many trials are done, with the parts of those that run."""
        return self.done + sum(one.done for one in self.running.values())

    def finish(self, results: Sequence[Result]) -> None:
        """Show what is done, failed and left."""
        self.done += len(results)
        self.failures += sum(result.status == "failed" for result in results)
        self.unscored += sum(result.status in ("unsupported", "error") for result in results)
        for result in results:
            attack = result.trial.cell.specs["attack"]
            self.left[attack] -= 1
            self.seconds[attack] += result.seconds
            self.trials[attack] += 1
        left = self._left()
        failures = f"{self.failures} diverged" + (f", {self.unscored} without a score" if self.unscored else "")
        self.bar.update(self.task, completed=self._completed(), beside=failures, left=left)
        words = results[0].trial.cell.words
        if not self.console.is_terminal:
            self.note(
                f"{self.part}[{self.done}/{self.total}] {words}: {len(results)} trial{'s' * (len(results) > 1)}, "
                f"{failures} so far{left and ', '}{left}"
            )

    def _left(self) -> str:
        """Return the time left in words, from the mean of each attack's trials so far.

        Empty while no attack that has trials left was measured; "at least" while another one was not.
        """
        waiting = [attack for attack, left in self.left.items() if left > 0]
        known = [attack for attack in waiting if self.trials[attack]]
        if waiting and not known:
            return ""
        seconds = sum(self.left[attack] * self.seconds[attack] / self.trials[attack] for attack in known)
        words = "about" if len(known) == len(waiting) else "at least"
        return f"{words} {duration(seconds / self.workers)} left"


def duration(seconds: float) -> str:
    """Return a time in words: ``2h 05m``, ``3m 07s`` or ``12s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
