"""A vision transformer with a variational latent and an embedding of it."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit import backbones
from vitkit.distributed import draw_rows
from vitkit.errors import UsageError
from vitkit.validation import at_least

LOG_VAR_LIMIT = 10.0
LOG_VAR_START = -4.0
"""With σ near 1 from the start, noise would be larger than μ, and training would stall for long."""


class VAEEncoder(nn.Module):
    """Images `(b c h w)` → μ and log σ² `(b latent_dim)` → z → embeddings `(b embedding_dim)`.

    The backbone `vit` gives tokens. A linear map of the pooled tokens gives μ and log σ². `embed`, two linear layers with
    GELU between them, maps a latent to its embedding. `depths` lists numbers of blocks, 1 … depth. The tokens after each of
    them are pooled and concatenated, which gives a hierarchical embedding ("all": after every block; None: after the last
    block).

    log σ² = 10·tanh(a/10) of the linear map's output a: for any a, it lies in [−10, 10] and σ in [0.0067, 148]. Latents are
    computed in fp32. Before training, log σ² is near −4 and μ near 0. The other arguments are those of `vit`.

    Raises `UsageError` for dimensions below one, depths that are empty or outside 1 … depth, and if `vit` does.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 64,
        embedding_dim: int = 64,
        depths: Sequence[int] | Literal["all"] | None = None,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 6,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        pool: Literal["cls", "mean"] = "mean",
        positions: Literal["learned", "sincos1d", "sincos2d", "none"] = "sincos2d",
        registers: int = 0,
        checkpoint: bool = False,
        stem: Literal["patch", "conv"] = "patch",
    ) -> None:
        super().__init__()
        at_least(1, latent_dim=latent_dim, embedding_dim=embedding_dim)
        chosen = range(1, depth + 1) if depths == "all" else (depth,) if depths is None else depths
        self.depths = tuple(chosen)
        if not self.depths or not all(1 <= number <= depth for number in self.depths):
            raise UsageError(f"depths are {list(self.depths)}; expected numbers of blocks in 1 … {depth}")
        self.vit = backbones.build(
            "vitkit:vit", img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth,
            num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout, drop_path=drop_path, pool=pool,
            positions=positions, registers=registers, checkpoint=checkpoint, stem=stem,
        )  # fmt: skip
        self.embed_dim, self.latent_dim, self.embedding_dim = embed_dim, latent_dim, embedding_dim
        self.img_size: tuple[int, int] = self.vit.img_size
        self.in_chans = in_chans
        self.to_latent = nn.Linear(len(self.depths) * embed_dim, 2 * latent_dim)
        nn.init.constant_(self.to_latent.bias[latent_dim:], LOG_VAR_START)
        hidden = 2 * max(latent_dim, embedding_dim)
        self.to_embedding = nn.Sequential(nn.Linear(latent_dim, hidden), nn.GELU(), nn.Linear(hidden, embedding_dim))

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"latent_dim": 8, "embedding_dim": 8, "img_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 1}, {}

    def forward(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → tokens `(b n d)`."""
        tokens: Tensor = self.vit(images)
        return tokens

    def encode_features(self, images: Tensor, depths: Sequence[int] | None = None) -> Tensor:
        """Images `(b c h w)` → pooled tokens `(b len(depths)·d)` in front of the latent, after `depths` blocks (None: `self.depths`)."""
        chosen = self.depths if depths is None else tuple(depths)
        if chosen == (len(self.vit.blocks),):
            return self.vit.encode_image(images)
        return torch.cat([self.vit.pool(tokens) for tokens in self.vit.forward_features(images, chosen)], dim=1)

    def encode_latent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(b c h w)` → μ and log σ², each float32 `(b latent_dim)`."""
        features = self.encode_features(images)
        with torch.autocast(features.device.type, enabled=False):
            mu, bounded = self.to_latent(features.float()).chunk(2, dim=1)
            return mu, LOG_VAR_LIMIT * torch.tanh(bounded / LOG_VAR_LIMIT)

    def embed(self, z: Tensor) -> Tensor:
        """Latents `(b latent_dim)` → embeddings `(b embedding_dim)`."""
        embeddings: Tensor = self.to_embedding(z)
        return embeddings

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the embeddings `(b embedding_dim)` of their μ."""
        mu, _ = self.encode_latent(images)
        return self.embed(mu)


def sample_latent(mu: Tensor, log_var: Tensor, *, views: int = 1) -> Tensor:
    """z = μ + σ·ε with ε ~ N(0, I): `(v·b z)`, all first views before all second ones.

    ε is drawn for the whole batch from torch's global generator on rank 0, so that it is equal for any number of ranks.
    """
    samples = mu[: len(mu) // views]
    noise = draw_rows(lambda n: torch.randn(n, views, mu.shape[1], device=mu.device, dtype=mu.dtype), samples)
    return mu + (0.5 * log_var).exp() * noise.transpose(0, 1).flatten(0, 1)
