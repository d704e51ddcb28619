"""Recomputes the figures of the READMEs and of the docs on results: ``python -m benchmarks.recheck``.

A paragraph, list item or table with figures is followed by a comment that names where they come from, its *mark*:

    <!-- figures: reports/curves/results.csv; attack=peel
    mean[]: defense=quantise(bits=half) / quantise
    difference: defense=none vs quantise; of=ssim_aligned
    settings: 8 4
    unrecorded: 52; no committed file holds the time
    -->

The first line names a CSV file and conditions (``column=value``) on its rows. They hold for every line of the mark,
unless it has another condition on that column. Every other line belongs to the next figures of the text, in order:

- ``COMPUTATION: conditions`` recomputes them; ``COMPUTATIONS`` has the list. A name is one figure; with ``[]`` behind
  it, also the two ends of its 95 % interval; in brackets, the ends only. In a condition, ``a | b`` is either value,
  ``*`` any text, ``a / b`` a line for each value, and ``a vs b`` the two arms of a difference. ``of`` names the metric
  (``psnr_aligned`` by default).
- ``settings: 8 4`` are figures that were chosen, not measured.
- ``printed: PAGE; TEXT; 0.23`` are figures that only a generated page has, on a line with that text.
- ``unrecorded: 52; WHY`` are figures that no committed file has. They are listed, with the reason.
- ``from FILE; conditions`` replaces the first line for the lines below it.

``<!-- figures: settings -->`` is the mark of a text whose figures were all chosen. Code, headings, link targets, names
such as ResNet-20 and "95 % interval" hold no figures. Any other figure needs a mark, or is in a table that a program
writes between two comments (``TABLES``). A figure is right if it is the recomputed value, rounded once.
"""

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import pandas as pd

from benchmarks.committed import CELL, METRIC, Fault, components, load, metric_of, planned
from benchmarks.readme import filled
from benchmarks.speed import report as speed
from benchmarks.speed.machine import ROOT
from leakbench.analysis.ensemble import RECOVERED, EnsembleResult, ensemble_results
from leakbench.analysis.statistics import UNIT, Difference, holm, paired_difference, share_interval, wilson_interval
from leakbench.analysis.summary import summarise
from leakbench.core.text import plural
from leakbench.plan.matrix import RECOVERY
from leakbench.report.worst_case import ranking

TEXTS = ("README.md", "reports/README.md", "docs/paper.md", "docs/worst-case.md")
TEST_IMAGES = 10_000
"""Test images of MNIST and of CIFAR-10, over which an accuracy has its interval."""
TIE = 1e-9
"""A value this near to the middle of two figures, in parts of itself, may be rounded either way."""
Numbers = tuple[float, ...]
Conditions = tuple[tuple[str, str], ...]
"""Pairs of column and value."""


# The data


@cache
def matching(files: str, conditions: Conditions) -> pd.DataFrame:
    """Return the rows of files that meet every condition, without those of floors unless one is on the attack.

    Raises:
        Fault: there is no such column, or no such row.
    """
    if not conditions:
        return load(files)
    data = matching(files, conditions[:-1])
    column, value = conditions[-1]
    if column not in data:
        raise Fault(f"there is no column {column!r}")
    pattern = "|".join(re.escape(one.strip()).replace(r"\*", ".*") for one in value.split(" | "))
    data = data[data[column].isin([one for one in data[column].unique() if re.fullmatch(pattern, str(one))])]
    if data.empty:
        raise Fault(f"no row has {column}={value} (beside the other conditions)")
    return data


