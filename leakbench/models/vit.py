"""A small vision transformer, with and without what stands between the position embedding and the first attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from leakbench.core.component import STATED, Count
from leakbench.errors import Unsupported
from leakbench.models.base import Architecture, Mode, register
from leakbench.models.weights import Init

FirstBlock = Literal["standard", "bare"]


class Attention(nn.Module):
    """Multi-head self-attention of tokens [B, N, D]; queries, keys, values and output have a linear layer each."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [B, N, D]."""
        query, key, value = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(query @ key.transpose(2, 3) / query.shape[3] ** 0.5, 3)
        return self.output((weights @ value).transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """An encoder block: attention and two linear layers, each behind a layer normalisation and with a skip connection.

    A bare one has neither normalisation nor skip connection at its attention.
    """

    def __init__(self, dim: int, heads: int, bare: bool) -> None:
        super().__init__()
        self.bare = bare
        self.norms = nn.ModuleList([nn.Identity() if bare else nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.attention = Attention(dim, heads)
        self.first, self.last = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [B, N, D]."""
        attended = self.attention(self.norms[0](tokens))
        tokens = attended if self.bare else tokens + attended
        return tokens + self.last(nn.functional.gelu(self.first(self.norms[1](tokens))))


class VisionTransformer(nn.Module):
    """Patches by a convolution, a class token, a learned position embedding, blocks, a classifier of the class token.

    Attributes:
        patches: the convolution, whose kernel and stride are a patch.
        token: the class token [1, 1, D].
        position: the position embedding [1, N + 1, D], which is added to class token and patches.
    """

    def __init__(self, options: ViT, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        count, dim = (height // options.patch) * (width // options.patch), options.dim
        self.patches = nn.Conv2d(channels, dim, options.patch, stride=options.patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, count + 1, dim))
        bare = options.first == "bare"
        self.blocks = nn.ModuleList(
            [EncoderBlock(dim, options.heads, bare and not index) for index in range(options.depth)]
        )
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, C, H, W] in [0, 1]."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.classifier(self.norm(tokens)[:, 0])


@register("vit")
@dataclass(frozen=True)
class ViT(Architecture):
    """Vision transformer (ViT) for small images: patches of 4x4, 4 blocks of width 96; 0.46 M parameters.

    Attributes:
        patch: the side of a patch, which must divide the image's sides.
        dim: the width of a token.
        depth: the number of blocks.
        heads: of each attention; they divide the width.
        first: the first block: ``standard``, with a layer normalisation before its attention and a skip connection
            around it, or ``bare``, whose attention takes the embedded patches themselves, as April needs.
        init: ``default`` (torch's) or ``uniform(a)``.
        mode: that in which the network is attacked; it changes nothing.
        fresh: every trial draws its own weights instead of sharing its seed's.
        weights: a checkpoint to attack instead of random weights.
    """

    reference: ClassVar[str] = (
        "Dosovitskiy et al. 2021, An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, ICLR, "
        "arXiv 2010.11929; the bare block: Lu et al. 2022, APRIL, CVPR"
    )
    patch: Count = 4
    dim: Annotated[int, Field(ge=1, le=4096)] = 96
    depth: Annotated[int, Field(ge=1, le=64)] = 4
    heads: Count = 4
    first: FirstBlock = "standard"
    init: Init = "default"
    mode: Mode = field(default="train", metadata=STATED)
    fresh: bool = False
    weights: str | None = None

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network, for images whose sides are multiples of the patch's."""
        _, height, width = image_shape
        if self.dim % self.heads:
            raise Unsupported(f"heads={self.heads} must divide dim={self.dim}; use heads=1 or dim={self.heads}")
        if height % self.patch or width % self.patch:
            raise Unsupported(
                f"vit cuts {height}x{width} images into patches of {self.patch}x{self.patch}; use patch=1"
            )
        return VisionTransformer(self, image_shape, num_classes)
