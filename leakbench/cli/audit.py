"""``leakbench audit``: how much one's own network, or one recorded update of it, leaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer
from typer.core import TyperGroup

from leakbench.cli.options import DEVICE, SALT, command, console, option, stoppable
from leakbench.errors import BadOption

if TYPE_CHECKING:
    from leakbench.audit import Audit, AuditedNetwork, AuditOptions, StatedRecipe
    from leakbench.engine.progress import NullProgress


class _Commands(TyperGroup):
    """Three commands; the options of each may also follow ``leakbench audit`` directly."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the command before options that name none, and say of which command a misplaced option is."""
        given = {arg.partition("=")[0] for arg in args if arg.startswith("--")}
        received, updates = "--received" in given, bool({"--before", "--after", "--recording"} & given)
        if args and args[0].startswith("-") and "--help" not in given:
            if not (received or updates or "--data" in given):
                raise BadOption(
                    "neither --data nor --before with --after nor --received is given; give images, a recorded "
                    "update, or the weights that a server sent"
                )
            args = ["received" if received else "update" if updates else "model", *args]
        if args and args[0] in self.commands:
            flags = {name: {flag for one in own.params for flag in one.opts} for name, own in self.commands.items()}
            for name in flags.keys() - {args[0]}:
                for flag in sorted(given & flags[name] - flags[args[0]]):
                    raise BadOption(f"{flag} is an option of leakbench audit {name}; leave it out")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    help="""Attack your own network, and write a report on what leaks: OUT/audit.md and OUT/audit.html.

    `audit model` attacks the network on images of yours, behind each defense. `audit update` attacks one recorded
    update: the weights that a client was given and those that it sent. `audit received` attacks nothing: it looks for
    signs that the server crafted the weights that it sent. Without these words, --data selects the first, --before with
    --after the second, and --received the third.

    The report states how many images the server recovers, which layers leak, what the attackers had to assume and
    what was not tried. A network that no attacker can attack is refused with the reason; it does not pass.

    The exit code is 0; 1 if --fail-if is true; 2 on bad input, if the network cannot be attacked, and if --fail-if
    cannot be judged (an attack ended in an error, or returned nothing for an image); 70 on a bug. That of `audit
    received` is 1 if a layer counts as crafted.""",
)


SIZE = "The side of the images in pixels, or their height and width, such as 48x32."
CHANNELS = "The channels of the images (default: those that the network's first layer takes, or 3)."


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """The options of both commands."""

    model: str = option(
        "A callable without arguments that returns an nn.Module from images to logits, or only its NAME if a --plugin "
        "defines it. It is imported and called.",
        default=MISSING,
        metavar="MODULE:FACTORY",
    )
    out: Path = option("The folder of the run file and of the report; an existing run is resumed.", default=MISSING)
    normalise: str = option(
        "The network's input normalisation, such as 0.485,0.456,0.406/0.229,0.224,0.225.",
        default="",
        metavar="MEAN/STD",
    )
    mode: Literal["train", "eval"] = option("The mode in which clients train.", default="train")
    loss: str = option(
        "What clients train with: cross-entropy, bce (on logits; of one logit or several), mse or nll; or a function "
        "MODULE:NAME of the network's outputs and the label's one-hot vector, such as one with auxiliary heads.",
        default="cross-entropy",
        metavar="LOSS",
    )
    budget: Literal["quick", "standard", "thorough"] = option(
        "Which attacks run, and for how long: quick takes minutes; thorough takes longest.", default="standard"
    )
    threshold: float | None = option(
        "An image is recovered if its SSIM, after a fit of brightness and contrast, is at least this and better than "
        "every floor's (default: 0.6).",
        min=0,
        max=1,
    )
    fail_if: str | None = option(
        "Exit with 1 if this is true behind any defense. NAME is recovered (the share of images), labels (the share "
        "inferred correctly without a search), or a metric of the image that leaks most; the comparison is >, >=, < or "
        "<=.",
        metavar="'NAME > NUMBER'",
    )
    no_truth: bool = option(
        "Leave the private images and their reconstructions out of the report; the scores stay. The run file holds "
        "them.",
        "--no-truth",
        default=False,
    )
    salt: str | None = option(SALT, metavar="HEX")
    plugin: list[Path] | None = option("A Python file that defines the factory, or components; it is executed.")

    def audit(
        self, attack: Callable[[AuditedNetwork, AuditOptions, NullProgress], Audit], checkpoint: str = ""
    ) -> None:
        """Load everything that both audits take, attack, write the report, and exit with 1 if ``--fail-if`` is true."""
        from leakbench import audit, metrics
        from leakbench.core.registry import load_plugin
        from leakbench.engine.progress import Display
        from leakbench.report import audit as pages
        from leakbench.report.files import replace

        with stoppable(lambda: "the trials that ended are kept") as line, Display(console()) as display:
            for path in self.plugin or []:
                load_plugin(path)
            measured = [metric.name for metric in metrics.of_run()]
            rule = None if self.fail_if is None else audit.FailRule.parse(self.fail_if, measured)
            network = audit.load_network(
                self.model,
                self.plugin or [],
                mode=self.mode,
                normalise=self.normalise,
                checkpoint=checkpoint,
                loss=self.loss,
            )
            found = attack(network, audit.AuditOptions(self.budget, self.threshold, rule, line, self.salt), display)
        for name, text in zip(
            pages.FILES, (pages.markdown(found, line), pages.html(found, line, pictures=not self.no_truth))
        ):
            replace(self.out / name, text.encode())
        for words in found.contradictions:
            typer.echo(words)
        for one in found.defenses:
            words = f"{pages.verdict(one)} {pages.exact_words(found, one)}"
            typer.echo(f"{one.result.defense}, {pages.mode(found)}: {words}".rstrip())
        for name in pages.FILES:
            typer.echo(str(self.out / name))
        passed = found.verdict()
        if passed is not None:
            typer.echo(pages.rule_words(found))
        raise typer.Exit(1 if passed is False else 0)


