"""The claims of the FedKL paper beside the committed results; the verdicts follow rules, and nobody writes them.

``docs/paper.md`` has the table, which ``python -m benchmarks.recheck --write`` writes. A share of images is that of
those that at least one of the named attackers recovers (SSIM after alignment of at least 0.6, better than every floor).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
from scipy.stats import norm, t

from benchmarks.recheck import TEST_IMAGES, Selection, accuracy, cost, ensembles
from benchmarks.speed.machine import ROOT
from leakbench.analysis.ensemble import EnsembleResult
from leakbench.core.text import name_of, number
from leakbench.report.compare import Published, published
from leakbench.report.display import to_markdown
from leakbench.training.thief import INITIAL, PAPER_RANDOM

HOLDS, FAILS, OPEN = "holds", "does not hold", "not shown"
RELIABLE = 0.05
"""An attacker recovers images if the lower end of the share's interval is above this."""
MINOR = 2.0
"""Points of accuracy: the largest cost that is called minor."""
NETWORKS = 3
"""The fewest networks that show a trend."""


@dataclass(frozen=True)
class Finding:
    """What committed results say of a claim.

    Attributes:
        verdict: ``HOLDS``, ``FAILS`` or ``OPEN``.
        words: the figures, with 95 % intervals and numbers of images, draws or networks.
    """

    verdict: str
    words: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        words: one sentence.
        section: where the paper makes it.
        printed: the paper's figures.
        found: returns the finding.
        command: repeats the run.
    """

    words: str
    section: str
    printed: str
    found: Callable[[], Finding]
    command: str


# The rules


def combined(verdicts: Sequence[str]) -> str:
    """Return the verdict over several datasets or networks: all must hold, and one that does not hold decides."""
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else OPEN


def stopped(behind: EnsembleResult, undefended: EnsembleResult) -> str:
    """Return the verdict on the claim that something stops an attack.

    It does not hold if the attack recovers images (``RELIABLE``). It holds if the interval of the recovered share lies
    below that without a defense: so nothing is shown of an attack that recovers little from an undefended client.
    """
    if behind.low > RELIABLE:
        return FAILS
    return HOLDS if behind.high < undefended.low else OPEN


def more(first: EnsembleResult, second: EnsembleResult) -> bool:
    """Return whether the interval of one share lies above that of another."""
    return first.low > second.high


def recovers(share: EnsembleResult, full_budget: bool) -> str:
    """Return the verdict on the claim that an attack recovers: most images, or not even half with the full budget."""
    return HOLDS if share.low > 0.5 else FAILS if share.high < 0.5 and full_budget else OPEN


def kept(high: float, low: float) -> str:
    """Return the verdict on the claim that the cost is minor, from the ends of its interval in points."""
    return HOLDS if high <= MINOR else FAILS if low > MINOR else OPEN


def useless(low: float, high: float, guessing: float) -> str:
    """Return the verdict on the claim that a model is useless: as accurate as guessing, or twice that at most."""
    return HOLDS if high <= 2 * guessing else FAILS if low > 2 * guessing else OPEN


# The findings


def shares(file: str, conditions: str, datasets: Sequence[str]) -> list[EnsembleResult]:
    """Return the recovered share of each dataset; a condition is ``column=value``, separated by ``;``."""
    pairs = tuple(tuple(part.strip().split("=", 1)) for part in conditions.split(";"))
    found = ensembles(Selection(file, pairs))  # type: ignore[arg-type]
    by_dataset = {name_of(one.dataset): one for one in found}
    return [by_dataset[name] for name in datasets]


def words(one: EnsembleResult) -> str:
    """Return a share as ``7 of 8 [53, 98]``, in images and per cent, or as ``99 % of 32`` if seeds differ."""
    count = one.share * one.images
    shown = f"{count:.0f}" if abs(count - round(count)) < 1e-9 else f"{100 * one.share:.0f} %"
    return f"{shown} of {one.images} [{100 * one.low:.0f}, {100 * one.high:.0f}]"


LABELS = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


def stops(file: str, attack: str, behind: str, datasets: Sequence[str] = ("mnist", "cifar10")) -> Finding:
    """Return whether a defense stops an attack that knows neither key nor lock, or the lock's weights."""
    rows = f"attack={attack}; threat=T0 | T1 | paper"
    defended = shares(file, f"{rows}; defense={behind}", datasets)
    control = shares(file, f"{rows}; defense=none", datasets)
    parts = [
        f"{LABELS[name]}: {words(one)} recovered, {words(other)} undefended"
        for name, one, other in zip(datasets, defended, control)
    ]
    return Finding(combined([stopped(*pair) for pair in zip(defended, control)]), "; ".join(parts))


