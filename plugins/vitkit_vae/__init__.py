"""The multi-task variational autoencoder: its backbone, decoder, losses, batches, model, evaluators and figures."""

from vitkit_vae.aliases import VAE_ALIASES
from vitkit_vae.batches import TripletBatches
from vitkit_vae.decoder import ConvDecoder
from vitkit_vae.elbo import KLLoss, ReconstructionLoss
from vitkit_vae.encoder import LOG_VAR_LIMIT, VAEEncoder, sample_latent
from vitkit_vae.evaluation import vae_evaluators
from vitkit_vae.evaluators import ActiveUnits, Reconstruction
from vitkit_vae.generate import figures, reconstruct, sample
from vitkit_vae.optimisation import scheduled
from vitkit_vae.transfer import PatchFeatures, PatchTransfer
from vitkit_vae.triplet import TripletLoss
from vitkit_vae.vae import MultiTaskVAE
from vitkit_vae.weighting import REFERENCE_WEIGHTS, MultiTaskLoss

__all__ = [
    "LOG_VAR_LIMIT",
    "REFERENCE_WEIGHTS",
    "VAE_ALIASES",
    "ActiveUnits",
    "ConvDecoder",
    "KLLoss",
    "MultiTaskLoss",
    "MultiTaskVAE",
    "PatchFeatures",
    "PatchTransfer",
    "Reconstruction",
    "ReconstructionLoss",
    "TripletBatches",
    "TripletLoss",
    "VAEEncoder",
    "figures",
    "reconstruct",
    "sample",
    "sample_latent",
    "scheduled",
    "vae_evaluators",
]
