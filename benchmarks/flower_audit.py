"""The recordings behind the audits of Flower apps: ``python -m benchmarks.flower_audit FOLDER``, with Flower.

Each app has one client that trains on 32 grey photographs in batches of 16 for 2 epochs by SGD with momentum 0.9, and
a server that records what the client sends. For NAME mlp2, mlp3, resnet2 and resnet3 (a network and its classes)
FOLDER/NAME has the photographs, their labels and the recording. Then, from the checkout:

leakbench audit update --model benchmarks.flower_audit:NAME --recording FOLDER/NAME/updates/round-0001/client-1 \\
    --size 28 --channels 1 --normalise 0.5/0.5 --truth FOLDER/NAME/photos --labels FOLDER/NAME/labels.txt \\
    --budget quick --out reports/audit/flower-NAME

The ResNet is ResNet-18 with a quarter of its channels, for the time that a search takes on a CPU. At this size it takes
no single image in training mode, so that the audit needs the number of images, which the recording states.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from leakbench import datasets

SIZE, IMAGES = 28, 32
CONFIG: Mapping[str, str | int | float] = {
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "batch-size": 16,
    "local-epochs": 2,
}


def mlp(classes: int) -> nn.Module:
    """Return a network of two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIZE * SIZE, 1024), nn.ReLU(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, classes)
    )


def resnet(classes: int) -> nn.Module:
    """Return ResNet-18 with a quarter of its channels, for grey images."""
    network = models.ResNet(models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=classes)
    for layer in list(network.modules()):
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Conv2d):
                inputs = 1 if child.in_channels == 3 else child.in_channels // 4
                kernel, stride, padding = child.kernel_size[0], child.stride[0], int(child.padding[0])
                new = nn.Conv2d(inputs, child.out_channels // 4, kernel, stride, padding, bias=False)
                setattr(layer, name, new)
            elif isinstance(child, nn.BatchNorm2d):
                setattr(layer, name, nn.BatchNorm2d(child.num_features // 4))
    network.fc = nn.Linear(128, classes)
    return network


def mlp2() -> nn.Module:
    """Return the MLP for two classes."""
    return mlp(2)


def mlp3() -> nn.Module:
    """Return the MLP for three classes."""
    return mlp(3)


def resnet2() -> nn.Module:
    """Return the ResNet for two classes."""
    return resnet(2)


def resnet3() -> nn.Module:
    """Return the ResNet for three classes."""
    return resnet(3)


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp2": (mlp2, 2),
    "mlp3": (mlp3, 3),
    "resnet2": (resnet2, 2),
    "resnet3": (resnet3, 3),
}


def photographs(classes: int, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Return 32 grey photographs [32, 1, size, size] of 8 bits in [0, 1], and a class of each."""
    images, _ = datasets.parse(f"samples(size={size})").load(range(IMAGES))
    grey = (images.mean(1, keepdim=True) * 255).round() / 255
    labels = torch.randint(classes, (IMAGES,), generator=torch.Generator().manual_seed(classes))
    return grey, labels


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train a network as the client does."""
    rate, momentum = float(CONFIG["lr"]), float(CONFIG["momentum"])
    optimiser = torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum)
    order = torch.Generator().manual_seed(0)
    for _ in range(int(CONFIG["local-epochs"])):
        for rows in torch.randperm(IMAGES, generator=order).split(int(CONFIG["batch-size"])):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network((images[rows] - 0.5) / 0.5), labels[rows]).backward()
            optimiser.step()


def record_app(name: str, folder: Path) -> None:
    """Run the app of one network, and write the photographs, their labels and the recording."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg

    from leakbench.flower import record, simulate

    build, classes = NETWORKS[name]
    images, labels = photographs(classes)
    (folder / "photos").mkdir(parents=True)
    for place, image in enumerate(images):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(folder / "photos" / f"{place:02}.png")
    (folder / "labels.txt").write_text("".join(f"{int(label)}\n" for label in labels))
    client, server = ClientApp(), ServerApp()

    @client.train()
    def trained(message: Message, context: Context) -> Message:
        network = build()
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        train(network.train(), images, labels)
        reply = {
            "arrays": ArrayRecord(network.state_dict()),
            "metrics": MetricRecord({"num-examples": len(images)}),
        }
        return Message(RecordDict(reply), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        recording = record(strategy, folder / "updates", config=context.run_config)
        recording.start(grid, ArrayRecord(build().state_dict()), num_rounds=1)

    simulate(server, client, 1, config=CONFIG)


def main() -> None:
    """Run all four apps."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flower_audit", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in NETWORKS:
        record_app(name, folder / name)


if __name__ == "__main__":
    main()
