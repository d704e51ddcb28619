from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import leakbench
from leakbench.errors import BadOption, LeakbenchError


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("mod", "record", "simulate"):
        with pytest.raises(LeakbenchError, match="pip install 'flwr>="):
            getattr(leakbench.flower, name)


@pytest.fixture
def app():
    leakbench.flower.require()
    import tests.flower_app as app

    return app


def run(app, client, **options):
    simulation = {key: options.pop(key) for key in ("workers", "failed") if key in options}
    server, results = app.server_app(**options)
    leakbench.flower.simulate(server, client, app.CLIENTS, **simulation)
    return results["result"]


def arrays(result) -> dict[str, torch.Tensor]:
    return dict(result.arrays.to_torch_state_dict())


def by_hand(app, rounds: int) -> dict[str, torch.Tensor]:
    """Federated averaging without Flower."""
    shared = {name: value.double() for name, value in app.network().state_dict().items()}
    for _ in range(rounds):
        total = {name: torch.zeros_like(value) for name, value in shared.items()}
        for client in range(app.CLIENTS):
            net = app.network()
            net.load_state_dict(shared)
            images, labels = app.data(client)
            nn.functional.cross_entropy(net(images), labels).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
            for name, value in net.state_dict().items():
                total[name] += value.double() * len(images) / sum(app.EXAMPLES)
        shared = total
    return shared


@pytest.mark.fl
def test_a_simulation_is_federated_averaging(app) -> None:
    spy: list = []
    result = run(app, app.client_app(), rounds=3, spy=spy)
    expected = by_hand(app, 3)
    for name, value in arrays(result).items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)
    assert [message.metadata.src_node_id for message in spy[3:6]] == [1, 2, 3]
    assert result.train_metrics_clientapp[3]["rounds"] == 3  # a client's state lives from round to round


@pytest.mark.fl
def test_a_client_that_raises_ends_the_simulation_or_is_reported(app) -> None:
    with pytest.raises(LeakbenchError) as caught:
        run(app, app.client_app(failing=1))
    assert str(caught.value) == "client 2 failed to train in round 2: ValueError: the disk is full"
    seen: list = []
    result = run(app, app.client_app(failing=1), failed=seen.append)
    assert [(failure.client, failure.round, failure.kind) for failure in seen] == [(2, 2, "train"), (2, 3, "train")]
    assert "in train" in seen[0].trace
    assert set(result.train_metrics_clientapp) == {1, 2, 3}


@pytest.mark.fl
def test_bad_simulations_are_refused(app) -> None:
    server, _ = app.server_app()
    with pytest.raises(BadOption, match="clients is 0"):
        leakbench.flower.simulate(server, app.client_app(), 0)
    from leakbench.flower import simulation

    grid = simulation.SimulatedGrid(2, simulation.in_process(app.client_app()))
    for _ in range(simulation.MAX_QUERIES):
        assert list(grid.get_node_ids()) == [1, 2]
    with pytest.raises(LeakbenchError, match="waits for more clients than the 2"):
        grid.get_node_ids()


@pytest.mark.fl
def test_replies_are_pulled_by_the_ids_of_the_messages(app) -> None:
    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    client, server = ClientApp(), ServerApp()
    client.query()(lambda message, context: Message(RecordDict(), reply_to=message))

    @server.main()
    def main(grid, context) -> None:
        ids = list(grid.push_messages([Message(RecordDict(), node, "query") for node in (2, 1, 2)]))
        first = list(grid.pull_messages(ids[:2]))
        assert [reply.metadata.src_node_id for reply in first] == [1, 2]
        assert [reply.metadata.reply_to_message_id for reply in first] == [ids[1], ids[0]]
        assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)] == [ids[2]]

    leakbench.flower.simulate(server, client, 2)


