"""Two gloo processes against one: every loss and the whole model."""

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from vitkit_vae import ConvDecoder, KLLoss, MultiTaskVAE, ReconstructionLoss, TripletLoss, VAEEncoder

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, -1, 1, 1])
SIZES = {"even": (5, 5), "uneven": (7, 3)}


def losses(images: Tensor, labels: Tensor) -> dict[str, tuple[dict[str, Tensor], list[Tensor]]]:
    """Each loss's parts and gradients for the weights."""
    torch.manual_seed(0)
    backbone = VAEEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, latent_dim=4, embedding_dim=3)
    decoder, classifier = ConvDecoder(in_dim=4, out_dim=1, img_size=8, kernel_size=2), nn.Linear(3, 3)
    weight = torch.randn(64, 3, requires_grad=True)
    embeddings = images.flatten(1) @ weight
    found: dict[str, Any] = {}
    for mining in ("batch_hard", "semi_hard"):
        parts = TripletLoss(0.5, mining)(embeddings, labels)
        found[mining] = parts, torch.autograd.grad(parts["loss"], weight, retain_graph=True)
    given = TripletLoss(0.5)(embeddings, positives=embeddings.square(), negatives=embeddings.sin())
    found["given"] = given, torch.autograd.grad(given["loss"], weight)
    model = MultiTaskVAE(backbone, classifier, decoder, triplet=TripletLoss(0.5), reconstruction=ReconstructionLoss("bce"), kl=KLLoss())
    parts = model({"images": images, "labels": labels})
    found["model"] = parts, torch.autograd.grad(parts["loss"], list(model.parameters()))
    return {
        name: ({part: value.detach() for part, value in parts.items()}, list(gradients))
        for name, (parts, gradients) in found.items()
    }


def worker(number: int, folder: str, images: Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    results = {name: losses(images.split(sizes)[number], LABELS.split(sizes)[number]) for name, sizes in SIZES.items()}
    torch.save(results, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_losses_and_gradients_of_one(tmp_path: Any) -> None:
    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    mp.spawn(worker, (str(tmp_path), images), nprocs=2)
    results = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    for name, (parts, gradients) in losses(images, LABELS).items():
        for sizes in SIZES:
            for result in results:
                torch.testing.assert_close(result[sizes][name][0], parts, rtol=1e-4, atol=1e-5)
            for first, second, expected in zip(results[0][sizes][name][1], results[1][sizes][name][1], gradients, strict=True):
                torch.testing.assert_close((first + second) / 2, expected, rtol=1e-4, atol=1e-5)
