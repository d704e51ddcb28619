"""The contract of a defense: what changes between a client's private image and what it sends.

A defense is written for ONE client step in plain torch; batching over trials happens elsewhere. No hook changes its
arguments in place. Every hook defaults to the identity.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from leakbench.core.component import Component
from leakbench.core.registry import Registry
from leakbench.core.text import plural
from leakbench.core.types import Gradient, Secret
from leakbench.defenses.adaptive import DEFAULT_ATTACKER, SIMULATE, AdaptiveAttacker
from leakbench.errors import BadOption, DefenseFailed, OldPlugin, Unsupported
from leakbench.gradients.losses import training_loss
from leakbench.gradients.plain import without_checkpointing
from leakbench.gradients.sensitivity import sensitivity


class Step:
    """The local training of one client: what a defense's ``release`` may draw on.

    Where clients share gradients it is one step. Where they share weights, it is one or more steps of SGD, and what a
    defense acts on is the update: a strength in absolute units counts in the update's, which are those of the gradient
    times the learning rate.

    Attributes:
        model: the client's network before it trains, secrets in place, in the mode it trains in.
        images: [B, C, H, W], the data after ``encode``.
        labels: [B] int64 or [B, K] class probabilities, after ``encode``.
        losses: the mean loss of every gradient that was computed so far, of clients that are computed one at a time.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, defense: Defense, trained: Gradient | None = None
    ) -> None:
        self.model = model
        self.images = images
        self.labels = labels
        self.losses: list[float] = []
        self._defense = defense
        self._trained = trained

    def gradient(self) -> Gradient:
        """Return the gradient of the mean loss over the batch, per trainable parameter.

        Where the client shares its weights, the update in its place: ``weights`` less ``trained``.
        """
        if self._trained is None:
            return self._gradient(self.images, self.labels)
        return {name: before - self._trained[name] for name, before in self.weights().items()}

    def gradient_of(self, images: Tensor, labels: Tensor) -> Gradient:
        """Return the gradient of the mean loss over other images, which does not count among ``losses``."""
        known = list(self.losses)
        found = self._gradient(images, labels)
        self.losses[:] = known
        return found

    def per_example(self) -> Gradient:
        """Return each example's own gradient, [B, *shape] per trainable parameter.

        Raises:
            Unsupported: the client shares its weights, in which examples are no longer apart.
        """
        if self._trained is not None:
            raise Unsupported(
                f"defense {self._defense.name!r} acts on the gradient of each example, and weights after local "
                "training have none; use a threat model with shares=gradient"
            )
        return self._by_part(len(self.images))

    def by_part(self, parts: int) -> Gradient:
        """Return the gradient of each of ``parts`` equal parts of the batch by itself, [parts, *shape] per parameter.

        Raises:
            Unsupported: the images cannot be divided so, or the client shares its weights.
        """
        if self._trained is not None:
            raise Unsupported(
                f"defense {self._defense.name!r} acts on the gradients of parts of the batch, and weights after local "
                "training have none; use a threat model with shares=gradient"
            )
        if len(self.images) % parts:
            raise Unsupported(
                f"defense {self._defense.name!r} divides the images among {parts} clients, and there are "
                f"{len(self.images)}; use batch={parts} or a multiple of it"
            )
        return self._by_part(parts)

    def sensitivity(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return r [D], what a linear layer of ``model`` takes for the one image x, and |d r_i / d x|_2 [D].

        Raises:
            Unsupported: the layer does not take one vector, once.
        """
        return sensitivity(self.model, layer, self.images)

    @property
    def structure(self) -> nn.Module:
        """A network like ``model``, to be asked for its layers only: its values may be those of another client."""
        return self.model

    def weights(self) -> Gradient:
        """Return the network's trainable parameters before the client trains."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters().items()}

    def trained(self) -> Gradient:
        """Return the trainable parameters after the client's local training.

        Raises:
            Unsupported: the client shares a gradient.
        """
        if self._trained is None:
            raise Unsupported(
                f"defense {self._defense.name!r} acts on the weights that a client sends, and this one sends a "
                "gradient; use a threat model with shares=weights"
            )
        return {name: value.clone() for name, value in self._trained.items()}

    def _by_part(self, parts: int) -> Gradient:
        """Return the gradient of each of ``parts`` equal parts of the batch."""
        rows = [self._gradient(x, y) for x, y in zip(self.images.chunk(parts), self.labels.chunk(parts))]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _gradient(self, images: Tensor, labels: Tensor) -> Gradient:
        parameters = self._parameters()
        with without_checkpointing():
            loss = self._defense.loss(self.model, images, labels).mean()
        self.losses.append(float(loss.detach()))
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(parameters[name]) if grad is None else grad.detach()
            for name, grad in zip(parameters, grads)
        }


