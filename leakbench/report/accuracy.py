"""``accuracy.md``: what defenses cost, from the records of a run's trainings; with curves, and as CSV."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from leakbench.analysis.statistics import effective_groups, wilson_interval
from leakbench.core.text import ABSENT, name_of, number, plural, slug
from leakbench.errors import BadOption
from leakbench.report.compare import Published, place_of, published
from leakbench.report.display import per_cent
from leakbench.report.figure import COLOURS, key_below, plain, saved
from leakbench.report.files import remove_others, replace
from leakbench.report.page import render_markdown
from leakbench.report.study import Value
from leakbench.training import TrainingRecord, records
from leakbench.training.arm import GLOBAL, Outcome, Round
from leakbench.training.run import ARMS_FOLDER
from leakbench.training.thief import INITIAL, KINDS, PAPER_RANDOM, ZERO

FILE = "accuracy.md"
"""The name of the report in a run's folder."""
CSV = "accuracy.csv"
PAPER_BATCH = 64
"""The batch by which FedKL's code divides."""

_RANDOM = {
    "random: fresh key, fresh lock": PAPER_RANDOM,
    "random: fresh key, initial lock": INITIAL,
}
"""The two readings of the paper's row ``random``, and the kinds of secrets of a thief that they are."""
Rows = list[Mapping[str, object]]
"""Rows of a table of a page, each as cells by heading."""

_DASHES = ("-", "--", "-.", ":")
_CURVES = re.compile(r"curves-\d{2}-.*\.png")


@dataclass(frozen=True)
class Block:
    """The trainings that compare: one dataset, model and recipe.

    Attributes:
        mode: ``centralised`` or ``fedavg``.
        arms: by defense, in the order of the report, one record per seed.
        file: the name of the figure.
    """

    dataset: str
    model: str
    mode: str
    arms: dict[str, list[TrainingRecord]]
    file: str

    @property
    def title(self) -> str:
        """The block in words."""
        return f"{self.model} on {self.dataset}, {self.mode}"

    @property
    def unit(self) -> str:
        """A round of fedavg, or an epoch."""
        return "round" if self.mode == "fedavg" else "epoch"

    @property
    def records(self) -> list[TrainingRecord]:
        """Every training."""
        return [one for own in self.arms.values() for one in own]

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe that all trainings share."""
        return self.records[0].recipe

    @property
    def ended(self) -> dict[str, list[TrainingRecord]]:
        """By defense, the trainings with at least one round; defenses without any are left out."""
        found = {defense: [one for one in own if one.outcome.rounds] for defense, own in self.arms.items()}
        return {defense: own for defense, own in found.items() if own}


def trained(out: Path) -> bool:
    """Return whether a run's folder holds trainings."""
    return (out / ARMS_FOLDER).is_dir()


def write(out: Path | str) -> list[Path]:
    """Write ``accuracy.md`` with ``curves/*.png`` and ``accuracy.csv`` from the trainings in ``out``; return paths.

    Raises:
        BadOption: there is no finished training in ``out``.
    """
    out = Path(out)
    found = records(out)
    if not found:
        raise BadOption(f"there is no finished training in {str(out)!r}; give the folder of `leakbench run accuracy`")
    blocks = blocks_of(found)
    written = [replace(out / CSV, csv(found).encode())]
    written += [replace(out / "curves" / block.file, saved(figure(block))) for block in blocks if block.ended]
    written.append(replace(out / FILE, markdown(blocks, published(), out.resolve().name).encode()))
    remove_others(out / "curves", _CURVES, {block.file for block in blocks})
    return written


def blocks_of(found: Sequence[TrainingRecord]) -> list[Block]:
    """Return the trainings by dataset, model and recipe; in each, the controls come first, then defenses by name."""
    controls = {"none": 0, "norm-only": 1}

    def place(one: TrainingRecord) -> tuple[str, str, str]:
        recipe = ", ".join(f"{name}={value}" for name, value in one.recipe.items())
        return one.specs["dataset"], one.specs["model"], recipe

    def rank(one: TrainingRecord) -> tuple[int, str, int]:
        return controls.get(name_of(one.specs["defense"]), 2), one.specs["defense"], one.seed

    blocks: list[Block] = []
    for (dataset, model, _), own in groupby(sorted(found, key=place), place):
        by_defense = groupby(sorted(own, key=rank), lambda one: one.specs["defense"])
        arms = {defense: list(arm) for defense, arm in by_defense}
        mode = str(next(iter(arms.values()))[0].recipe["mode"])
        file = f"curves-{len(blocks) + 1:02}-{slug((dataset, model, mode))}.png"
        blocks.append(Block(dataset, model, mode, arms, file))
    return blocks


