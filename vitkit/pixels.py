"""Operations on batches of images with a parameter for each image: what augmentations are made of.

Images are float32 `(n c h w)` in [0, 1], parameters `(n,)`. The results agree with torchvision's functional forms, which
take one parameter for all; the test suite compares them image by image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.errors import UsageError


def affine_matrices(
    images: Tensor, *, angle: Tensor, translate: tuple[Tensor, Tensor], scale: Tensor, shear: Tensor
) -> Tensor:
    """Matrices `(n 3 3)` that send output coordinates to input coordinates, both in [−1, 1].

    The image is sheared along x by `shear`, turned clockwise by `angle` (both in degrees), scaled by `scale`, all about
    its centre, and moved by `translate` (x, y), shares of its width and height: torchvision's `affine`.
    """
    angle, shear = angle * (math.pi / 180), shear * (math.pi / 180)
    cos, sin, slant = angle.cos(), angle.sin(), shear.tan()
    aspect = images.shape[2] / images.shape[3]  # normalised coordinates are not square where the image is not
    a, b = (cos - slant * sin) / scale, (sin + slant * cos) / scale * aspect
    c, d = -sin / scale / aspect, cos / scale
    x, y = 2 * translate[0], 2 * translate[1]
    return matrices_of(a, b, -(a * x + b * y), c, d, -(c * x + d * y))


def matrices_of(*entries: Tensor | float) -> Tensor:
    """`(n 3 3)` from the six entries of the upper two rows, each `(n,)` or one number for all."""
    tensor = next(entry for entry in entries if isinstance(entry, Tensor))
    rows = [*entries, 0.0, 0.0, 1.0]
    columns = [row if isinstance(row, Tensor) else torch.full_like(tensor, row) for row in rows]
    return torch.stack(columns, dim=1).unflatten(1, (3, 3))


def sample(images: Tensor, matrices: Tensor, *, outside: str = "zeros") -> Tensor:
    """Images read bilinearly at the places that matrices `(n 3 3)` send the output's pixels to.

    Beyond the edge there is black (`outside="zeros"`) or the edge itself ("border").
    """
    height, width = images.shape[2:]
    x, y = (_centres(size, images) for size in (width, height))
    # Sums of products, for affine_grid's matrix product takes several times as long.
    across = matrices[:, None, None, :2, 0] * x[:, None]  # (n 1 w 2)
    down = matrices[:, None, None, :2, 1] * y[:, None, None] + matrices[:, None, None, :2, 2]  # (n h 1 2)
    return F.grid_sample(images, across + down, mode="bilinear", padding_mode=outside, align_corners=False)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """clamp(factor · x), factor ≥ 0."""
    return (images * _each(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """clamp(m + factor · (x − m)) with the mean m of the grey image, factor ≥ 0."""
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, _each(factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """clamp(g + factor · (x − g)) with the grey image g, factor ≥ 0; an image of one channel stays as it is."""
    return images if images.shape[1] == 1 else torch.lerp(grey(images), images, _each(factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """The hue turned by a share `turn` of the circle, in [−0.5, 0.5]; an image of one channel stays as it is."""
    if images.shape[1] == 1:
        return images
    _require_colours(images)
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)  # (n h w)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = chroma.clamp(min=1e-12)
    # In sixths of the circle: 0 is red, 2 green, 4 blue.
    green_or_blue = torch.where(value == green, 2 + (blue - red) / scale, 4 + (red - green) / scale)
    hue = torch.where(value == red, (green - blue) / scale, green_or_blue) + 6 * turn.view(-1, 1, 1)
    # A channel is full within one sixth of its own hue, and zero from two sixths on: its distance `away` decides.
    away = (hue[:, None] - torch.arange(0, 6, 2, device=images.device).view(3, 1, 1)).abs_()  # (n 3 h w)
    away = torch.minimum(away, (away - 6).abs_())  # the way round the circle may be shorter
    return value[:, None] - away.sub_(1).clamp_(0, 1).mul_(chroma[:, None])


def grey(images: Tensor) -> Tensor:
    """Luma `(n 1 h w)` with the weights of ITU-R BT.601; an image of one channel stays as it is.

    Raises `UsageError` for other than 1 or 3 channels.
    """
    if images.shape[1] == 1:
        return images
    _require_colours(images)
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def gaussian_blur(images: Tensor, sigma: Tensor, *, kernel_size: int) -> Tensor:
    """Convolved with a normalised Gaussian of standard deviation `sigma` pixels, cut to `kernel_size`, mirrored edges.

    Raises `UsageError` where the kernel is even or reaches over a whole image.
    """
    radius = kernel_size // 2
    if kernel_size % 2 == 0 or radius >= min(images.shape[2:]):
        raise UsageError(
            f"kernel_size is {kernel_size}; expected an odd number below {2 * min(images.shape[2:])} for images of "
            f"{images.shape[2]}×{images.shape[3]} pixels"
        )
    taps = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (taps / sigma[:, None]).square(), dim=1)  # (n k)

    def matrices(size: int) -> Tensor:
        """`(n 1 size size)`: the convolution as a product, which takes less time than a sum of shifted images."""
        mirrored = F.pad(torch.eye(size, device=images.device)[None], (0, 0, radius, radius), mode="reflect")[0]
        shifts = mirrored.unfold(0, size, 1)  # (k in out)
        return torch.einsum("nk,kio->nio", kernel, shifts)[:, None]

    with torch.autocast(images.device.type, enabled=False):
        return matrices(images.shape[2]).mT @ (images @ matrices(images.shape[3]))


def _each(parameter: Tensor) -> Tensor:
    """`(n,)` → `(n 1 1 1)`."""
    return parameter.view(-1, 1, 1, 1)


def _centres(size: int, images: Tensor) -> Tensor:
    """The centres of `size` pixels in [−1, 1]."""
    return (torch.arange(size, device=images.device) * 2 + 1) / size - 1


def _require_colours(images: Tensor) -> None:
    if images.shape[1] != 3:
        raise UsageError(f"colours need images of 1 or 3 channels; given {images.shape[1]}")
