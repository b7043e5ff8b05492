"""A vision transformer with a variational latent and an embedding of it."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vitkit import backbones
from vitkit.distributed import draw_rows
from vitkit.errors import UsageError
from vitkit.models import encode_image
from vitkit.registry import NESTED_BACKBONE, Component
from vitkit.validation import at_least

VIT = ("vit", "vitkit:vit")
LOG_VAR_LIMIT = 10.0
LOG_VAR_START = -4.0
"""With σ near 1 from the start, noise would be larger than μ, and training would stall for long."""


class VAEEncoder(nn.Module):
    """Images `(b c h w)` → μ and log σ² `(b latent_dim)` → z → embeddings `(b embedding_dim)`.

    The registered `backbone` gives tokens. A linear map of the pooled tokens gives μ and log σ². `embed`, two linear layers with
    GELU between them, maps a latent to its embedding. `depths` lists numbers of blocks, 1 … depth, or of stages of a pyramid. The
    tokens after each of them are pooled and concatenated, which gives a hierarchical embedding ("all": after every block; None: after the
    last block).

    log σ² = 10·tanh(a/10) of the linear map's output a: for any a, it lies in [−10, 10] and σ in [0.0067, 148]. Latents are
    computed in fp32. Before training, log σ² is near −4 and μ near 0.

    `backbone_args` are the backbone's arguments beside `img_size` and `in_chans`. The other arguments here, from `patch_size` on, are
    those of `vit` and have no meaning for another backbone.

    Raises `UsageError` for dimensions below one, depths that are empty or outside 1 … depth, and if the backbone does.
    """

    vitkit_architecture: ClassVar = NESTED_BACKBONE

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
        backbone: str = "vitkit:vit",
        backbone_args: Mapping[str, Any] | None = None,
    ) -> None:
        at_least(1, latent_dim=latent_dim, embedding_dim=embedding_dim)
        of_vit = {
            "patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
            "dropout": dropout, "drop_path": drop_path, "pool": pool, "positions": positions, "registers": registers,
            "checkpoint": checkpoint, "stem": stem,
        }  # fmt: skip
        given = (of_vit if backbone in VIT else {}) | dict(backbone_args or {})
        vit = backbones.build(backbone, **{"img_size": img_size, "in_chans": in_chans} | given)  # refuses arguments before a module exists
        super().__init__()
        self.vit = vit
        widths = self._widths()
        chosen = range(1, len(widths) + 1) if depths == "all" else (len(widths),) if depths is None else depths
        self.depths = tuple(chosen)
        if not self.depths or not all(1 <= number <= len(widths) for number in self.depths):
            raise UsageError(f"depths are {list(self.depths)}; expected numbers of blocks in 1 … {len(widths)}")
        self.embed_dim, self.latent_dim, self.embedding_dim = self.vit.embed_dim, latent_dim, embedding_dim
        self.img_size: tuple[int, int] = self.vit.img_size
        self.in_chans = in_chans
        self.to_latent = nn.Linear(sum(widths[number - 1] for number in self.depths), 2 * latent_dim)
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
        if chosen == (len(self._widths()),):
            return encode_image(self.vit, images)
        pool = getattr(self.vit, "pool", lambda tokens: tokens.mean(dim=1))
        return torch.cat([pool(tokens) for tokens in self.vit.forward_features(images, chosen)], dim=1)

    def _widths(self) -> list[int]:
        """The width of the backbone's tokens after each depth that `forward_features` knows; else that of its output."""
        if not hasattr(self.vit, "forward_features"):
            return [self.vit.embed_dim]
        return list(getattr(self.vit, "widths", None) or [self.vit.embed_dim] * len(self.vit.blocks))

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


def build_encoder(encoder: Component, *, img_size: Any, in_chans: int, **vit: Any) -> Any:
    """The encoder of a VAE recipe: `encoder` itself if it has latents, else a `vae_encoder` around it.

    `vit` are the arguments of the vision transformer in the recipe's own encoder; another backbone takes its own arguments only.
    """
    if hasattr(backbones.get(encoder.name), "encode_latent"):
        return encoder.build(img_size=img_size, in_chans=in_chans, **vit)
    wrapped = {"backbone": encoder.name, "backbone_args": encoder.kwargs}
    if encoder.name in VIT:
        return backbones.build("vitkit:vae_encoder", img_size=img_size, in_chans=in_chans, **vit, **wrapped)
    return backbones.build("vitkit:vae_encoder", img_size=img_size, in_chans=in_chans, **wrapped)


def sample_latent(mu: Tensor, log_var: Tensor, *, views: int = 1) -> Tensor:
    """z = μ + σ·ε with ε ~ N(0, I): `(v·b z)`, all first views before all second ones.

    ε is drawn for the whole batch from torch's global generator on rank 0, so that it is equal for any number of ranks.
    """
    samples = mu[: len(mu) // views]
    noise = draw_rows(lambda n: torch.randn(n, views, mu.shape[1], device=mu.device, dtype=mu.dtype), samples)
    return mu + (0.5 * log_var).exp() * noise.transpose(0, 1).flatten(0, 1)
