"""Earlier names of the VAE recipes' flags: `ALIASES = VAE_ALIASES` in a recipe keeps them working."""

VAE_ALIASES = {
    "backbone": "encoder",
    "backbone_arg": "encoder_arg",
    "emb_dim": "embed_dim",
    "latent_dim": "encoder.latent_dim",
    "stem": "encoder.stem",
    "hierarchical": "encoder.depths=all",
    "checkpoint": "encoder.checkpoint=true",
    "weighting": "loss.mode",
    "mining": "triplet_loss.mining",
    "margin": "triplet_loss.margin",
    "kl_reduction": "kl_loss.reduction",
    "reconstruction_kind": "reconstruction_loss.kind",
    "reconstruction_reduction": "reconstruction_loss.reduction",
    "transfer_to": "transfer.dataset",
    "transfer_features": "transfer.features",
}
