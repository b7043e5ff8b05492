"""The methods as models: their views, heads and saved parts, on one process and on two, and with sharded weights."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from vitkit import Run, backbones
from vitkit.data import build
from vitkit.errors import UsageError
from vitkit.training import Accumulated
from vitkit_ssl import DINO, METHODS, DINOHead, DINOLoss, augmentation, build_method, encode_views, multi_crop, views_of

SIZE = 8
LABELLESS = [method for method in METHODS if method != "supervised"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def backbone(**options: Any) -> Any:
    return backbones.build(
        "vitkit:vit", **{"img_size": SIZE, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2, "dropout": 0.0,
                         "pool": "mean", "positions": "sincos2d", "dynamic_img_size": True, **options}
    )  # fmt: skip


def method_model(method: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_method(method, backbone(), classes=10, **options)


def batch(method: Any, samples: int = 5, epoch: int = 0) -> dict[str, Any]:
    data = build("digits").train.stratified_subset(samples)
    return next(data.batches(samples, shuffle=True, views=views_of(method, "auto", 1, SIZE)).epoch(epoch))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_the_same_backbone_and_states_its_losses(method: Any) -> None:
    model = method_model(method)
    parts = model(batch(method))
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.encode_image(gaussian(2, 1, SIZE, SIZE)).shape == (2, 16)
    if method != "supervised":
        assert set(model.uninformed(5)) <= set(parts)
        assert "loss" in model.uninformed(5)
    assert sum(p.numel() for p in model.backbone.parameters()) == sum(p.numel() for p in backbone().parameters())


def test_views_are_two_crops_and_for_dino_small_ones_too() -> None:
    sizes = {method: [(view.size, view.count) for view in views_of(method, "auto", 3, 32)] for method in METHODS}
    assert sizes["dino"] == [(None, 2), (16, 4)]
    assert sizes["simclr"] == sizes["byol"] == sizes["lejepa"] == [(None, 2)]
    assert sizes["mae"] == sizes["supervised"] == [(None, 1)]
    assert [tuple(views.shape) for views in batch("dino")["views"]] == [(5, 2, 1, 8, 8), (5, 4, 1, 4, 4)]


def test_grey_images_are_not_mirrored_and_mae_keeps_colours() -> None:
    names = {
        (augment, channels): [type(step).__name__ for step in augmentation(augment, channels).transforms]
        for augment, channels in (("auto", 1), ("auto", 3), ("crop", 3))
    }
    assert "HorizontalFlip" not in names["auto", 1]
    assert {"HorizontalFlip", "ColorJitter"} <= set(names["auto", 3])
    assert names["crop", 3] == ["RandomResizedCrop", "HorizontalFlip"]
    assert views_of("mae", "auto", 3, 32)[0].transform == augmentation("crop", 3)


def test_keep_leaves_patches_out() -> None:
    model, views = backbone().eval(), gaussian(3, 2, 1, SIZE, SIZE)
    whole = encode_views(model, views)
    torch.testing.assert_close(whole, model.encode_image(views.flatten(0, 1)).unflatten(0, (3, 2)))
    assert not torch.allclose(encode_views(model, views, 0.5), whole)


def test_koleo_is_added_with_its_weight_and_spreads_features() -> None:
    torch.manual_seed(0)
    model = DINO(backbone(), DINOHead(16, 32), DINOLoss(32), koleo=0.3)
    parts = model(batch("dino"))
    torch.testing.assert_close(parts["loss"], parts["dino"] + 0.3 * parts["koleo"])
    assert "loss" not in model.uninformed(5)
    assert set(model.uninformed(5)) <= set(parts)


def test_the_head_gives_cosines_whatever_the_length_of_its_weights() -> None:
    torch.manual_seed(0)
    head = DINOHead(16, 32)
    one = head(gaussian(4, 16))
    head.prototypes.data *= 7
    torch.testing.assert_close(head(gaussian(4, 16)), one)
    assert float(one.detach().abs().max()) <= 1


WRONG: dict[str, tuple[Any, str]] = {
    "method": (lambda: method_model("moco"), "method is 'moco'; expected 'mae', 'dino', 'simclr', 'byol', 'lejepa', 'supervised'"),
    "classes": (lambda: build_method("supervised", backbone()), "method 'supervised' needs images with labels of two classes or more"),
    "keep": (lambda: encode_views(backbone(), gaussian(1, 2, 1, 8, 8), 0.0), "keep is 0.0; expected a number in (0, 1]"),
    "views": (lambda: encode_views(backbone(), gaussian(2, 1, 8, 8)), "views are (2, 1, 8, 8); expected (batch, views, channels,"),
    "patches": (lambda: encode_views(torch.nn.Identity(), gaussian(1, 2, 1, 8, 8), 0.5), "Identity has no num_patches; give keep=1"),
    "no views": (lambda: method_model("dino")({"images": gaussian(2, 1, 8, 8)}), "the batch has no views; give the batches views="),
    "augment": (lambda: augmentation("blur", 3), "augment is 'blur'; did you mean 'colour'? expected 'auto', 'colour', 'crop', 'shape'"),
    "local": (lambda: multi_crop("auto", 3, 32, local=-1), "local is -1; expected at least 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_say_what_was_expected(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)


def steps(method: Any, rank: int = 0, world: int = 1) -> list[Any]:
    """Losses and gradients of two batches and of both together, with a step of plain descent after each."""
    model, results = method_model(method, keep=1.0 if method in ("mae", "supervised") else 0.5), []
    whole = [batch(method, epoch=number) for number in range(2)]
    shares = [map_parts(one, lambda value: value.tensor_split(world)[rank]) for one in whole]
    together = Accumulated(model)
    for index, group in enumerate([shares[:1], shares[1:], shares]):
        model.zero_grad()
        losses = together(group, [100 * index + 10 * number + rank for number in range(len(group))])
        losses["loss"].backward()
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                if world > 1:  # as DDP averages
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= world
                gradients[name] = parameter.grad.clone()
                parameter.data.add_(parameter.grad, alpha=-0.1)
        results.append(({name: value.detach() for name, value in losses.items()}, gradients))
    return results


def map_parts(one: dict[str, Any], change: Any) -> dict[str, Any]:
    return {name: tuple(map(change, value)) if isinstance(value, tuple) else change(value) for name, value in one.items()}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({method: steps(method, rank, 2) for method in METHODS}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_take_the_steps_of_one_also_of_accumulated_batches(method: str, two_ranks: list[dict[str, Any]]) -> None:
    expected = steps(method)
    for rank in two_ranks:
        torch.testing.assert_close(rank[method], expected, rtol=1e-4, atol=1e-5)


def trained(out: Path, method: Any) -> dict[str, Tensor]:
    run = Run(out, device="cpu", precision="fp32")
    model = method_model(method)
    batches = build("digits").train.stratified_subset(16).batches(4 if run.session.accelerator.num_processes == 2 else 8, shuffle=True,
                                                               drop_last=True, views=views_of(method, "crop", 1, SIZE))  # fmt: skip
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in run.fit(model, batches, epochs=1, optimizer=torch.optim.SGD(parameters, lr=0.05)):
        pass
    run.close()
    return model.state_dict()


def _sharded(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    torch.save({method: trained(folder / method, method) for method in LABELLESS}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_method_trains_with_sharded_weights_and_ranks_agree(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(_sharded, (port, tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for method in LABELLESS:
        before = method_model(method).state_dict()
        torch.testing.assert_close(one[method], two[method])
        assert not all(torch.equal(one[method][name], before[name]) for name in before)
