"""Contrastive losses between the embeddings of images and of captions, over the batches of all ranks."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.distributed import all_gather, all_reduce_sum, rank
from vitkit.errors import UsageError

MAX_SCALE = 100.0
"""The largest number that cosines are multiplied by, as in CLIP: beyond it a softmax over them is all but a maximum."""


class Contrastive(nn.Module, ABC):
    """What the losses of this module share: image and text embeddings `(n d)` → {"loss", parts}.

    Row i of both belongs together; embeddings need not be of unit length, s_ij is the cosine of image i and text j. `labels`
    int64 `(n,)` are the numbers of the captions: P(i) = {j: labels_j = labels_i} are the positives of i, the others its
    negatives; without labels P(i) = {i}. All is computed in fp32, under autocast too.

    Ranks: the loss is that of all ranks' rows, whose numbers may differ, the same everywhere; its gradient follows the
    convention of `vitkit.distributed.collectives`. Raises `UsageError` for embeddings and labels that do not fit.
    """

    def forward(self, image: Tensor, text: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if image.ndim != 2 or image.shape != text.shape or (labels is not None and labels.shape != image.shape[:1]):
            given = "none" if labels is None else tuple(labels.shape)
            raise UsageError(
                f"image is {tuple(image.shape)}, text {tuple(text.shape)}, labels {given}; expected (n, d), (n, d), (n,)"
            )
        if labels is None:
            labels = torch.arange(len(image), device=image.device) + (rank() << 32)  # no two alike on any rank
        with torch.autocast(image.device.type, enabled=False):
            image, text = (F.normalize(x.float(), dim=1, eps=1e-6) for x in (image, text))
            images, texts = all_gather(image), all_gather(text)
            positive = labels[:, None] == all_gather(labels)  # (n_r n)
            return self._compare(image @ texts.T, text @ images.T, positive)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        labels = torch.arange(samples) % max(samples - 1, 1)  # the first and the last have one caption
        return {}, {"image": torch.randn(samples, 8), "text": torch.randn(samples, 8), "labels": labels}

    @abstractmethod
    def _compare(self, to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
        """From this rank's rows of cosines `(n_r n)`, images to texts and texts to images, and who is a positive."""


