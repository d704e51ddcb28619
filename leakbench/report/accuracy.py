"""``accuracy.md``: what defenses cost, from the records of a run's trainings; with curves, and as CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from leakbench.analysis.statistics import wilson_interval
from leakbench.core.text import ABSENT, english, number, slug
from leakbench.errors import BadOption
from leakbench.report import grids
from leakbench.report.compare import Published, published
from leakbench.report.files import replace
from leakbench.report.md import escape, table
from leakbench.training import TrainingRecord, records
from leakbench.training.arm import GLOBAL, Outcome, Round
from leakbench.training.run import ARMS_FOLDER
from leakbench.training.thief import KINDS, ZERO, Theft

FILE = "accuracy.md"
"""The name of the report in a run's folder."""
CSV = "accuracy.csv"
PAPER: dict[str, Any] = {
    "rounds": 200,
    "batch": 64,
    "lr": 0.01,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "milestones": [60, 120, 160],
    "gamma": 0.2,
    "select": "test",
}
"""The recipe that FedKL's code is published with (of a centralised training, epochs stand for rounds)."""
PAPER_BATCH = 64
"""The batch by which FedKL's code divides."""

COLOURS = (*grids.COLOURS, "#000000", "#8c6d31")
"""Those of all figures, black and a brown."""
_DASHES = ("-", "--", "-.", ":")
_CURVES = re.compile(r"curves-\d{2}-.*\.png")


@dataclass(frozen=True)
class Block:
    """The trainings that compare: one dataset, model and recipe.

    Attributes:
        mode: ``centralised`` or ``fedavg``.
        arms: by defense, in the order of the run, one record a seed.
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
    for block in blocks:
        if any(one.outcome.rounds for arms in block.arms.values() for one in arms):
            written.append(replace(out / "curves" / block.file, png(block)))
    written.append(replace(out / FILE, markdown(blocks, published(), out.resolve().name).encode()))
    names = {block.file for block in blocks}
    for path in (out / "curves").glob("*.png"):
        if _CURVES.fullmatch(path.name) and path.name not in names:
            path.unlink()
    return written


def blocks_of(found: Sequence[TrainingRecord]) -> list[Block]:
    """Return the trainings by dataset, model and recipe, defenses in the order of registration of ``none`` first."""
    grouped: dict[tuple[str, str, str], list[TrainingRecord]] = {}
    for one in found:
        recipe = ", ".join(f"{name}={value}" for name, value in one.recipe.items())
        grouped.setdefault((one.specs["dataset"], one.specs["model"], recipe), []).append(one)
    blocks = []
    for index, ((dataset, model, _), own) in enumerate(sorted(grouped.items()), 1):
        arms: dict[str, list[TrainingRecord]] = {}
        for one in sorted(own, key=lambda one: (_rank(one.specs["defense"]), one.seed)):
            arms.setdefault(one.specs["defense"], []).append(one)
        mode = str(own[0].recipe["mode"])
        file = f"curves-{index:02}-{slug((dataset, model, mode))}.png"
        blocks.append(Block(dataset, model, mode, arms, file))
    return blocks


def _rank(defense: str) -> tuple[int, str]:
    """Return what defenses are sorted by: the two controls first."""
    first = {"none": 0, "norm-only": 1}
    return first.get(defense.partition("(")[0], 2), defense


def accuracy(outcome: Outcome) -> float:
    """Return the test accuracy of the best round in [0, 1], the mean over clients with secrets; NaN without rounds."""
    return outcome.chosen().accuracy("test") if outcome.rounds else math.nan


def interval(own: Sequence[TrainingRecord]) -> tuple[float, float, float]:
    """Return the mean test accuracy over seeds in [0, 1], with its 95 % Wilson interval over the test images."""
    values = [accuracy(one.outcome) for one in own if one.outcome.rounds]
    if not values:
        return math.nan, math.nan, math.nan
    count = next(one.outcome for one in own if one.outcome.rounds).chosen().views[0].test.count
    return mean(values), *wilson_interval(mean(values), count)


def _percent(value: float, sign: bool = False) -> str:
    return number(100 * value, 2, sign)


def _spread(values: Sequence[float]) -> str:
    """Return ``mean ± deviation (least to largest)`` in per cent, the mean alone of one value."""
    if len(values) == 1:
        return _percent(values[0])
    return f"{_percent(mean(values))} ± {_percent(stdev(values))} ({_percent(min(values))} to {_percent(max(values))})"


def markdown(blocks: Sequence[Block], paper: Published, name: str) -> str:
    """Return the report; it depends on nothing but its arguments."""
    parts = [f"# What defenses cost: {escape(name)}", _about(blocks), _WORDS]
    for block in blocks:
        parts += [f"## {escape(block.title)}", _recipe(block), _costs(block), _clients(block), _reasons(block)]
        if any(one.outcome.rounds for own in block.arms.values() for one in own):
            parts.append(f"![{escape(block.title)}](curves/{block.file})")
        parts += [_thieves(block), _published(block, paper)]
    return "\n\n".join(part for part in parts if part) + "\n"


_WORDS = """\
**accuracy** is the share of the test images that the network of the best round classifies rightly, in per cent; of a \
defense with secrets, the mean over the clients, each with its own. Brackets are 95 % Wilson intervals over the test \
images (of one training; they say nothing of other seeds). **of seeds** is the mean over seeds, ± their standard \
deviation. **cost** is the accuracy without a defense less that with it, in points; of one client, without a defense \
from the same seed. **paper's convention** divides the \
correct images by the batches of 64, the last one counted as full, as FedKL's code does: lower by 0.48 % of itself on \
10,000 images; it belongs beside the paper's figures alone.

