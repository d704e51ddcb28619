"""The contract of an attack: from an Observation to a Reconstruction, all trials at once."""

import dataclasses
import inspect
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from leakbench.attacks.simulate import simulated
from leakbench.core.component import Component
from leakbench.core.loss_curve import marks
from leakbench.core.registry import Registry
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction, ThreatModel
from leakbench.defenses.adaptive import SIMULATE, AdaptiveAttacker
from leakbench.defenses.base import by_informed
from leakbench.errors import BadOption, OldPlugin, Unsupported
from leakbench.observation import Observation


class Attack(Component):
    """What a curious server does with what it saw; a subclass defines ``run``, and ``check`` and ``probe`` if it can.

    An attack is called as ``attack(observation, rng)``: that prepares the observation by the threat model
    (``prepare``), runs the attack on it, and checks what came back. ``run``, ``check`` and ``probe`` get the prepared
    observation. An attack that uses another one calls that one's ``run``.

    Attributes:
        floor: True for an attack that uses no gradient; tables show every other attack's gain over the best floor.
        is_control: True for an attack that shows what no gradient leaked, such as memorised images. It is neither a
            floor nor an attacker: tables show it apart, and it never counts as having recovered an image.
        updates: True for an attack that works on an update of unknown learning rate; any other one is given the
            gradient that the update is of, and needs a threat model that grants the rate.
        learns_rate: True for one of these that finds the rate on the way.
        batches: True for an attack that serves clients of several images: observations with a ``count`` above 1, or of
            0, where it is hidden. It then returns images [T, M, C, H, W] with M <= B.
        queue: how many times as many trials it is given as it works on at a time (``Observation.slots``); more than 1
            for an attack whose trials end at different times, and that then begins the next one in the free place.
    """

    floor: ClassVar[bool] = False
    is_control: ClassVar[bool] = False
    updates: ClassVar[bool] = False
    learns_rate: ClassVar[bool] = False
    batches: ClassVar[bool] = False
    queue: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        """Take a subclass's ``__call__``, its own or a mixin's, which attacks defined before ``run``, for its ``run``.

        Raises:
            BadOption: a method calls another attack's ``__call__`` by name, as that of the class that it derives from;
                or the class has code that would run when leakbench copies it or reads its attributes.
        """
        super().__init_subclass__()
        _check_passive(cls)
        old = cls.__call__
        if old is Attack.__call__:
            return
        methods = [inspect.unwrap(value) for value in (old, *vars(cls).values()) if inspect.isfunction(value)]
        if any("__call__" in method.__code__.co_names for method in methods):
            raise BadOption(
                f"class {cls.__name__} overrides __call__ and calls it of another attack; rename both to run"
            )
        warnings.warn(f"class {cls.__name__} overrides __call__; rename it to run", OldPlugin, stacklevel=2)
        cls.run, cls.__call__ = old, Attack.__call__  # type: ignore[method-assign, misc]

    @property
    def repeats(self) -> bool:
        """Whether it repeats the client's local steps, by whichever optimiser."""
        return False

    @property
    def competes(self) -> bool:
        """Whether it counts as an attacker: it is neither a floor nor a control."""
        return not (self.floor or self.is_control)

    @abstractmethod
    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return a reconstruction of every trial; nothing of the observation is changed.

        Raises:
            Unsupported: the attack cannot serve this observation; the message says why.
        """

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if the attack cannot serve this observation; called with a blank image before a run."""

    def probe(self, observation: Observation, rng: Rng) -> int | None:
        """Do a small, typical piece of the work on all trials, from whose time and memory their number is chosen.

        Returns:
            The bytes that the whole work holds beside what this piece needs; None where nothing was done, and the
            default number of trials at a time shall be taken.
        """
        return None

    def pace(self, observation: Observation, rng: Rng) -> float | None:
        """Return about how many seconds the search of all trials takes, from one evaluation; None without a search."""
        return None

    def uses(self) -> Sequence[Component]:
        """Return the other components whose code the attack runs, such as a generator."""
        return ()

    @final
    def __call__(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return a reconstruction of every trial, whose failed rows are the grey image.

        Args:
            observation: what the server saw, as the clients sent it.
            rng: what the attacker draws from, one key for each trial.

        Raises:
            Unsupported: the attack cannot serve this observation; the message says why.
            BadOption: the attack returned something else than a reconstruction of every trial.
        """
        attack, known = prepare(self, observation)
        return checked(self, attack.run(known, rng), known)

    @final
    def preflight(self, observation: Observation) -> None:
        """Raise Unsupported if the attack cannot serve this observation, by ``prepare`` or by its own ``check``."""
        attack, known = prepare(self, observation)
        attack.check(known)

    @final
    def measure(self, observation: Observation, rng: Rng) -> int | None:
        """Return what ``probe`` returns for this observation."""
        attack, known = prepare(self, observation)
        return attack.probe(known, rng)

    @final
    def seconds(self, observation: Observation, rng: Rng) -> float | None:
        """Return what ``pace`` returns for this observation."""
        attack, known = prepare(self, observation)
        return attack.pace(known, rng)


def _check_passive(cls: type[Attack]) -> None:
    """Raise BadOption if a class has code that runs outside of the calls of the attack (``engine.isolation``)."""
    for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__getattribute__", "__getattr__", "__class__"):
        if inspect.getattr_static(cls, name, None) is not inspect.getattr_static(Attack, name, None):
            raise BadOption(f"class {cls.__name__} defines {name}, which would run outside of the attack; leave it out")
    flags = ("floor", "is_control", "updates", "learns_rate", "batches")
    for name, kind in (*((flag, bool) for flag in flags), ("queue", int)):
        value = inspect.getattr_static(cls, name)
        if type(value) is not kind:
            raise BadOption(f"class {cls.__name__} states {name} = {value!r}; write a plain {kind.__name__}")


ORDINARY_SIZES = (2.0**-30, 2.0**16)
"""The largest entries that gradients have: networks that are sure of their answer have small ones."""


registry: Registry[Attack] = Registry("attack", "leakbench.attacks", Attack)
register = registry.register


def prepare(attack: Attack, observation: Observation) -> tuple[Attack, Observation]:
    """Return an attack and what it works on, both as the threat model has them.

    Entries that are not finite are left out (``Observation.shown``). A gradient whose largest entry is outside
    ``ORDINARY_SIZES`` is divided by that entry, rounded down to a power of two, so that no attack overflows; gradient
    matching then asks only for the same direction. What was prepared before stays as it is.

    Raises:
        Unsupported: the threat model has the attacker optimise secrets, which this attack cannot; or it asks for an
            adaptive attacker that the defense does not have; or the client shares weights, and the attack, or the
            adaptive attacker, needs the learning rate, which is not granted, or a single step.
    """
    if observation.count != 1 and not attack.batches:
        raise Unsupported(f"{attack.name} serves clients of one image, and these have several; use batch=1")
    if attack.floor:
        return attack, observation
    unit = _unit_of(attack, observation)
    observation = _without_decay(_finite(observation))
    adaptive = _adaptive_attacker(observation) if observation.adaptive is None else None
    if adaptive is not None and observation.count != 1 and not adaptive.batched:
        assert observation.defense is not None
        raise Unsupported(
            f"the adaptive attacker models the defense {observation.defense.name!r} for one image, and these clients "
            "have several; use batch=1, or informed=false"
        )
    if adaptive is not None:
        observation = _derive(attack, dataclasses.replace(observation, adaptive=adaptive), adaptive)
    if unit != 1.0 and observation.unit == 1.0:
        gradient = {name: value / unit for name, value in observation.gradient.items()}
        observation = dataclasses.replace(observation, gradient=gradient, unit=unit)
    return _adapt(attack, observation.threat), _of_ordinary_size(observation)


def _finite(observation: Observation) -> Observation:
    """Return the observation with zeros, which are not ``shown``, for the entries that are not finite."""
    finite = {name: torch.isfinite(value) for name, value in observation.gradient.items()}
    if all(bool(own.all()) for own in finite.values()):
        return observation
    gradient = {name: torch.where(finite[name], value, 0.0) for name, value in observation.gradient.items()}
    return dataclasses.replace(observation, gradient=gradient, shown=_both(finite, observation.shown))


def _both(shown: dict[str, Tensor], before: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return which entries are shown now, of those that were shown before."""
    return shown if before is None else {name: own & before.get(name, own) for name, own in shown.items()}


def _without_decay(observation: Observation) -> Observation:
    """Return the observation of an update without the share of the weights that a known weight decay adds to it."""
    client, rate, before = observation.client, observation.threat.learning_rate, observation.weights
    share = 0.0 if client is None or rate is None else client.optimiser(rate).decayed(client.steps)
    if not share or observation.unit != 1.0:
        return observation
    gradient = {name: value - share * before[name] for name, value in observation.gradient.items()}
    return dataclasses.replace(observation, gradient=gradient)


def _of_ordinary_size(observation: Observation) -> Observation:
    """Return the observation with gradients of ``ORDINARY_SIZES`` (``Observation.size``)."""
    entries = [value.abs().reshape(len(value), -1).amax(1) for value in observation.gradient.values() if value.numel()]
    largest = torch.stack(entries).amax(0)
    low, high = ORDINARY_SIZES
    odd = (largest > 0) & ((largest < low) | (largest > high))
    if not bool(odd.any()):
        return observation
    exponent = torch.frexp(largest.double()).exponent - 1
    size = torch.where(odd, torch.exp2(exponent.clamp(min=-126).double()), 1.0)  # 2^-126: the least normal float32
    gradient = {
        name: (value.double() / size.view(-1, *[1] * (value.ndim - 1))).to(value)
        for name, value in observation.gradient.items()
    }
    size = size.to(observation.dtype) if observation.size is None else size.to(observation.dtype) * observation.size
    return dataclasses.replace(observation, gradient=gradient, size=size)


def _adaptive_attacker(observation: Observation) -> AdaptiveAttacker | None:
    """Return the adaptive attacker that the threat model asks for, or None where the attacker is oblivious.

    A defense that states none has the one that leakbench supplies (``simulate``).

    Raises:
        Unsupported: the defense has no such attacker.
    """
    defense, informed = observation.defense, observation.threat.informed
    if defense is None:
        return None
    attackers = by_informed(defense)
    if informed == SIMULATE or (informed is True and not attackers):
        return simulated(observation)
    if informed in attackers:
        return attackers[informed]
    known = " or ".join(str(name).lower() for name in (*attackers, SIMULATE))
    raise Unsupported(f"the defense {defense.name!r} has no adaptive attacker {informed!r}; write informed={known}")


def _adapt(attack: Attack, threat: ThreatModel) -> Attack:
    """Return the attack as the threat model has it act: with ``secrets=optimise`` where it ``optimises``.

    Raises:
        Unsupported: the attack has no such option.
    """
    if not threat.optimises:
        return attack
    if "secrets" not in attack.options():
        raise Unsupported(f"{attack.name} cannot optimise secrets; use a threat model with optimises=false")
    return dataclasses.replace(attack, secrets="optimise")  # type: ignore[type-var]


def _unit_of(attack: Attack, observation: Observation) -> float:
    """Return what the observed gradient is divided by to be what an attack works on.

    Where the client shares its weights, that is the mean gradient of its local steps: the update divided by the number
    of steps and, unless the attack has ``updates``, by the learning rate.

    Raises:
        Unsupported: the attack needs the learning rate, and it is not granted; or the optimiser's steps are no sum of
            gradients.
    """
    threat, unit = observation.threat, observation.sent_unit
    if threat.shares == "gradient":
        return 1.0
    if observation.client is not None and observation.client.optimiser(1.0).kind != "sgd":
        if not attack.repeats:
            other = ", or local=unrolled with rate=known" if "local" in attack.options() else ""
            raise Unsupported(
                f"{attack.name} needs a sum of gradients, and {observation.client.optimiser(1.0).kind} divides each "
                f"entry by a number of its own; use a client with optimizer=sgd{other}"
            )
        if not attack.updates and threat.learning_rate is not None:
            return threat.learning_rate * observation.client.steps
    if attack.updates:
        return observation.rate_unit
    if unit is None:
        raise Unsupported(
            f"{attack.name} needs the gradient, and an update of unknown learning rate does not give its size; use "
            "dlm or dlm+, or a threat model with rate=known"
        )
    return unit


def _derive(attack: Attack, observation: Observation, adaptive: AdaptiveAttacker) -> Observation:
    """Return what an adaptive attacker knows before any search.

    That is the secrets and the class probabilities that follow from the gradient (the mean one of several local steps),
    and the gradient or update before the defense acted, as far as what was sent shows it.

    Args:
        attack: what will work on it.
        observation: as the client sent it, in the units in which it did.
        adaptive: what the attacker knows of the defense.

    Raises:
        Unsupported: something follows from a gradient in its own units, and the learning rate is hidden; or from the
            gradient of one step, and what was sent is the sum of several.
    """
    _check_units(attack, observation, adaptive)
    size = observation.sent_unit or 1.0
    gradient = {name: value / size for name, value in observation.gradient.items()}
    seen = (observation.model, gradient, observation.weights)
    found = {} if adaptive.recover is None else adaptive.recover(*seen)
    found = {name: value for name, value in found.items() if name not in observation.weights}
    targets = None if adaptive.targets is None else adaptive.targets(*seen)
    labels = observation.labels
    return dataclasses.replace(
        _undone(observation, adaptive),
        weights={**observation.weights, **found},
        labels=targets.argmax(1) if labels is None and targets is not None else labels,
        targets=targets,
        secrets=tuple(secret for secret in observation.secrets if secret.name not in found),
    )


def _check_units(attack: Attack, observation: Observation, adaptive: AdaptiveAttacker) -> None:
    """Raise Unsupported if modelling the defense needs a learning rate that is hidden, or a single step."""
    assert observation.defense is not None
    name, threat, unit = observation.defense.name, observation.threat, observation.sent_unit
    if adaptive.models_release and unit is None and not attack.learns_rate:
        raise Unsupported(
            f"the adaptive attacker models the defense {name!r} in the units of the update, and the learning rate is "
            f"neither known nor learned by {attack.name}; use dlm, a threat model with rate=known, or informed=false"
        )
    if not adaptive.derives:
        return
    if unit is None and not adaptive.scale_free:
        raise Unsupported(
            f"what the adaptive attacker derives behind {name!r} needs the gradient in its own units, and the learning "
            "rate is not known; use a threat model with rate=known, or informed=false"
        )
    if threat.shares == "weights" and threat.local_steps > 1 and not adaptive.summed:
        raise Unsupported(
            f"what the adaptive attacker derives behind {name!r} follows from the gradient of one step, and an update "
            f"of {threat.local_steps} local steps is a sum of several; use local_steps=1, or informed=false"
        )


def _undone(observation: Observation, adaptive: AdaptiveAttacker) -> Observation:
    """Return the observation with what the defense did undone, as far as what was sent shows it."""
    if adaptive.undo is None:
        return observation
    before = adaptive.undo(observation.gradient, observation.weights)
    shown = _both({name: ~torch.isnan(value) for name, value in before.items()}, observation.shown)
    gradient = {name: torch.where(shown[name], value, 0.0) for name, value in before.items()}
    return dataclasses.replace(observation, gradient=gradient, shown=shown)


def check_images(observation: Observation, most: int, limits: str) -> None:
    """Raise Unsupported if a client has more images than an attack can return, whatever they are.

    Args:
        observation: what the attacker sees.
        most: how many images it can return at the most.
        limits: the first half of the message: that it returns at most ``most`` images, and by which layer.
    """
    if not most:
        raise Unsupported(f"{limits}; use a wider layer")
    if observation.count > most:
        raise Unsupported(
            f"{limits}, and a client has {observation.count}; give a client at most {most}, or use a wider layer"
        )


def checked(attack: Attack, guess: object, observation: Observation) -> Reconstruction:
    """Return a reconstruction on the observation's device whose failed or non-finite rows are the grey image.

    Raises:
        BadOption: it is no reconstruction, or its shapes are wrong.
    """
    if not isinstance(guess, Reconstruction):
        raise BadOption(f"attack {attack.name!r} returned {type(guess).__name__}; return a Reconstruction")
    expected = _expected(guess, observation)
    if not isinstance(guess.images, torch.Tensor):
        raise BadOption(f"attack {attack.name!r} returned images as {type(guess.images).__name__}; return a tensor")
    if tuple(guess.images.shape) != expected:
        raise BadOption(
            f"attack {attack.name!r} returned images of shape {tuple(guess.images.shape)}; return {expected}"
        )
    rows = {name: getattr(guess, name) for name in ("labels", "objective", "failed", "evaluations")}
    places = expected[: -len(observation.image_shape)]
    for name, value in {**rows, **guess.findings}.items():
        own = places if name == "labels" else expected[:1]
        if value is not None and not isinstance(value, torch.Tensor):
            raise BadOption(f"attack {attack.name!r} returned {name} as {type(value).__name__}; return a tensor")
        if value is not None and tuple(value.shape) != own:
            raise BadOption(f"attack {attack.name!r} returned {name} of shape {tuple(value.shape)}; return {own}")
    curve = guess.curve
    if curve is not None and tuple(curve.values.shape) != (expected[0], len(marks(curve.limit, curve.every))):
        raise BadOption(
            f"attack {attack.name!r} returned a curve of shape {tuple(curve.values.shape)}; give one value for "
            "each trial and mark"
        )
    if guess.reasons and len(guess.reasons) != expected[0]:
        raise BadOption(
            f"attack {attack.name!r} returned {len(guess.reasons)} reasons; return one for each of {expected[0]} trials"
        )
    device = observation.device
    images = guess.images.detach().to(device)
    finite = torch.isfinite(images.flatten(len(places))).all(-1)
    failed = ~finite.view(len(images), -1).any(1)  # an image of a batch that is not finite was not found
    if guess.failed is not None:
        failed = failed | guess.failed.to(device)
    images = torch.where(failed.view(-1, *[1] * (images.ndim - 1)), torch.full_like(images, 0.5), images)
    labels = None if guess.labels is None else guess.labels.to(device)
    return dataclasses.replace(guess, images=images, labels=labels, failed=failed)


def _expected(guess: Reconstruction, observation: Observation) -> tuple[int, ...]:
    """Return the shape that a reconstruction must have; of a batch, any number of images up to the batch's."""
    one = (observation.trials, *observation.image_shape)
    if observation.count == 1 or not isinstance(guess.images, torch.Tensor):
        return one
    given = guess.images.shape[1] if guess.images.ndim == len(one) + 1 else 0
    most = observation.count or given
    return (one[0], min(given, most) or most, *one[1:])