@dataclass(frozen=True)
class Selection:
    """The rows of a file that a line of a mark is about; a condition with ``vs`` has two arms.

    Attributes:
        file: the CSV.
        conditions: by column.
        of: the metric or column.
    """

    file: str
    conditions: Conditions
    of: str = METRIC

    @property
    def rows(self) -> pd.DataFrame:
        """The rows; those of floors only if there is a condition on the attack."""
        rows = matching(self.file, self.conditions)
        return rows if "floor" not in rows or self.on("attack") else rows[~rows["floor"]]

    def on(self, column: str) -> str:
        """Return the condition on a column; empty for none."""
        return dict(self.conditions).get(column, "")

    @property
    def arms(self) -> tuple["Selection", "Selection"]:
        """Both arms of a difference."""
        pairs = [(column, value.split(" vs ")) for column, value in self.conditions]
        if max((len(values) for _, values in pairs), default=1) != 2:
            raise Fault("a difference needs two arms: column=a vs b")
        first, second = (tuple((column, values[place]) for column, values in pairs) for place in (0, -1))
        return replace(self, conditions=first), replace(self, conditions=second)

    @property
    def cells(self) -> list[pd.DataFrame]:
        """The rows of each attack behind each defense; see ``CELL``."""
        return [cell for _, cell in self.rows.groupby(CELL, sort=False)]

    @property
    def values(self) -> pd.Series:
        """The metric by group, image and seed.

        Raises:
            Fault: the rows are those of several cells.
        """
        cells = self.rows[CELL].drop_duplicates()
        if len(cells) > 1:
            raise Fault(f"{len(cells)} cells meet the conditions, such as {tuple(cells.iloc[-1])}")
        return self.rows.set_index(UNIT)[self.of]

    @property
    def summary(self) -> pd.DataFrame:
        """The summary of the rows, a row for each cell."""
        return summarise(self.rows, [metric_of(self.of)])

    def ensemble(self) -> EnsembleResult:
        """Return the result behind the only defense.

        Raises:
            Fault: there are several.
        """
        found = ensembles(self)
        if len(found) > 1:
            raise Fault(f"{len(found)} ensembles meet the conditions, the last behind {found[-1].defense}")
        return found[0]


@cache
def ensembles(chosen: Selection) -> list[EnsembleResult]:
    """Return the result of the selected attackers behind each defense, beside the floors on the same images."""
    everything = load(chosen.file)
    floors = everything[everything["floor"] & everything["dataset"].isin(chosen.rows["dataset"])]
    return ensemble_results(pd.concat([floors, chosen.rows]), RECOVERED)


# The computations


def mean(chosen: Selection) -> Numbers:
    """The mean over images and seeds, with its bootstrap interval."""
    found = chosen.summary
    if len(found) != 1:
        raise Fault(f"{len(found)} cells meet the conditions")
    return tuple(float(found[f"{chosen.of}{part}"].iloc[0]) for part in ("", " low", " high"))


def ssim(chosen: Selection) -> Numbers:
    """The mean of ``ssim_aligned``."""
    return mean(replace(chosen, of=RECOVERY))


def least_mean(chosen: Selection) -> Numbers:
    """The least mean of any cell."""
    return (float(chosen.summary[chosen.of].min()),)


def most_mean(chosen: Selection) -> Numbers:
    """The largest mean of any cell."""
    return (float(chosen.summary[chosen.of].max()),)


def _paired(chosen: Selection) -> Difference:
    first, second = chosen.arms
    return paired_difference(first.values, second.values)


def difference(chosen: Selection) -> Numbers:
    """The paired difference of two arms, the first less the second, with its bootstrap interval."""
    found = _paired(chosen)
    return found.mean, found.low, found.high


def least_difference(chosen: Selection) -> Numbers:
    """The least paired difference of any cell of the first arm and the cell of the second that is like it otherwise."""
    return (min(_differences(chosen)),)


def most_difference(chosen: Selection) -> Numbers:
    """The largest such difference; see ``least_difference``."""
    return (max(_differences(chosen)),)


def _differences(chosen: Selection) -> list[float]:
    first, second = chosen.arms
    alike = [column for column in CELL if " vs " not in chosen.on(column)]
    others = {tuple(cell[alike].iloc[0]): cell for cell in second.cells}
    pairs = [(cell, others.get(tuple(cell[alike].iloc[0]))) for cell in first.cells]
    series = [[one.set_index(UNIT)[chosen.of] for one in pair if one is not None] for pair in pairs]
    found = [paired_difference(*pair).mean for pair in series if len(pair) == 2]
    if not found:
        raise Fault("no two cells of the arms are alike otherwise")
    return found


def p(chosen: Selection) -> Numbers:
    """The p of the paired difference of two arms, uncorrected."""
    return (_paired(chosen).p,)


def holm_p(chosen: Selection) -> Numbers:
    """The p of the paired difference of two arms, corrected over both aligned metrics."""
    other = replace(chosen, of=RECOVERY if chosen.of != RECOVERY else METRIC)
    return (holm([_paired(chosen).p, _paired(other).p])[0],)


