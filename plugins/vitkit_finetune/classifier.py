"""A backbone and a linear classifier on it, of which a part is trained."""

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit.models import encode_image
from vitkit.validation import at_least, one_of

Tune = Literal["linear", "partial", "full"]


class FineTuning(nn.Module):
    """Batches of images and labels → the loss of `classifier(backbone.encode_image(x))`.

    `tune` names the trained part:

    - "linear": the classifier alone;
    - "partial": the classifier, the last `blocks` transformer blocks, and the modules of the backbone that follow them, such as its norm;
    - "full": the classifier and the backbone.

    All other parameters get no gradient, and their modules stay in evaluation mode: no dropout, and batch norms keep their statistics.
    `classes` are the names of the classes; with them `vitkit.models` finds the loss of a prediction that uses no information, ln k.
    Batches may hold mixed images (`partners` and `weights`, see `vitkit.contracts.Batches`).

    Raises `UsageError` for another `tune`, and with "partial" for a backbone without `blocks` and for more blocks than it has.
    """

    def __init__(
        self, backbone: nn.Module, classifier: nn.Module, loss: nn.Module, *, classes: list[str], tune: Tune = "full", blocks: int = 2
    ) -> None:
        super().__init__()
        one_of(get_args(Tune), tune=tune)
        self.backbone, self.classifier, self.loss = backbone, classifier, loss
        self.classes, self.tune = list(classes), tune
        if tune != "full":
            backbone.requires_grad_(False)
        self._trained = [*(_last_modules(backbone, blocks) if tune == "partial" else [backbone] if tune == "full" else []), classifier]
        for module in self._trained:
            module.requires_grad_(True)

    def train(self, mode: bool = True) -> "FineTuning":
        """Set the mode of the trained parts; the others stay in evaluation mode."""
        super().train(mode)
        if mode and self.tune != "full":
            self.backbone.eval()
            for module in self._trained:
                module.train()
        return self

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's pooled features `(b d)`."""
        if self.tune == "linear":
            with torch.no_grad():
                return encode_image(self.backbone, images)
        return encode_image(self.backbone, images)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.classifier(self.encode_image(batch["images"]))
        mixed = {name: batch[name] for name in ("partners", "weights") if name in batch}
        return dict(self.loss(logits, batch["labels"], **mixed))

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """ln k, for the same probability of each of k classes."""
        return {"loss": math.log(len(self.classes))}


def _last_modules(backbone: nn.Module, count: int) -> list[nn.Module]:
    """The last `count` blocks of a backbone, and the modules after them."""
    at_least(1, blocks=count)
    owner: Any = next((m for m in backbone.modules() if isinstance(getattr(m, "blocks", None), nn.Sequential | nn.ModuleList)), None)
    if owner is None:
        raise UsageError(
            f"{type(backbone).__name__} has no list of blocks, so no part of it can be chosen; give --tune linear or --tune full"
        )
    blocks = cast(nn.Sequential, owner.blocks)
    if count > len(blocks):
        raise UsageError(f"blocks is {count}, but {type(backbone).__name__} has {len(blocks)}; give at most {len(blocks)}, or --tune full")
    names = list(dict(owner.named_children()))
    after = [getattr(owner, name) for name in names[names.index("blocks") + 1 :]]
    return [*list(blocks)[len(blocks) - count :], *after]


__all__ = ["FineTuning", "Tune"]
