"""EfficientNet-Lite0 (arXiv 1905.11946, the variant without squeeze-and-excitation): pixels -> feature map, frozen.

Batch norms are folded into the convolutions before them, so the network is convolutions and clipped ramps alone and has
no state that training mode would change.  Knows the names in the published PyTorch weights; does not know what reads the
features.

Shape letters: I images, W channels of the feature map.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.config import UserError

STEM = 32
WIDTH = 1280
"""Channels of the feature map, W."""

STRIDE = 32
"""Pixels of the image to one position of the feature map, along each side."""

STAGES = (
    # repeats, kernel, stride, expansion, channels (table 1 of the paper)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

BATCH_NORM_EPS = 1e-3
"""Of the published weights, which TensorFlow trained."""


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's ``SAME``: the odd pixel on the right and at the bottom."""

    def forward(self, image: Tensor) -> Tensor:
        """[I, in, h, w] -> [I, out, ceil(h / stride), ceil(w / stride)]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in image.shape[-2:]]
        top, left = (count // 2 for count in missing)
        return super().forward(F.pad(image, (left, missing[1] - left, top, missing[0] - top)))


class InvertedBottleneck(nn.Module):
    """Widen, convolve every channel by itself, narrow; plus the input where the shape stays."""

    def __init__(self, n_in: int, n_out: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = n_in * expansion
        self.expand = SameConv(n_in, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, n_out, 1)
        self.keeps_shape = stride == 1 and n_in == n_out

    def forward(self, image: Tensor) -> Tensor:
        """[I, in, h, w] -> [I, out, h / stride, w / stride]."""
        inner = image if self.expand is None else F.relu6(self.expand(image))
        inner = self.project(F.relu6(self.depthwise(inner)))
        return image + inner if self.keeps_shape else inner


class EfficientNetLite(nn.Module):
    """The network up to its last feature map, without classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM, 3, 2)
        blocks, channels = [], STEM
        for repeats, kernel, stride, expansion, n_out in STAGES:
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(InvertedBottleneck(channels, n_out, kernel=kernel, stride=step, expansion=expansion))
                channels = n_out
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, WIDTH, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [I, 3, height, width] -> [I, W, height / 32, width / 32], values from 0 to 6."""
        image = F.relu6(self.stem(pixel_values))
        for block in self.blocks:
            image = block(image)
        return F.relu6(self.head(image))


def folded(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published PyTorch weights (``_conv_stem.weight``, ``_blocks.0._bn1.running_var``, ...) -> those of the class here.

    Folding is done in float64 and rounded once.  Raises UserError for names that are missing or left over.
    """
    left = {name: tensor for name, tensor in published.items() if not name.startswith("_fc.")}
    taken: dict[str, Tensor] = {}

    def fold(name: str, conv: str, norm: str) -> None:
        try:
            weight = left.pop(f"{conv}.weight").double()
            scale, shift, mean, variance = (
                left.pop(f"{norm}.{part}").double() for part in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as error:
            raise UserError(
                f"EfficientNet-Lite0 weights lack {error.args[0]}: want the published Lite0 file"
            ) from error
        left.pop(f"{norm}.num_batches_tracked", None)
        factor = scale / torch.sqrt(variance + BATCH_NORM_EPS)
        taken[f"{name}.weight"] = (weight * factor[:, None, None, None]).float()
        taken[f"{name}.bias"] = (shift - mean * factor).float()

    fold("stem", "_conv_stem", "_bn0")
    expansions = [expansion for repeats, _, _, expansion, _ in STAGES for _ in range(repeats)]
    for index, expansion in enumerate(expansions):
        if expansion > 1:
            fold(f"blocks.{index}.expand", f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0")
        fold(f"blocks.{index}.depthwise", f"_blocks.{index}._depthwise_conv", f"_blocks.{index}._bn1")
        fold(f"blocks.{index}.project", f"_blocks.{index}._project_conv", f"_blocks.{index}._bn2")
    fold("head", "_conv_head", "_bn1")
    if left:
        raise UserError(f"EfficientNet-Lite0 weights hold {min(left)}, for which Lite0 has no place")
    return taken