def above(chosen: Selection) -> Numbers:
    """The share of images, in per cent, on which the first arm is above each cell of the second, with its interval."""
    first, second = chosen.arms
    images = ["group", "image"]
    own = first.rows.groupby(images)[chosen.of].mean()
    others = pd.concat([cell.groupby(images)[chosen.of].mean() for cell in second.cells], axis=1)
    higher = (own > others.max(axis=1)).astype(float)
    ends = share_interval(higher.to_numpy(), higher.index.get_level_values("group").to_numpy())
    return tuple(100 * value for value in (float(higher.mean()), *ends))


def share(chosen: Selection) -> Numbers:
    """The share of images that the attackers recover, in per cent, with its interval."""
    found = chosen.ensemble()
    return 100 * found.share, 100 * found.low, 100 * found.high


def recovered(chosen: Selection) -> Numbers:
    """The number of images that the attackers recover."""
    found = chosen.ensemble()
    return (found.share * found.images,)


def itself(chosen: Selection) -> Numbers:
    """The number of images whose private image itself is recovered, behind a defense that changes images."""
    found = chosen.ensemble()
    return (found.itself * found.images,)


def images(chosen: Selection) -> Numbers:
    """The number of images of which the attackers' share is."""
    return (float(chosen.ensemble().images),)


def attacked(chosen: Selection) -> Numbers:
    """The number of images that were attacked, with those that a floor recovers."""
    return (float(chosen.rows["image"].nunique()),)


def complete(chosen: Selection) -> Numbers:
    """The number of defenses behind which the attackers recover every image."""
    return (float(sum(one.share == 1 for one in ensembles(chosen))),)


def defenses(chosen: Selection) -> Numbers:
    """The number of defenses."""
    return (float(chosen.rows["defense"].nunique()),)


def minutes(chosen: Selection) -> Numbers:
    """The time of the trials, or of the rounds, added up, in minutes."""
    rows = chosen.rows
    rounds = rows if "trial" in rows else rows.drop_duplicates(["defense", "seed", "round"])
    return (float(rounds["seconds"].sum()) / 60,)


def failed(chosen: Selection) -> Numbers:
    """The number of trials that diverged."""
    return (float((chosen.rows["status"] == "failed").sum()),)


def trials(chosen: Selection) -> Numbers:
    """The number of trials with a result."""
    return (float(len(chosen.rows)),)


def least(chosen: Selection) -> Numbers:
    """The least value of any row in the column ``of``."""
    return (float(chosen.rows[chosen.of].min()),)


def most(chosen: Selection) -> Numbers:
    """The largest value of any row in the column ``of``."""
    return (float(chosen.rows[chosen.of].max()),)


def total(chosen: Selection) -> Numbers:
    """The sum over the rows of the column ``of``."""
    return (float(chosen.rows[chosen.of].sum()),)


def accuracy(chosen: Selection) -> Numbers:
    """The test accuracy of a training in per cent, with its Wilson interval over the test images.

    It is that of the best round, unless ``round`` is stated; the mean over clients, and then over seeds.
    """
    rows = chosen.rows if chosen.on("round") else chosen.rows[chosen.rows["best"]]
    if len(rows[["dataset", "model", "defense", "mode"]].drop_duplicates()) > 1:
        raise Fault("several trainings meet the conditions")
    value = float(rows.groupby("seed")["test_accuracy"].mean().mean())
    return tuple(100 * part for part in (value, *wilson_interval(value, TEST_IMAGES)))


def cost(chosen: Selection) -> Numbers:
    """The accuracy of the first arm less that of the second, in points."""
    first, second = chosen.arms
    return (accuracy(first)[0] - accuracy(second)[0],)


def train_loss(chosen: Selection) -> Numbers:
    """The training loss of a round."""
    return (float(chosen.rows["train_loss"].mean()),)


COMPUTATIONS: Mapping[str, Callable[[Selection], Numbers]] = {
    one.__name__: one
    for one in (
        mean, ssim, least_mean, most_mean, difference, least_difference,
        most_difference, p, holm_p, above, share, recovered, itself, images, attacked, complete,
        defenses, minutes, failed, trials, least, most, total, accuracy, cost, train_loss,
    )
}  # fmt: skip
"""Every computation by its name in a mark; it returns a figure, or a figure and the ends of its interval."""


# The marks

UNCOMPUTED = ("settings:", "unrecorded:", "printed:")
"""What begins a line whose figures are not computed; a mark of such lines needs no file."""


