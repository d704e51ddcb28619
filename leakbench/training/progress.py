"""The progress of a training: a live display in a terminal, plain lines elsewhere."""

from rich.console import Console

from leakbench.engine.progress import Bar, duration
from leakbench.training.arm import Outcome, Round
from leakbench.training.run import NullTrainingProgress
from leakbench.training.settings import Arm


class Rounds(Bar, NullTrainingProgress):
    """Arm, rounds done, loss, accuracy and time left: a live bar in a terminal, one line a round elsewhere."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "")
        self.total = 0
        self.seconds: list[float] = []

    def begin(self, arm: Arm, number: int, arms: int) -> None:
        """Show the arm."""
        words, self.total, self.seconds = arm.words(), arm.recipe.rounds, []
        self.note(f"training {number} of {arms}: {words}, {self.total} rounds")
        self.bar.update(self.task, description=words, total=self.total, completed=0, beside="", left="")

    def round(self, one: Round) -> None:
        """Show the measurements after a round."""
        self.seconds.append(one.seconds)
        left = duration((self.total - one.number) * sum(self.seconds) / len(self.seconds))
        numbers = f"loss {one.loss:.4f}, test {100 * one.accuracy('test'):.2f} %"
        self.bar.update(self.task, completed=one.number, beside=numbers, left=f"about {left} left")
        if not self.console.is_terminal:
            self.note(f"[{one.number}/{self.total}] {numbers}, about {left} left")
        for failure in (*one.failures, *one.untested):
            self.note(f"round {one.number}: {failure}")

    def end(self, outcome: Outcome) -> None:
        """Report why an arm ended without success."""
        if outcome.reason:
            self.note(f"{outcome.status}: {outcome.reason}")