def ggl_is_stopped() -> Finding:
    """GGL on MNIST at the scale of table 6, and on CIFAR-10 with twice its evaluations."""
    found = [stops(TABLE6, "ggl(*)", "keylock*", ["mnist"]), stops(GGL, "ggl(budget=2000)", "keylock", ["cifar10"])]
    return Finding(combined([one.verdict for one in found]), "; ".join(one.words for one in found))


def dlg_fails_behind_normalisation() -> Finding:
    """DLG on LeNet with key-lock's normalisation and no lock."""
    found = stops(TABLE6, "dlg(*)", "norm-only")
    return Finding(found.verdict, f"LeNet with key-lock's normalisation only; {found.words}")


def grnn_recovers() -> Finding:
    """GRNN on ResNet-20, with a tenth of the paper's steps."""
    names = ("mnist", "cifar10")
    found = shares(GRNN_RESNET, "attack=grnn(*); defense=none; threat=T1", names)
    parts = [f"{LABELS[name]}: {words(one)}" for name, one in zip(names, found)]
    verdict = combined([recovers(one, full_budget=False) for one in found])
    return Finding(verdict, f"2,000 steps in place of 20,000: {'; '.join(parts)}")


def not_run() -> Finding:
    """A claim on a network for which no run is committed."""
    return Finding(OPEN, "not run: it needs a GPU")


def lock_is_safe() -> Finding:
    """Whether more images are recovered if the lock's weights and gradients are shared than if nothing is."""
    gains, text = _shared("reveals=lock, informed=true", "T0", "with nothing shared")
    return Finding(FAILS if any(gains) else OPEN, text)


def key_matters() -> Finding:
    """Whether more images are recovered with the key; the attackers of both arms have the lock's weights."""
    gains, text = _shared("T3", "T1", "without the key")
    return Finding(HOLDS if all(gains) else OPEN, f"{text}; all with the lock's weights")


def _shared(given: str, control: str, title: str) -> tuple[list[bool], str]:
    """Return for each dataset whether more is recovered under one threat model than under another, and the figures.

    Args:
        given: a threat model.
        control: the other one.
        title: the other one in words.
    """
    names = ("mnist", "cifar10")
    both = [shares(SHARING, f"defense=keylock; threat={threat}", names) for threat in (given, control)]
    parts = [f"{LABELS[name]}: {words(first)}, {title} {words(second)}" for name, first, second in zip(names, *both)]
    return [more(*pair) for pair in zip(*both)], "; ".join(parts)


def infeasible() -> Finding:
    """Whether any attacker without key and lock recovers images behind key-lock."""
    (found,) = shares(ADAPTIVE, "model=lenet; defense=keylock; threat=paper | informed=*", ["cifar10"])
    return Finding(FAILS if found.low > RELIABLE else OPEN, f"CIFAR-10, LeNet before training: {words(found)}")


def accuracy_is_kept() -> Finding:
    """The cost of key-lock, with an interval over the test images."""
    parts, verdicts = [], []
    for file, title in (
        (TABLE3, "LeNet, MNIST, federated, 24 rounds, 2 seeds"),
        (TABLE1, "ResNet-20, CIFAR-10, centralised, 6 epochs, 1 seed"),
    ):
        arms = [Selection(file, (("defense", spec),)) for spec in ("none", "keylock*")]
        value = cost(Selection(file, (("defense", "none vs keylock*"),)))[0]
        variance = sum(share * (1 - share) for share in (accuracy(arm)[0] / 100 for arm in arms)) / TEST_IMAGES
        half = 100 * float(norm.ppf(0.975)) * math.sqrt(variance)
        verdicts.append(kept(value + half, value - half))
        low, high = number(value - half, 2), number(value + half, 2)
        parts.append(f"{title}: {number(value, 2)} points [{low}, {high}]")
    return Finding(combined(verdicts), "; ".join(parts))


