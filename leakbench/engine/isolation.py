"""Attacks that are not part of leakbench run in processes of their own, one for each call.

Such a process holds the attack, what it observes and its source of random numbers. It has no private image, no other
trial, no memory of an earlier call, an empty working folder, and no ``LEAKBENCH_*`` variable but one. Its answer is
read as data. ``docs/safety.md`` says what this stops and what it does not.

Importing torch takes seconds. Therefore a *template* process imports it once, is given nothing else, and is copied for
every call (on Linux; elsewhere every call has a process that starts from the beginning).
"""

import contextlib
import io
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch

from leakbench import errors
from leakbench.attacks import Attack
from leakbench.attacks.base import checked
from leakbench.core.compiled import SWITCH
from leakbench.core.component import shipped
from leakbench.core.device import empty_cache
from leakbench.core.lock import remove_abandoned, temporary_folder
from leakbench.core.loss_curve import Curve
from leakbench.core.registry import plugins
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.engine.batch_size import chunk_size
from leakbench.errors import LeakbenchError, one_line
from leakbench.observation import Observation

INSIDE = "leakbench.engine.isolated"
"""The module that only the processes of attacks import."""

MAX_OUTPUT = 2**16
"""Bytes of the end of what an attack prints that are passed on."""

LENGTH = struct.Struct("!Q")
"""The length in front of a message."""
EXIT_CODE = struct.Struct("!i")
"""The exit code that the template reports."""

_KNOWN = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LeakbenchError)
}


class AttackError(Exception):
    """An attack raised an error in its own process, or ended it; the message begins with the type of the error."""


@dataclass(frozen=True)
class Call:
    """What the process of an attack is asked.

    Attributes:
        verb: ``run`` the attack, ``check`` whether it supports the observation, or measure the ``size`` of its chunks.
        limits: for ``size``: the last three arguments of ``chunk_size``.
    """

    verb: Literal["run", "check", "size"]
    attack: Attack
    observation: Observation
    rng: Rng | None = None
    limits: tuple[bool, int, float] | None = None


@dataclass(frozen=True)
class Setting:
    """What a process must import before it can read a call, and its number of threads."""

    plugins: tuple[Path, ...]
    script: Path | None
    path: tuple[str, ...]
    threads: int


def foreign(attack: Attack) -> bool:
    """Return whether code runs in an attack that is not part of leakbench: its class, a base, or what it ``uses``."""
    return not (shipped(type(attack)) and all(shipped(type(part)) for part in attack.uses()))


def refuse_inside() -> None:
    """Raise LeakbenchError in the process of an attack, which must not start a run of its own."""
    if INSIDE in sys.modules:
        raise LeakbenchError(
            "the script that defines the attack starts a run when it is imported; call leakbench.run under "
            "if __name__ == '__main__'"
        )


@dataclass
class Isolation:
    """Calls attacks: those of leakbench in this process, others each time in a process of its own.

    Attributes:
        template: the process that is copied for each call; None before the first call, and after an attack ended it.
    """

    template: "Template | None" = field(default=None, init=False)

    def run(self, attack: Attack, observation: Observation, rng: Rng) -> Reconstruction:
        """Return what ``attack(observation, rng)`` returns.

        Raises:
            Unsupported: as the attack does, and so is any other LeakbenchError.
            AttackError: the attack raised any other error, or its process died.
            MemoryError: it ran out of memory.
        """
        if not foreign(attack):
            return attack(observation, rng)
        found = self._answer(Call("run", attack, replace(observation, tick=None, note=None), rng))
        return checked(attack, _reconstruction(attack, found), observation)

    def check(self, attack: Attack, observation: Observation) -> None:
        """Raise Unsupported if the attack cannot serve this observation; see ``run`` for other errors."""
        if not foreign(attack):
            attack.preflight(observation)
        else:
            self._answer(Call("check", attack, observation))

    def size(self, attack: Attack, observation: Observation, own: bool, trials: int, share: float) -> int | None:
        """Return how many trials to run at a time (``chunk_size``); see ``run`` for errors."""
        if not foreign(attack):
            return chunk_size(attack, observation, own, trials, share)
        found = self._answer(Call("size", attack, observation, limits=(own, trials, share)))
        return max(1, min(trials, found)) if isinstance(found, int) else None

    def close(self) -> None:
        """End the template, and with it the process of a call."""
        if self.template is not None:
            self.template.close()
            self.template = None

    def _answer(self, call: Call) -> object:
        """Return the answer to a call, plain values and tensors; raise the error that it is."""
        message = _packed(call)
        empty_cache(call.observation.device)  # what this process keeps for later is missing in the other one
        try:
            if self.template is None:
                self.template = Template()
            answer, said, code = self.template.ask(message)
        except BaseException:
            self.close()
            raise
        if code is None or sys.platform != "linux":  # it has ended
            self.close()
        sys.stderr.write(said)
        if answer is None:
            last = next((line for line in reversed(said.splitlines()) if line.strip()), "it printed nothing")
            raise AttackError(f"the process of the attack {call.attack.name!r} ended {_death(code)}: {one_line(last)}")
        try:
            found = torch.load(io.BytesIO(answer), map_location="cpu", weights_only=True)
            kind, value, text = one_line(found["kind"]), found["value"], one_line(found["text"])
        except Exception as error:  # whatever the bytes make torch raise
            raise AttackError(
                f"the answer of the attack {call.attack.name!r} cannot be read: {one_line(error)}"
            ) from None
        if kind == "memory":
            raise MemoryError(text)
        if kind in _KNOWN:
            raise _KNOWN[kind](text)
        if kind:
            raise AttackError(f"{kind}: {text}")
        return value