Images are in [0, 1], rounded to 8 bits, and not normalised. Losses are mean cross-entropies; the training loss holds \
what a defense adds to it. In `centralised` mode the defense acts on the gradient of every batch; in `fedavg` mode it \
acts on the update that each client sends after a round (weights before less weights after), and secrets stay with \
their client."""


def _about(blocks: Sequence[Block]) -> str:
    own = [one for block in blocks for arms in block.arms.values() for one in arms]
    sources = {tuple(sorted((key, str(value)) for key, value in one.provenance.items())): one for one in own}
    rows = [["trainings", str(len(own))]]
    seconds = sum(each.seconds for one in own for each in one.outcome.rounds)
    rows.append(["time in rounds", f"{number(seconds / 60, 1)} min"])
    for one in sources.values():
        source = one.provenance
        commit = "no checkout" if source["commit"] is None else f"commit {source['commit'][:12]}"
        dirty = " with uncommitted changes" if source["dirty"] else ""
        packages = ", ".join(f"{key} {value}" for key, value in source["packages"].items())
        rows += [
            ["command", escape(source["command"])],
            ["device", escape(f"{source['device']}, {source['threads']} CPU threads")],
            ["versions", escape(f"leakbench {source['version']} ({commit}{dirty}), Python {source['python']}")],
            ["packages", escape(packages)],
        ]
    return table(["run", ""], rows, left=2)


def _recipe(block: Block) -> str:
    """Return how the block's arms were trained, in words."""
    one = next(iter(block.arms.values()))[0]
    own = one.recipe
    unit = "round" if block.mode == "fedavg" else "epoch"
    size = max(record.outcome.images for arms in block.arms.values() for record in arms)
    parts = [f"{own['rounds']} {unit}s", f"batches of {own['batch']}"]
    if block.mode == "fedavg":
        share = "" if own["fraction"] == 1 else f", a share of {own['fraction']:g} in each round"
        how = "IID" if own["split"] == "iid" else f"{own['shards']} label shards each"
        parts.insert(0, f"{own['clients']} clients ({how}{share})")
        parts.append(f"{own['local_epochs']} local epoch{'s' * (own['local_epochs'] > 1)}")
    nesterov = " (Nesterov)" if own["nesterov"] else ""
    parts.append(f"SGD: lr {own['lr']:g}, momentum {own['momentum']:g}{nesterov}, weight decay {own['weight_decay']:g}")
    if own["milestones"]:
        parts.append(f"lr × {own['gamma']:g} after {english(map(str, own['milestones']))} {unit}s")
    parts.append(f"augmentation: {english(own['augment']) if own['augment'] else 'none'}")
    chosen = {
        "validation": f"best {unit} on {100 * own['validation']:g} % of the training images, held out",
        "test": f"**best {unit} chosen on the test images, as the paper does: the accuracies are optimistic**",
        "last": f"the last {unit}",
    }
    parts.append(chosen[own["select"]])
    return f"{size:,} training images. {'; '.join(parts)}."


