"""DINO: self-distillation with a momentum teacher and crops of several sizes."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit.training import GradCacheable, MomentumTeacher, Schedule, cosine
from vitkit.validation import at_least
from vitkit_ssl.koleo import KoLeoLoss
from vitkit_ssl.masking import encode_views
from vitkit_ssl.pooled import Pooled
from vitkit_vit import MLPHead


class DINOHead(nn.Module):
    """Features `(... in_dim)` → cosines with `out_dim` prototypes `(... out_dim)`, in [−1, 1].

    An MLP of `depth` layers, `hidden` wide (None: four times `in_dim`), leads to a bottleneck of `bottleneck` dimensions. The output is the
    product of its direction with the direction of each prototype: the last layer has weights of length one. `norm` is that of the
    MLP, see the head `mlp`.

    Raises `UsageError` for dimensions below 1. Source: Caron et al., arXiv 2104.14294, with `norm_last_layer`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: int | None = None,
        bottleneck: int = 64,
        depth: int = 3,
        norm: Literal["layer", "batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        at_least(1, in_dim=in_dim, out_dim=out_dim, hidden=hidden, bottleneck=bottleneck, depth=depth)
        self.mlp = MLPHead(in_dim, bottleneck, hidden=4 * in_dim if hidden is None else hidden, depth=depth, norm=norm)
        self.prototypes = nn.Parameter(torch.randn(out_dim, bottleneck))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave out of weight decay: only the direction of a prototype matters."""
        return {"prototypes"}

    def forward(self, features: Tensor) -> Tensor:
        x = self.mlp(features)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float(), dim=-1, eps=1e-6), F.normalize(self.prototypes.float(), dim=-1, eps=1e-6))


class DINO(GradCacheable):
    """Batches with `views` → {"loss", "teacher_entropy", "marginal_entropy", ...}: the student's view of an image predicts the
    teacher's distribution over prototypes for another view.

    The first kind of `views` `(b v c h w)` are global crops, which student and teacher get; further kinds are local crops for the student
    alone, and may be smaller. The backbone then has to take images of other sizes (`vit` with `dynamic_img_size`).

    - `momentum` is that of the teacher, which averages backbone and head: a number or a schedule.
    - `koleo` is the weight of the KoLeo loss on the student's features of each global view; its value is returned as "koleo".
    - `keep` is the share of the patches that the student's global views use.

    Ranks: the losses are those of the samples of all ranks. Raises `UsageError` for a negative `koleo`, and a batch without `views`.

    Source: Caron et al., arXiv 2104.14294; KoLeo as in DINOv2, arXiv 2304.07193.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dino_head: nn.Module,
        loss: nn.Module,
        *,
        momentum: float | Schedule | None = None,
        koleo: float = 0.0,
        keep: float = 1.0,
    ) -> None:
        super().__init__()
        at_least(0, koleo=koleo)
        self.backbone, self.dino_head, self.loss = backbone, dino_head, loss
        self.koleo, self.koleo_loss, self.keep = koleo, KoLeoLoss(), keep
        momentum = cosine(0.99, 1.0) if momentum is None else momentum
        self.teacher, self.teacher_head = MomentumTeacher(Pooled(backbone), momentum), MomentumTeacher(dino_head, momentum)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's features `(b d)`."""
        return Pooled.encode(self.backbone, images)

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The values of the loss for a uniform student; with KoLeo the sum has no such value."""
        values_of = getattr(self.loss, "uninformed", None)
        values = {} if values_of is None else dict(values_of(batch_size))
        if self.koleo:
            values["dino"] = values.pop("loss")
        return values

    def forward_features(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Features of all crops `student` `(b v d)`, and of the global crops `teacher` `(b t d)`."""
        if "views" not in batch:
            raise UsageError("the batch has no views; give the batches views=[View(count=2), View(size=..., count=4)]")
        crops, *local = batch["views"]
        student = [encode_views(self.backbone, crops, self.keep), *(encode_views(self.backbone, views) for views in local)]
        teacher = self.teacher(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        return {"student": torch.cat(student, dim=1), "teacher": teacher}

    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of the features of one batch, or of several joined batches."""
        student, teacher = (features[name].transpose(0, 1) for name in ("student", "teacher"))  # (v b d)
        parts = dict(self.loss(self.dino_head(student), self.teacher_head(teacher)))
        if self.koleo:
            parts["koleo"] = torch.stack([self.koleo_loss(view)["loss"] for view in student[: len(teacher)]]).mean()
            parts["dino"] = parts["loss"]
            parts["loss"] = parts["dino"] + self.koleo * parts["koleo"]
        return parts


__all__ = ["DINO", "DINOHead"]