@dataclass(frozen=True)
class Expected:
    """What a mark says of one figure.

    Attributes:
        value: as recomputed; None if it was not.
        line: the line of the mark.
        word: the figure itself, if the mark has it.
        why: the reason why it was not recomputed; empty for one that was, or was chosen.
        page: lines of a page, one of which must have the figure, perhaps with more digits; empty for none.
    """

    value: float | None
    line: str
    word: str = ""
    why: str = ""
    page: tuple[str, ...] = ()


def expected(mark: str) -> Iterator[Expected]:
    """Yield what a mark says of each figure of its text, in their order.

    Raises:
        Fault: a line is malformed, or matches no data.
    """
    lines = [line.strip() for line in mark.splitlines() if line.strip()]
    if not lines:
        raise Fault("the mark is empty; name the file that has the figures")
    file, base = ("", ()) if lines[0].startswith(UNCOMPUTED) else _head(lines.pop(0))
    for line in lines:
        if line.startswith("from "):
            file, base = _head(line.removeprefix("from "))
            continue
        name, colon, rest = line.partition(":")
        if not colon:
            raise Fault(f"{line!r} has no colon; write COMPUTATION: conditions")
        try:
            yield from _line(name.strip(), rest.strip(), file, base, line)
        except Fault as fault:
            raise Fault(f"{line!r}: {fault}") from None


def _head(line: str) -> tuple[str, Conditions]:
    file, _, conditions = line.partition(";")
    return file.strip(), _conditions(conditions)


def _conditions(text: str) -> Conditions:
    pairs = [part.partition("=") for part in text.split(";") if part.strip()]
    for column, equals, _ in pairs:
        if not equals:
            raise Fault(f"{column.strip()!r} is no condition; write column=value")
    return tuple((column.strip(), value.strip()) for column, _, value in pairs)


def _line(name: str, rest: str, file: str, base: Conditions, line: str) -> Iterator[Expected]:
    parts = [part.strip() for part in rest.split(";")]
    if name == "settings":
        yield from (Expected(None, line, word) for word in rest.split())
    elif name == "unrecorded":
        if len(parts) != 2:
            raise Fault("write unrecorded: FIGURES; WHY")
        yield from (Expected(None, line, word, parts[1]) for word in parts[0].split())
    elif name == "printed":
        if len(parts) != 3:
            raise Fault("write printed: PAGE; TEXT OF ITS LINE; FIGURES")
        page = [one for one in _page(parts[0]).splitlines() if parts[1] in one]
        if not page:
            raise Fault(f"no line of {parts[0]} has {parts[1]!r}")
        yield from (Expected(None, line, word, f"only {parts[0]} has it", tuple(page)) for word in parts[2].split())
    else:
        yield from _computed(name, rest, file, base, line)


def _page(file: str) -> str:
    path = ROOT / file
    if not path.is_file():
        raise Fault(f"{file} is no committed page")
    return path.read_text(encoding="utf-8")


def _computed(name: str, rest: str, file: str, base: Conditions, line: str) -> Iterator[Expected]:
    """Yield the figures of a line with computations, for each value of its conditions."""
    own = dict(base) | dict(_conditions(rest))
    of = own.pop("of", METRIC)
    each = [[(column, value.strip()) for value in values.split(" / ")] for column, values in own.items()]
    for conditions in itertools.product(*each):
        chosen = Selection(file, conditions, of)
        for word in name.split():
            bare = word.strip("[]")
            numbers = computed(bare, chosen)
            if "[" in word and len(numbers) == 1:
                raise Fault(f"{bare} has no interval")
            found = numbers[1:] if word.startswith("[") else numbers if word.endswith("[]") else numbers[:1]
            yield from (Expected(value, line) for value in found)


@cache
def computed(name: str, chosen: Selection) -> Numbers:
    """Return what the computation of a name gives for a selection.

    Raises:
        Fault: there is no such computation, or the selection does not suit it.
    """
    if name not in COMPUTATIONS:
        raise Fault(f"the computation {name!r} is unknown; known: {', '.join(COMPUTATIONS)}")
    try:
        return COMPUTATIONS[name](chosen)
    except KeyError as error:
        raise Fault(f"{chosen.file} has no column {error}, and {name} needs it") from None


# The texts