def _costs(block: Block) -> str:
    headers = ["defense", "seeds", f"best {'round' if block.mode == 'fedavg' else 'epoch'}", "accuracy", "of seeds"]
    headers += ["cost, points", "test loss", "failed clients", "paper's convention"]
    control = next((interval(own)[0] for defense, own in block.arms.items() if defense == "none"), math.nan)
    rows = []
    for defense, own in block.arms.items():
        ended = [one.outcome for one in own if one.outcome.rounds]
        if not ended:
            rows.append([escape(defense), str(len(own)), own[0].outcome.status, *[ABSENT] * 6])
            continue
        value, low, high = interval(own)
        best = [outcome.chosen() for outcome in ended]
        failed = sum(len(one.failures) + len(one.untested) for outcome in ended for one in outcome.rounds)
        status = "" if all(outcome.status == "ok" for outcome in ended) else " (diverged)"
        several = len(ended) > 1
        rows.append(
            [
                escape(defense) + status,
                str(len(ended)),
                ", ".join(str(one.number) for one in best),
                f"{_percent(value)} [{_percent(low)}, {_percent(high)}]",
                f"{_percent(value)} ± {_percent(stdev(map(accuracy, ended)))}" if several else ABSENT,
                ABSENT if defense == "none" else _percent(control - value, sign=True),
                number(mean(view.test.loss for one in best for view in one.views), 4),
                str(failed),
                _percent(mean(_as_paper(one) for one in best)),
            ]
        )
    return table(headers, rows, left=1)


def _as_paper(one: Round) -> float:
    """Return the accuracy as FedKL's code computes it."""
    return mean(view.test.correct / (PAPER_BATCH * math.ceil(view.test.count / PAPER_BATCH)) for view in one.views)


def _clients(block: Block) -> str:
    controls = {one.seed: accuracy(one.outcome) for one in block.arms.get("none", ())}
    rows = [
        [
            escape(defense),
            str(one.seed),
            view.name,
            _percent(view.test.accuracy),
            _percent(controls.get(one.seed, math.nan) - view.test.accuracy, sign=True),
            number(view.test.loss, 4),
        ]
        for defense, own in block.arms.items()
        for one in own
        if one.outcome.rounds
        for view in one.outcome.chosen().views
        if view.name != GLOBAL
    ]
    if not rows:
        return ""
    return "Each client with its own secrets, on all test images:\n\n" + table(
        ["defense", "seed", "client", "accuracy", "cost, points", "test loss"], rows, left=3
    )


def _reasons(block: Block) -> str:
    lines = []
    for defense, own in block.arms.items():
        for one in own:
            if one.outcome.reason:
                lines.append(
                    f"- {escape(defense)}, seed {one.seed}: {one.outcome.status}: {escape(one.outcome.reason)}"
                )
            rounds = one.outcome.rounds
            told = {
                "failed to train and had no part in the average": [text for each in rounds for text in each.failures],
                "could not test the model, so that the round's accuracy is that of the others, and the round was not "
                "chosen where another one could be": [text for each in rounds for text in each.untested],
            }
            for words, failures in told.items():
                if failures:
                    times = "once" if len(failures) == 1 else f"{len(failures)} times"
                    lines.append(
                        f"- {escape(defense)}, seed {one.seed}: {times} a client {words}; first: {escape(failures[0])}"
                    )
    return "\n".join(lines)


def _thieves(block: Block) -> str:
    rows = []
    for defense, own in block.arms.items():
        kinds = [theft.kind for one in own for theft in one.outcome.thefts]
        for kind in dict.fromkeys(kinds):
            values = [
                correct / theft.count
                for one in own
                for theft in one.outcome.thefts
                if theft.kind == kind
                for correct in _different(theft)
            ]
            rows.append([escape(defense), escape(kind), escape(KINDS[kind]), str(len(values)), _spread(values)])
    if not rows:
        return ""
    words = (
        "What the global model of the best round is worth with other secrets, on the test images, in per cent: mean ± "
        "standard deviation over draws (least to largest). Guessing is worth one class in so many. The global model "
        "is the same for all clients, so that who uses a client's key and lock does not matter: of these there is one "
        "figure a client and seed, and more need more seeds or clients. Pairs are all ordered pairs of clients. Where "
        "the key makes no difference to a zero lock, its draws count once a seed."
    )
    return f"{words}\n\n" + table(["defense", "secrets", "what it is", "n", "accuracy"], rows, left=3)


def _different(theft: Theft) -> tuple[int, ...]:
    """Return the correct images of each draw; one alone of a zero lock to which the key makes no difference."""
    return theft.correct[:1] if theft.kind == ZERO and len(set(theft.correct)) == 1 else theft.correct