def stolen(page: str, kind: str) -> tuple[float, float, float, int]:
    """Return a thief's accuracy in per cent, its 95 % interval over draws, and how many there are, from a page."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith("| keylock") and f"| {kind} " in line and " ± " in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    value, deviation = map(float, re.findall(r"[\d.]+", cells[-1])[:2])
    count = int(cells[-2])
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return value, value - half, value + half, count


THIEVES = (("LeNet, MNIST", "reports/table3/accuracy.md"), ("ResNet-20, CIFAR-10", "reports/table1/accuracy.md"))


def thief(kind: str) -> Finding:
    """The accuracy of the global model for a thief with secrets of a kind; guessing has 10 %."""
    found = [(title, stolen(page, kind)) for title, page in THIEVES]
    parts = [f"{title}: {one[0]:.1f} % [{one[1]:.1f}, {one[2]:.1f}], n = {one[3]}" for title, one in found]
    return Finding(combined([useless(one[1], one[2], 10) for _, one in found]), "; ".join(parts))


def gap_grows_with_the_share() -> Finding:
    """The gap between own and random secrets, by the lock's share of the parameters, from own rows."""
    gaps, parts = [], []
    for (title, page), file, share in zip(THIEVES, (TABLE3, TABLE1), SHARES):
        own = accuracy(Selection(file, (("defense", "keylock*"),)))[0]
        value, low, high, count = stolen(page, PAPER_RANDOM)
        gaps.append(own - value)
        parts.append(f"{title} ({share} %): {own - value:.0f} points [{own - high:.0f}, {own - low:.0f}], n = {count}")
    verdict = OPEN if len(gaps) < NETWORKS else HOLDS if gaps == sorted(gaps, reverse=True) else FAILS
    return Finding(verdict, f"{'; '.join(parts)}; {len(gaps)} networks, too few for a trend")


TABLE1, TABLE3 = "reports/table1/accuracy.csv", "reports/table3/accuracy.csv"
TABLE6, SHARING = "reports/table6/results.csv", "reports/sharing/results.csv"
GRNN_RESNET = "reports/grnn-resnet20/results.csv"
GRNN, GGL, ADAPTIVE = "reports/grnn/results.csv", "reports/ggl/results.csv", "reports/adaptive-cifar10/results.csv"
SHARES = ("60.9", "10.7")
"""The lock's share of the parameters of LeNet and ResNet-20 with 10 classes, in per cent; a test counts them."""


