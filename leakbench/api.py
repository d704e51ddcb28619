"""leakbench from Python: ``run`` a matrix; ``observe``, ``attack``, ``show``, ``keylock`` for one's own network."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

from leakbench import attacks, defenses
from leakbench.attacks import Attack
from leakbench.core.malloc import keep_freed_memory
from leakbench.core.rng import Rng, check_salt, new_salt, salted
from leakbench.core.text import plural
from leakbench.core.types import Reconstruction, ThreatModel
from leakbench.defenses import Defense
from leakbench.defenses.keylock import LockGate, locks
from leakbench.engine import run as engine
from leakbench.engine.progress import NullProgress
from leakbench.engine.run import RunOptions
from leakbench.errors import BadOption, LeakbenchError, one_line
from leakbench.gradients import full_precision
from leakbench.gradients.evaluate import tensors_of, working
from leakbench.models import OwnModule
from leakbench.models.surgery import Layers
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix, parse_threat
from leakbench.store.frames import ended
from leakbench.store.run_file import FILE, Store
from leakbench.victim import Client, build, check_reveals, groups_of
from leakbench.victim import observe as observe_clients

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Run:
    """A run on disk: everything else is read from its file.

    A notebook shows it as its heat map and the share of images recovered behind each defense. The figures of ``plot``
    and ``grid`` are Matplotlib's; a notebook shows them, and ``savefig(PATH)`` writes them.

    Attributes:
        out: the folder that holds ``run.sqlite``, and the report once it is written.
    """

    out: Path

    def __init__(self, out: str | Path) -> None:
        object.__setattr__(self, "out", Path(out))

    def __repr__(self) -> str:
        """Return the folder, and how many of the planned trials are finished."""
        try:
            with Store.open(self.out / FILE, readonly=True) as store:
                counts = f"{len(store.done()):,} of {plural(len(store.planned()), 'trial')} finished"
        except LeakbenchError as error:
            counts = str(error)
        return f"Run({str(self.out)!r}: {counts})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the heat map, and what is recovered behind each defense, all in one."""
        from leakbench.report import notebook  # plotting and templates are loaded only by who asks for a page

        return notebook.run_html(self.out)

    def results(self) -> pd.DataFrame:
        """Return one row per finished trial: what it was, how it ended, every metric."""
        with Store.open(self.out / FILE, readonly=True) as store:
            controls = ended(store.controls())
            return pd.concat([store.results(), controls], ignore_index=True) if len(controls) else store.results()

    def summary(self) -> pd.DataFrame:
        """Return one row per cell: counts, and each metric's mean, interval and gain over the best floor."""
        from leakbench.analysis.summary import summarise  # scipy.stats takes a second
        from leakbench.metrics import NOT_LEAKAGE

        with Store.open(self.out / FILE, readonly=True) as store:
            return summarise(store.results(), [one for one in store.metrics() if one.name not in NOT_LEAKAGE])

    def tables(self) -> list[Table]:
        """Return the summary as compact rich tables, one for each dataset, model and threat model."""
        from leakbench.report import console_table

        return console_table(self.summary())

    def plot(self, chart: str = "heatmap", *, dataset: str = "", model: str = "", threat: str = "") -> "Figure":
        """Return one chart of the run as a figure.

        Args:
            chart: ``heatmap`` (attackers x defenses), ``recovery`` (images recovered by any attacker, with intervals),
                ``ssim`` or ``psnr`` (the best score of each image), ``threshold``, ``evaluations``, ``curves`` (against
                noise or precision), ``objective`` (how it falls), ``utility`` (against leakage).
            dataset: which one, by its spec, or by its name without options; a run of one needs none. So for ``model``;
                ``threat`` is for ``curves`` and ``objective``, which are of one threat model.

        Raises:
            BadOption: there is no such chart, the run has none, or it has several and none is chosen.
            ForeignRun: there is no readable run file.
        """
        from leakbench.report import notebook

        return notebook.plot(self.out, chart, dataset, model, threat)

    def grid(
        self,
        *,
        dataset: str = "",
        model: str = "",
        threat: str = "",
        seed: int | None = None,
        attacks: Sequence[str] = (),
        defenses: Sequence[str] = (),
        images: int = 12,
        page: int = 1,
    ) -> "Figure":
        """Return the private images beside the reconstructions, as in ``report.md``: a row an image.

        Args:
            dataset: which one, by its spec, or by its name without options; a run of one needs none. So for ``model``
                and ``threat``.
            seed: the first by default.
            attacks: which columns, by spec or name; all by default. So for ``defenses``; floors are of every defense.
            images: how many are shown: the first ones.
            page: of a grid that is wider than one page, from 1.

        Raises:
            BadOption: nothing of the run fits, or several datasets, models or threat models do.
            ForeignRun: there is no readable run file.
        """
        from leakbench.report import notebook

        return notebook.grid(self.out, dataset, model, threat, seed, attacks, defenses, images, page)

    def report(self, formats: Iterable[str] = ("md", "csv")) -> list[Path]:
        """Write the report next to the run file, and return the paths written."""
        from leakbench import report

        return report.write(self.out, set(formats))


