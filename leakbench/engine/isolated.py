"""The process in which an attack runs that is not part of leakbench; ``isolation.py`` starts it and asks it.

Only these processes import this module.
"""

import contextlib
import ctypes
import importlib.util
import io
import os
import pickle
import signal
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

from leakbench.core.device import make_current, out_of_memory
from leakbench.core.malloc import keep_freed_memory
from leakbench.core.registry import load_plugin
from leakbench.core.types import Reconstruction
from leakbench.engine.batch_size import chunk_size
from leakbench.engine.isolation import EXIT_CODE, LENGTH, Call, Setting
from leakbench.errors import OldPlugin
from leakbench.gradients import full_precision

COPIES = sys.platform == "linux"
"""Whether a process is copied for each call; with the threads of other systems' libraries that is not safe."""


def main(descriptor: int) -> None:
    """Answer the calls that arrive on a socket, each in a copy of this process, until its other end is closed."""
    _end_with_the_parent()
    control = socket.socket(fileno=descriptor)
    while True:
        folder, (call, said), _, _ = _received(control)
        if not COPIES:
            threading.Thread(target=_watch, args=(control,), daemon=True).start()
            _serve(call, said, folder)
        process = os.fork()
        if process == 0:
            control.close()
            _end_with_the_parent()
            os.setpgid(0, 0)
            _serve(call, said, folder)
        os.close(call)
        os.close(said)
        _, status = os.waitpid(process, 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)  # what the attack started
        control.sendall(EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))


def _received(control: socket.socket) -> tuple[bytes, list[int], int, Any]:
    """Return the next folder, with the descriptors of the call's socket and of the file for what it prints."""
    received = socket.recv_fds(control, 4096, 2)
    if not received[0]:
        os._exit(0)
    return received


def _watch(control: socket.socket) -> None:
    """End this process with its parent."""
    control.recv(1)
    os._exit(1)


def _end_with_the_parent() -> None:
    """Have the system kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _serve(call: int, said: int, folder: bytes) -> NoReturn:
    """Read one call, write the answer, and end this process."""
    os.chdir(folder)
    os.environ["PWD"] = os.fsdecode(folder)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.close(said)
    connection = socket.socket(fileno=call)
    sizes = [LENGTH.unpack(_exactly(connection, LENGTH.size))[0] for _ in range(2)]
    head, body = [_exactly(connection, size) for size in sizes]
    answer = _answer(head, body)
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(LENGTH.pack(len(answer)) + answer)
    os._exit(0)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    """Return this many bytes; end the process if there are fewer."""
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(2**20, size - len(data)))
        if not part:
            os._exit(1)
        data += part
    return data


def _answer(head: bytearray, body: bytearray) -> bytes:
    """Return the answer to a call: plain values and tensors in the format of ``torch.save``."""
    found: dict[str, object] = {"kind": "", "value": None, "text": ""}
    try:
        warnings.simplefilter("ignore", OldPlugin)  # the driver has shown it
        setting: Setting = pickle.loads(head)
        sys.path[:] = setting.path
        for file in setting.plugins:
            load_plugin(file)
        if setting.script is not None:
            _load_script(setting.script)
        torch.set_num_threads(setting.threads)
        keep_freed_memory()
        call: Call = pickle.loads(body)
        make_current(call.observation.device)
        with full_precision():
            found["value"] = _do(call)
    except (Exception, SystemExit) as error:
        found |= {"kind": "memory" if out_of_memory(error) else type(error).__name__, "text": str(error)}
    stream = io.BytesIO()
    torch.save(found, stream)
    return stream.getvalue()


def _do(call: Call) -> object:
    match call.verb:
        case "run":
            assert call.rng is not None
            return _plain(call.attack(call.observation, call.rng))
        case "check":
            call.attack.preflight(call.observation)
            return None
        case "size":
            assert call.limits is not None
            return chunk_size(call.attack, call.observation, *call.limits)


def _plain(guess: Reconstruction) -> dict[str, object]:
    """Return a reconstruction as plain values and tensors."""
    values = {name: _on_cpu(value) for name, value in vars(guess).items() if name not in ("findings", "curve", "path")}
    curve = guess.curve
    return values | {
        "path": str(guess.path),
        "findings": {str(name): _on_cpu(value) for name, value in guess.findings.items()},
        "curve": curve and {"limit": curve.limit, "every": curve.every, "values": _on_cpu(curve.values)},
    }


def _on_cpu(value: object) -> object:
    """Return a tensor as one on the CPU without a graph, with only its own values; anything else as it is."""
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _load_script(file: Path) -> None:
    """Import the script that the driver runs, in which components are defined, under the name that they have."""
    spec = importlib.util.spec_from_file_location("__mp_main__", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["__mp_main__"] = sys.modules["__main__"] = module
    spec.loader.exec_module(module)