@pytest.mark.fl
def test_nothing_is_sent_over_the_network(app, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    run(app, app.client_app())
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"


def wire(message) -> bytes:
    from flwr.common.serde import message_to_proto

    return message_to_proto(message).SerializeToString()


def carries(messages: list, tensor: torch.Tensor) -> bool:
    return any(tensor.numpy().tobytes() in wire(message) for message in messages)


@pytest.mark.fl
def test_no_secret_leaves_a_client(app) -> None:
    from flwr.serverapp.strategy import FedAvg

    locked = app.network(locked=True)
    spy: list = []
    secrets: list = []
    keep = leakbench.flower.mod("keylock(length=8)", locked, seed=0)  # a seed whose gates are not all shut
    client = app.client_app(keep, locked=True, secrets=secrets)
    result = run(app, client, strategy=FedAvg(), locked=True, spy=spy)
    assert len(spy) == 36
    assert len(result.evaluate_metrics_clientapp) == 3
    assert len(secrets) == 9
    for message in spy:
        names = [name for record in message.content.array_records.values() for name in record]
        assert not any("key" in name or ".scale." in name or ".shift." in name for name in names)
    for own in secrets:
        for name, value in own.items():
            assert name == "client" or not carries(spy, value), (name, value)
    assert any(carries(spy, value) for value in app.network().state_dict().values() if value.numel() > 3)
    # each client has one key of its own, and its lock goes on from where it was
    of = [[own for own in secrets if int(own["client"]) == client] for client in range(app.CLIENTS)]
    for client in range(app.CLIENTS):
        assert all(torch.equal(own["key"], of[client][0]["key"]) for own in of[client])
        assert not torch.equal(of[client][0]["key"], of[client - 1][0]["key"])
        assert not torch.equal(of[client][0]["norm.scale.weight"], of[client][1]["norm.scale.weight"])
    assert "norm.scale.weight" not in result.arrays


def under_a_prefix(content, own: dict[str, torch.Tensor]) -> None:
    from flwr.app import ArrayRecord

    arrays = content["arrays"].to_torch_state_dict()
    content["arrays"] = ArrayRecord({f"module.{name}": value for name, value in arrays.items()})


def in_a_list(content, own: dict[str, torch.Tensor]) -> None:
    from flwr.app import ArrayRecord

    content["arrays"] = ArrayRecord([value.numpy() for value in content["arrays"].to_torch_state_dict().values()])


def in_another_record(content, own: dict[str, torch.Tensor]) -> None:
    from flwr.app import ArrayRecord

    content["more"] = ArrayRecord({"best": own["norm.scale.weight"]})


def in_place_of_a_weight(content, own: dict[str, torch.Tensor]) -> None:
    from flwr.app import ArrayRecord

    arrays = dict(content["arrays"].to_torch_state_dict())
    arrays["fc.weight"] = arrays["fc.weight"].clone()
    arrays["fc.weight"].view(-1)[5 : 5 + own["key"].numel()] = own["key"]
    content["arrays"] = ArrayRecord(arrays)


def rounded_among_the_metrics(content, own: dict[str, torch.Tensor]) -> None:
    content["metrics"]["norms"] = own["norm.scale.weight"].bfloat16().flatten().tolist()


def one_by_one_among_the_metrics(content, own: dict[str, torch.Tensor]) -> None:
    for place, value in enumerate(own["key"].tolist()):
        content["metrics"][f"m{place}"] = value


def in_bytes(content, own: dict[str, torch.Tensor]) -> None:
    from flwr.app import ConfigRecord

    content["extra"] = ConfigRecord({"blob": b"x" + own["key"].numpy().tobytes()})


@pytest.mark.fl
@pytest.mark.parametrize(
    ("hide", "says"),
    [
        (under_a_prefix, "is the secret 'norm.scale.weight' under a prefix|'module.conv.weight' of shape"),
        (in_a_list, "array '0' of shape"),
        (in_another_record, "array 'best' of shape"),
        (in_place_of_a_weight, "the secret 'norm.key' is in the reply's array 'fc.weight'"),
        (rounded_among_the_metrics, "the secret 'norm.scale.weight' is in the reply's list 'norms'"),
        (one_by_one_among_the_metrics, "the secret 'norm.key' is in the reply's single values"),
        (in_bytes, "the secret 'norm.key' is in the reply's bytes 'blob'"),
    ],
)
def test_a_secret_under_another_name_never_leaves_a_client(app, hide, says: str) -> None:
    from leakbench.flower.mods import SECRETS

    own: dict[str, torch.Tensor] = {}

    def smuggle(message, context, call_next):
        reply = call_next(message, context)
        own.update(context.state[SECRETS].to_torch_state_dict())
        lock = reply.content["arrays"].to_torch_state_dict()
        own.update({name: value for name, value in lock.items() if name.startswith("norm.scale.")})
        hide(reply.content, {**own, "key": own["norm.key"]})
        return reply

    spy: list = []
    failures: list = []
    keep = leakbench.flower.mod("keylock(length=8)", app.network(locked=True), seed=0)
    client = app.client_app(keep, smuggle, locked=True)
    run(app, client, locked=True, spy=spy, rounds=1, failed=failures.append)
    assert len(failures) == app.CLIENTS
    assert all(re.search(says, failure.reason) for failure in failures), failures[0].reason
    assert all("nothing was sent" in failure.reason for failure in failures)
    assert not any(carries(spy, value) for value in own.values() if value.numel() > 3)
    assert all(message.has_error() for message in spy[app.CLIENTS :])


def first_updates(app, *mods) -> list[dict[str, torch.Tensor]]:
    """Return what each client's weights lost in the first round, as the server sees it."""
    spy: list = []
    run(app, app.client_app(*mods), spy=spy, rounds=1)
    sent, replies = sorted(spy[: app.CLIENTS], key=lambda m: m.metadata.dst_node_id), spy[app.CLIENTS :]
    return [
        {
            name: before.double() - reply.content["arrays"].to_torch_state_dict()[name].double()
            for name, before in message.content["arrays"].to_torch_state_dict().items()
        }
        for message, reply in zip(sent, replies)
    ]


def norm(update: dict[str, torch.Tensor]) -> float:
    names = [name for name, _ in nn.Module.named_parameters(NET())]
    return float(torch.cat([update[name].flatten() for name in names]).norm())


def NET() -> nn.Module:
    import tests.flower_app as app

    return app.network()


@pytest.mark.fl
def test_a_mod_releases_the_update(app) -> None:
    mod = leakbench.flower.mod
    plain = first_updates(app)
    clipped = first_updates(app, mod("clip(norm=0.01)"))
    assert all(norm(update) > 0.02 for update in plain)
    assert [norm(update) for update in clipped] == pytest.approx([0.01] * 3, rel=1e-3)
    pruned = first_updates(app, mod("prune(ratio=0.5)"))
    noisy = first_updates(app, mod("noise(scale=0.1)", seed=1))
    again = first_updates(app, mod("noise(scale=0.1)", seed=1))
    for before, small, changed, repeated in zip(plain, pruned, noisy, again):
        zeros = small["fc.weight"] == 0
        assert zeros.double().mean() == pytest.approx(0.5, abs=0.01)
        torch.testing.assert_close(small["fc.weight"][~zeros], before["fc.weight"][~zeros], atol=1e-7, rtol=0)
        assert float((changed["fc.weight"] - before["fc.weight"]).std()) == pytest.approx(0.1, rel=0.1)
        assert torch.equal(changed["fc.weight"], repeated["fc.weight"])
        for name in ("norm.running_mean", "norm.num_batches_tracked"):
            assert torch.equal(changed[name], before[name])
    assert not torch.equal(noisy[0]["conv.weight"] - plain[0]["conv.weight"], noisy[1]["conv.weight"])
    both = first_updates(app, mod("clip(norm=0.01)"), mod("noise(scale=0.1)"))  # the last acts first
    assert [norm(update) for update in both] == pytest.approx([0.01] * 3, rel=1e-3)


@pytest.mark.fl
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mixup", "acts on the data; call its encode"),
        ("norm-only", "changes only the network; train its wrap"),
        ("keylock", r"no network is given; train leakbench.keylock\(model\)"),
        ("precode", r"no network is given; train its wrap\(model\)"),
        ("soteria", "needs the client's images, which no mod sees"),
    ],
)
def test_a_mod_refuses_a_defense_that_it_cannot_apply(app, spec: str, says: str) -> None:
    with pytest.raises(BadOption, match=says):
        leakbench.flower.mod(spec)
    if spec == "keylock":
        with pytest.raises(BadOption, match="this one has none"):
            leakbench.flower.mod(spec, app.network())


