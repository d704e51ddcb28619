"""The worker: from trials to results. Only its driver decides what is run, and writes the run file."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from leakbench import attacks
from leakbench.assets import home
from leakbench.attacks import Attack
from leakbench.core.component import shipped
from leakbench.core.device import DEFAULT, SHARE, empty_cache, out_of_memory
from leakbench.core.rng import Rng, generator, salted
from leakbench.core.types import HONEST, Reconstruction
from leakbench.datasets import Dataset
from leakbench.engine.floors import FalseFloor, noise_like, verify_floor
from leakbench.engine.isolation import AttackError, Isolation, foreign
from leakbench.errors import DEFENSE_FAILED, ClientFailed, DefenseFailed, LeakbenchError, Unsupported, one_line, words
from leakbench.metrics import ReplacedMetric, refuse_replaced
from leakbench.metrics.aligned import align
from leakbench.metrics.base import Metric, Truth
from leakbench.metrics.members import MAX_DECOYS, BatchMetric, ScoredBatches, assign, matched
from leakbench.observation import Observation
from leakbench.plan.matrix import FLOORS
from leakbench.plan.trial import MAX_PICTURE_ERROR, UNSEEN, BatchMember, Cell, Result, Trial
from leakbench.victim import Client, Exchange, StepRecord, build, groups_of, observe


@dataclass(frozen=True)
class ClientData:
    """The images of a dataset that clients hold, and its public facts.

    Attributes:
        images: [C, H, W] in [0, 1] by index.
        labels: the class by index.
        mean: [C, H, W], the mean of public images.
        observed: the recorded update of the one client, which then takes no step of its own; images and labels are
            empty if they are not known. None: every client takes its step.
        salt: of the run (``core.rng.salted``); the keys of clients and of attackers are derived from it.
    """

    images: Mapping[int, Tensor]
    labels: Mapping[int, int]
    mean: Tensor
    num_classes: int
    observed: Observation | None = None
    salt: str = ""

    def of(self, trials: Sequence[Trial]) -> ClientData:
        """Return the part that these trials need."""
        needed = {index for trial in trials for index in (*trial.indices, *companions(trial, self.salt))}
        images = {index: image for index, image in self.images.items() if index in needed}
        labels = {index: label for index, label in self.labels.items() if index in needed}
        return replace(self, images=images, labels=labels)


@dataclass(frozen=True)
class CheckTask:
    """Ask whether the attacks of cells with the same observation support it; answered by a ``Refusal``.

    Attributes:
        observed: a recorded update, which they all observe.
        data: the client of the first trial, whose step they all observe. None and no update: a step on a blank image.
    """

    trials: tuple[Trial, ...]
    observed: Observation | None = None
    data: ClientData | None = None
    lost: int = 0


@dataclass(frozen=True)
class Refusal:
    """The findings of a check.

    Attributes:
        cells: the reason for each unsupported cell, by ``Cell.key``.
        groups: the defenses' groups of secrets.
    """

    cells: Mapping[str, str]
    groups: frozenset[str]


@dataclass(frozen=True)
class MeasureTask:
    """Measure how many of the ``trials`` trials of a cell to run at a time; answered by their number."""

    trial: Trial
    trials: int
    lost: int = 0


@dataclass(frozen=True)
class ChunkTask:
    """Run trials of one cell, ``slots`` at a time; answered by their results.

    Attributes:
        data: the images of the clients.
    """

    trials: tuple[Trial, ...]
    slots: int
    data: ClientData
    lost: int = 0

    @property
    def trial(self) -> Trial:
        """The first one."""
        return self.trials[0]


Task = CheckTask | MeasureTask | ChunkTask
"""What a worker is given; ``lost`` counts the workers that died while they held it."""

TaskAnswer = Refusal | int | list[Result]


@dataclass(frozen=True)
class WorkerContext:
    """What a worker needs for every task.

    Attributes:
        metrics: the metrics that can be computed.
        share: the part of the device's free memory that a chunk may take.
    """

    metrics: Sequence[Metric]
    device: torch.device
    strict: bool
    share: float = SHARE


@dataclass(frozen=True)
class Worker:
    """Does tasks; calls ``note`` with lines for the user, and ``begin`` with the number of trials that begin.

    ``tick`` is called while an attack searches (``Observation.tick``).

    Attributes:
        noted: the metrics and replaced functions that the user was told of.
        isolation: calls the attacks, those that are not part of leakbench in processes of their own.
        floors: the floors of leakbench that were verified on private images.
    """

    work: WorkerContext
    note: Callable[[str], None]
    begin: Callable[[int], None] = lambda trials: None
    noted: set[str] = field(default_factory=set)
    isolation: Isolation = field(default_factory=Isolation)
    floors: set[str] = field(default_factory=set)
    tick: Callable[[int, int], None] | None = None

    def do(self, task: Task) -> TaskAnswer:
        """Return the answer to a task.

        Raises:
            LeakbenchError: a task that ends the run.
        """
        match task:
            case CheckTask():
                return self._refusal(task)
            case MeasureTask():
                return self.size(task.trial, task.trials)
            case ChunkTask():
                return self.results(task.data, task.trials, task.slots)

    def _refusal(self, task: CheckTask) -> Refusal:
        """Return which cells that see the same, one trial each, cannot be served.

        A blank image does not decide that alone: its gradient may have zeros where that of a real image has none, and a
        defense may treat it in another way. A component that fails is recorded, with its reason, when its trials run.

        Raises:
            FalseFloor: a floor uses the gradient.
        """
        trials, groups = task.trials, set[str]()
        cell = trials[0].cell
        try:
            if task.observed is not None:
                seen = task.observed
            elif task.data is None:
                seen = blank(cell, groups)
            else:
                seen = _observed(task.data, trials[:1])
        except Unsupported as error:
            return Refusal({trial.cell.key: str(error) for trial in trials}, frozenset(groups))
        except (Exception, SystemExit) as error:
            if isinstance(error, LeakbenchError) and not isinstance(error, ClientFailed) and task.data is None:
                raise
            return Refusal({}, frozenset(groups))
        refused = {}
        granted = seen
        for trial in trials:
            attack = trial.cell.attack
            seen = _for(attack, granted, trial.cell)
            try:
                self.isolation.check(attack, seen)
                if attack.floor:
                    rng = Rng(tuple(map(str, range(seen.trials))), seen.device)
                    verify_floor(self.isolation, attack, seen, rng, None, noise_like(seen))
            except Unsupported as error:
                refused[trial.cell.key] = str(error)
            except LeakbenchError:
                raise
            except (Exception, SystemExit):  # it is recorded when the trials run
                continue
        return Refusal(refused, frozenset(groups))

    def size(self, first: Trial, trials: int) -> int:
        """Return how many trials to run at a time, by measurement if the attack can be measured."""
        device = self.work.device
        size = min(trials, DEFAULT[device.type])
        if trials == 1:
            return size
        try:
            seen, own = blank(first.cell, set(), device), first.cell.model.fresh_weights()
            return self.isolation.size(first.cell.attack, seen, own, trials, self.work.share) or size
        except (Exception, SystemExit):  # a component that fails does so again, and is recorded, when its trials run
            return size

    def results(self, data: ClientData, trials: Sequence[Trial], slots: int) -> list[Result]:
        """Return the results of trials of one cell; trials that fail together are tried in halves, then recorded."""
        self.begin(len(trials))
        try:
            return self._together(data, trials, slots)
        except (FalseFloor, ReplacedMetric):
            raise
        except (Exception, SystemExit) as error:  # an error of a component costs its own trials, not the run
            memory = out_of_memory(error)
            if len(trials) == 1:
                return [self._refused(data, trials[0], error)]
        # outside of the except block, in which the error's frames would still hold the tensors that did not fit
        slots = min(slots, len(trials))
        if memory:
            empty_cache(self.work.device)
            self.note(f"{slots} trials at a time do not fit into memory; trying {-(-slots // 2)}")
            slots = -(-slots // 2)
        half = len(trials) // 2
        return self.results(data, trials[:half], slots) + self.results(data, trials[half:], slots)

    def _refused(self, data: ClientData, trial: Trial, error: BaseException) -> Result:
        """Return the result of a trial that raised an error; raise LeakbenchError if the run is strict."""
        if isinstance(error, Unsupported) and not self.work.strict:
            return without_score(data, trial, "unsupported", str(error))
        if out_of_memory(error):
            reason = "out of memory"
        else:
            known = str(error) if isinstance(error, (AttackError, DefenseFailed)) else words(error)
            blames = known.startswith(DEFENSE_FAILED) and not isinstance(error, DefenseFailed)
            reason = f"the attack says that {known}" if blames else known  # an attack cannot blame the defense
        if self.work.strict:
            raise LeakbenchError(f"{trial.cell.words}, image {trial.image}: {reason}") from error
        return without_score(data, trial, "error", reason)

    def _together(self, data: ClientData, trials: Sequence[Trial], slots: int) -> list[Result]:
        """Observe, attack and score trials of one cell, ``slots`` at a time."""
        begin = time.perf_counter()
        if data.observed is None:
            observation, rng, records = self._stepped(data, trials)
        else:
            key = salted("audit/update", "attack", data.salt)
            observation, rng, records = data.observed, Rng((key,), self.work.device), []
        cell, attack, named = trials[0].cell, trials[0].cell.attack, trials[0].cell.words
        said: list[str] = []  # a function of this worker would show the attack what it is called with
        told = replace(observation, slots=slots, tick=self.tick, note=said.append)
        told = _for(attack, told, cell)
        try:
            guess = self.isolation.run(attack, told, rng)
        except DefenseFailed as error:  # the client's defense did not fail: an attacker ran its code, or says so
            raise AttackError(str(error)) from error
        for line in dict.fromkeys(said):  # several searches of an attack may say the same
            self.note(f"{named}: {line}")
        if attack.floor and (foreign(attack) or attack.name not in self.floors):
            other = self._other(data, trials) if data.observed is None else noise_like(observation)
            verify_floor(self.isolation, attack, told, rng, guess, other)
            self.floors.add(attack.name)
        guess = replace(guess, images=guess.images.float())
        # only here do reconstruction and truth meet
        truth = self._truth(data, trials, records, observation, rng) if data.images else None
        if truth is not None and trials[0].others:
            outcomes = self._of_batches(data, trials, guess, truth)
        else:
            outcomes = self._of_images(guess, truth)
        seconds = (time.perf_counter() - begin) / len(trials)
        guess = _on_host(guess)
        failed = guess.failed
        assert failed is not None, "a called attack says of every trial whether it failed"
        courses = [b""] * len(trials) if guess.curve is None else guess.curve.rows()
        return [
            Result(
                trial=trial,
                status="failed" if bool(failed[row]) else "ok",
                reason=_why(guess, row) if bool(failed[row]) else _unseen(trial, records[row] if records else None),
                seconds=seconds,
                scores=outcomes[row].scores,
                reconstruction=outcomes[row].reconstruction,
                truth=outcomes[row].truth,
                label=data.labels.get(trial.image),
                objective=_finite(guess.objective, row),
                evaluations=None if guess.evaluations is None else int(guess.evaluations[row]),
                path=guess.path,
                findings=_found(guess, row),
                curve=courses[row],
                aligned=None if bool(failed[row]) else outcomes[row].aligned,
                members=outcomes[row].members,
            )
            for row, trial in enumerate(trials)
        ]

    def _of_images(self, guess: Reconstruction, truth: Truth | None) -> list[_Outcome]:
        """Return the scores and pictures of clients of one image."""
        images = guess.images.cpu()
        if truth is None and images.ndim == 5:  # a recorded update of several images, none of which is known
            return [_Outcome({}, png(own[0]), None, None, _unknown(own)) for own in images]
        if truth is None:
            return [_Outcome({}, png(image), None, None) for image in images]
        scores = self._score(guess, truth)
        truths = truth.images.cpu()
        fitted = aligned(images, truths)
        return [
            _Outcome(
                {name: values[row] for name, values in scores.items() if values[row] == values[row]},
                png(image),
                png(truths[row]),
                fitted[row],
            )
            for row, image in enumerate(images)
        ]

    def _of_batches(
        self, data: ClientData, trials: Sequence[Trial], guess: Reconstruction, truth: Truth
    ) -> list[_Outcome]:
        """Return the scores and pictures of clients of several images, after one assignment of each client's."""
        device, shape = self.work.device, truth.images.shape[1:]
        # assigned and drawn in the host's memory, so that the device is not waited for at every image
        images = torch.stack([torch.stack([data.images[index] for index in one.indices]) for one in trials])
        labels = torch.tensor([[data.labels.get(index, -1) for index in one.indices] for one in trials])
        own = [part[torch.isfinite(part.flatten(1)).all(1)] for part in guess.images.cpu()]  # NaN: not found
        places = [assign(some, true).tolist() for some, true in zip(own, images)]
        pairs = torch.stack([matched(some, true) for some, true in zip(own, images)])
        count = images.shape[1]
        scored = ScoredBatches(
            images=pairs.to(device),
            truth=images.to(device),
            inferred=guess.labels,
            labels=labels.to(device),
            decoys=_unattacked(trials[0].cell.dataset, home())[:MAX_DECOYS],
            values={},
        )
        flat = replace(
            truth,
            images=scored.truth.view(-1, *shape),
            labels=scored.labels.flatten(),
            encoded=None,
            floors=(),
            cosines=None if truth.cosines is None else truth.cosines.repeat_interleave(count),
        )
        rows = [metric for metric in self.work.metrics if not isinstance(metric, BatchMetric)]
        values = {
            name: torch.tensor(found, dtype=torch.float64).view(-1, count)
            for name, found in self._score(Reconstruction(scored.images.view(-1, *shape)), flat, rows).items()
        }
        whole = self._score_batches(replace(scored, values=values))
        fitted = aligned(pairs.view(-1, *shape), images.view(-1, *shape))
        outcomes = []
        for row, trial in enumerate(trials):
            members = tuple(
                BatchMember(
                    image=index,
                    label=data.labels.get(index),
                    truth=png(images[row, place]),
                    reconstruction=png(pairs[row, place]) if places[row][place] >= 0 else None,
                    aligned=fitted[row * count + place],
                    scores={name: float(table[row, place]) for name, table in values.items()},
                )
                for place, index in enumerate(trial.indices)
            )
            means = {name: float(table[row].mean()) for name, table in values.items()}
            scores = {name: value for name, value in (means | whole[row]).items() if value == value}
            outcomes.append(_Outcome(scores, png(pairs[row, 0]), members[0].truth, members[0].aligned, members))
        return outcomes

    def _score_batches(self, scored: ScoredBatches) -> list[dict[str, float]]:
        """Return the values of the metrics of whole batches, of each client."""
        found: list[dict[str, float]] = [{} for _ in scored.images]
        for metric in (one for one in self.work.metrics if isinstance(one, BatchMetric)):
            for row, value in zip(found, metric.of_batches(scored).tolist()):
                row[metric.name] = value
        return found

    def _stepped(self, data: ClientData, trials: Sequence[Trial]) -> tuple[Observation, Rng, list[StepRecord]]:
        """Return what clients send after a step, the attacker's draws, and what only evaluation sees of the steps."""
        cell, clients = trials[0].cell, [_client(trial, data) for trial in trials]
        seen, records = Exchange(
            cell.model,
            cell.defense,
            cell.threat,
            clients,
            data.num_classes,
            data.mean,
            self.work.device,
            server_images(cell),
            cell.client,
        ).recorded()
        return seen, Rng(tuple(attack_key(trial, data.salt) for trial in trials), self.work.device), records

    def _other(self, data: ClientData, trials: Sequence[Trial]) -> Mapping[str, Tensor]:
        """Return the gradients that the same clients would have sent of noise with other labels, from the salt.

        An attack that knew the other image, or what makes it of the private one, could return the same for both.
        """
        images, labels = {}, {}
        for index, image in data.images.items():
            rng = generator(salted(f"floor/{index}", "client", data.salt))
            images[index] = torch.rand(image.shape, generator=rng).to(image)
            step = int(torch.randint(1, max(2, data.num_classes), (), generator=rng))
            labels[index] = (data.labels[index] + step) % data.num_classes
        return _observed(replace(data, images=images, labels=labels), trials, self.work.device).gradient

    def _truth(
        self,
        data: ClientData,
        trials: Sequence[Trial],
        records: Sequence[StepRecord],
        observation: Observation,
        rng: Rng,
    ) -> Truth:
        """Return the private images with their labels, -1 for a label that is not known, and what the steps were."""
        device = self.work.device
        changed = [None if record.changed is None else record.changed.to(device) for record in records]
        floors = FLOORS if any(images is not None for images in changed) else ()
        cosines = [record.cosine for record in records]
        return Truth(
            torch.stack([data.images[trial.image] for trial in trials]).to(device),
            torch.tensor([data.labels.get(trial.image, -1) for trial in trials], device=device),
            changed or None,
            trials[0].cell.dataset.public,
            [self.isolation.run(attacks.parse(floor), observation, rng).images.float() for floor in floors],
            torch.tensor(cosines, dtype=torch.float64) if cosines else None,
        )

    def _score(
        self, guess: Reconstruction, truth: Truth, measured: Sequence[Metric] | None = None
    ) -> dict[str, list[float]]:
        """Return every metric's values by row, NaN if the metric raises, which is noted."""
        refuse_replaced()
        measured = self.work.metrics if measured is None else measured
        with torch.no_grad():
            return {metric.name: self._values(metric, guess, truth) for metric in measured}

    def _values(self, metric: Metric, guess: Reconstruction, truth: Truth) -> list[float]:
        rows = len(truth.images)
        try:
            found = metric.score(guess, truth)
            # one copy to the host for all rows
            values = [float(value) for value in (found.tolist() if isinstance(found, Tensor) else found)]
            if len(values) != rows:
                raise ValueError(f"it returned {len(values)} values for {rows} images; return one an image")
            return values
        except (Exception, SystemExit) as error:
            if self.work.strict or out_of_memory(error):
                raise
            reason = one_line(error)
        if rows > 1:  # outside of the except block, whose error would hold the tensors of all rows
            each = [self._values(metric, *_row(guess, truth, row)) for row in range(rows)]
            return [value for (value,) in each]
        if metric.name not in self.noted:
            self.noted.add(metric.name)
            self.note(f"metric {metric.name!r} left out: {reason}")
        return [float("nan")]


