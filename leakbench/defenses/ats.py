"""ATSPrivacy: augmentations chosen so that the gradients of augmented images are hard to invert."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from pydantic import AfterValidator, Field
from torch import Tensor

from leakbench.defenses.base import Defense, register
from leakbench.errors import Unsupported

_POOL = """\
invert 7, contrast 6, rotate 2, translate-x 9, sharpness 1, sharpness 3, shear-y 2, translate-y 2, autocontrast 5,
equalize 2, shear-y 5, posterize 5, color 3, brightness 5, sharpness 9, brightness 9, equalize 5, equalize 1,
contrast 7, sharpness 5, color 5, translate-x 5, equalize 7, autocontrast 8, translate-y 3, sharpness 6, brightness 6,
color 8, solarize 0, invert 0, equalize 0, autocontrast 0, equalize 8, equalize 4, color 9, equalize 5,
autocontrast 4, solarize 4, brightness 3, color 0, solarize 1, autocontrast 0, translate-y 3, translate-y 3,
autocontrast 1, solarize 1, equalize 5, invert 0, translate-y 3, autocontrast 1
"""
POOL = tuple((name, int(level)) for name, level in (entry.split() for entry in _POOL.split(",")))
"""The released sub-policies by number: an operation, and a level of 0 to 9 for those that have one."""

CROP_PADDING = 4
"""How many black pixels are added on each side before a random crop."""


def _checked(policy: str) -> str:
    for part in re.split("[-+]", policy):
        if not (part.isascii() and part.isdigit() and int(part) < len(POOL)):
            raise ValueError(
                f"{part!r} is not a sub-policy; write numbers of 0 to {len(POOL) - 1} such as 3-1-7+43-18-18"
            )
    return policy


@register("ats")
@dataclass(frozen=True)
class ATS(Defense):
    """ATSPrivacy: train on a transformed image, by policies whose gradients were found to be hard to invert.

    One of the policies is drawn, each with the same probability, and its sub-policies are applied one after another,
    always and not with the probabilities that the released list states, as the released code does. Where an operation
    has a direction (shear, translate, color, brightness, contrast, sharpness), it is drawn. Images are rounded to 8
    bits. No policy is searched for: those that the authors found are options. A reconstruction is compared with the
    original image, and with the transformed one in the metrics ``*_encoded``; by the first, a mere shift, which hides
    nothing from the eye, counts as protection in metrics by pixel. Every attack matches the transformed image, so that
    no adaptive attacker is stated.

    Attributes:
        policy: numbers of sub-policies (0 to 49), ``-`` between those of one policy and ``+`` between policies.
            Published for CIFAR-100: ``3-1-7+43-18-18`` on ResNet-20, ``21-13-3+7-4-15`` on a ConvNet.
        augment: crop at random after padding by 4 black pixels, and mirror half of the images, before the policy, as
            the published training does.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Gao et al. 2021, Privacy-preserving Collaborative Learning with Automatic Transformation Search, CVPR, "
        "sections 4 and 5 (and released code)"
    )
    assumes: ClassVar[str] = "Transformed images are harder to recover."
    cost: ClassVar[str] = "Training on transformed images."
    fails: ClassVar[str] = (
        "The transformed image is recovered; the policies are public, and many only move or recolour it."
    )
    policy: Annotated[
        str, AfterValidator(_checked), Field(description="numbers of sub-policies such as 3-1-7+43-18-18")
    ] = "3-1-7+43-18-18"
    augment: bool = True

    def encode(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the transformed images, each by draws of its own, and the labels."""
        if x.shape[1] not in (1, 3):
            raise Unsupported(f"ats transforms images of 1 or 3 channels, not {x.shape[1]}")
        return torch.stack([self._transformed(image, rng) for image in x]), y

    def _transformed(self, pixels: Tensor, rng: torch.Generator) -> Tensor:
        """Return an image [C, H, W] in [0, 1], transformed."""
        values = pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        image = Image.fromarray(values[..., 0] if len(pixels) == 1 else values)
        if self.augment:
            image = _augmented(image, rng)
        policies = self.policy.split("+")
        for number in policies[_below(len(policies), rng)].split("-"):
            operation, level = POOL[int(number)]
            image = transform(image, operation, level, 1 if _below(2, rng) else -1)
        return torch.from_numpy(np.array(image)).view(*pixels.shape[1:], len(pixels)).permute(2, 0, 1).to(pixels) / 255


def transform(image: Image.Image, operation: str, level: int, direction: int) -> Image.Image:
    """Return an image after one operation of AutoAugment.

    Args:
        image: 8 bits, grey or RGB.
        operation: see ``POOL``.
        level: 0 to 9, the strength of the operations that have one.
        direction: 1 or -1, for the operations that have one.
    """
    part = level / 9
    shift = direction * part * 150 / 331
    strength = 1 + direction * part / 2
    match operation:
        case "shear-y":
            matrix = (1, 0, 0, direction * part * 0.3, 1, 0)
            return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        case "translate-x":
            return image.transform(image.size, Image.Transform.AFFINE, (1, 0, shift * image.width, 0, 1, 0))
        case "translate-y":
            return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, shift * image.height))
        case "rotate":
            return image.rotate(part * 30, fillcolor=128 if image.mode == "L" else (128, 128, 128))
        case "color":
            return ImageEnhance.Color(image).enhance(strength)
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(strength)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(strength)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(strength)
        case "posterize":
            return ImageOps.posterize(image, round(8 - 4 * part))
        case "solarize":
            return ImageOps.solarize(image, math.ceil(256 * (1 - part)))  # inverts what is not below
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
    raise ValueError(f"unknown operation {operation!r}")


def _augmented(image: Image.Image, rng: torch.Generator) -> Image.Image:
    """Return a random crop of the padded image, mirrored half of the time."""
    left, top = _below(2 * CROP_PADDING + 1, rng), _below(2 * CROP_PADDING + 1, rng)
    crop = ImageOps.expand(image, CROP_PADDING).crop((left, top, left + image.width, top + image.height))
    return ImageOps.mirror(crop) if _below(2, rng) else crop


def _below(count: int, rng: torch.Generator) -> int:
    """Return one of 0 to count - 1, each with the same probability."""
    return int(torch.randint(count, (), generator=rng))
