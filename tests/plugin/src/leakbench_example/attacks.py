"""An attack on softmax regression."""

from __future__ import annotations

import torch

from leakbench import Attack, Observation, Reconstruction, Rng, Unsupported, attacks


@attacks.register("first-layer")
class FirstLayer(Attack):
    """Divide the gradient of the first linear layer by its bias's: with one image that is the image."""

    reference = "Phong et al. 2018, Privacy-Preserving Deep Learning via Additively Homomorphic Encryption, section 3"

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the row of the weight's gradient with the largest bias gradient, divided by that."""
        weight, bias = self._layer(observation)
        unit = bias.abs().argmax(1)
        rows = torch.arange(observation.trials, device=unit.device)
        images = weight[rows, unit] / bias[rows, unit][:, None]
        return Reconstruction(images.unflatten(1, observation.image_shape))

    def check(self, observation: Observation) -> None:
        """Raise Unsupported where the first layer that was sent is not linear in all pixels."""
        self._layer(observation)

    def _layer(self, observation: Observation) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.Size(observation.image_shape).numel()
        weight, *others = observation.gradient.values()
        if weight.ndim != 3 or weight.shape[2] != pixels or not others or others[0].shape != weight.shape[:2]:
            raise Unsupported("the first layer is not linear in all pixels with a bias; choose --model softmax")
        return weight, others[0]