def run(
    matrix: Matrix,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    chunk: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    time_limit: float | None = None,
    shard: str = "",
    executor: str = "local",
    ray_address: str = "",
    gpus_per_worker: float | None = None,
    salt: str | None = None,
    progress: NullProgress | None = None,
    command: str = "",
    log: Sequence[str] = (),
) -> Run:
    """Run every trial of a matrix that has no result yet, and return the run.

    Args:
        matrix: what to run.
        out: the run's folder, ``runs/NAME`` by default; an existing run in it is resumed.
        device: this and the options up to ``salt`` are those of ``leakbench.engine.run.RunOptions``.
        progress: what reports the progress; nothing by default.
        command: the command line, for the provenance.
        log: experiment trackers that the run is logged to while it runs: ``wandb``, ``tensorboard`` or ``mlflow``. The
            report is then written too, since its pages and pictures are logged.

    Raises:
        LeakbenchError: one line that says what is wrong; nothing was written.
    """
    options = RunOptions(
        device, chunk, strict, workers, time_limit, shard, executor, ray_address, gpus_per_worker, salt
    )
    if not log:
        return Run(engine.run(matrix, out, options, progress=progress, command=command))
    from leakbench.trackers import tracked  # reports are loaded only by who asks for one

    folder = Path(out) if out is not None else Path("runs") / matrix.name
    with tracked(log, folder) as tracking:
        told = tracking.display(progress or NullProgress())
        own = Run(engine.run(matrix, folder, options, progress=told, command=command))
        tracking.finish(own.report())
    return own