class UpdateStep(Step):
    """Finished local training: its gradient is the update, ``weights`` less ``trained``, of the shared parameters.

    ``per_example`` has the update as the one example, so that DP-SGD's clipping and noise act on clients, not images.

    Args:
        defense: the defense that acts on it.
        before: the parameters that the client received, by name.
        update: ``before`` less the parameters after training.
        seen: the client's network and its last batch, where the defense may see them.
    """

    def __init__(
        self,
        defense: Defense,
        before: Gradient,
        update: Gradient,
        seen: tuple[nn.Module, Tensor, Tensor] | None = None,
    ) -> None:
        self._defense = defense
        self._before = before
        self._update = update
        if seen is not None:
            self.model, self.images, self.labels = seen

    def __getattr__(self, name: str) -> object:
        raise BadOption(
            f"defense {self._defense.name!r} needs the client's {name}, which no mod sees; call release in the client"
        )

    def gradient(self) -> Gradient:
        """Return the update, per shared parameter."""
        return {name: value.clone() for name, value in self._update.items()}

    def per_example(self) -> Gradient:
        """Return the update as that of one example."""
        return {name: value[None].clone() for name, value in self._update.items()}

    def weights(self) -> Gradient:
        """Return the parameters that were received."""
        return {name: self._before[name].clone() for name in self._update}

    def trained(self) -> Gradient:
        """Return the parameters after the client's local training."""
        return {name: self._before[name] - value for name, value in self._update.items()}


