"""Defenses as client mods: a Flower client sends the update that the defense releases, and keeps its secrets."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from torch import Tensor, nn

from leakbench import defenses
from leakbench.core.rng import generator
from leakbench.core.types import Gradient, Secret
from leakbench.defenses import Defense
from leakbench.defenses.base import UpdateStep, checked
from leakbench.errors import BadOption
from leakbench.gradients.evaluate import tensors_of

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]

SECRETS = "leakbench.secrets"
"""The record of a client's state that holds its secrets."""
RELEASES = "leakbench.releases"
"""The record of a client's state that counts its releases, by defense."""
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""The names of the buffers of torch's normalisations."""
MIN_NUMBERS, MIN_ROUNDED_NUMBERS = 4, 16
"""A secret of fewer numbers is not looked for; one of at least the second count is found in rounded numbers too."""
EXACT_TOLERANCE, ROUNDED_TOLERANCE = 1e-6, 0.01
"""Relative difference up to which a number is a secret's, exact or rounded; bfloat16 rounds by 0.4 %."""


def mod(defense: str | Defense, network: nn.Module | None = None, *, seed: int | None = None) -> Mod:
    """Return a client mod that applies a defense to a Flower client's replies: ``ClientApp(mods=[mod("noise")])``.

    The reply to a ``train`` message must hold one ArrayRecord, of the received arrays after training. The defense's
    ``release`` gets the update (received less trained arrays, in place of the gradient, in the weights' units; for
    ``dp`` the client is the one example), and the reply holds the received arrays less the released update. Running
    statistics, integers and metrics are sent unchanged.

    A defense with secrets (``keylock``; the noise of ``precode``) changes the network: train
    ``leakbench.keylock(model)``, or the defense's ``wrap(model)``, in the app, and give one such network here. Its
    secrets are taken out of every reply, kept in ``Context.state``, and put back into the arrays that come next. A
    secret that is not in the state dict (the key) is put into the client's network by
    ``leakbench.flower.restore(model, context)``. Every client begins with the lock of ``network``, and draws a key of
    its own. A reply fails if it holds an array that is not in the network's state dict, by name and shape (a prefix, or
    arrays in a list, could hide a secret), or if its arrays, metrics or configuration hold the numbers of a secret.

    Args:
        defense: acts on the update, or has secrets.
        network: the network that the clients train; needed for secrets. It also distinguishes parameters from buffers;
            without it buffers are recognised by torch's names for them.
        seed: of the defense's draws, for tests: a server that knows it knows the noise. None: the operating system's.

    Raises:
        BadOption: a mod cannot apply the defense; the message says how to apply it. In the client, whose message then
            fails without sending anything: the reply does not hold the received arrays, or holds a secret.
        DefenseFailed: in the client too: what the defense released is no finite update of these arrays.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> app = ClientApp(mods=[mod("noise(scale=0.001)"), mod("clip(norm=1)")])  # the last one acts first
    """
    return _DefenseMod(defenses.parse(defense), network, seed)


def restore(model: nn.Module, context: Context) -> None:
    """Put a client's secrets, which the mod keeps in its context, into its network, which is changed.

    Raises:
        BadOption: the context holds no secrets, or one that is not in the network.
    """
    if SECRETS not in context.state:
        raise BadOption(
            "this client has no secrets; give its ClientApp mods=[leakbench.flower.mod('keylock', network)]"
        )
    tensors = tensors_of(model)
    with torch.no_grad():
        for name, value in _tensors(context.state.array_records[SECRETS]).items():
            if name not in tensors:
                raise BadOption(
                    f"the secret {name!r} is not a tensor of {type(model).__name__}; give the mod that network"
                )
            tensors[name].copy_(value)