class _Tempered(Contrastive):
    """Cosines over a temperature T, fixed or learned, and a loss of each row in both directions."""

    def __init__(self, temperature: float, learned: bool, max_scale: float) -> None:
        super().__init__()
        if not (max_scale >= 1 and max_scale <= 1e4):
            raise UsageError(
                f"max_scale is {max_scale}; expected from 1 to 10,000: cosines are multiplied by up to that"
            )
        if not (math.isfinite(temperature) and temperature >= (1 - 1e-6) / max_scale):
            raise UsageError(
                f"temperature is {temperature}; expected a finite number of at least {1 / max_scale:g}: a smaller one "
                f"overflows a softmax in half precision; raise max_scale={max_scale:g} if you mean it"
            )
        self.max_scale = max_scale
        self.learned = learned
        log_scale = torch.tensor(-math.log(temperature))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"learned": True}, Contrastive.vitkit_example(samples)[1]

    def _scale(self) -> Tensor:
        """1/T, at most `max_scale`; a learned one that an optimiser took beyond it is put back."""
        if self.learned:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.float().exp()

    def _compare(self, to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
        scale = self._scale()
        parts = _symmetric(self._rows(scale * to_text, positive), self._rows(scale * to_image, positive), positive)
        return parts | ({"temperature": 1 / scale.detach()} if self.learned else {})

    @abstractmethod
    def _rows(self, logits: Tensor, positive: Tensor) -> Tensor:
        """A loss `(n_r,)` for each row of logits `(n_r n)`."""


class InfoNCE(_Tempered):
    """Symmetric cross entropy of images against captions and back, in nats: CLIP's loss, equal captions as positives.

        L_i = −1/|P(i)| Σ_{p∈P(i)} log( exp(s_ip/T) / Σ_j exp(s_ij/T) ),

    a mean over rows and both directions → {"loss", "image_to_text", "text_to_image"}. T is `temperature`, or with `learned`
    starts there, is trained as log(1/T) with 1/T ≤ `max_scale`, and returned as "temperature".

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; of all ranks, as `Contrastive` says.

    Raises `UsageError` for a temperature below 1/`max_scale`. Source: Radford et al., arXiv 2103.00020; several positives as
    in UniCL, arXiv 2204.03610. With distinct labels it is open_clip's `ClipLoss`.
    """

    def __init__(self, temperature: float = 0.07, learned: bool = False, max_scale: float = MAX_SCALE) -> None:
        super().__init__(temperature, learned, max_scale)

    def _rows(self, logits: Tensor, positive: Tensor) -> Tensor:
        return _cross_entropy(logits, positive)


class FocalNCE(_Tempered):
    """InfoNCE's row i times (1 − p_i)^γ, p_i = Σ_{p∈P(i)} softmax(s_i/T)_p: rows that are right already count less.

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; of all ranks, as `Contrastive` says.

    `gamma` = 0 is `info_nce`; parts and other arguments as there. Raises `UsageError` for a negative `gamma`. Source: the
    focal loss, Lin et al., arXiv 1708.02002, on contrastive logits; no gradient is stopped.
    """

    def __init__(
        self, temperature: float = 0.07, gamma: float = 2.0, learned: bool = False, max_scale: float = MAX_SCALE
    ) -> None:
        super().__init__(temperature, learned, max_scale)
        if not (math.isfinite(gamma) and gamma >= 0):
            raise UsageError(f"gamma is {gamma}; expected a finite number of at least 0")
        self.gamma = gamma

    def _rows(self, logits: Tensor, positive: Tensor) -> Tensor:
        wrong = logits.softmax(dim=1).masked_fill(positive, 0.0).sum(dim=1)  # 1 − p_i, without cancellation
        weight = wrong.clamp(min=1e-12) ** self.gamma if self.gamma else 1.0
        return weight * _cross_entropy(logits, positive)


class HardNegativeNCE(_Tempered):
    """InfoNCE whose negatives weigh the more the nearer they are, without the share of positives among them.

    With N_i the set of negatives, N = |N_i|, and e_ij = exp(s_ij/T):

        L_i = −1/|P(i)| Σ_{p∈P(i)} log( e_ip / (Σ_{q∈P(i)} e_iq + G_i) ),
        G_i = max( (Σ_{j∈N_i} w_ij·e_ij − τ·N·mean_{p∈P(i)} e_ip) / (1 − τ),  N·exp(−1/T) ),
        w_ij = e_ij^β / mean_{k∈N_i} e_ik^β.

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; of all ranks, as `Contrastive` says.

    `beta` = 0 and `tau` = 0 is `info_nce`; parts and other arguments as there. Raises `UsageError` for a negative `beta` and
    a `tau` outside [0, 1). Source: Robinson et al., arXiv 2010.04592, and its code, which has one positive a row.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        beta: float = 0.5,
        tau: float = 0.0,
        learned: bool = False,
        max_scale: float = MAX_SCALE,
    ) -> None:
        super().__init__(temperature, learned, max_scale)
        if not (math.isfinite(beta) and beta >= 0 and 0 <= tau < 1):
            raise UsageError(f"beta is {beta} and tau {tau}; expected beta >= 0 and tau in [0, 1)")
        self.beta, self.tau = beta, tau

    def _rows(self, logits: Tensor, positive: Tensor) -> Tensor:
        nothing = torch.finfo(logits.dtype).min
        count = (~positive).sum(dim=1).clamp(min=1).log()
        negatives = logits.masked_fill(positive, nothing)
        # Logarithms throughout: exp(s/T) itself would overflow where 1/T is near its limit and β is large.
        weighted = torch.logsumexp((1 + self.beta) * negatives.clamp(min=-1e30), dim=1)
        mean_weight = torch.logsumexp(self.beta * negatives.clamp(min=-1e30), dim=1) if self.beta else count
        hard = weighted - mean_weight + count
        own = torch.logsumexp(logits.masked_fill(~positive, nothing), dim=1)
        if self.tau:
            mean_own = own - positive.sum(dim=1).log()
            share = (math.log(self.tau) + count + mean_own - hard).clamp(max=-1e-6)
            hard = hard + torch.log1p(-share.exp()) - math.log1p(-self.tau)
        scale = self.log_scale.float().exp()
        hard = torch.maximum(hard, count - scale)
        hard = hard.masked_fill(positive.all(dim=1), nothing)  # nobody else is there
        total = torch.logaddexp(own, hard)
        return total - (logits * positive).sum(dim=1) / positive.sum(dim=1)


class MarginTriplet(Contrastive):
    """max(0, margin − s_ip + s_ij) over positives p and negatives j, in both directions: cosines apart by a margin.

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; of all ranks, as `Contrastive` says.

    With `hardest` the nearest negative of each row alone (Faghri et al., arXiv 1707.05612), else the mean over all; over
    positives always the mean. → {"loss", "image_to_text", "text_to_image"}, of cosines, without a temperature. Raises
    `UsageError` for a margin outside [0, 2].
    """

    def __init__(self, margin: float = 0.2, hardest: bool = True) -> None:
        super().__init__()
        if not 0.0 <= margin <= 2.0:
            raise UsageError(f"margin is {margin}; expected a difference of cosines in [0, 2]")
        self.margin, self.hardest = margin, hardest

    def _compare(self, to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
        return _symmetric(self._rows(to_text, positive), self._rows(to_image, positive), positive)

    def _rows(self, cosines: Tensor, positive: Tensor) -> Tensor:
        if not cosines.shape[1]:
            return cosines.sum(dim=1)  # nobody on any rank, and of nobody there is no nearest
        if self.hardest:
            nearest = cosines.masked_fill(positive, -math.inf).amax(dim=1, keepdim=True)  # (n_r 1)
            hinges = (self.margin - cosines + nearest).clamp(min=0)
            return (hinges * positive).sum(dim=1) / positive.sum(dim=1)
        pairs = (self.margin - cosines[:, :, None] + cosines[:, None, :]).clamp(min=0)  # (n_r positive negative)
        counted = positive[:, :, None] & ~positive[:, None, :]
        return (pairs * counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp(min=1)


class SigLIP(Contrastive):
    """Each image with each caption a yes or a no of its own: −1/n Σ_ij log σ(z_ij·(s_ij/T + b)), z_ij = 1 for positives,
    else −1.

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; of all ranks, as `Contrastive` says.

    → {"loss", "siglip", "temperature", "bias"}. log(1/T) and b are learned, from `temperature` = 0.1 and `bias` = −10 on,
    with 1/T ≤ `max_scale`. Raises `UsageError` for a temperature below 1/`max_scale`. Source: Zhai et al., arXiv 2303.15343,
    whose pairs are positives only where they belong together; with distinct labels it is open_clip's `SigLipLoss`.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, max_scale: float = MAX_SCALE) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature >= (1 - 1e-6) / max_scale and math.isfinite(bias)):
            raise UsageError(
                f"temperature is {temperature} and bias {bias}; expected finite numbers, the temperature at least "
                f"{1 / max_scale:g}"
            )
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def _compare(self, to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))
        logits = self.log_scale.float().exp() * to_text + self.bias
        total = F.softplus(torch.where(positive, -logits, logits)).sum()
        loss = all_reduce_sum(total) / _count(positive)
        told = {"temperature": (-self.log_scale).exp().detach(), "bias": self.bias.detach()}
        return {"loss": loss, "siglip": loss, **told}


def _cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """−1/|P(i)| Σ_{p∈P(i)} log softmax(logits_i)_p, `(n_r,)`."""
    mean = (logits * positive).sum(dim=1) / positive.sum(dim=1)
    return torch.logsumexp(logits, dim=1) - mean


def _symmetric(to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """The means of both directions' rows `(n_r,)` over all ranks, and half their sum."""
    sums = all_reduce_sum(torch.stack([to_text.sum(), to_image.sum()])) / _count(positive)
    return {"loss": sums.mean(), "image_to_text": sums[0], "text_to_image": sums[1]}


def _count(positive: Tensor) -> int:
    """Rows of all ranks, at least one."""
    return max(positive.shape[1], 1)


__all__ = ["Contrastive", "FocalNCE", "HardNegativeNCE", "InfoNCE", "MarginTriplet", "SigLIP"]
