"""Contrastive losses between the embeddings of images and of captions, over the batches of all ranks."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.distributed import all_gather, all_reduce_sum, load_scalars, rank
from vitkit.errors import UsageError
from vitkit.validation import at_least, in_range

MAX_SCALE = 100.0
"""The largest factor of the cosines, as in CLIP: with a larger one a softmax over them is nearly a maximum."""
HIGHEST_MAX_SCALE = 1e4


class Contrastive(nn.Module, ABC):
    """The base of the losses of this module: image and text embeddings `(n d)` → {"loss", parts}.

    Image i and text i belong together. Embeddings can have any length; s_ij is the cosine of image i and text j. `labels`
    int64 `(n,)` are the numbers of the captions. P(i) = {j: labels_j = labels_i} are the positives of i, and all others are
    its negatives. Without labels, P(i) = {i}. Everything is computed in fp32, also under autocast.

    `uninformed` is the value if all embeddings are equal and the n captions are distinct.

    Ranks: the loss is that of the rows of all ranks and equal on every rank. The numbers of rows may differ. Its gradient
    follows `vitkit.distributed.collectives`. Raises `UsageError` if the shapes of embeddings and labels do not fit.
    """

    def forward(self, image: Tensor, text: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if image.ndim != 2 or image.shape != text.shape or (labels is not None and labels.shape != image.shape[:1]):
            given = "none" if labels is None else tuple(labels.shape)
            raise UsageError(
                f"image is {tuple(image.shape)}, text {tuple(text.shape)}, labels {given}; expected (n, d), (n, d), (n,)"
            )
        if labels is None:
            labels = torch.arange(len(image), device=image.device) + (rank() << 32)  # different on every rank
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
    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The value of each part if all embeddings are equal and the `batch_size` captions are distinct."""

    @abstractmethod
    def _compare(self, to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
        """The loss of this rank's cosines `(n_r n)`, images to texts and texts to images; `positive` is bool `(n_r n)`."""


class _Tempered(Contrastive):
    """Cosines divided by a temperature T, which is fixed or learned, and a loss per row in both directions."""

    def __init__(self, temperature: float, learned: bool, max_scale: float) -> None:
        super().__init__()
        in_range(1, HIGHEST_MAX_SCALE, max_scale=max_scale)
        _check_temperature(temperature, max_scale)
        self.max_scale = max_scale
        self.learned = learned
        log_scale = torch.full((1,), -math.log(temperature))  # FSDP2 refuses parameters of 0 dimensions
        if learned:
            self.log_scale = nn.Parameter(log_scale)
            load_scalars(self, "log_scale")
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"learned": True}, Contrastive.vitkit_example(samples)[1]

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """Each softmax is even: ln n."""
        return _both_directions(math.log(batch_size))

    def _scale(self) -> Tensor:
        """1/T, at most `max_scale`; if an optimiser has raised a learned 1/T above it, 1/T is set to `max_scale`."""
        if self.learned:
            _clamp(self.log_scale, self.max_scale)
        return self.log_scale.float().exp()

    def _compare(self, to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
        scale = self._scale()
        parts = _symmetric(self._rows(scale * to_text, positive), self._rows(scale * to_image, positive), positive)
        return parts | ({"temperature": 1 / scale.detach()[0]} if self.learned else {})

    @abstractmethod
    def _rows(self, logits: Tensor, positive: Tensor) -> Tensor:
        """A loss `(n_r,)` for each row of logits `(n_r n)`."""


class InfoNCE(_Tempered):
    """CLIP's loss with equal captions as positives: cross entropy between images and captions in both directions, in nats.

        L_i = −1/|P(i)| Σ_{p∈P(i)} log( exp(s_ip/T) / Σ_j exp(s_ij/T) ),

    a mean over rows and both directions → {"loss", "image_to_text", "text_to_image"}. T is `temperature`. With `learned`,
    `temperature` is the initial value of T. The loss then trains log(1/T) with 1/T ≤ `max_scale`, and returns T as
    "temperature".

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; over all ranks, see `Contrastive`.

    Raises `UsageError` if the temperature is below 1/`max_scale`. Source: Radford et al., arXiv 2103.00020; several
    positives as in UniCL, arXiv 2204.03610. With distinct labels it equals open_clip's `ClipLoss`.
    """

    def __init__(self, temperature: float = 0.07, learned: bool = False, max_scale: float = MAX_SCALE) -> None:
        super().__init__(temperature, learned, max_scale)

    def _rows(self, logits: Tensor, positive: Tensor) -> Tensor:
        return _cross_entropy(logits, positive)


class FocalNCE(_Tempered):
    """InfoNCE with row i multiplied by (1 − p_i)^γ, p_i = Σ_{p∈P(i)} softmax(s_i/T)_p: rows that are already correct count less.

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; over all ranks, see `Contrastive`.

    With `gamma` = 0 it equals `info_nce`. The parts and the other arguments are the same. Raises `UsageError` if `gamma` is
    negative. Source: the focal loss, Lin et al., arXiv 1708.02002, on contrastive logits; no gradient is stopped.
    """

    def __init__(
        self, temperature: float = 0.07, gamma: float = 2.0, learned: bool = False, max_scale: float = MAX_SCALE
    ) -> None:
        super().__init__(temperature, learned, max_scale)
        at_least(0, gamma=gamma)
        self.gamma = gamma

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """Each softmax is even: (1 − 1/n)^γ · ln n."""
        return _both_directions((1 - 1 / batch_size) ** self.gamma * math.log(batch_size))

    def _rows(self, logits: Tensor, positive: Tensor) -> Tensor:
        wrong = logits.softmax(dim=1).masked_fill(positive, 0.0).sum(dim=1)  # 1 − p_i, without cancellation
        weight = wrong.clamp(min=1e-12) ** self.gamma if self.gamma else 1.0
        return weight * _cross_entropy(logits, positive)


class HardNegativeNCE(_Tempered):
    """InfoNCE with larger weights for nearer negatives, corrected for the share of positives among the negatives.

    With N_i the set of negatives, N = |N_i|, and e_ij = exp(s_ij/T):

        L_i = −1/|P(i)| Σ_{p∈P(i)} log( e_ip / (Σ_{q∈P(i)} e_iq + G_i) ),
        G_i = max( (Σ_{j∈N_i} w_ij·e_ij − τ·N·mean_{p∈P(i)} e_ip) / (1 − τ),  N·exp(−1/T) ),
        w_ij = e_ij^β / mean_{k∈N_i} e_ik^β.

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; over all ranks, see `Contrastive`.

    With `beta` = 0 and `tau` = 0 it equals `info_nce`. The parts and the other arguments are the same. Raises `UsageError`
    if `beta` is negative or `tau` is outside [0, 1). Source: Robinson et al., arXiv 2010.04592, and its code, which has one
    positive per row.
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
        at_least(0, beta=beta)
        in_range(0, 1, high_included=False, tau=tau)
        self.beta, self.tau = beta, tau

    def _rows(self, logits: Tensor, positive: Tensor) -> Tensor:
        lowest = torch.finfo(logits.dtype).min
        log_count = (~positive).sum(dim=1).clamp(min=1).log()
        negatives = logits.masked_fill(positive, lowest)
        # All terms are logarithms: exp(s/T) would overflow if 1/T is near its limit and β is large.
        weighted = torch.logsumexp((1 + self.beta) * negatives.clamp(min=-1e30), dim=1)
        mean_weight = torch.logsumexp(self.beta * negatives.clamp(min=-1e30), dim=1) if self.beta else log_count
        hard = weighted - mean_weight + log_count
        positives = torch.logsumexp(logits.masked_fill(~positive, lowest), dim=1)
        if self.tau:
            mean_positive = positives - positive.sum(dim=1).log()
            share = (math.log(self.tau) + log_count + mean_positive - hard).clamp(max=-1e-6)
            hard = hard + torch.log1p(-share.exp()) - math.log1p(-self.tau)
        scale = self.log_scale.float().exp()
        hard = torch.maximum(hard, log_count - scale)
        hard = hard.masked_fill(positive.all(dim=1), lowest)  # there are no negatives
        total = torch.logaddexp(positives, hard)
        return total - (logits * positive).sum(dim=1) / positive.sum(dim=1)


class MarginTriplet(Contrastive):
    """max(0, margin − s_ip + s_ij) over positives p and negatives j, in both directions: cosines should differ by a margin.

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; over all ranks, see `Contrastive`.

    With `hardest`, only the nearest negative of each row counts (Faghri et al., arXiv 1707.05612). Without it, the loss is
    the mean over all negatives. It is always the mean over positives. → {"loss", "image_to_text", "text_to_image"}, in
    units of cosines; there is no temperature. Raises `UsageError` if the margin is outside [0, 2].
    """

    def __init__(self, margin: float = 0.2, hardest: bool = True) -> None:
        super().__init__()
        in_range(0, 2, margin=margin)
        self.margin, self.hardest = margin, hardest

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """All cosines are equal: the margin, or 0 for one pair, which has no negative."""
        return _both_directions(self.margin if batch_size > 1 else 0.0)

    def _compare(self, to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
        return _symmetric(self._rows(to_text, positive), self._rows(to_image, positive), positive)

    def _rows(self, cosines: Tensor, positive: Tensor) -> Tensor:
        if not cosines.shape[1]:
            return cosines.sum(dim=1)  # no rank has a row, and amax needs one
        if self.hardest:
            nearest = cosines.masked_fill(positive, -math.inf).amax(dim=1, keepdim=True)  # (n_r 1)
            hinges = (self.margin - cosines + nearest).clamp(min=0)
            return (hinges * positive).sum(dim=1) / positive.sum(dim=1)
        pairs = (self.margin - cosines[:, :, None] + cosines[:, None, :]).clamp(min=0)  # (n_r positive negative)
        counted = positive[:, :, None] & ~positive[:, None, :]
        return (pairs * counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp(min=1)


class SigLIP(Contrastive):
    """A binary decision per pair of image and caption: −1/n Σ_ij log σ(z_ij·(s_ij/T + b)), z_ij = 1 for positives, else −1.

    Call: image and text embeddings `(n d)`, labels `(n,)` or none; over all ranks, see `Contrastive`.

    → {"loss", "siglip", "temperature", "bias"}. The loss learns log(1/T) and b. They start at `temperature` and `bias`, and
    1/T is at most `max_scale`. Raises `UsageError` if the temperature is below 1/`max_scale`. Source: Zhai et al., arXiv
    2303.15343, where only image i and caption i are positives. With distinct labels it equals open_clip's `SigLipLoss`.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, max_scale: float = MAX_SCALE) -> None:
        super().__init__()
        in_range(1, HIGHEST_MAX_SCALE, max_scale=max_scale)
        _check_temperature(temperature, max_scale)
        if not math.isfinite(bias):
            raise UsageError(f"bias is {bias}; expected a finite number")
        self.max_scale = max_scale
        # FSDP2 refuses parameters of 0 dimensions.
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(temperature)))
        self.bias = nn.Parameter(torch.full((1,), float(bias)))
        load_scalars(self, "log_scale", "bias")

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """With one positive among n captions the best constant probability is 1/n: n·H(1/n) = ln n + (n − 1)·ln(n/(n − 1))."""
        n = batch_size
        value = math.log(n) + (n - 1) * math.log(n / (n - 1)) if n > 1 else 0.0
        return {"loss": value, "siglip": value}

    def _compare(self, to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
        _clamp(self.log_scale, self.max_scale)
        logits = self.log_scale.float().exp() * to_text + self.bias
        total = F.softplus(torch.where(positive, -logits, logits)).sum()
        loss = all_reduce_sum(total) / _count(positive)
        learned = {"temperature": (-self.log_scale).exp().detach()[0], "bias": self.bias.detach()[0]}
        return {"loss": loss, "siglip": loss, **learned}


def _check_temperature(temperature: float, max_scale: float) -> None:
    if not (math.isfinite(temperature) and temperature >= (1 - 1e-6) / max_scale):
        raise UsageError(
            f"temperature is {temperature}; expected a finite number of at least {1 / max_scale:g}: a smaller one "
            f"overflows a softmax in half precision; raise max_scale={max_scale:g} if you need it"
        )


def _clamp(log_scale: Tensor, max_scale: float) -> None:
    with torch.no_grad():
        log_scale.clamp_(max=math.log(max_scale))


def _both_directions(value: float) -> dict[str, float]:
    return {"loss": value, "image_to_text": value, "text_to_image": value}


def _cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """−1/|P(i)| Σ_{p∈P(i)} log softmax(logits_i)_p, `(n_r,)`."""
    mean = (logits * positive).sum(dim=1) / positive.sum(dim=1)
    return torch.logsumexp(logits, dim=1) - mean


def _symmetric(to_text: Tensor, to_image: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """The mean over all ranks of the rows `(n_r,)` of each direction, and the mean of both directions."""
    sums = all_reduce_sum(torch.stack([to_text.sum(), to_image.sum()])) / _count(positive)
    return {"loss": sums.mean(), "image_to_text": sums[0], "text_to_image": sums[1]}


def _count(positive: Tensor) -> int:
    """The number of rows of all ranks, but at least 1."""
    return max(positive.shape[1], 1)


__all__ = ["Contrastive", "FocalNCE", "HardNegativeNCE", "InfoNCE", "MarginTriplet", "SigLIP"]