_MARK = re.compile(r"<!-- figures:(.*?)-->", re.DOTALL)
_FIGURE = re.compile(r"(?<![\w./#-])[+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-−]?\d+)?(?!\.?\w|/)")
_NO_FIGURES = re.compile(
    r"<!--(?! figures:).*?-->|^```.*?^```|`[^`\n]*`|\]\([^)]*\)|^#.*?$"  # comments, code, link targets, headings
    r"|\bet al\. \d{4}|\b95 %(?= (?:\w+ )?intervals?\b)"
    r"|\b(?:[Ss]eeds?|[Cc]lients?|images?|tables?) \d+(?: and \d+)*\b(?! images)",
    re.DOTALL | re.MULTILINE,
)
_BREAK = re.compile(r"\n[ \t]*\n|^#.*$", re.MULTILINE)


@dataclass(frozen=True)
class Figure:
    """A figure of a text: where it begins and ends there, and how it is written."""

    start: int
    end: int
    word: str

    @property
    def value(self) -> str:
        """The figure in the form in which figures are compared."""
        return plain(self.word)

    def rounded(self, value: float) -> str:
        """Return a value with as many digits as this figure has, rounded once."""
        mantissa, exponent, _ = plain(self.word).partition("e")
        places = len(mantissa.partition(".")[2])
        return plain(f"{value:.{places}e}" if exponent else f"{value:.{places}f}")


def plain(word: str) -> str:
    """Return a figure without the marks that do not change its value: ``+``, thousands' commas, an exponent's zeros."""
    word = re.sub(r"e([+-]?)0*(?=\d)", r"e\1", word.replace("−", "-").replace("+", "").replace(",", ""))
    return word.removeprefix("-") if float(word) == 0 else word


@dataclass(frozen=True)
class Rechecked:
    """What came of the comparison of a text with the data.

    Attributes:
        faults: a line for each fault: file, line, the figure as stated, the figure as recomputed.
        others: a line for each reason why figures of one line were not recomputed.
        count: how many figures were recomputed.
        text: the text with the recomputed figures in place of wrong ones.
    """

    faults: list[str]
    others: list[str]
    count: int
    text: str


def recheck(name: str, text: str) -> Rechecked:
    """Compare the figures of a Markdown text with the data; ``name`` is that of its file, for messages."""
    faults: list[str] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    right: list[tuple[Figure, float]] = []
    count = 0

    def place(offset: int) -> str:
        return f"{name}:{1 + text.count(chr(10), 0, offset)}"

    for start, end, mark in _marked(text):
        figures = [Figure(*one.span(), one.group()) for one in _FIGURE.finditer(_masked(text), start, end)]
        here = place(figures[0].start if figures else end)
        if mark is None and figures:
            faults.append(f"{here}: {_words(figures)} stated, without a mark")
        if mark is None or mark.strip() == "settings":
            continue
        try:
            known = list(expected(mark))
        except Fault as fault:
            faults.append(f"{here}: {fault}")
            continue
        if len(known) != len(figures):
            faults.append(
                f"{here}: {plural(len(figures), 'figure')} stated ({_words(figures)}), {len(known)} in the mark"
            )
            continue
        for figure, one in zip(figures, known):
            if one.why:
                reasons.setdefault((place(figure.start), one.why), []).append(figure.word)
            if (wrong := _wrong(figure, one)) is not None:
                faults.append(f"{place(figure.start)}: {figure.word} stated, {wrong} ({one.line})")
                right += [] if one.value is None or not math.isfinite(one.value) else [(figure, one.value)]
            count += one.value is not None
    others = [f"{where}: {' '.join(words)}: not recomputable: {why}" for (where, why), words in reasons.items()]
    return Rechecked(faults, others, count, _corrected(text, right))


def _wrong(figure: Figure, one: Expected) -> str | None:
    """Return what the data or the mark have in place of a figure; None if it is right."""
    if one.value is not None:
        right = {figure.rounded(one.value * (1 + side * TIE)) for side in (-1, 1)}
        return None if figure.value in right else f"{one.value:.6g} recomputed"
    if plain(one.word) != figure.value:
        return f"{one.word} in the mark"
    if one.page and not any(_has(line, figure) for line in one.page):
        return "but the page has another figure"
    return None


def _corrected(text: str, right: Sequence[tuple[Figure, float]]) -> str:
    for figure, value in reversed(right):
        word = figure.rounded(value).replace("-", "−")
        sign = "+" if figure.word.startswith("+") and not word.startswith("−") else ""
        text = text[: figure.start] + sign + word + text[figure.end :]
    return text


