"""The networks of the conditional DCGAN."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

SIDE = 32
"""The side of the images, in pixels."""


class ConditionalNorm(nn.Module):
    """Batch normalisation whose scale and shift are the class's own (Dumoulin et al. 2017, arXiv 1610.07629)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Parameter(torch.ones(classes, channels))
        self.shift = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return [N, C, H, W] normalised, scaled and shifted by the labels [N]."""
        return self.norm(x) * self.scale[labels][:, :, None, None] + self.shift[labels][:, :, None, None]


class Decoder(nn.Module):
    """DCGAN's generator (Radford et al. 2016, arXiv 1511.06434), conditioned through its normalisations.

    Args:
        latent: the size of the latent.
        classes: number of classes.
        channels: 1 or 3.
        width: the channels at 4 x 4 pixels; half as many at 8 x 8, a quarter at 16 x 16.
    """

    def __init__(self, latent: int, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(latent, width * 16, bias=False)
        sizes = [width, width // 2, width // 4]
        self.norms = nn.ModuleList(ConditionalNorm(size, classes) for size in sizes)
        # only the last layer has a bias: a normalisation would remove that of the others
        ups = [
            nn.ConvTranspose2d(before, after, 4, 2, 1, bias=last)
            for before, after, last in zip(sizes, [*sizes[1:], channels], (False, False, True))
        ]
        self.ups = nn.ModuleList(ups)
        for weight in (self.project.weight, *(up.weight for up in ups)):
            nn.init.normal_(weight, 0.0, 0.02)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return images [N, C, 32, 32] in [-1, 1] for latents [N, d] and labels [N] int64."""
        x = self.project(latent).view(-1, self.width, 4, 4)
        for norm, up in zip(self.norms, self.ups):
            x = up(F.relu(norm(x, labels)))
        return torch.tanh(x)


class Critic(nn.Module):
    """A convolutional discriminator with spectral normalisation and a projection on the label.

    Spectral normalisation is that of Miyato et al. 2018 (arXiv 1802.05957), the projection that of Miyato and Koyama
    2018 (arXiv 1802.05637).
    """

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        sizes = [channels, max(16, width * 3 // 16), width // 2, width]
        self.downs = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4, 2, 1)) for before, after in itertools.pairwise(sizes)
        )
        self.score = spectral_norm(nn.Linear(width * 16, 1))
        self.match = spectral_norm(nn.Embedding(classes, width))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return [N], higher for images [N, C, 32, 32] in [-1, 1] that look real and fit their labels [N]."""
        x = images
        for down in self.downs:
            x = F.leaky_relu(down(x), 0.2)
        return self.score(x.flatten(1))[:, 0] + (self.match(labels) * x.sum((2, 3))).sum(1)