@dataclass(frozen=True)
class _DefenseMod:
    """The mod: a defense, the network that it changed, and the seed of its draws."""

    defense: Defense
    network: nn.Module | None
    seed: int | None

    def __post_init__(self) -> None:
        own, name = type(self.defense), self.defense.name
        if own.encode is not Defense.encode:
            raise BadOption(f"defense {name!r} acts on the data; call its encode on every batch in the client instead")
        if own.wrap is not Defense.wrap and own.secrets is Defense.secrets:
            raise BadOption(f"defense {name!r} changes only the network; train its wrap(model), and leave the mod out")
        if own.secrets is not Defense.secrets and not self._secrets():
            instead = "leakbench.keylock(model)" if name == "keylock" else "its wrap(model)"
            raise BadOption(
                f"defense {name!r} keeps tensors of the network secret, and "
                f"{'no network is given' if self.network is None else 'this one has none'}; train {instead} in the "
                f"app, and give such a network: mod({name!r}, network)"
            )
        probe = {"probe": torch.zeros(2)}
        self.defense.release(UpdateStep(self.defense, probe, probe), generator("probe"))

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """Answer a message: secrets in, secrets out, and the update released."""
        secrets = self._secrets()
        received = {name: _tensors(record) for name, record in message.content.array_records.items()}
        if secrets:
            own, inside = self._own(context), self._inside()
            for name, arrays in received.items():
                message.content[name] = _record(arrays | {key: own[key] for key in own if key in inside})
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        hidden = {secret.name for secret in secrets}
        fresh = {secret.name for secret in secrets if secret.fresh}
        known = list(_tensors(context.state.array_records[SECRETS]).items()) if secrets else []
        for name, record in list(reply.content.array_records.items()):
            arrays = _tensors(record)
            known += [(key, value) for key, value in arrays.items() if key in hidden]
            kept = {key: value for key, value in arrays.items() if key in hidden - fresh}
            if kept:
                context.state[SECRETS] = _record(_tensors(context.state.array_records[SECRETS]) | kept)
            reply.content[name] = _record({key: value for key, value in arrays.items() if key not in hidden})
        if secrets:
            self._refuse_secrets(reply.content, hidden, known)
        if message.metadata.message_type.split(".")[0] == MessageType.TRAIN:
            self._release(received, reply, context)
        return reply

    def _refuse_secrets(self, content: RecordDict, hidden: set[str], known: Sequence[tuple[str, Tensor]]) -> None:
        """Raise BadOption if the rest of a reply can hold a secret; ``known`` are the values seen so far."""
        assert self.network is not None
        public = {name: value.shape for name, value in self.network.state_dict().items() if name not in hidden}
        for record in content.array_records.values():
            for name, value in _tensors(record).items():
                if name not in public or value.shape != public[name]:
                    like = next((secret for secret in sorted(hidden) if name.endswith(f".{secret}")), "")
                    why = f"is the secret {like!r} under a prefix" if like else "could be one of its secrets"
                    raise BadOption(
                        f"the reply's array {name!r} of shape {tuple(value.shape)} is not in "
                        f"{type(self.network).__name__} and {why}; nothing was sent: reply with that network's "
                        "state_dict(), and give the mod the same network"
                    )
        for place, part in _parts(content):
            for name, value in known:
                if _holds(part, value):
                    raise BadOption(f"the secret {name!r} is in the reply's {place}; nothing was sent: leave it out")

    def _release(self, received: Mapping[str, Gradient], reply: Message, context: Context) -> None:
        if type(self.defense).release is Defense.release:
            return
        records = reply.content.array_records
        if len(records) != 1 or len(received) != 1:
            raise BadOption(
                f"a message with {len(received)} ArrayRecords and a reply with {len(records)}; a mod protects an app "
                "that exchanges one, the weights"
            )
        ((name, record),) = records.items()
        (before,) = received.values()
        after = _tensors(record)
        for key, value in after.items():
            if key not in before or before[key].shape != value.shape:
                raise BadOption(
                    f"the reply's array {key!r} was not received in this shape, so that its update is not known; reply "
                    "with the arrays that were received, trained further"
                )
        parameters = [key for key, value in after.items() if value.is_floating_point() and self._is_parameter(key)]
        update = {key: before[key] - after[key] for key in parameters}
        step = UpdateStep(self.defense, {key: before[key] for key in parameters}, update)
        finite = all(bool(torch.isfinite(value).all()) for value in update.values())  # else the training diverged
        released = checked(self.defense, self.defense.reply(step, self._rng(context)), update, finite=finite)
        for key in parameters:
            after[key] = before[key] - released.get(key, torch.zeros_like(update[key])).to(before[key])
        reply.content[name] = _record(after)

    def _secrets(self) -> tuple[Secret, ...]:
        return () if self.network is None else self.defense.secrets(self.network)

    def _inside(self) -> set[str]:
        """Return the names of the secrets that the network's state dict holds."""
        return set() if self.network is None else set(self.network.state_dict())

    def _is_parameter(self, name: str) -> bool:
        if self.network is None:
            return not name.endswith(BUFFERS)
        return name in dict(self.network.named_parameters())

    def _own(self, context: Context) -> Gradient:
        """Return the client's secrets, made at the first call; zeros for those that are drawn in each pass."""
        assert self.network is not None
        tensors, inside = tensors_of(self.network), self._inside()
        held = _tensors(context.state.array_records.get(SECRETS, ArrayRecord()))
        rng = self._generator("secrets", context.node_id)
        for secret in self._secrets():
            if not secret.fresh and secret.name not in held:
                value = tensors[secret.name].detach()
                held[secret.name] = value if secret.name in inside else secret.law.draw(tuple(value.shape), rng)
        context.state[SECRETS] = _record(held)
        fresh = {secret.name: torch.zeros_like(tensors[secret.name]) for secret in self._secrets() if secret.fresh}
        return held | fresh

    def _rng(self, context: Context) -> torch.Generator:
        """Return a generator for this release; no two releases of a client draw the same numbers."""
        counts = context.state.config_records.get(RELEASES, ConfigRecord())
        spec = defenses.registry.spec(self.defense)
        number = int(counts.get(spec, 0)) + 1
        context.state[RELEASES] = ConfigRecord({**counts, spec: number})
        return self._generator("release", spec, context.node_id, number)

    def _generator(self, *key: object) -> torch.Generator:
        if self.seed is not None:
            return generator("flower", self.seed, *key)
        rng = torch.Generator()
        rng.seed()
        return rng


