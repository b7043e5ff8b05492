"""The multi-task VAE over several batches: triplets, classes, pixels and KL of all of them, with the noise of each."""

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from vitkit.training import Accumulated, GradCacheable
from vitkit_vae import ConvDecoder, KLLoss, MultiTaskVAE, TripletLoss, VAEEncoder

COUNT, LATENT = 11, 4


def vae(*, conditional: bool = False, supervised: bool = True) -> MultiTaskVAE:
    torch.manual_seed(0)
    backbone = VAEEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, latent_dim=LATENT, embedding_dim=3)
    with torch.no_grad():  # noise that no tolerance overlooks
        backbone.to_latent.bias[LATENT:] = 0.0
    decoder = ConvDecoder(in_dim=LATENT, out_dim=1, img_size=8, kernel_size=2, num_classes=3 if conditional else None)
    return MultiTaskVAE(
        backbone, nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)) if supervised else None, decoder, triplet=TripletLoss(0.5),
        kl=KLLoss(), supervised=supervised,
    )  # fmt: skip


def whole(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (COUNT, 2, 1, 8, 8) if kind == "views" else (COUNT, 1, 8, 8)
    made = {"images": torch.rand(shape, generator=generator), "labels": torch.tensor([0, 1, 2, 0, -1, 2, 0, 1, 1, 2, 0])}
    if kind == "given":
        made |= {name: torch.rand(shape, generator=generator) for name in ("positives", "negatives")}
    if kind == "mixed":
        made |= {"partners": made["labels"].flip(0), "weights": torch.rand(COUNT, generator=generator)}
    return made


def parts(kind: str, *sizes: int) -> list[dict[str, Tensor]]:
    split = {name: value.split(sizes) for name, value in whole(kind).items()}
    return [{name: values[number] for name, values in split.items()} for number in range(len(sizes))]


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def noise_of_each(model: MultiTaskVAE, kind: str, patch: pytest.MonkeyPatch) -> None:
    """From here on ε is a sample's own, whichever batch it comes in: a sample is known by its μ."""
    data = whole(kind)
    with torch.no_grad():
        known = torch.cat([model.backbone.encode_latent(data[name].view(-1, 1, 8, 8)[:: 2 if kind == "views" else 1])[0]
                           for name in ("images", "positives", "negatives") if name in data])  # fmt: skip
    noise = torch.randn(len(known), 2, LATENT, generator=torch.Generator().manual_seed(2))

    def own(draw: Any, like: Tensor) -> Tensor:
        views = draw(1).shape[1]
        return noise[torch.cdist(like.detach(), known).argmin(1), :views]

    patch.setattr("vitkit_vae.encoder.draw_rows", own)


@pytest.mark.parametrize("sizes", [(4, 4, 3), (10, 1)])
@pytest.mark.parametrize("kind", ["single", "views", "unsupervised", "given", "mixed", "conditional"])
def test_accumulated_batches_have_the_loss_and_the_gradient_of_one(kind: str, sizes: tuple[int, ...], monkeypatch: Any) -> None:
    options = {"conditional": kind == "conditional", "supervised": kind != "unsupervised"}
    kind = {"unsupervised": "views", "conditional": "single"}.get(kind, kind)
    model = vae(**options)
    assert isinstance(model, GradCacheable)
    noise_of_each(model, kind, monkeypatch)
    found = []
    for call in (lambda model: Accumulated(model)(parts(kind, *sizes), range(len(sizes))), lambda model: model(whole(kind))):
        model = vae(**options)
        losses = call(model)
        losses["loss"].backward()
        state = {name: value.clone() for name, value in model.state_dict().items()}  # a batch norm's, and the calls
        found.append(({name: value.detach() for name, value in losses.items()}, grads(model), state))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert found[0][0]["triplet"] > 0


def test_triplets_are_mined_among_all() -> None:
    """Batches of one class each hold no triplet; together they do."""
    data = whole("single")
    batches = [{name: value[data["labels"] == label] for name, value in data.items()} for label in range(3)]
    assert all(float(vae()(batch)["active"]) == 0 for batch in batches)
    assert float(Accumulated(vae())(batches, [1, 2, 3])["active"]) > 0


def accumulated(number: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two batches, of eight and of three: all of them, or one rank's of two."""
    model: Any = vae()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # torch's own knows nothing of ranks
    batches = parts("single", 8, 3)
    called: nn.Module = Accumulated(model)
    if number is not None:
        batches = [{name: value.tensor_split(2)[number] for name, value in batch.items()} for batch in batches]
        called = nn.parallel.DistributedDataParallel(called)
    losses = called(batches, [3 + 10 * (number or 0), 5 + 10 * (number or 0)])
    losses["loss"].backward()
    return {name: value.detach() for name, value in losses.items()}, grads(model)


def _worker(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    torch.save(accumulated(number), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_accumulate_as_one_with_the_same_noise(tmp_path: Any) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    for number in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{number}.pt"), accumulated(None), rtol=1e-5, atol=1e-5)