def _words(figures: Sequence[Figure]) -> str:
    shown = " ".join(figure.word for figure in figures[:12])
    return f"{shown} ..." if len(figures) > 12 else shown


def _has(page: str, figure: Figure) -> bool:
    """Return whether a line of a page has a figure, or one with more digits of which every reading rounds to it."""
    for printed in _FIGURE.finditer(page.replace("-", "−")):
        word = plain(printed.group())
        places = len(word.partition("e")[0].partition(".")[2])
        half = 0.499 * 10.0**-places if "e" not in word else 0.0
        ends = {figure.rounded(float(word) + side * half) for side in (-1, 1)}
        if float(word) == float(figure.value) or ends == {figure.value}:
            return True
    return False


@lru_cache(maxsize=4)
def _masked(text: str) -> str:
    """Return a text of the same length in which all that holds no figures is blank."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found.group())

    for table in TABLES:
        text = re.sub(f"{re.escape(table.begin)}.*?{re.escape(table.end)}", blank, text, flags=re.DOTALL)
    return _MARK.sub(blank, _NO_FIGURES.sub(blank, text))


def _marked(text: str) -> Iterator[tuple[int, int, str | None]]:
    """Yield the start and end of each piece of a text with its mark; None for a piece without one."""
    place = 0
    for mark in [*_MARK.finditer(text), None]:
        end = len(text) if mark is None else mark.start()
        body = len(text[:end].rstrip())
        breaks = [place, *(found.end() for found in _BREAK.finditer(_masked(text), place, body)), end]
        yield from ((first, last, None) for first, last in itertools.pairwise(breaks[: -1 if mark else None]))
        if mark is not None:
            yield breaks[-2], end, mark.group(1)
            place = mark.end()


# The tables that programs write


@dataclass(frozen=True)
class Table:
    """A table that a program writes between two comments of a text.

    Attributes:
        begin: the comment before it; ``end`` is the one behind it.
        block: returns the table, from committed data.
    """

    begin: str
    end: str
    block: Callable[[], str]


def _worst_case() -> str:
    trials = planned(load("reports/worst-case/results.csv"))
    return ranking(trials, components(trials), RECOVERED)


def _speed() -> str:
    return speed.summary(speed.load(ROOT / "reports" / "speed"))


def _claims() -> str:
    from benchmarks.claims import block  # which takes its findings from here

    return block()


CLAIMS = ("<!-- claims: begin, written by python -m benchmarks.recheck --write -->", "<!-- claims: end -->")
BEGIN, END = "<!-- worst case: begin, written by python -m benchmarks.recheck --write -->", "<!-- worst case: end -->"
TABLES = (Table(BEGIN, END, _worst_case), Table(speed.BEGIN, speed.END, _speed), Table(*CLAIMS, _claims))


def rechecked_tables(name: str, text: str) -> tuple[list[str], str]:
    """Return a line for each row of a table that its data do not give, and the text with the right tables."""
    faults = []
    for table in TABLES:
        if table.begin not in text:
            continue
        before, _, rest = text.partition(table.begin)
        block = table.block()
        pairs = itertools.zip_longest(rest.partition(table.end)[0].strip("\n").split("\n"), block.split("\n"))
        faults += [
            f"{name}:{number}: {stated or 'nothing'} stated, {found or 'nothing'} recomputed"
            for number, (stated, found) in enumerate(pairs, before.count("\n") + 2)
            if stated != found
        ]
        text = filled(text, block, table.begin, table.end)
    return faults, text


def main() -> None:
    """Print what is wrong, and exit with 1 if anything is; list what cannot be recomputed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recheck", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--write", action="store_true", help="replace wrong figures and tables by the recomputed ones")
    parser.add_argument("--quiet", action="store_true", help="do not list what cannot be recomputed")
    chosen = parser.parse_args()
    wrong = 0
    for name in TEXTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        tables, right = rechecked_tables(name, text)
        found = recheck(name, text)
        for line in [*found.faults, *tables, *([] if chosen.quiet else found.others)]:
            print(line)
        faults = len(found.faults) + len(tables)
        print(f"{name}: {plural(found.count, 'figure')} recomputed, {plural(faults, 'fault')}")
        wrong += faults
        if chosen.write:
            (ROOT / name).write_text(recheck(name, right).text, encoding="utf-8")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