@dataclass(frozen=True, kw_only=True)
class _OnImages(_Shared):
    """The options of ``audit model``."""

    data: str = option(
        "Images, one subfolder for each class; or any dataset's spec.", default=MISSING, metavar="folder:PATH"
    )
    classes: str | None = option(
        "A text file with the name of the class folder of each output of the network, one a line; by default the "
        "folders, sorted by name, are the outputs in their order.",
        metavar="FILE",
    )
    first: int | None = option(
        "Only the first N classes of the data count, as the first N outputs of the network.", metavar="N"
    )
    size: str | None = option(SIZE, metavar="SIDE|HEIGHTxWIDTH")
    channels: int | None = option(CHANNELS, min=1)
    images: str | None = option("The first N images, or indices such as 0,3,5.")
    checkpoint: str = option(
        "Trained weights: .safetensors, or a state dict of torch.save.", default="", metavar="FILE"
    )
    defense: list[str] | None = option("A defense of the clients (default: none); repeatable.")
    threat: list[str] | None = option("A threat model; it replaces those of the budget; repeatable.")
    device: str = option(DEVICE, default="auto")


@dataclass(frozen=True, kw_only=True)
class _OnUpdate(_Shared):
    """The options of ``audit update``."""

    before: str | None = option("The weights that the client was given.", metavar="FILE")
    after: str | None = option("The weights that it sent: .safetensors, a state dict, or .npz.", metavar="FILE")
    recording: str | None = option(
        "The folder of one client that leakbench.flower.record wrote, in place of --before and --after. Its facts.json "
        "states what the app states of the training.",
        metavar="DIR",
    )
    size: str = option(SIZE, default=MISSING, metavar="SIDE|HEIGHTxWIDTH")
    channels: int | None = option(CHANNELS, min=1)
    delta: bool = option("--after holds the weights after the training less those before.", "--delta", default=False)
    gradient: bool = option("--after holds the gradient of the loss of one step.", "--gradient", default=False)
    finite: bool = option(
        "Attack the finite values of an update that has others, too (NaN or infinite).", "--finite", default=False
    )
    images: str = option(
        "How many images the client trained on; auto: as many as the update shows, or one if it shows no number.",
        default="auto",
    )
    local_batch: int | None = option("The images in each of its batches, if that is known.", min=1)
    local_epochs: int | None = option("How often it went through its images, if that is known.", min=1)
    local_steps: int | None = option(
        "How many batches it trained on, if that is known (default: those of --images, --local-batch and "
        "--local-epochs; if one of these is not stated, 1).",
        min=1,
    )
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad", "signsgd", "other"] | None = option(
        "Its optimiser, if that is known."
    )
    rate: float | None = option("Its learning rate, if that is known.")
    momentum: float | None = option("Its momentum, if that is known.")
    weight_decay: float | None = option("Its weight decay, if that is known.")
    truth: str | None = option(
        "The private image, or a folder of all of them: they are only compared with the reconstructions.",
        metavar="IMAGE|FOLDER",
    )
    label: int | None = option("The label of the image: it is only compared with the inferred one.", min=0)
    labels: str | None = option(
        "A text file with the labels of all images, one a line in the order of the images' names, or NAME,LABEL: they "
        "are only compared with the inferred counts.",
        metavar="FILE",
    )

    def recipe(self) -> StatedRecipe:
        """Return what the options state of the client's training."""
        from leakbench.audit import StatedRecipe

        images = None
        if self.images != "auto":
            if not self.images.isdecimal():
                raise BadOption(f"--images {self.images!r} is no whole number; give how many images, or auto")
            images = int(self.images)
        return StatedRecipe(
            images=images,
            local_batch=self.local_batch,
            local_epochs=self.local_epochs,
            local_steps=self.local_steps,
            optimizer=self.optimizer,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            rate=self.rate,
        )


