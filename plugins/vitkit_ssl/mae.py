"""Masked autoencoders: an encoder of the visible patches, and a small decoder of the masked ones."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkit.contracts import Sheet
from vitkit.errors import UsageError
from vitkit.models import evaluating
from vitkit.training import GradCacheable
from vitkit.validation import in_range
from vitkit_ssl.masking import at_places, hide, patch_order, patchify, unpatchify


class MAE(GradCacheable):
    """Batches of images → {"loss"}: the masked patches, predicted from the visible ones.

    Of n patches a share `mask` is masked, drawn for each image and step, at least one and at most n − 1. The backbone encodes the
    visible patches alone (its argument `keep`), so that the cost of its blocks falls with `mask`. `mae_decoder` predicts the pixels of the
    masked patches, and `loss` compares them. Masked pixels are zero in the image that the backbone gets: a convolutional stem does
    not see them either.

    A batch is `images` `(b c h w)` or `(b v c h w)`. Every view is masked by itself.

    Ranks: masks are drawn for all images on rank 0, so that any number of ranks gives the loss of one process. Raises `UsageError` for a
    `mask` outside (0, 1), and for a backbone with fewer than two patches or without `grid_size`, `num_patches` and `patch_size`.

    Source: He et al., arXiv 2111.06377.
    """

    def __init__(self, backbone: Any, mae_decoder: nn.Module, loss: nn.Module, *, mask: float = 0.75) -> None:
        super().__init__()
        in_range(0, 1, low_included=False, high_included=False, mask=mask)
        missing = [name for name in ("grid_size", "num_patches", "patch_size") if not hasattr(backbone, name)]
        if missing or backbone.num_patches < 2:
            given = f"has no {', '.join(missing)}" if missing else "has one patch"
            raise UsageError(f"{type(backbone).__name__} {given}; expected a backbone of two patches or more, such as 'vit'")
        self.backbone, self.mae_decoder, self.loss = backbone, mae_decoder, loss
        self.mask = mask
        self.num_masked = min(max(round(mask * backbone.num_patches), 1), backbone.num_patches - 1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's features `(b d)`, of all patches."""
        features: Tensor = self.backbone.encode_image(images)
        return features

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The loss of a prediction of zero; empty if the loss does not give it."""
        values_of = getattr(self.loss, "uninformed", None)
        return {} if values_of is None else dict(values_of(batch_size, pixels=self.backbone.in_chans * self.backbone.patch_size**2))

    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """For each sample the predicted and the true pixels of its masked patches, `prediction` and `target` `(b v·m p)`."""
        images = batch["images"]
        images = images[:, None] if images.ndim == 4 else images
        shape, rows = images.shape[:2], images.flatten(0, 1)
        order = patch_order(images, shape[1], self.backbone.num_patches).flatten(0, 1)
        prediction, target = self.predict(rows, order)
        return {"prediction": prediction.unflatten(0, shape).flatten(1, 2), "target": target.unflatten(0, shape).flatten(1, 2)}

    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of the patches of one batch, or of several joined batches."""
        return dict(self.loss(features["prediction"], features["target"]))

    def predict(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true pixels `(b m p)` of the first m patches in `order` int64 `(b n)`, from all others."""
        backbone = self.backbone
        masked, keep = order[:, : self.num_masked], order[:, self.num_masked :]
        target = at_places(patchify(images, backbone.patch_size), masked)
        tokens = backbone(hide(images, masked, backbone.grid_size, backbone.patch_size), keep=keep)
        return self.mae_decoder(tokens, keep, masked), target


def reconstructions(model: MAE, data: Any, *, count: int = 8, seed: int = 0) -> Sheet:
    """A sheet of validation images: the image, its visible patches, and the prediction in place of the masked ones.

    With a normalised loss the network predicts a patch up to its mean and contrast; the sheet takes these two from the true patch.
    """
    images = data.val.stratified_subset(count, seed=seed)
    grid, patch = model.backbone.grid_size, model.backbone.patch_size
    with evaluating(model) as device:
        batch = next(iter(images.batches(count).epoch(0, device=device)))["images"]
        order = torch.rand(len(batch), grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)).argsort(dim=1).to(device)
        prediction, target = (pixels.float() for pixels in model.predict(batch, order))
        if getattr(model.loss, "normalise", False):
            prediction = prediction * target.std(dim=-1, keepdim=True) + target.mean(dim=-1, keepdim=True)
        masked = order[:, : model.num_masked]
        visible = hide(batch, masked, grid, patch)
        places = masked[:, :, None].expand(-1, -1, prediction.shape[-1])
        filled = unpatchify(patchify(batch, patch).scatter(1, places, prediction), grid, patch)
        rows = torch.stack([batch, visible, filled], dim=1).flatten(0, 1)  # (3n c h w)
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (data.mean, data.std))
        pixels = (rows * std + mean).clamp(0, 1).cpu().numpy()
    return Sheet(pixels, ["image", "visible", "predicted"] * len(batch), columns=6)


__all__ = ["MAE", "reconstructions"]