def accuracy(outcome: Outcome) -> float:
    """Return the test accuracy of the best round in [0, 1], the mean over clients with secrets; NaN without rounds."""
    return outcome.chosen().accuracy("test") if outcome.rounds else math.nan


def interval(own: Sequence[TrainingRecord]) -> Value:
    """Return the mean test accuracy over seeds in [0, 1], with its 95 % Wilson interval over the test images.

    If groups hold several of them, it is over as many as the groups are worth (``effective_groups``).
    """
    ended = [one.outcome for one in own if one.outcome.rounds]
    if not ended:
        return Value()
    value = mean(map(accuracy, ended))
    count = effective_groups(ended[0].groups) if ended[0].groups else ended[0].chosen().views[0].test.count
    return Value(value, *wilson_interval(value, count))


def _percent(value: float, sign: bool = False) -> str:
    return number(100 * value, 2, sign)


def _mean(values: Sequence[float]) -> float:
    return mean(values) if values else math.nan


def _spread(values: Sequence[float], ends: bool = False) -> str:
    """Return ``mean ± deviation`` in per cent, with ``(least to largest)`` if asked for; of one value the mean."""
    if len(values) == 1:
        return _percent(values[0])
    text = f"{_percent(mean(values))} ± {_percent(stdev(values))}"
    return f"{text} ({_percent(min(values))} to {_percent(max(values))})" if ends else text


def markdown(blocks: Sequence[Block], paper: Published, name: str) -> str:
    """Return the report; it depends on nothing but its arguments."""
    return render_markdown(
        "accuracy.md.j2",
        name=name,
        facts=_about(blocks),
        paper=paper,
        GLOBAL=GLOBAL,
        blocks=[
            {
                "block": block,
                "images": max(one.outcome.images for one in block.records),
                "costs": _costs(block),
                "controls": {one.seed: accuracy(one.outcome) for one in block.arms.get("none", ())},
                "thefts": _thefts(block),
                "published": _comparison([block], paper, whole=False),
            }
            for block in blocks
        ],
    )


def _about(blocks: Sequence[Block]) -> list[tuple[str, object]]:
    """Return how many trainings there are, how long they took, and every start that ended one."""
    own = [one for block in blocks for one in block.records]
    seconds = sum(each.seconds for one in own for each in one.outcome.rounds)
    facts: list[tuple[str, object]] = [("trainings", len(own)), ("time in rounds", f"{number(seconds / 60, 1)} min")]
    starts = [one.provenance for one in own]
    for place, start in enumerate(starts):
        if start not in starts[:place]:
            facts += [("command", start.command), *start.describe().items()]
            facts += [("salt", start.salt)] if start.salt else []
    return facts


def _costs(block: Block) -> list[dict[str, object]]:
    """Return a row for each defense, with only a status if none of its trainings has a round."""
    control = interval(block.arms.get("none", ())).mean
    found: list[dict[str, object]] = []
    for defense, own in block.arms.items():
        ended = [one.outcome for one in block.ended.get(defense, ())]
        value, chosen = interval(own), [outcome.chosen() for outcome in ended]
        rounds = [one for outcome in ended for one in outcome.rounds]
        diverged = any(outcome.status != "ok" for outcome in ended)
        found.append(
            {
                "defense": f"{defense} (diverged)" if diverged else defense,
                "seeds": len(ended or own),
                f"best {block.unit}": ", ".join(str(one.number) for one in chosen) or own[0].outcome.status,
                "accuracy": per_cent(*value),
                "over seeds": _spread([accuracy(one) for one in ended]) if len(ended) > 1 else ABSENT,
                "cost, points": ABSENT if defense == "none" else _percent(control - value.mean, sign=True),
                "test loss": number(_mean([view.test.loss for one in chosen for view in one.views]), 4),
                "failed clients": sum(len(one.failures) + len(one.untested) for one in rounds) if rounds else ABSENT,
                "paper's convention": _percent(_mean([_as_paper(one) for one in chosen])),
            }
        )
    return found


def _as_paper(one: Round) -> float:
    """Return the accuracy as FedKL's code computes it."""
    return mean(view.test.correct / (PAPER_BATCH * math.ceil(view.test.count / PAPER_BATCH)) for view in one.views)