@command(app, "model", _OnImages)
def model(given: _OnImages) -> None:
    """Attack your network on images of yours, behind each defense.

    For a CI job: leakbench audit model --model app.models:build --data folder:tests/images --size 32 --budget quick
    --fail-if "recovered > 0.1" --out audit
    """
    from leakbench import audit, defenses
    from leakbench.plan.matrix import axes_from_options

    def attack(network: AuditedNetwork, options: AuditOptions, progress: NullProgress) -> Audit:
        return audit.audit_model(
            network,
            audit.images_of(given.data, given.size, given.channels, network),
            [defenses.parse(one) for one in given.defense or ["none"]],
            given.out,
            options,
            images=axes_from_options({"images": [given.images] if given.images else []}).get("images"),
            first=given.first,
            order=given.classes,
            threats=given.threat or (),
            device=given.device,
            progress=progress,
        )

    given.audit(attack, given.checkpoint)


@command(app, "update", _OnUpdate)
def update(given: _OnUpdate) -> None:
    """Attack one recorded update: the weights that a client was given, and those that it sent.

    The report first states what the two models show by themselves: images, steps, optimiser. If a linear layer with a
    bias takes the pixels before a ReLU, and has many more units than there are images, every image of a client that
    trains by SGD usually follows in closed form, and no attack searches. Attacks that search look for all images at
    once if their number is stated or shown, and otherwise for one. They repeat the training of several images if their
    number, batches, steps (or epochs) and the learning rate are stated; else they take the update for steps of plain
    SGD, and match the mean of these.
    """
    from leakbench import audit

    def attack(network: AuditedNetwork, options: AuditOptions, progress: NullProgress) -> Audit:
        shape = audit.shape_of(given.size, given.channels, network)
        several = given.truth is not None and Path(given.truth).expanduser().is_dir()
        if given.delta and given.gradient:
            raise BadOption("--delta and --gradient are both given; leave one of them out")
        if given.label is not None and given.labels is not None:
            raise BadOption("--label and --labels are both given; leave one of them out")
        recipe, before, after, recorded = given.recipe(), given.before, given.after, None
        if given.recording is not None:
            if before is not None or after is not None:
                twice = "--before" if before is not None else "--after"
                raise BadOption(f"--recording and {twice} are both given; leave one of them out")
            recorded = audit.read_recording(given.recording)
            recipe = recipe.joined(recorded.recipe, f"--recording {given.recording!r}")
            before, after = recorded.before, recorded.after
        if before is None or after is None:
            raise BadOption(f"{'--before' if before is None else '--after'} is not given; give both, or --recording")
        return audit.audit_update(
            network,
            before,
            after,
            shape,
            given.out,
            options,
            recipe=recipe,
            recording=recorded,
            truth=None if given.truth is None or several else audit.read_image(given.truth, shape),
            truths=audit.read_images(given.truth, shape) if given.truth is not None and several else None,
            label=given.label,
            labels=given.labels,
            names=audit.image_names(given.truth) if given.truth is not None and several else None,
            kind="delta" if given.delta else "gradient" if given.gradient else "weights",
            finite=given.finite,
            progress=progress,
        )

    given.audit(attack)


@dataclass(frozen=True, kw_only=True)
class _OnWeights:
    """The options of ``audit received``."""

    received: str = option(
        "The weights that the server sent: .safetensors, a state dict of torch.save, or .npz.",
        default=MISSING,
        metavar="FILE",
    )
    layers: bool = option("Also print the scores of every layer.", "--layers", default=False)


@command(app, "received", _OnWeights)
def received(given: _OnWeights) -> None:
    """Look for signs that a server crafted the weights that it sent, before a client trains on them.

    No image and no network is needed. Crafted layers (imprints, trap weights) let a server read images out of the
    gradient of a large batch, or out of the sum of many clients' gradients. The exit code is 1 if a layer counts as
    crafted. Exit code 0 is no proof of honesty: a server that knows the test can avoid it.
    """
    from leakbench.audit import received as own
    from leakbench.report.received import lines

    found = own.read_received(given.received)
    for line in lines(found, layers=given.layers):
        typer.echo(line)
    raise typer.Exit(1 if found.crafted else 0)