@pytest.mark.fl
def test_precode_keeps_its_noise(app) -> None:
    from flwr.app import ArrayRecord, Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    net = leakbench.defenses.parse("precode(k=4)").wrap(app.network())
    (name,) = [name for name in net.state_dict() if name.endswith("noise")]
    keep = leakbench.flower.mod("precode(k=4)", net)
    public = {key: value for key, value in net.state_dict().items() if key != name}
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    message = Message(RecordDict({"arrays": ArrayRecord(public)}), dst_node_id=1, message_type="evaluate")

    def client(message: Message, context: Context) -> Message:
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())  # strict: the noise is there
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict())}), reply_to=message)

    reply = keep(message, Context(1, 1, {}, RecordDict(), {}), client)
    assert set(reply.content["arrays"]) == set(public)


@pytest.mark.fl
def test_a_recording_is_what_was_on_the_wire(app, tmp_path: Path) -> None:
    from flwr.serverapp.strategy import FedAvg

    spy: list = []
    strategy = leakbench.flower.record(FedAvg(), tmp_path / "updates", clients=[1, 3], rounds=[1, 2])
    result = run(app, app.client_app(), strategy=strategy, spy=spy, rounds=3)
    plain = run(app, app.client_app(), rounds=3)
    for name, value in arrays(plain).items():
        assert torch.equal(arrays(result)[name], value)
    found = sorted(str(path.relative_to(tmp_path / "updates")) for path in tmp_path.glob("updates/*/*"))
    assert found == [f"round-000{n}/client-{c}" for n in (1, 2) for c in (1, 3)]
    for number in (1, 2):
        for client in (1, 3):
            folder = tmp_path / "updates" / f"round-000{number}" / f"client-{client}"
            start = 12 * (number - 1)  # of training; then six messages of an evaluation
            (message,) = [m for m in spy[start : start + 3] if m.metadata.dst_node_id == client]
            (reply,) = [m for m in spy[start + 3 : start + 6] if m.metadata.src_node_id == client]
            for file, source in (("before", message), ("after", reply)):
                recorded = load_file(folder / f"{file}.safetensors")
                assert set(recorded) == set(app.network().state_dict())
                for name, value in source.content["arrays"].to_torch_state_dict().items():
                    assert torch.equal(recorded[name], value)
            facts = json.loads((folder / "facts.json").read_text())
            assert (facts["round"], facts["client"]) == (number, client)
            assert facts["examples"] == app.EXAMPLES[client - 1]
            assert facts["strategy"] == "FedAvg"
    with pytest.raises(BadOption, match="is not empty"):
        leakbench.flower.record(FedAvg(), tmp_path / "updates")
    with pytest.raises(BadOption, match="not a strategy of Flower's message API"):
        leakbench.flower.record("fedavg", tmp_path / "other")


