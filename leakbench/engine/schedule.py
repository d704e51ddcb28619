"""The schedule of a run: cells in the order of the matrix, cut into chunks; without processes and clocks.

A worker that takes a task holds it until it answers, dies or times out. Then the task is done, or is scheduled again.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from leakbench.analysis.recovery import recovered_targets
from leakbench.engine.worker import ChunkTask, ClientData, MeasureTask, attack_key, without_score
from leakbench.plan.trial import Cell, Result, Trial, target
from leakbench.store.run_file import Store

MAX_DEATHS = 3
"""After this many workers died while they held a chunk, it is halved; a single trial is an error."""

FULL = 16
"""Trials from which a search fills the registers of any processor; one of fewer at a time costs more a trial."""


def recovered(trials: Iterable[Trial], store: Store, threshold: float | None) -> set[str]:
    """Return the trials to skip: another trial has recovered the same image behind the same defense.

    Whether it has is judged against the floors on the image (``analysis.recovery``), which run before.

    The private image decides here which trials are still run; it never decides what an attack returns. Floors and
    controls always run, and without a threshold all trials run.
    """
    if threshold is None:
        return set()
    by_target = recovered_targets(store, threshold)
    attacked = (trial for trial in trials if trial.cell.attack.competes)
    return {trial.id for trial in attacked if by_target.get(trial.target, set()) - {trial.id}}


@dataclass
class _Line:
    """A cell in the schedule: not begun while ``chunks`` is None; ended when it is empty and no chunk is running."""

    cell: Cell
    trials: tuple[Trial, ...]
    chain: str
    chunks: deque[ChunkTask] | None = None
    measured: bool = False
    running: int = 0
    ended: bool = False


class Schedule:
    """The chunks of a run, one after the other.

    In an ensemble (with a threshold), the floors of a dataset run first, and then the cells of one dataset, model and
    defense one after the other, so that the same trials are skipped with any number of workers.

    Args:
        trials: all planned trials, those of a cell together.
        store: the run file; trials with a result in it are not run again.
        data: the clients' images, by the spec of the dataset.
        threshold: of the matrix.
        size: trials at a time; None: as recorded in the run file, or else as a worker measures.
        workers: how many there are; cells are cut for them where chunks stay ``FULL``, and, if fewer cells than workers
            can run beside each other, so small that all are busy.
        skip: called with trials that need not be run.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        store: Store,
        data: Mapping[str, ClientData],
        *,
        threshold: float | None,
        size: int | None,
        workers: int,
        skip: Callable[[list[Trial]], None],
    ) -> None:
        self._store, self._data, self._threshold, self._size, self._skip = store, data, threshold, size, skip
        self._done = store.done()
        groups = itertools.groupby(trials, key=lambda trial: trial.cell.key)
        cells = [self._mixed(list(members)) for _, members in groups]
        if threshold is not None:
            cells.sort(key=lambda cell: not cell[0].cell.attack.floor)
        self._lines = [_Line(cell[0].cell, cell, target(cell[0].cell.settings, 0, 0)) for cell in cells]
        self._by_cell = {line.cell.key: line for line in self._lines}
        self._workers = workers
        self._beside = self._count_beside(self._lines)
        self._beside_left = self._count_beside(
            [line for line in self._lines if any(trial.id not in self._done for trial in line.trials)]
        )
        self._unmeasured: deque[MeasureTask] = deque()
        self._first = 0

    def next(self) -> MeasureTask | ChunkTask | None:
        """Return the next task; None if there is none, or none until another one has ended."""
        while self._first < len(self._lines) and self._lines[self._first].ended:
            self._first += 1
        if self._unmeasured:
            return self._unmeasured.popleft()
        busy: set[str] = set()  # chains with a line that has not ended, and datasets whose floors have not
        for line in itertools.islice(self._lines, self._first, None):
            if line.ended:
                continue
            attack, dataset = line.cell.attack, line.cell.specs["dataset"]
            waits = self._threshold is not None and attack.competes and not busy.isdisjoint((line.chain, dataset))
            if not waits and (task := self._take(line)) is not None:
                return task
            if self._threshold is not None and not line.ended and not attack.is_control:
                busy.add(dataset if attack.floor else line.chain)
        return None

    def measured(self, task: MeasureTask, size: int) -> None:
        """Record how many trials of a cell run at a time, as measured, and cut the cell into chunks."""
        line = self._by_cell[task.trial.cell.key]
        self._store.record_chunk(line.cell.key, size)  # a run that is resumed is cut into the same pieces
        self._cut(line, size)

    def finished(self, chunk: ChunkTask) -> None:
        """Record that the results of a chunk were written."""
        line = self._by_cell[chunk.trial.cell.key]
        line.running -= 1
        line.ended = not line.chunks and not line.running

    def lost(self, task: ChunkTask | MeasureTask, reason: str) -> list[Result]:
        """Schedule the task of a dead worker again; return the results of trials that are given up.

        The same chunk gives the same numbers, so it is first tried again as it is, and later halved.
        """
        task = replace(task, lost=task.lost + 1)
        if isinstance(task, MeasureTask):
            if task.lost < MAX_DEATHS:
                self._unmeasured.append(task)
            else:
                self.measured(task, 1)
            return []
        if task.lost < MAX_DEATHS:
            return self._again([task])
        if len(task.trials) > 1:
            half = len(task.trials) // 2
            return self._again([_part(task, task.trials[:half]), _part(task, task.trials[half:])])
        return self._gave_up(task, f"{task.lost} workers died while they ran it, the last one {reason}")

    def timed_out(self, task: ChunkTask | MeasureTask, limit: float) -> list[Result]:
        """Schedule the trials of a chunk that timed out one by one; return the results of trials that are given up."""
        if isinstance(task, MeasureTask):
            self.measured(task, 1)
            return []
        if len(task.trials) > 1:
            return self._again([_part(task, (trial,)) for trial in task.trials])
        return self._gave_up(task, f"timed out after {limit:g} s (--time-limit)")

    def _again(self, chunks: Sequence[ChunkTask]) -> list[Result]:
        line = self._by_cell[chunks[0].trial.cell.key]
        assert line.chunks is not None  # it was cut when the chunk was taken
        line.chunks.extendleft(reversed(chunks))
        line.running -= 1
        return []

    def _gave_up(self, chunk: ChunkTask, reason: str) -> list[Result]:
        self.finished(chunk)
        return [without_score(chunk.data, chunk.trial, "error", reason)]

    def _take(self, line: _Line) -> MeasureTask | ChunkTask | None:
        if line.chunks is None:
            if line.measured:
                return None
            skipped = recovered(line.trials, self._store, self._threshold)
            self._skip([trial for trial in line.trials if trial.id in skipped - self._done])
            line.trials = tuple(trial for trial in line.trials if trial.id not in skipped)
            if all(trial.id in self._done for trial in line.trials):
                line.ended = True
                return None
            size = self._size or self._store.chunk(line.cell.key)
            if size is None:
                line.measured = True
                return MeasureTask(line.trials[0], self._share(line))
            self._cut(line, size)
        if not line.chunks:
            return None
        line.running += 1
        return line.chunks.popleft()

    def _mixed(self, trials: list[Trial]) -> tuple[Trial, ...]:
        """Return the trials of a cell in the order of their attackers' keys, so that no position tells the image."""
        salt = self._data[trials[0].cell.specs["dataset"]].salt
        return tuple(sorted(trials, key=lambda trial: attack_key(trial, salt)) if salt else trials)

    def _count_beside(self, lines: Sequence[_Line]) -> int:
        """Return how many searches of these cells can run beside each other: those of a chain wait for each other."""
        searches = [line for line in lines if line.cell.attack.competes]
        return max(1, len(searches) if self._threshold is None else len({line.chain for line in searches}))

    def _share(self, line: _Line) -> int:
        """Return how many trials of a cell a worker is to have at most; of one that was begun, as at its beginning."""
        begun = any(trial.id in self._done for trial in line.trials)
        pieces = -(-self._workers // (self._beside if begun else self._beside_left))
        return -(-len(line.trials) // max(pieces, min(self._workers, len(line.trials) // FULL)))

    def _cut(self, line: _Line, size: int) -> None:
        """Cut a cell into chunks; trials that are done leave gaps, so that a resumed run is cut as before."""
        data = self._data[line.cell.specs["dataset"]]
        width = size * min(line.cell.attack.queue, -(-self._share(line) // size))
        pieces = (line.trials[begin : begin + width] for begin in range(0, len(line.trials), width))
        left = (tuple(trial for trial in piece if trial.id not in self._done) for piece in pieces)
        line.chunks = deque(ChunkTask(piece, size, data.of(piece)) for piece in left if piece)


def _part(chunk: ChunkTask, trials: tuple[Trial, ...]) -> ChunkTask:
    return ChunkTask(trials, chunk.slots, chunk.data.of(trials))
