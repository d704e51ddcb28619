"""A Flower app in the manner of Flower's own quick start: a small network of PyTorch, random data, FedAvg.

A module of its own, so that Ray's processes can import it; it is imported where Flower is installed alone.
"""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn
from torch.nn import functional as F

import leakbench
from leakbench.defenses.keylock import LOCK_TENSORS, get_key
from leakbench.flower import restore
from leakbench.flower.mods import Mod

CLIENTS = 3
EXAMPLES = (4, 6, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 6 * 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).flatten(1))


def network(locked: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
    return leakbench.keylock(net, length=8, rng=torch.Generator().manual_seed(0)) if locked else net


def data(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(client)
    return torch.rand(EXAMPLES[client], 1, 8, 8, generator=rng), torch.arange(EXAMPLES[client]) % 3


def client_app(
    *mods: Mod, locked: bool = False, failing: int | None = None, secrets: list[dict[str, torch.Tensor]] | None = None
) -> ClientApp:
    """Return an app whose client ``failing`` raises in its second round; ``secrets`` gets each client's."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        rounds = int(context.state["rounds"]["done"]) + 1 if "rounds" in context.state else 1
        context.state["rounds"] = MetricRecord({"done": rounds})
        if number == failing and rounds == 2:
            raise ValueError("the disk is full\nsecond line")
        net = network(locked)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        if locked:
            restore(net, context)
        images, labels = data(number)
        descent = torch.optim.SGD(net.parameters(), lr=0.1)
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        descent.step()
        metrics = MetricRecord({"num-examples": len(images), "train_loss": loss.item(), "rounds": rounds})
        if secrets is not None:
            lock = {name: value.clone() for name, value in net.state_dict().items() if name.endswith(LOCK_TENSORS)}
            secrets.append({"client": torch.tensor(number), "key": get_key(net), **lock})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate(mods=list(mods))
    def evaluate(message: Message, context: Context) -> Message:
        net = network(locked).eval()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        if locked:
            restore(net, context)
        images, labels = data(int(context.node_config["partition-id"]))
        with torch.no_grad():
            accuracy = (net(images).argmax(1) == labels).float().mean().item()
        metrics = MetricRecord({"num-examples": len(images), "eval_acc": accuracy})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def server_app(
    strategy: Strategy | None = None, rounds: int = 3, spy: list[Message] | None = None, locked: bool = False
) -> tuple[ServerApp, dict]:
    """Return an app and where its results go; ``spy`` gets every message on the wire."""
    app, results = ServerApp(), {}

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if spy is not None:
            carried = grid.send_and_receive

            def send_and_receive(messages, *, timeout=None):
                messages = list(messages)
                replies = list(carried(messages, timeout=timeout))
                spy.extend([*messages, *replies])
                return replies

            grid.send_and_receive = send_and_receive
        acting = strategy if strategy is not None else FedAvg(fraction_evaluate=0.0)
        initial = {k: v for k, v in network(locked).state_dict().items() if not k.endswith(LOCK_TENSORS)}
        results["result"] = acting.start(grid, ArrayRecord(initial), num_rounds=rounds)

    return app, results