def _published(block: Block, paper: Published) -> str:
    """Return the paper's figures beside ours; a figure that was not transcribed is missing."""
    model, dataset = block.model.partition("(")[0], block.dataset.partition("(")[0]
    rows = []
    for defense, own in block.arms.items():
        if defense.partition("(")[0] not in ("none", "keylock"):
            continue
        fits = [
            one
            for one in paper.accuracy
            if (one.mode, one.model, one.dataset, one.defense)
            == (block.mode, model, dataset, defense.partition("(")[0])
        ]
        ended = [one.outcome for one in own if one.outcome.rounds]
        if not ended:
            continue
        ours = mean(accuracy(one) for one in ended)
        paper_ours = mean(_as_paper(one.chosen()) for one in ended)
        stolen = [
            correct / theft.count
            for each in ended
            for theft in each.thefts
            if theft.kind == "fresh key, initial lock"
            for correct in theft.correct
        ]
        for one in fits:
            if one.of == "random key":
                cells = [_percent(mean(stolen)) if stolen else ABSENT, ABSENT]
            else:
                cells = [_percent(ours), _percent(paper_ours)]
            rows.append([one.table, escape(defense), escape(one.of), f"{one.percent:.2f}", *cells])
        if not fits:
            rows.append([ABSENT, escape(defense), "not transcribed", ABSENT, _percent(ours), _percent(paper_ours)])
    if not rows:
        return ""
    headers = ["table", "defense", "of", "paper", "ours", "ours, paper's convention"]
    return f"Beside {escape(paper.source)}, in per cent. {_otherwise(block)}\n\n" + table(headers, rows, left=3)


def _otherwise(block: Block) -> str:
    """Return in which of the options that the paper publishes its recipe differs, in words."""
    own = next(iter(block.arms.values()))[0].recipe
    others = [
        f"{name} {_plain(value)} (here {_plain(own[name])})" for name, value in PAPER.items() if own[name] != value
    ]
    recipe = (
        f"Its recipe is another: {english(others)}" if others else "Its recipe is this one as far as it is published"
    )
    return (
        f"{recipe}. Its networks differ in more than the defense (normalisation, shortcuts, pooling), and the options "
        "of models and defenses for each cell are not published: what differs between these figures is no measure of "
        "the defense."
    )


def _plain(value: object) -> str:
    """Return the value of an option in words."""
    if isinstance(value, list):
        return english(map(str, value)) if value else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def csv(found: Sequence[TrainingRecord]) -> str:
    """Return every round's numbers: one row a training, round and view."""
    rows = []
    for one in found:
        for each in one.outcome.rounds:
            for view in each.views:
                held = view.validation
                rows.append(
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
                        "validation_loss": None if held is None else held.loss,
                        "validation_accuracy": None if held is None else held.accuracy,
                        "test_loss": view.test.loss,
                        "test_accuracy": view.test.accuracy,
                        "failed_clients": len(each.failures),
                        "untested_clients": len(each.untested),
                        "seconds": round(each.seconds, 3),
                    }
                )
    return str(pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def png(block: Block) -> bytes:
    """Return the curves of a block as a PNG: accuracy and loss on the test images, and the training loss, by round."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for index, (defense, own) in enumerate(block.arms.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = _DASHES[index // len(COLOURS) % len(_DASHES)]
        for first, one in enumerate(own):
            rounds = one.outcome.rounds
            if not rounds:
                continue
            x = [each.number for each in rounds]
            style = {"color": colour, "linestyle": dash, "linewidth": 1.5}
            label = grids.plain(defense) if first == 0 else None
            left.plot(x, [100 * each.accuracy("test") for each in rounds], label=label, **style)
            losses = [mean(view.test.loss for view in each.views) for each in rounds]
            right.plot(x, losses, **style)
            right.plot(x, [each.loss for each in rounds], color=colour, linestyle=dash, linewidth=0.9, alpha=0.45)
            best = one.outcome.chosen()
            left.plot([best.number], [100 * best.accuracy("test")], "o", color=colour, markersize=5)
    unit = "round" if block.mode == "fedavg" else "epoch"
    for panel, title in ((left, "test accuracy, %"), (right, "loss: test, and training (pale)")):
        panel.set_xlabel(unit)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
    if right.dataLim.y1 > 10 * right.dataLim.y0:
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = left.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if longest < 24 else 3, fontsize=9)
    figure.suptitle(grids.plain(block.title), fontsize=11)
    stream = BytesIO()
    canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()