def claims(paper: Published) -> list[Claim]:
    """Return the claims in the order of the table."""

    def ssim(attack: str, model: str, dataset: str) -> str:
        rows = [one for one in paper.table6 if (one.attack, one.model, one.dataset) == (attack, model, dataset)]
        values = {one.keylock: one.ssim.replace("-", "−") for one in rows}
        return f"{values['without']}, with key-lock {values['with']} ({LABELS.get(dataset, 'ImageNet')})"

    def bare(attack: str, model: str, dataset: str) -> str:
        return ssim(attack, model, dataset).partition(",")[0]

    accuracies = {
        (*one.place[:3], one.keylock): float(one.accuracy) for one in paper.table1 if one.training != "reference"
    }
    costs = [
        accuracies[*place, "without"] - accuracies[*place, "with"]
        for place in (
            ("fedavg", "lenet", "mnist"),
            ("centralised", "resnet20", "cifar10"),
            ("fedavg", "resnet20", "cifar10"),
        )
    ]
    rows = {(one.model, one.dataset, one.key_source): one for one in paper.table3}
    random = {model: rows[model, "cifar10", "random"].accuracy for model in ("resnet20", "vgg16")}
    average = [rows["lenet", "mnist", "average"]]
    average += [rows[model, "cifar10", "average"] for model in ("resnet20", "resnet32", "vgg16")]
    gaps = ", ".join(f"{one.gap} at {one.parameter_proportion_percent} %" for one in average)
    table6, sharing = "leakbench run paper --table 6 --scale cpu", "leakbench run sharing --scale cpu"
    resnet = "leakbench run matrix benchmarks/table6.toml --scale grnn"
    grnn = "leakbench run matrix --attack 'grnn(steps=2000)' --defense none --defense keylock --model lenet"
    trained = "leakbench run accuracy benchmarks/table3.toml --scale wide; leakbench run paper --table 1 --scale cpu"
    return [
        Claim(
            "DLG fails on networks with normalisation.", "4.3", "failed on every ResNet (table 4)",
            dlg_fails_behind_normalisation, table6,
        ),
        Claim(
            "GRNN recovers images from ResNet-20.", "4.3", f"SSIM {bare('grnn', 'resnet20', 'cifar10')} (CIFAR-10)",
            grnn_recovers, resnet,
        ),
        Claim(
            "GRNN recovers images from ResNet-18.", "4.3", f"SSIM {bare('grnn', 'resnet18', 'cifar10')} (CIFAR-10)",
            not_run, "leakbench run paper --table 6 --scale full --device cuda",
        ),
        Claim(
            "Key-lock stops DLG.", "4.3", f"SSIM {ssim('dlg', 'lenet', 'cifar10')}",
            lambda: stops(TABLE6, "dlg(*)", "keylock*"), table6,
        ),
        Claim(
            "Key-lock stops GRNN on LeNet.", "4.3", f"SSIM {ssim('grnn', 'lenet', 'cifar10')}",
            lambda: stops(GRNN, "grnn(*)", "keylock"), f"{grnn} --dataset mnist --dataset cifar10 --images 8",
        ),
        Claim(
            "Key-lock stops GRNN on ResNet-20 (an attacker with the lock's weights, T1).", "4.3",
            f"SSIM {ssim('grnn', 'resnet20', 'cifar10')}",
            lambda: stops(GRNN_RESNET, "grnn(*)", "keylock(*"), resnet,
        ),
        Claim(
            "Key-lock stops GGL.", "4.3", f"SSIM {ssim('ggl', 'resnet18', 'imagenet')}",
            ggl_is_stopped,
            f"{table6}; leakbench run matrix --attack 'ggl(budget=2000)' --defense none --defense keylock "
            "--model lenet --dataset cifar10 --images 16",
        ),
        Claim(
            "Without key and lock, no attack can rebuild the image.", "abstract", "no figure", infeasible,
            "leakbench run matrix benchmarks/adaptive.toml",
        ),
        Claim("Sharing the lock's gradient is safe.", "4.4", "pictures (table 7)", lock_is_safe, sharing),
        Claim(
            "Sharing the key is what lets these attacks succeed.", "4.4", "pictures (table 7)", key_matters, sharing
        ),
        Claim(
            "The accuracy is kept.", "4.2",
            f"cost {costs[0]:.2f} points (LeNet, federated), {costs[1]:.2f} (ResNet-20, CIFAR-10, centralised), "
            f"at most {costs[2]:.2f} (the same, federated)",
            accuracy_is_kept, trained,
        ),
        Claim(
            "The global model is useless without the key (a random key and a fresh lock).", "4.2",
            f"{rows['lenet', 'mnist', 'random'].accuracy} % (LeNet); on CIFAR-10 {random['resnet20']} % (ResNet-20) "
            f"and {random['vgg16']} % (VGG-16)",
            lambda: thief(PAPER_RANDOM), trained,
        ),
        Claim(
            "The same, if the random lock is the one that training began with.", "4.2", "the same figures",
            lambda: thief(INITIAL), trained,
        ),
        Claim(
            "The larger the lock's share of the parameters, the more a model without its secrets loses.", "4.2",
            f"gap in points by share: {gaps} (table 3: LeNet; CIFAR-10)", gap_grows_with_the_share, trained,
        ),
    ]  # fmt: skip


def block() -> str:
    """Return the table of claims, in Markdown."""
    rows = []
    for claim in claims(published()):
        found = claim.found()
        rows.append(
            {
                "claim": f"{claim.words} ({claim.section})",
                "the paper": claim.printed,
                "here": found.words,
                "verdict": found.verdict,
                "command": claim.command,
            }
        )
    table = to_markdown(pd.DataFrame(rows, dtype=str), 5)
    for command in {one.command for one in claims(published())}:
        table = table.replace(f"| {command} ", f"| `{command}` ")
    return table