def _packed(call: Call) -> bytes:
    """Return a call as the message for another process.

    Raises:
        LeakbenchError: another process cannot import a component.
    """
    try:
        body = pickle.dumps(call, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise LeakbenchError(
            f"attack {call.attack.name!r} runs in a process of its own, and a component cannot be sent there: "
            f"{one_line(error)}; define it at the top level of a module"
        ) from error
    script = None
    if b"__main__" in body:
        file = getattr(sys.modules["__main__"], "__file__", None)
        if file is None or not Path(file).is_file():
            raise LeakbenchError(
                f"attack {call.attack.name!r} runs in a process of its own, which cannot import what is defined in a "
                "notebook or at a prompt; put it into a .py file, and import that"
            )
        script = Path(file).resolve()
    path = tuple(str(Path(folder).resolve()) for folder in sys.path)
    setting = Setting(tuple(plugins()), script, path, torch.get_num_threads())
    head = pickle.dumps(setting, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(head)) + LENGTH.pack(len(body)) + head + body


def _reconstruction(attack: Attack, found: object) -> object:
    """Return the reconstruction in an answer; what is none is returned as it is."""
    if not isinstance(found, dict) or not isinstance(found.get("findings"), dict):
        return found
    curve: Any = found.get("curve")
    if isinstance(curve, dict):
        curve = Curve(int(curve["limit"]), int(curve["every"]), curve["values"])
    names = ("images", "labels", "objective", "failed", "evaluations")
    findings = {one_line(name): value for name, value in found["findings"].items()}
    tensors: dict[str, Any] = {name: found.get(name) for name in names}
    reasons = tuple(one_line(each) for each in found.get("reasons", ()))
    path = one_line(found.get("path", ""))
    return Reconstruction(**tensors, path=path, findings=findings, curve=curve, reasons=reasons)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return f"by {name}{' (as the system does when memory runs out)' if name == 'SIGKILL' else ''}"
    return "with its template" if code is None else f"with exit code {code}"


class Template:
    """A process that has imported torch and leakbench, and is copied for every call."""

    def __init__(self) -> None:
        refuse_inside()
        remove_abandoned()
        self._open = contextlib.ExitStack()  # as long as the process
        folder = str(self._open.enter_context(temporary_folder("attack")))
        self._log = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._control, there = socket.socketpair()
        path = [str(Path(folder).resolve()) for folder in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from {INSIDE} import main; main({there.fileno()})"
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[there.fileno()],
                cwd=folder,
                env=environment(folder),
                start_new_session=True,  # Ctrl-C in a terminal goes to the driver only, which ends the template
            )

    def close(self) -> None:
        """Kill the process; a call that it does ends with it."""
        self._control.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._open.close()

    def ask(self, message: bytes) -> tuple[bytes | None, str, int | None]:
        """Return the answer to a call, None if its process ended without one; what it printed; and its exit code.

        The exit code is None if the template has ended.
        """
        here, there = socket.socketpair()
        with here, tempfile.TemporaryFile() as said, temporary_folder("attack") as folder:
            with there, contextlib.suppress(OSError):  # the template has ended
                socket.send_fds(self._control, [bytes(folder)], [there.fileno(), said.fileno()])
            with contextlib.suppress(OSError):  # the process has ended
                here.sendall(message)
            answer, code = self._received(here)
            printed = _end_of(said) or (_end_of(self._log) if code is None else "")
            return answer, printed, code

    def _received(self, here: socket.socket) -> tuple[bytes | None, int | None]:
        """Return an answer, and the exit code of the process that gave it."""
        data, code, ended, total = bytearray(), None, False, None
        while not ended and (total is None or len(data) < total):
            ready = wait([here, self._control])
            ended = here not in ready  # the template reports the end of the process after all that it sent
            if ended:
                code = self._exit_code()
                break
            part = _receive(here)
            if not part:
                break
            data += part
            if total is None and len(data) >= LENGTH.size:
                total = LENGTH.size + LENGTH.unpack_from(data)[0]
        code = code if ended else self._exit_code()
        return (bytes(data[LENGTH.size :]) if total is not None and len(data) == total else None), code

    def _exit_code(self) -> int | None:
        """Wait for the end of the process of a call; return its exit code, None if the template ended."""
        data = _receive(self._control)
        return EXIT_CODE.unpack(data)[0] if len(data) == EXIT_CODE.size else None


def _receive(connection: socket.socket) -> bytes:
    """Return the next bytes, none at the end."""
    try:
        return connection.recv(2**20)
    except OSError:
        return b""


def _end_of(file: Any) -> str:
    """Return the end of what was written to a file."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - MAX_OUTPUT))
    text: str = file.read().decode(errors="replace")
    return text


def environment(folder: str) -> Mapping[str, str]:
    """Return the variables of an attack's process: of leakbench only the switch of the kernels."""
    hidden = ("PWD", "OLDPWD", "_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LEAKBENCH_") or name == SWITCH}
    return {name: value for name, value in kept.items() if name not in hidden} | {"PWD": folder}