def _thefts(block: Block) -> list[list[object]]:
    """Return a row for each defense and kind of secrets."""
    found: list[list[object]] = []
    for defense, own in block.arms.items():
        kinds: dict[str, list[float]] = {}
        for theft in [theft for one in own for theft in one.outcome.thefts]:
            constant = theft.kind == ZERO and len(set(theft.correct)) == 1  # the key does not change the zero lock
            draws = theft.correct[:1] if constant else theft.correct
            kinds.setdefault(theft.kind, []).extend(correct / theft.count for correct in draws)
        found += [[defense, kind, KINDS[kind], len(own), _spread(own, ends=True)] for kind, own in kinds.items()]
    return found


def beside_table1(blocks: Sequence[Block], paper: Published, whole: bool = False) -> Rows:
    """Return the figures of the paper's table 1 beside the accuracies of a run, with the cost of key-lock.

    Args:
        blocks: the trainings.
        paper: the published figures.
        whole: whether figures without a training of the run are shown, too.
    """
    ours = _by_place(blocks)
    printed = {(one.training, *one.place): one.accuracy for one in paper.table1}
    rows: Rows = []
    for one in paper.table1:
        cell = {"training": one.training, "model": one.model, "dataset": f"{one.dataset}, {one.resolution}"}
        own = ours.get(one.place, ())
        for settings, arms in own or ([("not in this run", ())] if whole else []):
            value = {"this run": per_cent(*interval(arms)), "paper's convention": _mean_as_paper(arms)}
            blank = {"this run": "", "paper's convention": ""}
            listed = {"key-lock": one.keylock, "paper": one.accuracy}
            rows.append(cell | listed | (value if arms else blank) | {"settings": settings})
        undefended = printed.get((one.training, *one.place[:-1], "without"))
        if one.keylock == "with" and undefended is not None and (own or whole):
            points = f"{float(undefended) - float(one.accuracy):+.2f}".replace("-", "−")
            costs = [cost for block in blocks if (cost := _cost_at(block, one.place)) is not None]
            listed = {"key-lock": "cost, points (without − with)", "paper": points}
            rows.append(cell | listed | {"this run": ", ".join(_percent(cost, sign=True) for cost in costs)})
    return rows


def beside_table3(blocks: Sequence[Block], paper: Published, whole: bool = False) -> Rows:
    """Return the figures of the paper's table 3, by the key in use, beside those of a run (see ``beside_table1``)."""
    ours = _by_place(blocks)
    rows: Rows = []
    for one in paper.table3:
        cell = {"model": one.model, "dataset": f"{one.dataset}, {one.resolution}"}
        lock = {"lock, % of parameters": one.parameter_proportion_percent}
        for settings, arms in ours.get(one.place, ()) or ([("not in this run", ())] if whole else []):
            for key, kind in _RANDOM.items() if one.key_source == "random" else ((one.key_source, ""),):
                value, spread = _by_key(arms, one.key_source, kind)
                gap = value - _mean(_stolen(arms, PAPER_RANDOM))
                own = {"this run": spread, "gap here": _percent(gap) if arms else "", "settings": settings}
                rows.append(cell | {"key": key, "paper": one.accuracy, "gap": one.gap} | own | lock)
    return rows


def _by_place(blocks: Sequence[Block]) -> dict[tuple[str, ...], list[tuple[str, Sequence[TrainingRecord]]]]:
    """Return by published place the trainings with rounds, and their settings in words."""
    found: dict[tuple[str, ...], list[tuple[str, Sequence[TrainingRecord]]]] = {}
    for block in blocks:
        for defense, own in block.ended.items():
            place = (block.mode, *place_of(own[0].specs, ("model", "dataset")))
            found.setdefault(place, []).append((f"{block.model}, {defense}, {plural(len(own), 'seed')}", own))
    return found


def _cost_at(block: Block, place: tuple[str, ...]) -> float | None:
    """Return the accuracy without a defense minus that with key-lock, of a block at a published place."""
    means = {
        name_of(defense): interval(own).mean
        for defense, own in block.ended.items()
        if (block.mode, *place_of(own[0].specs, ("model", "dataset")))[:-1] == place[:-1]
    }
    return means["none"] - means["keylock"] if {"none", "keylock"} <= set(means) else None


def _stolen(own: Sequence[TrainingRecord], kind: str) -> list[float]:
    """Return the accuracy in [0, 1] of the stolen model with each draw of secrets of a kind."""
    thefts = [theft for one in own for theft in one.outcome.thefts if theft.kind == kind]
    return [correct / theft.count for theft in thefts for correct in theft.correct]