def _on_host(guess: Reconstruction) -> Reconstruction:
    """Return a reconstruction with every tensor in the host's memory, for rows to be read one at a time."""

    def host(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.cpu()

    return replace(
        guess,
        images=guess.images.cpu(),
        labels=host(guess.labels),
        objective=host(guess.objective),
        failed=host(guess.failed),
        evaluations=host(guess.evaluations),
        findings={name: value.cpu() for name, value in guess.findings.items()},
    )


@dataclass(frozen=True)
class _Outcome:
    """The scores and pictures of a trial (``Result``)."""

    scores: Mapping[str, float]
    reconstruction: bytes
    truth: bytes | None
    aligned: bytes | None
    members: tuple[BatchMember, ...] = ()


def _for(attack: Attack, observation: Observation, cell: Cell) -> Observation:
    """Return what an attack observes; a floor, which uses no gradient, is granted the number of images."""
    return replace(observation, count=cell.client.count) if attack.floor and not observation.count else observation


def _unseen(trial: Trial, record: StepRecord | None) -> str:
    """Return the reason of a trial that did not fail."""
    return UNSEEN if record is not None and record.unseen and not shipped(type(trial.cell.defense)) else ""


def _unknown(images: Tensor) -> tuple[BatchMember, ...]:
    """Return images [M, C, H, W] that an attack returned of a client of whose images none is known, in no order."""
    found = images[torch.isfinite(images.flatten(1)).all(1)]
    return tuple(BatchMember(place, None, b"", png(image), None, {}) for place, image in enumerate(found))


def without_score(data: ClientData, trial: Trial, status: Literal["unsupported", "error"], reason: str) -> Result:
    """Return the result of a trial without scores."""
    return Result(
        trial=trial,
        status=status,
        reason=reason,
        seconds=0.0,
        scores={},
        reconstruction=None,
        truth=png(data.images[trial.image]) if trial.image in data.images else None,
        label=data.labels.get(trial.image),
    )


def failure_line(cell: Cell, reason: str) -> str:
    """Return a line for the user on a defense that failed."""
    specs = cell.specs
    return f"{specs['defense']}, {specs['model']} on {specs['dataset']}: {reason}"


def _row(guess: Reconstruction, truth: Truth, row: int) -> tuple[Reconstruction, Truth]:
    """Return one trial's reconstruction and truth, as a batch of one."""
    labels = None if guess.labels is None else guess.labels[row : row + 1]
    only = Reconstruction(guess.images[row : row + 1], labels)
    part = slice(row, row + 1)
    return only, replace(
        truth,
        images=truth.images[part],
        labels=truth.labels[part],
        encoded=None if truth.encoded is None else truth.encoded[part],
        floors=[images[part] for images in truth.floors],
        cosines=None if truth.cosines is None else truth.cosines[part],
    )


def png(image: Tensor) -> bytes:
    """Return a PNG of an image [C, H, W], clamped to [0, 1] and rounded to 8 bits.

    One channel is grey, three are RGB and four RGBA; of any other number the first three are shown, or the first.
    """
    if len(image) not in (1, 3, 4):
        image = image[:3] if len(image) > 3 else image[:1]
    pixels = image.detach().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(stream, "PNG")
    return stream.getvalue()


def aligned(images: Tensor, truth: Tensor) -> list[bytes | None]:
    """Return PNGs of the images [T, C, H, W] after the best fit to the truth, where ``png`` would not show the same.

    A PNG loses what lies outside [0, 1], and a contrast of less than a few of its 256 levels; normalisation in front of
    a network leaves an attacker free to return either. None where the fit of the PNG differs by less than
    ``MAX_PICTURE_ERROR``, or where the two have other shapes.
    """
    if images.shape != truth.shape:
        return [None] * len(images)
    fitted, shown = align(images, truth), align(images.clamp(0, 1).mul(255).round().div(255), truth)
    errors = (fitted - shown).square().flatten(1).mean(dim=1)
    return [png(image) if float(error) > MAX_PICTURE_ERROR else None for image, error in zip(fitted, errors)]


def attack_key(trial: Trial, salt: str) -> str:
    """Return the key of an attacker's draws, the same for all attacks on an image with one seed (``salted``)."""
    return salted(f"attack/{trial.seed}/{trial.cell.specs['dataset']}/{trial.image}", "attack", salt)


def _client(trial: Trial, data: ClientData) -> Client:
    """Return the client of a trial.

    Weights that all clients of a seed share are public, and so is their key. A client's own weights are public too, but
    not their key: an attacker who tries the keys of all images would find the index.
    """
    key = f"{trial.seed}/{trial.cell.specs['dataset']}/{trial.image}"
    fresh = trial.cell.model.fresh_weights()
    weights = salted(f"weights/{key}", "client", data.salt) if fresh else f"weights/{trial.seed}"
    others = tuple((data.images[index], data.labels[index]) for index in companions(trial, data.salt))
    own = salted(f"client/{key}", "client", data.salt)
    further = tuple((data.images[index], data.labels[index]) for index in trial.others)
    return Client(data.images[trial.image], data.labels[trial.image], weights, own, others, further)


def _observed(data: ClientData, trials: Sequence[Trial], device: torch.device | str = "cpu") -> Observation:
    """Return what the clients of trials of one cell send after their steps."""
    cell, clients = trials[0].cell, [_client(trial, data) for trial in trials]
    public, client = server_images(cell), cell.client
    return observe(cell.model, cell.defense, cell.threat, clients, data.num_classes, data.mean, device, public, client)


@functools.lru_cache(maxsize=1)
def _unattacked(dataset: Dataset, cache: Path) -> Tensor:
    """Return ``dataset.unattacked()`` with this cache of assets; loaded once in a process."""
    return dataset.unattacked()


def server_images(cell: Cell) -> Tensor | None:
    """Return the public images [P, C, H, W] of a malicious server; None if the server is honest."""
    return None if cell.threat.server == HONEST else _unattacked(cell.dataset, home())


def companions(trial: Trial, salt: str) -> list[int]:
    """Return the indices of the client's further images, any but the attacked one, for a defense that mixes them in."""
    cell = trial.cell
    if not cell.defense.companions or trial.others:
        return []
    plain = "\x1f".join(("companions", str(trial.seed), cell.specs["dataset"], str(trial.image)))
    rng = generator(salted(plain, "client", salt))
    order = torch.randperm(len(cell.dataset), generator=rng).tolist()
    return [index for index in order if index != trial.image][: cell.defense.companions]


def blank(cell: Cell, groups: set[str], device: torch.device | str = "cpu") -> Observation:
    """Return the observation of a step on a blank image; add the defense's groups of secrets to ``groups``.

    The images of a batch are of different greys: of equal ones a gradient shows fewer than there are.
    """
    dataset, model, defense = cell.dataset, cell.model, cell.defense
    shape, classes = dataset.image_shape, dataset.num_classes
    groups |= groups_of(defense, build(model, defense, shape, classes, "blank"))
    image, count = torch.full(shape, 0.5), cell.client.count
    further = tuple((torch.full(shape, 0.97 * place / count), place % classes) for place in range(1, count))
    mixed = ((image, 0),) * (min(defense.companions, len(dataset) - 1) if count == 1 else 0)
    client, public = Client(image, 0, "blank", "blank", mixed, further), server_images(cell)
    return observe(model, defense, cell.threat, [client], classes, dataset.mean(), device, public, cell.client)


def _why(guess: Reconstruction, row: int) -> str:
    """Return why a trial failed."""
    return (guess.reasons[row] if guess.reasons else "") or "the attack diverged; its picture is the grey image"


def _found(guess: Reconstruction, row: int) -> dict[str, float]:
    """Return the finite findings of one trial, by name (``Reconstruction.findings``)."""
    found = {name: _finite(values, row) for name, values in guess.findings.items()}
    return {name: value for name, value in found.items() if value is not None}


def _finite(values: Tensor | None, row: int) -> float | None:
    value = None if values is None else float(values[row])
    return value if value is not None and abs(value) < float("inf") else None