class Defense(Component):
    """What a client does to hide its data; subclasses override the hooks they need.

    An attacker who knows the defense and models it is an ``AdaptiveAttacker``: see ``attackers``.

    Attributes:
        companions: how many further images of the client's own data ``encode`` needs beside the attacked one.
        batched: True for a defense that serves a client of several images: ``encode`` gets and returns all of them.
        joint: True for a defense whose ``loss`` runs the network once, on the images that it is given, and whose
            ``release`` is plain torch on tensors of any device. On a GPU the gradients of many clients are then
            computed at once; otherwise clients take their steps on the CPU, one at a time. It is not inherited.
        aggregated: True for a defense whose images are those of several clients, each with statistics of its own.
    """

    companions: ClassVar[int] = 0
    batched: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    aggregated: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Set ``joint``, and build an ``AdaptiveAttacker`` from hooks of it where defenses once had them.

        Raises:
            BadOption: it also has ``relax`` or ``attackers``, which return other things than they did.
        """
        super().__init_subclass__()
        cls.joint = cls.__dict__.get("joint", False)
        old = [name for name in _HOOKS if name in dir(cls)]
        if not old:
            return
        words = f"class {cls.__name__} defines {', '.join(old)}"
        if "relax" in old or "attackers" in cls.__dict__:
            raise BadOption(f"{words}; return an AdaptiveAttacker with it from attackers(), see CONTRIBUTING.md")
        warnings.warn(f"{words}; return an AdaptiveAttacker from attackers() instead", OldPlugin, stacklevel=2)
        cls.attackers = _of_hooks  # type: ignore[assignment, method-assign]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the network that the client trains, made from a copy of ``model``; secrets are named tensors of it."""
        return model

    def secrets(self, model: nn.Module) -> tuple[Secret, ...]:
        """Return the tensors of the wrapped network that never leave the client (nor do their gradients)."""
        return ()

    def encode(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images [B, C, H, W] and labels ([B] or [B, K]) that the client trains on.

        Args:
            x: [1 + companions, C, H, W] in [0, 1], the attacked image first; in training, a defense without companions
                is given a whole batch [B, C, H, W].
            y: [1] or [B] int64; class probabilities [1 + companions, K] for a defense that has companions.
            rng: what the defense draws from.
        """
        return x, y

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return [B], the loss that the client trains with; ``y`` is [B] int64 or [B, K] class probabilities."""
        return training_loss(model, x, y)

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return what is sent, per parameter; secrets are removed afterwards in any case.

        Where the client shares its weights, that is the update as the server computes it from two models.
        """
        return step.gradient()

    def reply(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return what a client that trains sends: the model it was given less the one it sends back, per parameter.

        By default that is what is released. A defense whose server compares two other models overrides this.
        """
        return self.release(step, rng)

    def feedback(self, step: Step, memory: Gradient, rng: torch.Generator) -> tuple[Gradient, Gradient] | None:
        """Return what a client in training sends, and what it keeps of it for its next step or round.

        None, by default: it keeps nothing, and sends what ``release`` or ``reply`` returns.

        Args:
            step: the present one; in federated training the round's whole update.
            memory: what was kept, per parameter; empty before the first step.
            rng: what the defense draws from.
        """
        return None

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the adaptive attackers of the defense by name; none by default.

        ``informed = true`` in a threat model asks for the one named ``default``, ``informed = "NAME"`` for another one.
        """
        return {}

    def note(self) -> str:
        """Return what a reader must know of the defense with these options, in one line, or an empty string."""
        return ""


def checked(defense: Defense, released: object, like: Mapping[str, Tensor], *, finite: bool = True) -> Gradient:
    """Return what a defense released, detached and in the types of the network's parameters.

    A name may be missing: a defense may withhold a parameter.

    Args:
        defense: names itself in the error.
        released: what ``release`` or ``reply`` returned.
        like: the parameters that may be sent, by name.
        finite: whether every value must be finite; a training that diverged is no fault of its defense.

    Raises:
        DefenseFailed: it is no mapping from these names to dense floating-point tensors of the same shapes.
    """
    if not isinstance(released, Mapping):
        raise DefenseFailed(f"{defense.name!r} released {type(released).__name__}; return a dict of tensors by name")
    sent = {}
    for name, value in released.items():
        if name not in like:
            raise DefenseFailed(f"{defense.name!r} released {name!r}, which is not a parameter of its network")
        sent[name] = _tensor(f"{defense.name!r} released {name!r}", value, like[name], finite=finite)
    return sent


def _tensor(said: str, value: object, like: Tensor, *, finite: bool = True) -> Tensor:
    """Return a tensor that a defense returned, detached, of the type and on the device of ``like``.

    Raises:
        DefenseFailed: it is no dense floating-point tensor of the shape of ``like``, or one that must be finite and is
            not; the message begins with ``said``.
    """
    if not isinstance(value, Tensor):
        raise DefenseFailed(f"{said} as {type(value).__name__}; return a tensor")
    if value.layout != torch.strided or value.is_nested or value.is_meta:
        kind = "without values" if value.is_meta else f"with the layout {_short(value.layout)}"
        raise DefenseFailed(f"{said} {kind}; return a dense tensor")
    if not value.is_floating_point():
        raise DefenseFailed(f"{said} as {_short(value.dtype)}; return real floating-point numbers")
    if value.shape != like.shape:
        raise DefenseFailed(f"{said} of shape {tuple(value.shape)}, not {tuple(like.shape)}")
    value = value.detach().to(like)
    wrong = value.numel() - int(torch.isfinite(value).sum()) if finite else 0
    if wrong:
        count = f"{wrong:,} of {plural(value.numel(), 'value')}"
        raise DefenseFailed(f"{said} with {count} not finite in {_short(value.dtype)} (NaN or infinite)")
    return value


def _short(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")


def encoded(defense: Defense, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the images and labels that a client trains on (``Defense.encode``).

    Raises:
        DefenseFailed: they are no finite images [B, C, H, W] of the same shape with one label each.
    """
    pair = defense.encode(x, y, rng)
    if not (isinstance(pair, tuple) and len(pair) == 2):
        raise DefenseFailed(f"{defense.name!r} encoded an image as {type(pair).__name__}; return images and labels")
    images, labels = pair
    rows = len(images) if isinstance(images, Tensor) and images.ndim == 4 else 0
    images = _tensor(f"{defense.name!r} encoded images", images, x[:1].expand(max(1, rows), *x.shape[1:]))
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            kind = f"{_short(labels.dtype)} {tuple(labels.shape)}"
            raise DefenseFailed(f"{defense.name!r} encoded labels as {kind}; return int64 {tuple(images.shape[:1])}")
        return images, labels
    like = images.new_empty(rows, *(labels.shape[1:2] if isinstance(labels, Tensor) and labels.ndim == 2 else ()))
    return images, _tensor(f"{defense.name!r} encoded labels", labels, like)


def by_informed(defense: Defense) -> dict[bool | str, AdaptiveAttacker]:
    """Return a defense's attackers by what a threat model writes for ``informed``: true for the default one.

    Raises:
        BadOption: ``attackers`` returned something else, such as other defenses, or a name that means something else.
    """
    found = defense.attackers()
    values = list(found.values()) if isinstance(found, Mapping) else [found]
    wrong = [type(value).__name__ for value in values if not isinstance(value, AdaptiveAttacker)]
    if wrong or not isinstance(found, Mapping):
        raise BadOption(
            f"defense {defense.name!r}: attackers() returned {(wrong or [type(found).__name__])[0]}; return "
            "AdaptiveAttacker objects by name, see CONTRIBUTING.md"
        )
    for name in found:
        if not isinstance(name, str) or name.lower() in ("true", "false", "every", SIMULATE):
            raise BadOption(f"defense {defense.name!r}: an attacker is named {name!r}; choose another name")
    return {True if name == DEFAULT_ATTACKER else name: attacker for name, attacker in found.items()}


_HOOKS = ("informed", "relax", "undo", "surrogate", "likelihood", "recover", "targets", "scale_free", "summed")
"""Members that defenses had before ``AdaptiveAttacker``; ``informed`` was its description, empty for no attacker."""


def _of_hooks(defense: Defense) -> Mapping[str, AdaptiveAttacker]:
    """Return the attacker that a defense of before states by its own members."""
    hooks = {name: getattr(defense, name) for name in _HOOKS if name in dir(defense)}
    description = hooks.pop("informed", "")
    return {DEFAULT_ATTACKER: AdaptiveAttacker(description, loss=defense.loss, **hooks)} if description else {}


registry: Registry[Defense] = Registry("defense", "leakbench.defenses", Defense)
register = registry.register
