"""Operations on batches of images with a parameter for each image, as augmentations use them.

Images are float32 `(n c h w)` in [0, 1], parameters `(n,)`. The results agree with torchvision's functions, which take one parameter
for all images; the test suite compares them image by image.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.errors import UsageError


def affine_matrices(
    images: Tensor, *, angle: Tensor, translate: tuple[Tensor, Tensor], scale: Tensor, shear: Tensor
) -> Tensor:
    """Matrices `(n 3 3)` that send output coordinates to input coordinates, both in [−1, 1]: torchvision's `affine`.

    The image is sheared along x by `shear`, rotated clockwise by `angle` (both in degrees) and scaled by `scale`, all about its centre,
    and moved by `translate` (x, y), shares of its width and height.
    """
    angle, shear = angle * (math.pi / 180), shear * (math.pi / 180)
    cos, sin, slant = angle.cos(), angle.sin(), shear.tan()
    aspect = images.shape[2] / images.shape[3]  # normalised coordinates are not square where the image is not
    a, b = (cos - slant * sin) / scale, (sin + slant * cos) / scale * aspect
    c, d = -sin / scale / aspect, cos / scale
    x, y = 2 * translate[0], 2 * translate[1]
    return matrices_of(a, b, -(a * x + b * y), c, d, -(c * x + d * y))


def matrices_of(*entries: Tensor | float) -> Tensor:
    """`(n 3 3)` from the six entries of the upper two rows, each `(n,)` or one number for all images."""
    tensor = next(entry for entry in entries if isinstance(entry, Tensor))
    rows = [*entries, 0.0, 0.0, 1.0]
    columns = [row if isinstance(row, Tensor) else torch.full_like(tensor, row) for row in rows]
    return torch.stack(columns, dim=1).unflatten(1, (3, 3))


def chain(first: Tensor, then: Tensor) -> Tensor:
    """The matrices `(n 3 3)` of a move followed by another one: the last move is undone first."""
    return (first[:, :, :, None] * then[:, None]).sum(2)  # autocast would round a matrix product to bfloat16


def sample(
    images: Tensor,
    matrices: Tensor,
    *,
    padding_mode: Literal["zeros", "border"] = "zeros",
    interpolation: Literal["bilinear", "nearest"] = "bilinear",
) -> Tensor:
    """Images sampled at the positions to which matrices `(n 3 3)` send the output's pixels.

    Beyond the edge pixels are black (`padding_mode="zeros"`) or those of the edge ("border").
    """
    height, width = images.shape[2:]
    x, y = (_centres(size, images) for size in (width, height))
    rows = matrices[:, :2]
    # Sums of products: the matrix product of affine_grid takes several times as long. x and y are a plane each.
    across = rows[:, :, None, None, 0] * x  # (n 2 1 w)
    down = (rows[:, :, None, 1] * y + rows[:, :, None, 2])[..., None]  # (n 2 h 1)
    grid = (across + down).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode=interpolation, padding_mode=padding_mode, align_corners=False)


def crop_resize(images: Tensor, matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops `(b·v c *size)` of images `(b c h w)`, v of each in a row, resized with antialiasing: torchvision's `resized_crop`.

    `matrices` `(b·v 3 3)` send output to input coordinates, both in [−1, 1], and only shrink, mirror and move within the image. Each
    output pixel is a mean of the crop's pixels, weighted by a triangle that is two output pixels wide, and at least two input pixels.
    """
    count, channels, height, width = images.shape
    crops = len(matrices)
    if not crops:
        return images.new_empty((0, channels, *size))
    with torch.autocast(images.device.type, enabled=False):
        # Vertically a sum of a few rows, which skips the rows between; horizontally a product with a matrix.
        taps, weights = _triangles(matrices[:, 1, 1], matrices[:, 1, 2], height, size[0])
        first = torch.arange(count, device=images.device).repeat_interleave(crops // count) * height
        table = images.transpose(1, 2).reshape(count * height, channels * width)
        bags = (taps + first[:, None, None]).flatten(0, 1)  # (b·v·h' k)
        rows = F.embedding_bag(bags, table, per_sample_weights=weights.flatten(0, 1), mode="sum")
        taps, weights = _triangles(matrices[:, 0, 0], matrices[:, 0, 2], width, size[1])
        across = weights.new_zeros(crops, size[1], width).scatter_add_(2, taps, weights)
        resized = rows.view(crops, size[0] * channels, width) @ across.mT
        return resized.view(crops, size[0], channels, size[1]).transpose(1, 2).contiguous()


def _triangles(stretch: Tensor, shift: Tensor, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Along one side of `length` pixels: the input pixels `(n size k)` of each of `size` output pixels, and their weights."""
    output = (torch.arange(size, device=stretch.device) * 2 + 1) / size - 1
    centres = (stretch[:, None] * output + shift[:, None] + 1) * (length / 2)  # (n size), in input pixels from the edge
    step = (stretch.abs() * (length / size)).clamp(min=1)[:, None, None]  # input pixels in an output pixel
    count = 2 * math.ceil(max(length / size, 1.0)) + 1  # as many as a crop of the full side needs
    taps = (centres[..., None] - step).floor() + torch.arange(count, device=stretch.device)
    weights = (1 - (taps + 0.5 - centres[..., None]).abs() / step).clamp_(min=0)
    low, high = ((shift + side * stretch.abs() + 1)[:, None, None] * (length / 2) for side in (-1, 1))
    # Pixels of which a part lies in the crop; a thousandth of a pixel is a rounding error.
    weights = weights * ((taps + 1 > low + 1e-3) & (taps < high - 1e-3))
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return taps.clamp(0, length - 1).long(), weights


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """clamp(factor · x), factor ≥ 0."""
    return (images * _each(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """clamp(m + factor · (x − m)) with the mean m of the grey image, factor ≥ 0."""
    factor = _each(factor)
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """clamp(g + factor · (x − g)) with the grey image g, factor ≥ 0; an image of one channel is unchanged."""
    return images if images.shape[1] == 1 else torch.lerp(grey(images), images, _each(factor)).clamp_(0, 1)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """clamp(s + factor · (x − s)), factor ≥ 0, with s smoothed by (1 1 1, 1 5 1, 1 1 1)/13; the outermost pixels are unchanged."""
    if min(images.shape[2:]) <= 2:
        return images
    # Rows are joined end to end, which takes half the time; only sums for the outermost pixels cross from one row into the next.
    width, flat = images.shape[3], images.flatten(2)
    sums = (flat[..., :-2] + flat[..., 1:-1]).add_(flat[..., 2:])
    sums = (sums[..., : -2 * width] + sums[..., width:-width]).add_(sums[..., 2 * width :])
    inside = slice(width + 1, -width - 1)
    sharp = flat.clone()
    smooth = sums.add_(flat[..., inside], alpha=4).div_(13)
    torch.lerp(smooth, flat[..., inside], factor[:, None, None], out=sharp[..., inside])
    sharp = sharp.view_as(images)
    for edge in (0, -1):
        sharp[..., edge] = images[..., edge]
    return sharp.clamp_(0, 1)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The largest of the 2ᵇ levels k/2ᵇ, k < 2ᵇ, that is not above x, with `bits` b ≥ 0."""
    levels = _each(bits.to(images.dtype).exp2())
    return torch.minimum((images * levels).floor_(), levels - 1).div_(levels)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """1 − x where x ≥ threshold."""
    return (images - images.clone().ge_(_each(threshold))).abs_()  # |x − [x ≥ threshold]|: `where` takes six times as long


def autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched so that its darkest pixel is 0 and its brightest 1; a constant channel is unchanged."""
    darkest, brightest = (extreme(images, dim=(2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    single = brightest == darkest
    darkest = darkest.masked_fill(single, 0.0)
    return (images - darkest).div_((brightest - darkest).masked_fill_(single, 1.0)).clamp_(0, 1)


def equalize(images: Tensor) -> Tensor:
    """The histogram of each channel over 256 levels is equalised, as Pillow does it; a nearly constant channel is unchanged."""
    levels = (images * 255.999).int().flatten(2).flatten(0, 1)  # (n·c h·w)
    places = torch.arange(0, 256 * len(levels), 256, device=images.device, dtype=torch.int32)[:, None]
    brightest = places[:, 0] + levels.amax(dim=1)
    places = levels.add_(places).flatten()  # in tables of 256 levels, one for each channel
    # Integers as floats, which are divided several times as fast; adding a half keeps exact quotients from rounding down.
    count = torch.bincount(places, minlength=256 * len(levels)).float()
    step = ((levels.shape[1] - count.index_select(0, brightest) + 0.5) / 255).floor_()[:, None]
    count = count.view(-1, 256)
    below = count.cumsum(dim=1).sub_(count)
    table = below.add_((step / 2).floor_() + 0.5).div_(step.clamp(min=1)).floor_().clamp_(0, 255)
    table = torch.where(step > 0, table, torch.arange(256.0, device=images.device)).div_(255)
    return table.flatten().index_select(0, places).view_as(images)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """The hue turned by a share `turn` of the circle, in [−0.5, 0.5]; an image of one channel is unchanged."""
    if images.shape[1] == 1:
        return images
    _require_colours(images)
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)  # (n h w)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # In sixths of the circle: 0 is red, 2 green, 4 blue.
    is_red, is_green = value == red, value == green
    hue = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green)).div_(chroma.clamp(min=1e-12))
    hue.add_(torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))).add_(6 * turn.view(-1, 1, 1))  # in [−4, 8]
    turned = torch.empty_like(images)
    for channel, centre in enumerate((0, 2, 4)):
        # A channel is full within one sixth of its hue, and zero from two sixths on, in both directions.
        away = (hue - centre).abs_().sub_(3).abs_().neg_().add_(3).abs_()
        torch.sub(value, away.sub_(1).clamp_(0, 1).mul_(chroma), out=turned[:, channel])
    return turned


def grey(images: Tensor) -> Tensor:
    """Luma `(n 1 h w)` with the weights of ITU-R BT.601; an image of one channel is unchanged.

    Raises `UsageError` for other than 1 or 3 channels.
    """
    if images.shape[1] == 1:
        return images
    _require_colours(images)
    red, green, blue = images.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def gaussian_blur(images: Tensor, sigma: Tensor, *, kernel_size: int) -> Tensor:
    """Images convolved with a normalised Gaussian of standard deviation `sigma` pixels, cut to `kernel_size`, mirrored edges.

    Raises `UsageError` if the kernel is even or larger than the image.
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
        """`(n 1 size size)`: the convolution as a matrix product, which is faster than a sum of shifted images."""
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