def _parts(content: RecordDict) -> Iterator[tuple[str, np.ndarray | bytes]]:
    """Yield everything in a message that can hold numbers: its name, and flat float64 or bytes."""
    for arrays in content.array_records.values():
        for name, array in arrays.items():
            yield f"array {name!r}", array.numpy().astype(np.float64, copy=False).ravel()
    for record in (*content.metric_records.values(), *content.config_records.values()):
        yield "single values", _numbers(record.values())
        for name, value in record.items():
            values = value if isinstance(value, list) else [value]
            if values is value:
                yield f"list {name!r}", _numbers(values)
            yield from ((f"bytes {name!r}", one) for one in values if isinstance(one, bytes))


def _numbers(values: Iterable[object]) -> np.ndarray:
    return np.array([value for value in values if isinstance(value, (int, float))], dtype=np.float64)


def _holds(part: np.ndarray | bytes, secret: Tensor) -> bool:
    """Return whether a part holds all numbers of a secret in order; a secret of equal numbers is never found."""
    wanted = secret.detach().double().flatten().numpy()
    if wanted.size < MIN_NUMBERS or np.ptp(wanted) == 0:
        return False
    if isinstance(part, bytes):
        return any(wanted.astype(kind).tobytes() in part for kind in (np.float16, np.float32, np.float64))
    if wanted.size > part.size:
        return False
    tolerance = ROUNDED_TOLERANCE if wanted.size >= MIN_ROUNDED_NUMBERS else EXACT_TOLERANCE
    windows = np.lib.stride_tricks.sliding_window_view(part, wanted.size)
    largest = np.abs(wanted).argmax()
    starts = np.flatnonzero(np.isclose(windows[:, largest], wanted[largest], tolerance, 0))
    return any(np.allclose(windows[start], wanted, tolerance, 0) for start in starts)


def _tensors(record: ArrayRecord) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def _record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(value.detach().cpu().numpy()) for name, value in tensors.items()})