@pytest.mark.fl
def test_a_recording_states_the_recipe_under_its_usual_names(app, tmp_path: Path) -> None:
    """Of several statements the client's own counts, then what the server sent it, then what the app says of all."""
    from flwr.app import ConfigRecord
    from flwr.serverapp.strategy import FedAvg

    class Told(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            told = {"Local_Epochs": 3, "batch_size": 16, "learning-rate": 0.1, "optimiser": 5}
            return super().configure_train(server_round, arrays, ConfigRecord({**config, **told}), grid)

    def states(message, context, call_next):
        reply = call_next(message, context)
        reply.content["metrics"].update({"local-lr": 0.05, "num_steps": 6})
        return reply

    config = {"epochs": 1, "batch-size": 8, "weight_decay": 5e-4, "momentum": 0.9, "optimizer": "sgd", "rounds": 7}
    strategy = leakbench.flower.record(Told(), tmp_path / "updates", clients=[1], config=config)
    run(app, app.client_app(states), strategy=strategy, rounds=1)
    facts = json.loads((tmp_path / "updates/round-0001/client-1/facts.json").read_text())
    stated = {key: facts[key] for key in ("batch", "epochs", "steps", "lr", "optimizer", "momentum", "weight_decay")}
    assert stated == {
        "batch": 16,
        "epochs": 3,
        "steps": 6,
        "lr": 0.05,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }


@pytest.mark.fl
def test_the_lines_of_the_documentation_run(app, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "flower.md").read_text(encoding="utf-8")
    (block,) = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "leakbench.flower import mod" in code
    ]
    exec(block, {})
    folders = sorted(path.name for path in tmp_path.glob("updates/round-0001/*"))
    assert folders == ["client-1", "client-2", "client-3"]
    for folder in tmp_path.glob("updates/round-0001/*"):
        before, after = (load_file(folder / f"{name}.safetensors") for name in ("before", "after"))
        update = torch.cat([(before[name] - after[name]).flatten() for name in before])
        assert float(update.norm()) <= 0.51