def observe(
    model: nn.Module,
    images: Tensor | NDArray[Any] | Sequence[Any],
    labels: Tensor | NDArray[Any] | Sequence[Any],
    *,
    defense: str | Defense = "none",
    threat: str | ThreatModel = "paper",
    num_classes: int | None = None,
    mean_image: Tensor | None = None,
    seed: int = 0,
    salt: str | None = None,
    device: torch.device | str = "cpu",
) -> Observation:
    """Run one client step for each image, each a batch of one, and return what a server may see of them.

    Args:
        model: maps images [B, C, H, W] in [0, 1] to logits [B, K]; used in its mode, with its weights, and not changed.
        images: [T, C, H, W] in [0, 1], the private images; a tensor, an array, or a list of either.
        labels: [T] whole numbers, or class probabilities [T, K].
        defense: what every client does.
        threat: what the attacker is granted.
        num_classes: K; by default the size of the model's output.
        mean_image: [C, H, W] in [0, 1], public knowledge of what images look like; grey by default.
        seed: what the clients' own draws come from, with the salt.
        salt: 32 hex digits; random by default, so that no attack can repeat the clients' draws. With the same seed and
            salt, clients draw the same.
        device: where the observation's tensors go.

    Raises:
        BadOption: shapes or ranges are not valid.
        Unsupported: model and defense do not go together.
    """
    images, labels = _tensor(images, "images"), _tensor(labels, "labels")
    soft = labels.ndim == 2 and labels.shape[1] > 1
    if images.ndim != 4 or not (labels.ndim == 1 or soft) or len(labels) != len(images):
        raise BadOption(f"images {tuple(images.shape)} and labels {tuple(labels.shape)}; give [T, C, H, W] and [T]")
    if len(images) == 0:
        raise BadOption("there are no images; give at least one")
    _check_range(images, "images")
    check_salt(salt or "")
    salt = new_salt() if salt is None else salt
    own = OwnModule(type(model).__name__, model)
    images = images.to(working(own.module))
    if num_classes is None:
        num_classes = own.logits(images[:1]).shape[1]
    targets = _targets(labels, num_classes)
    method, granted = defenses.parse(defense), parse_threat(threat)
    image_shape = (images.shape[1], images.shape[2], images.shape[3])
    check_reveals([granted], groups_of(method, build(own, method, image_shape, num_classes, "own")))
    clients = [
        Client(image, target, "own", key, _others(images, targets, index, method.companions))
        for index, (image, target) in enumerate(zip(images, targets))
        for key in [salted(f"client/{seed}/{index}", "client", salt)]
    ]
    return observe_clients(
        own,
        method,
        granted,
        clients,
        num_classes,
        torch.full_like(images[0], 0.5) if mean_image is None else mean_image,
        device,
    )


def _tensor(given: Any, name: str) -> Tensor:
    """Return a tensor, an array, or a list of tensors, arrays or numbers, as a tensor on the CPU.

    Raises:
        BadOption: it is none of these, or its parts differ in shape.
    """
    try:
        if isinstance(given, Sequence) and any(isinstance(part, Tensor) for part in given):
            given = torch.stack([torch.as_tensor(part) for part in given])
        value = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadOption(
            f"{name} of type {type(given).__name__} are no numbers of one shape: {one_line(error)}"
        ) from error
    return value.detach().cpu()


def _check_range(images: Tensor, name: str) -> None:
    """Raise BadOption unless the images are in [0, 1]."""
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise BadOption(f"{name} range from {low:g} to {high:g}; give them in [0, 1]")


def _targets(labels: Tensor, num_classes: int) -> list[int | Tensor]:
    """Return each client's label: a class, or class probabilities [K].

    Raises:
        BadOption: a label is no whole number from 0 to K - 1, or a row is no distribution over K classes.
    """
    if labels.ndim == 2:
        rows = labels.double()
        if rows.shape[1] != num_classes or bool((rows < 0).any()) or not bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
            raise BadOption(
                f"labels {tuple(labels.shape)} are no class probabilities; give rows of {num_classes} numbers from 0 "
                "that add up to 1, or whole numbers [T]"
            )
        return [int(row.argmax()) if float(row.max()) == 1 else row.float() for row in rows]
    if labels.is_complex() or bool((labels != labels.double().floor()).any()):
        raise BadOption(
            f"labels of type {labels.dtype} are no whole numbers; give classes [T], or probabilities [T, K]"
        )
    low, high = int(labels.min()), int(labels.max())
    if not (low >= 0 and high < num_classes):
        raise BadOption(f"labels range from {low} to {high}; give them in 0 to {num_classes - 1}")
    return [int(label) for label in labels]


def _others(
    images: Tensor, labels: Sequence[int | Tensor], index: int, count: int
) -> tuple[tuple[Tensor, int | Tensor], ...]:
    """Return ``count`` images after that of an index, with labels, or all there are; after the last comes the first."""
    rows = [row % len(images) for row in range(index + 1, index + 1 + min(count, len(images) - 1))]
    return tuple((images[row], labels[row]) for row in rows)


