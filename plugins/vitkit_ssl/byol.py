"""BYOL: a network predicts, from one view of an image, the projection that its momentum teacher has of another view."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.distributed import all_reduce_sum
from vitkit.errors import UsageError
from vitkit.training import GradCacheable, MomentumTeacher, Schedule, cosine
from vitkit_ssl.masking import encode_views
from vitkit_ssl.pooled import Pooled


class BYOLLoss(nn.Module):
    """2 − 2·cos(q_i, z_j), a mean over samples and all pairs of two different views i and j.

    Call: predictions q `(v n d)` and the teacher's projections z `(v n d)`, v ≥ 2 → {"loss"}. No gradient flows into the teacher's.
    `uninformed` is 2: a random direction has a cosine of 0 in the mean. Computed in fp32, also under autocast.

    Ranks: the loss is the mean over the samples of all ranks, whose numbers may differ. Raises `UsageError` for shapes that differ.
    Source: Grill et al., arXiv 2006.07733.
    """

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"prediction": torch.randn(2, samples, 8), "target": torch.randn(2, samples, 8)}

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """Of a prediction in a random direction."""
        return {"loss": 2.0}

    def forward(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        if prediction.shape != target.shape or prediction.ndim != 3 or len(prediction) < 2:
            raise UsageError(
                f"predictions are {tuple(prediction.shape)} and targets {tuple(target.shape)}; expected two of (views, samples, dim) "
                f"with two views or more"
            )
        views, samples = prediction.shape[:2]
        with torch.autocast(prediction.device.type, enabled=False):
            q, z = F.normalize(prediction.float(), dim=-1), F.normalize(target.detach().float(), dim=-1)
            cosines = torch.einsum("vnd,nd->", q, z.sum(dim=0)) - torch.einsum("vnd,vnd->", q, z)
            count = all_reduce_sum(cosines.new_tensor(float(samples))).clamp(min=1) * (views * (views - 1))
            return {"loss": 2 - 2 * all_reduce_sum(cosines) / count}


class BYOL(GradCacheable):
    """Batches with `views` → {"loss"}: `predictor(projector(student(view)))` follows `projector(teacher(another view))`.

    `momentum` is that of the teacher, which averages backbone and projector: a number or a schedule. Each view of the student uses a share
    `keep` of its patches; the teacher uses all.

    Ranks: patches are drawn for the samples of all ranks. Source: Grill et al., arXiv 2006.07733.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        loss: nn.Module,
        *,
        momentum: float | Schedule | None = None,
        keep: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.predictor, self.loss, self.keep = backbone, projector, predictor, loss, keep
        momentum = cosine(0.99, 1.0) if momentum is None else momentum
        self.teacher, self.teacher_projector = MomentumTeacher(Pooled(backbone), momentum), MomentumTeacher(projector, momentum)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's features `(b d)`."""
        return Pooled.encode(self.backbone, images)

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The value of the loss for a prediction in a random direction; empty if the loss does not give it."""
        values_of = getattr(self.loss, "uninformed", None)
        return {} if values_of is None else dict(values_of(batch_size))

    def forward_features(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Features `student` and `teacher` `(b v d)` of the first kind of views."""
        views = batch["views"][0]
        teacher = self.teacher(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return {"student": encode_views(self.backbone, views, self.keep), "teacher": teacher}

    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of the features of one batch, or of several joined batches."""
        student, teacher = (features[name].transpose(0, 1) for name in ("student", "teacher"))  # (v b d)
        return dict(self.loss(self.predictor(self.projector(student)), self.teacher_projector(teacher)))


__all__ = ["BYOL", "BYOLLoss"]