@pytest.mark.fl
def test_the_project_of_the_documentation_ends_in_an_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are written, run, and audited by its command; each claim of the page is that of the recipe."""
    from typer.testing import CliRunner

    from leakbench import datasets
    from leakbench.cli.main import app as command_line

    text = (Path(__file__).parent.parent / "docs" / "flower.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"`(grey/[\w./]+)`\n\n```(?:toml|python)\n(.*?)```", text, re.DOTALL))
    assert len(files) == 5
    for name, content in {**files, "grey/grey/__init__.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    images, _ = datasets.parse("samples(size=32)").load(range(64))
    for number, image in enumerate(images):
        client, label = f"client-{number // 32}", "ab"[number % 2]
        folder = tmp_path / "photos" / client / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "grey"))
    code = compile(files["grey/simulate.py"], str(tmp_path / "grey" / "simulate.py"), "exec")
    exec(code, {"__file__": str(tmp_path / "grey" / "simulate.py")})
    facts = json.loads((tmp_path / "updates/round-0001/client-1/facts.json").read_text())
    stated = {"examples": 32, "batch": 16, "epochs": 2, "lr": 0.01, "momentum": 0.9, "optimizer": "sgd"}
    assert {key: facts[key] for key in stated} == stated
    (command,) = [code for code in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "--recording" in code]
    done = CliRunner().invoke(command_line, command.replace("\\\n", " ").split()[1:])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "audit" / "audit.md").read_text()
    for claim in (
        "Under SGD, the client used several images: at least 32 different ones",
        "32 images, batches of 16, 2 epochs, optimiser sgd, learning rate 0.01 and momentum 0.9",
        "SGD (any momentum)",
        "that exceeds the rounding of the record; other layers do not show it",
        "The server recovers 100 % of the 32 images, in closed form from the change of layer network.1.",
    ):
        assert claim in page
    assert "Stated:" not in page
    counts = re.search(r"(\d+) of class 0 and (\d+) of class 1", page)
    assert counts is None or int(counts[1]) + int(counts[2]) == 32


@pytest.mark.fl
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_gives_the_same_numbers_and_failures(app) -> None:
    here = run(app, app.client_app(failing=1), failed=[].append)
    seen: list = []
    there = run(app, app.client_app(failing=1), failed=seen.append, workers=2)
    assert [(failure.client, failure.round) for failure in seen] == [(2, 2), (2, 3)]
    for name, value in arrays(here).items():
        assert torch.equal(arrays(there)[name], value)
    assert not left()
    gc.collect()  # Ray leaves /dev/null open


SCRIPT = """
import os, sys, time
import leakbench.flower as flower
from leakbench.errors import LeakbenchError
flower.require()
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
import tests.flower_app as app

client = ClientApp()

@client.train()
def train(message, context):
    open(os.environ["FOLDER"] + "/" + str(os.getpid()), "w").close()
    import time
    time.sleep(60)

try:
    flower.simulate(app.server_app()[0], client, 3, workers=int(sys.argv[1]))
except LeakbenchError as error:
    print(error)
    sys.exit(2)
"""


def left() -> list[str]:
    """Return the folders that simulations over Ray left."""
    import tempfile

    return [str(path) for path in Path(tempfile.gettempdir()).glob("leakbench-ray-*")]


def alive(group: int) -> list[int]:
    """Return the processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.fl
@pytest.mark.parametrize("how", ["interrupt", "interrupt-here", "kill", "kill-ray"])
def test_a_simulation_that_is_stopped_leaves_nothing(tmp_path: Path, how: str) -> None:
    workers = 0 if how == "interrupt-here" else 2
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(workers)],
        env=os.environ | {"FOLDER": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parent.parent,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while not list(tmp_path.iterdir()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        if how == "kill":
            os.kill(int(next(tmp_path.iterdir()).name), signal.SIGKILL)
        elif how == "kill-ray":
            (server,) = [one for one in psutil.Process(process.pid).children() if one.name() == "raylet"]
            server.kill()
        else:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, errors = process.communicate(timeout=90)
        if how == "kill-ray":
            assert process.returncode == 2
            assert output.splitlines()[-1].startswith("Ray was interrupted")  # behind Ray's own log
        elif how == "kill":
            assert process.returncode == 2
            assert output.splitlines()[-1].startswith("Ray lost the process of client")  # behind Ray's own notice
            assert errors == ""
        else:
            assert process.returncode in (130, -signal.SIGINT)
            assert "KeyboardInterrupt" in errors
        for _ in range(50):
            if not alive(process.pid):
                break
            time.sleep(0.2)
        assert not alive(process.pid)
        assert not left()
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)
