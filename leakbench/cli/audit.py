"""``leakbench audit``: what one's own network, or one recorded update of it, leaks."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def audit(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="A callable without arguments that returns an nn.Module, from images to logits; NAME alone for one of "
            "a --plugin. It is imported and run.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the pages audit.md and audit.html; an audit goes on.")],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="FILE", help="Trained weights: .safetensors, or a state dict of torch.save.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="folder:PATH", help="Images, one subfolder a class; or any dataset's spec.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="The side of the images.")] = None,
    normalise: Annotated[
        str | None,
        typer.Option(
            metavar="MEAN/STD", help="The network's input normalisation, such as 0.485,0.456,0.406/0.229,0.224,0.225."
        ),
    ] = None,
    mode: Annotated[Literal["train", "eval"], typer.Option(help="The mode in which clients train.")] = "train",
    defense: Annotated[
        list[str] | None, typer.Option("--defense", help="What clients do (default: none); repeatable.")
    ] = None,
    threat: Annotated[
        list[str] | None, typer.Option("--threat", help="In place of the budget's threat models; repeatable.")
    ] = None,
    budget: Annotated[
        Literal["quick", "standard", "thorough"],
        typer.Option(help="How much the attackers may do: see leakbench list suites, audit."),
    ] = "standard",
    images: Annotated[str | None, typer.Option(help="The first N images, or indices such as 0,3,5.")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="The aligned SSIM from which an image is recovered (0.6).")
    ] = None,
    before: Annotated[
        str | None, typer.Option(metavar="FILE", help="A recorded update: the weights that the client was given.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="FILE", help="The weights that it sent: safetensors, state dict or npz.")
    ] = None,
    truth: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="The image of a recorded update, to be compared with alone.")
    ] = None,
    label: Annotated[int | None, typer.Option(min=0, help="Its label, likewise.")] = None,
    rate: Annotated[float | None, typer.Option(help="The learning rate of a recorded update, where known.")] = None,
    local_steps: Annotated[int | None, typer.Option(min=1, help="How many steps a recorded update took (1).")] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, max=3, help="Of a recorded update's images: 1 or 3 (3).")
    ] = None,
    fail_if: Annotated[
        str | None,
        typer.Option(
            metavar="'NAME > NUMBER'",
            help="Exit with 1 where this holds behind any defense: recovered (the share of images), labels (the share "
            "read off), or a metric of the image that leaks most; with >, >=, < or <=.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto (the default), cpu, cuda or cuda:N; a recorded update is attacked on the CPU."),
    ] = None,
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", help="A Python file that has the factory, or components; it is run."),
    ] = None,
) -> None:
    """Attack your own network on your own images, or one recorded update; write OUT/audit.md and OUT/audit.html.

    The pages say in plain words what the server sees, which layers leak, what the attackers had to assume, and what
    was not tried. What no attacker can attack is refused with the reason, and never passed as safe.

    Exits with 0; with 1 where --fail-if is crossed; with 2 on bad input, where the network cannot be attacked, and
    where --fail-if cannot be judged (attackers broke, or images that none returned); with 70 on a bug. In a CI job:
    leakbench audit --model app.models:build --data folder:tests/images --size 32 --budget quick
    --fail-if "recovered > 0.1" --out audit
    """
    from leakbench import audit as audits
    from leakbench import defenses, metrics
    from leakbench.audit.given import behind_scale, images_of, load_checkpoint, read_image, subject
    from leakbench.audit.run import refuse_unmeasured
    from leakbench.cli.options import console
    from leakbench.core.registry import load_plugin
    from leakbench.datasets import spec
    from leakbench.engine.progress import Display
    from leakbench.errors import BadOption
    from leakbench.plan.matrix import axes_from_options
    from leakbench.report import audit as pages
    from leakbench.report.files import replace

    for path in plugin or []:
        load_plugin(path)
    gate = None if fail_if is None else audits.parse_gate(fail_if, metrics.names())
    recorded = before is not None or after is not None
    _check_given(recorded, before, after, data, size, rate)
    foreign = (
        {
            "--data": data,
            "--checkpoint": checkpoint,
            "--defense": defense,
            "--threat": threat,
            "--images": images,
            "--device": device,
        }
        if recorded
        else {"--truth": truth, "--label": label, "--rate": rate, "--local-steps": local_steps, "--channels": channels}
    )
    for option, given in foreign.items():
        if given is not None and given != []:
            kind = "an audit on images; leave it out beside --before and --after"
            raise BadOption(
                f"{option} is of {kind if recorded else 'a recorded update; give --before and --after too'}"
            )
    if recorded and threshold is not None and truth is None:
        raise BadOption("--threshold is for the comparison with --truth; give that too")
    if channels == 2:
        raise BadOption("--channels 2: images have 1 (grey) or 3 (RGB)")
    scale = None if normalise is None else audits.Scale.parse(normalise)
    network = audits.factory(model, plugin or [])
    facts = [("model", model), ("weights", checkpoint or "as the factory made them, its draws seeded")]
    if checkpoint is not None:
        load_checkpoint(network, checkpoint)
    if scale is not None:
        facts.append(("input normalisation", str(scale)))
    command = "leakbench " + shlex.join(sys.argv[1:])
    try:
        if recorded:
            assert before is not None
            assert after is not None
            assert size is not None
            update = audits.read_update(network, before, after)
            shape = (channels or 3, size, size)
            facts[1] = ("update", f"{before} to {after}")
            own = subject(network, model, shape[0], mode, scale)
            with Display(console()) as display:
                found = audits.audit_update(
                    own,
                    update if scale is None else behind_scale(update),
                    shape,
                    budget=budget,
                    rate=rate,
                    local_steps=local_steps or 1,
                    truth=None if truth is None else read_image(truth, shape),
                    label=label,
                    threshold=threshold,
                    facts=facts,
                    gate=gate,
                    progress=display,
                )
        else:
            assert data is not None
            dataset = images_of(data, size)
            own = subject(network, model, dataset.image_shape[0], mode, scale)
            chosen = axes_from_options({"images": [images] if images else []}).get("images")
            with Display(console()) as display:
                found = audits.audit_model(
                    own,
                    spec(dataset),
                    [defenses.parse(one) for one in defense or ["none"]],
                    out,
                    budget=budget,
                    images=chosen,
                    threats=threat or (),
                    threshold=threshold,
                    facts=[*facts, ("data", spec(dataset))],
                    gate=gate,
                    device=device or "auto",
                    progress=display,
                    command=command,
                )
    except KeyboardInterrupt:
        typer.echo(f"stopped; to go on: {command}", err=True)
        raise typer.Exit(130) from None
    for name, text in zip(pages.FILES, (pages.markdown(found, command), pages.html(found, command))):
        replace(out / name, text.encode())
    for one in found.behind:
        typer.echo(f"{one.defense}: {pages.verdict(one)}")
    for name in pages.FILES:
        typer.echo(str(out / name))
    if gate is not None:
        refuse_unmeasured(found)
        typer.echo(pages.gate_words(found))
    raise typer.Exit(1 if found.crossings() else 0)


def _check_given(
    recorded: bool, before: str | None, after: str | None, data: str | None, size: int | None, rate: float | None
) -> None:
    """Raise BadOption where what is audited is not given in full."""
    from leakbench.errors import BadOption

    if not recorded and data is None:
        raise BadOption("neither --data nor --before and --after is given; give images, or a recorded update")
    if recorded and (before is None or after is None):
        raise BadOption("a recorded update has two files; give both --before and --after")
    if recorded and size is None:
        raise BadOption("--size is missing: a recorded update does not say how large its image was")
    if rate is not None and not 0 < rate < float("inf"):
        raise BadOption(f"--rate {rate:g} does not fit; give a learning rate above 0")