def attack(method: str | Attack, observation: Observation, *, seed: int = 0) -> Reconstruction:
    """Attack every trial of an observation at once.

    Args:
        method: a spec such as ``ig(steps=1000)``, or an Attack.
        observation: what the server saw.
        seed: what the attacker's own draws come from.

    Raises:
        Unsupported: the attack cannot serve this observation; the message says why.
    """
    rng = Rng(tuple(f"attack/{seed}/{row}" for row in range(observation.trials)), observation.device)
    acting = attacks.parse(method)
    keep_freed_memory()
    with full_precision():
        return acting(observation, rng)


def show(found: Reconstruction, truth: Tensor | NDArray[Any] | Sequence[Any] | None = None) -> "Figure":
    """Return reconstructions side by side as a figure, at most 24, which a notebook shows.

    Args:
        found: what an attack returned; its images are drawn as they are, clipped to [0, 1].
        truth: [T, C, H, W] in [0, 1], or [C, H, W] for one trial: the private images. They are then drawn above, with
            PSNR and SSIM after alignment (the best fit of brightness and contrast) below. A reconstruction of which
            only brightness and contrast are lost is drawn after this fit, and marked *aligned*.

    Raises:
        BadOption: the private images are not of the same shape, or not in [0, 1].

    Example:
        >>> images, network = torch.rand(2, 3, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        >>> show(attack("analytic", observe(network, images, [0, 1])), images).axes[0].get_ylabel()
        'private'
    """
    from leakbench.report import notebook

    if truth is None:
        return notebook.beside(found)
    given = _tensor(truth, "truth")
    given = given[None] if given.ndim == found.images.ndim - 1 else given
    if given.shape != found.images.shape:
        raise BadOption(f"truth {tuple(given.shape)} and reconstructions {tuple(found.images.shape)} differ in shape")
    _check_range(given, "truth")
    return notebook.beside(found, given)


def keylock(
    model: nn.Module,
    *,
    length: int = 1024,
    gate: LockGate = "relu",
    keys: Literal["uniform", "normal"] = "uniform",
    lock_init: Literal["default", "uniform"] = "default",
    layers: Layers = "first",
    rng: torch.Generator | None = None,
) -> nn.Module:
    """Return a copy of any network of 2-d convolutions with FedKL's key-lock in it, key and lock drawn.

    The lock replaces the first convolution's normalisation, whose running statistics it takes over, or
    behind the first convolution where it has none. The copy trains and infers as any network does. No state dict holds
    the key: ``leakbench.defenses.keylock`` has ``get_key``, ``set_key`` (None takes the key out; the network then runs
    with wrong scales and shifts) and ``shared_state``, the state dict without the lock's layers.

    Args:
        model: from images [B, C, H, W] to anything; not changed.
        length: the key's length S.
        gate: the activation on scale and shift.
        keys: the key's distribution: U[0, 1) or N(0, 1).
        lock_init: the distribution of the lock weights: torch's for linear layers, or U(-0.5, 0.5).
        layers: ``first``, or ``all`` for a lock in every block, each with the block before as its key.
        rng: what key and lock are drawn from; seeded by the operating system by default.

    Raises:
        BadOption: an option is not valid, or the network has a key-lock already.
        Unsupported: the network has no 2-d convolution.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> keylock(network)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 10])
    """
    if not isinstance(model, nn.Module):
        raise BadOption(f"the model is of type {type(model).__name__}; give an nn.Module")
    if locks(model):
        raise BadOption(f"{type(model).__name__} has a key-lock already; give the network without it")
    options = {"length": length, "gate": gate, "keys": keys, "lock_init": lock_init, "layers": layers}
    method = defenses.registry.build("keylock", options)
    if rng is None:
        rng = torch.Generator()
        rng.seed()
    with torch.random.fork_rng(devices=[]):
        locked = method.wrap(model)
    tensors = tensors_of(locked)
    with torch.no_grad():
        for secret in method.secrets(locked):
            own = tensors[secret.name]
            own.copy_(secret.law.draw(tuple(own.shape), rng))
    return locked
