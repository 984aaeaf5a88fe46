"""Image classification data held in memory, with batched augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: int) -> Tensor:
    """Float ``[N, C, H, W]`` to ``[N, C, size, size]``, bilinear with antialiasing."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def shift_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Translate square images, reflected at the edges, and mirror some of them.

    Args:
        images: float ``[N, C, S, S]``.
        top, left: int64 ``[N, 1]``, 0 to 2 · (S // 8): where the window starts in the image padded
            by S // 8 on each side.
        flip: bool ``[N]``.

    Returns:
        Float ``[N, C, S, S]``.
    """
    n, channels, size, _ = images.shape
    pad = size // 8
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    steps = torch.arange(size)
    rows, columns = top + steps, left + steps
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    index = (rows[:, :, None] * (size + 2 * pad) + columns[:, None, :]).view(n, 1, -1)
    return padded.flatten(2).gather(2, index.expand(-1, channels, -1)).view_as(images)


class Images:
    """Labelled images as a map-style data set that makes whole batches at once.

    Args:
        images: uint8 ``[N, C, S, S]``.
        labels: int64 ``[N]``.
        normalize: uint8 images to float ones of the same shape.
        augment: shift by up to an eighth (reflected) and mirror, anew in each epoch. An image is
            mirrored in every other epoch (Jordan 2024), so that two epochs show both.

    A batch is ``(float [n, C, size, size] in channels_last, int64 [n])``. What it holds is a
    function of the seed, the epoch and the indices alone.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalize: Callable[[Tensor], Tensor],
        augment: bool = False,
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"images must be uint8 [N, C, S, S], got {images.dtype} {list(images.shape)}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images but labels of shape {list(labels.shape)}")
        self.images, self.labels, self.normalize, self.augment = images, labels, normalize, augment
        self.size = images.shape[-1]
        digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes())
        self._digest = digest.hexdigest()[:16]
        self.set_epoch(0, 0)

    @property
    def fingerprint(self) -> str:
        """What tells these images from others: all that a batch depends on but the epoch."""
        normalize = getattr(self.normalize, "__qualname__", type(self.normalize).__qualname__)
        return (
            f"{len(self.images)} images {self._digest} augment={self.augment} size={self.size} "
            f"{normalize}"
        )

    def set_size(self, size: int) -> None:
        """Make images of ``size`` × ``size`` from now on."""
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        self.size = size

    def set_epoch(self, epoch: int, seed: int) -> None:
        """Draw the augmentation of all images for ``epoch``."""
        n = len(self.images)
        generator = torch.Generator().manual_seed(seed % 2**63)
        first = torch.rand(n, generator=generator) < 0.5
        self._flip = first ^ bool(epoch % 2)
        generator.manual_seed((seed + 0x9E3779B97F4A7C15 * (epoch + 1)) % 2**63)
        # On the unit interval, because the range depends on the image size of the moment.
        self._shift = torch.rand(n, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        images = resize(self.normalize(self.images[index]), self.size)
        if self.augment:
            positions = 2 * (self.size // 8) + 1
            shift = (self._shift[index] * positions).long().clamp(max=positions - 1)
            images = shift_and_flip(images, shift[:, :1], shift[:, 1:], self._flip[index])
        return images.contiguous(memory_format=torch.channels_last), self.labels[index]