def _by_key(own: Sequence[TrainingRecord], source: str, kind: str) -> tuple[float, str]:
    """Return the accuracy of trainings with the keys of a row of table 3, and in words; NaN and "" without any."""
    if source == "random":
        values = _stolen(own, kind)
    elif source == "average":
        values = [accuracy(one.outcome) for one in own]
    else:  # the paper counts clients from 0, a run from 1
        number = int(source.removeprefix("client "))
        views = [one.outcome.chosen().views for one in own]
        values = [each[number].test.accuracy for each in views if number < len(each)]
    return (_mean(values), _spread(values, ends=source == "random")) if values else (math.nan, "")


def _mean_as_paper(own: Sequence[TrainingRecord]) -> str:
    return _percent(_mean([_as_paper(one.outcome.chosen()) for one in own]))


def odd_averages(paper: Published, places: Collection[tuple[str, ...]]) -> list[str]:
    """Return a clause on each printed average of table 3, at some places, that is far from the mean of its rows."""
    found = []
    for one in paper.table3:
        own = [row for row in paper.table3 if row.place == one.place and row.key_source.startswith("client")]
        rows = mean(float(row.accuracy) for row in own)
        if one.place in places and one.key_source == "average" and abs(rows - float(one.accuracy)) > 0.3:
            found.append(f"{one.accuracy} for {one.model} on {one.dataset} (the mean of its rows is {rows:.2f})")
    return found


def write_comparison(out: Path | str) -> Path:
    """Write ``paper.md``, tables 1 and 3 of the paper beside the trainings in ``out``; return its path."""
    out = Path(out)
    blocks, paper = blocks_of(records(out)), published()
    text = render_markdown(
        "paper_accuracy.md.j2", source=paper.source, published=_comparison(blocks, paper, whole=True)
    )
    return replace(out / "paper.md", text.encode())


def _comparison(blocks: Sequence[Block], paper: Published, whole: bool) -> dict[str, object]:
    """Return what a page shows of the paper beside trainings."""
    return {
        "table1": beside_table1(blocks, paper, whole),
        "table3": beside_table3(blocks, paper, whole),
        "averages": odd_averages(paper, {one.place for one in paper.table3} if whole else set(_by_place(blocks))),
    }


def csv(found: Sequence[TrainingRecord]) -> str:
    """Return every round's numbers: one row a training, round and view."""
    rows = [
        {
            **one.specs,
            "mode": one.recipe["mode"],
            "seed": one.seed,
            "status": one.outcome.status,
            "round": each.number,
            "best": each.number == one.outcome.best,
            "view": view.name,
            "lr": each.rate,
            "train_loss": each.loss,
            "validation_loss": view.validation and view.validation.loss,
            "validation_accuracy": view.validation and view.validation.accuracy,
            "test_loss": view.test.loss,
            "test_accuracy": view.test.accuracy,
            "failed_clients": len(each.failures),
            "untested_clients": len(each.untested),
            "seconds": round(each.seconds, 3),
        }
        for one in found
        for each in one.outcome.rounds
        for view in each.views
    ]
    return str(pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def figure(block: Block) -> Figure:
    """Return the curves of a block: accuracy and loss on the test images, and the training loss, by round."""
    drawn = Figure(figsize=(11.5, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for index, (defense, own) in enumerate(block.arms.items()):
        look: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)],
        }
        for one in (one for one in own if one.outcome.rounds):
            rounds, best = one.outcome.rounds, one.outcome.chosen()
            x = [each.number for each in rounds]
            left.plot(x, [100 * each.accuracy("test") for each in rounds], label=plain(defense), linewidth=1.5, **look)
            left.plot([best.number], [100 * best.accuracy("test")], "o", color=look["color"], markersize=5)
            right.plot(x, [mean(view.test.loss for view in each.views) for each in rounds], linewidth=1.5, **look)
            right.plot(x, [each.loss for each in rounds], linewidth=0.9, alpha=0.45, **look)
    for panel, title in ((left, "test accuracy, %"), (right, "loss: test, and training (pale)")):
        panel.set_xlabel(block.unit)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
    if right.dataLim.y1 > 10 * right.dataLim.y0:
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter(NullFormatter())
    key_below(drawn, left, columns=4 if max(map(len, block.arms)) < 24 else 3)
    drawn.suptitle(plain(block.title), fontsize=11)
    return drawn
