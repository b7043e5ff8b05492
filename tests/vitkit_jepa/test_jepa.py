"""The JEPA model: its views, hidden labels, what each objective trains."""

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from vitkit import backbones, heads, losses
from vitkit.errors import UsageError
from vitkit.training import Accumulated
from vitkit_jepa import JEPA


def jepa(objective: Any = "joint", **kwargs: Any) -> JEPA:
    torch.manual_seed(0)
    backbone = backbones.build(
        "multimodal_vit", num_classes=3, img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2
    )
    torch.nn.init.normal_(backbone.label_embed.weight)
    projector = heads.build("mlp", in_dim=16, out_dim=8)
    return JEPA(backbone, projector, losses.build("lejepa", directions=16), objective=objective, **kwargs)


def batch(labels: list[int], views: int = 2) -> dict[str, Tensor]:
    images = torch.randn(len(labels), views, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"images": images, "labels": torch.tensor(labels)}


def run(model: JEPA, data: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return model(data)


@pytest.mark.parametrize("objective", ["joint", "reference", "images"])
@pytest.mark.parametrize("labels", [[0, 1, 2, 2], [0, -1, -1, 2], [-1, -1, -1, -1]])
def test_every_trainable_parameter_takes_part_whatever_labels_are_shown(
    objective: str, labels: list[int]
) -> None:
    model = jepa(objective)
    parts = run(model, batch(labels))
    parts["loss"].backward()
    assert set(parts) == {"loss", "invariance", "sigreg"}
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("objective", ["joint", "reference"])
def test_labels_matter_and_hidden_ones_do_not(objective: str) -> None:
    model = jepa(objective)
    assert run(model, batch([0, 1, 2]))["loss"] != run(model, batch([0, 1, 1]))["loss"]
    hidden = run(model, batch([0, 1, -1]))["loss"]
    assert hidden != run(model, batch([0, 1, 2]))["loss"]
    assert hidden == run(model, batch([0, 1, -1]))["loss"]


def test_hidden_labels_leave_no_trace_of_a_class() -> None:
    model = jepa("joint")
    parts = run(model, batch([-1, -1, -1, -1]))
    torch.nn.init.normal_(model.backbone.label_embed.weight)
    for part, value in run(model, batch([-1, -1, -1, -1])).items():
        assert torch.equal(value, parts[part])


def test_images_objective_ignores_labels_and_leaves_their_embedding_alone() -> None:
    model = jepa("images")
    assert run(model, batch([0, 1, 2]))["loss"] == run(model, batch([2, 2, -1]))["loss"]
    before = model.backbone.label_embed.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    run(model, batch([0, 1, 2]))["loss"].backward()
    optimizer.step()
    assert torch.equal(model.backbone.label_embed.weight, before)


def test_reference_objective_is_the_loss_of_labelled_views_alone() -> None:
    model, data = jepa("reference"), batch([0, 1, 2])
    z = torch.stack(
        [
            model.projector(model.backbone.encode_multimodal(v, data["labels"]))
            for v in data["images"].unbind(1)
        ]
    )
    torch.manual_seed(7)
    expected = model.loss(z)
    torch.testing.assert_close(run(model, data), expected)


def test_without_swaps_joint_is_the_loss_of_images_fused_and_label() -> None:
    model, data = jepa("joint", swap=0.0), batch([0, 1, 2], views=3)
    first, second, last = data["images"].unbind(1)
    backbone, labels = model.backbone, data["labels"]
    features = [
        backbone.encode_image(first),
        backbone.encode_image(second),
        backbone.encode_multimodal(last, labels),
        backbone.encode_label(labels),
    ]
    expected = model.loss(torch.stack([model.projector(f) for f in features]), regularised=3)
    torch.testing.assert_close(run(model, data)["invariance"], expected["invariance"])


def test_a_swapped_view_agrees_where_the_label_alone_moves_it() -> None:
    class Additive(nn.Module):
        """An encoder in which a label takes its class's place: E(x, k) = style(x) + e_k, E(x) = E(x, own label)."""

        num_classes, num_patches = 3, 4

        def encode_image(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
            return x.flatten(1)[:, :8]

        def encode_label(self, labels: Tensor) -> Tensor:
            return 5 * torch.eye(8)[labels]

        def encode_multimodal(self, x: Tensor, labels: Tensor, *, keep: Tensor | None = None) -> Tensor:
            own = torch.tensor([0, 1, 2])
            return self.encode_image(x) - self.encode_label(own) + self.encode_label(labels)

        def check_labels(self, labels: Tensor) -> None:
            pass

    data = batch([0, 1, 2], views=1)
    parts = [
        run(JEPA(Additive(), nn.Identity(), losses.build("lejepa"), swap=swap), data)["invariance"] for swap in (0.0, 1.0)
    ]
    torch.testing.assert_close(parts[0], parts[1])


def test_swap_is_the_share_of_wrong_labels() -> None:
    labels = torch.arange(3).repeat(400)
    for swap in (0.0, 0.25, 1.0):
        torch.manual_seed(0)
        drawn = jepa(swap=swap)._swapped(labels)
        assert (drawn != labels).float().mean().item() == pytest.approx(swap, abs=0.04)
        assert ((drawn >= 0) & (drawn < 3)).all()


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("joint", [(4, 2), (2, 3), (3, 1)]),  # two views of two images; two patches and a label; three labels
        ("reference", [(6, 3)]),
        ("images", [(6, 2)]),
    ],
)
def test_every_view_shows_a_share_of_its_patches(objective: str, expected: list[tuple[int, int]]) -> None:
    model, seen = jepa(objective, keep=0.5), []
    model.backbone.vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    run(model, batch([0, 1], views=3))
    assert seen == expected


def test_patches_are_drawn_for_each_view_of_each_image_and_none_comes_twice() -> None:
    torch.manual_seed(0)
    model = jepa(keep=0.5)  # two of four patches: six ways
    kept = model._drawn_patches(torch.zeros(500, dtype=torch.int64), 2).sort(dim=1).values
    assert kept.shape == (1000, 2)
    ways, counts = kept.unique(dim=0, return_counts=True)
    assert len(ways) == 6
    assert (ways[:, 0] != ways[:, 1]).all()
    assert counts.float().std() < 4 * 1000**0.5 / 6  # evenly, as far as chance lets
    assert (kept[:500] == kept[500:]).all(dim=1).float().mean().item() == pytest.approx(1 / 6, abs=0.07)


def test_a_single_view_needs_no_axis_of_its_own() -> None:
    data = batch([0, 1, 2], views=1)
    squeezed = {"images": data["images"][:, 0], "labels": data["labels"]}
    assert run(jepa(), data)["loss"] == run(jepa(), squeezed)["loss"]


def test_training_brings_image_and_label_together() -> None:
    torch.manual_seed(0)
    model, labels = jepa(), torch.arange(3).repeat(16)
    prototypes = torch.randn(3, 1, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        images = prototypes[labels][:, None] + 0.3 * torch.randn(48, 2, 1, 8, 8)
        optimizer.zero_grad()
        model({"images": images, "labels": labels})["loss"].backward()
        optimizer.step()
    images, labels = prototypes.repeat(2, 1, 1, 1), torch.arange(3).repeat(2)
    z, own = (
        model.projector(model.backbone.encode_image(images)),
        model.projector(model.backbone.encode_label(torch.arange(3))),
    )
    assert (torch.cdist(z, own).argmin(1) == labels).all()


PARTS = {"even": (6, 6), "uneven": (7, 5), "empty": (12, 0)}


def gradients(objective: str, data: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss and parts, and every parameter's gradient, with wrong labels, some patches and a batch norm."""
    model = normed(objective, keep=0.5)
    torch.manual_seed(7 + 100 * torch.distributed.get_rank() if torch.distributed.is_initialized() else 7)
    parts = model(data)
    parts["loss"].backward()
    return {name: part.detach() for name, part in parts.items()}, grads(model)


def normed(objective: Any, **kwargs: Any) -> JEPA:
    """With a batch norm in the projector, as the recipe has it."""
    model = jepa(objective, **kwargs)
    torch.manual_seed(1)
    model.projector = heads.build("mlp", in_dim=16, out_dim=8, norm="batch")
    return model


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def accumulated() -> list[dict[str, Tensor]]:
    """The whole batch in two batches of seven and five."""
    return [{key: value[rows] for key, value in whole().items()} for rows in (slice(7), slice(7, 12))]


def whole() -> dict[str, Tensor]:
    return batch([0, 1, 2, -1, 1, 1, 0, -1, 2, 2, 0, 1], views=3)


def _worker(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    found = {}
    for objective in ("joint", "reference", "images"):
        for name, sizes in PARTS.items():
            part = {key: value.split(sizes)[number] for key, value in whole().items()}
            found[objective, name] = gradients(objective, part)
    model, groups = normed("joint", swap=0.5), accumulated()
    cached = nn.parallel.DistributedDataParallel(Accumulated(model))
    parts = cached([{key: value.tensor_split(2)[number] for key, value in part.items()} for part in groups], [3 + number, 5 + number])
    parts["loss"].backward()
    found["cached"] = {name: part.detach() for name, part in parts.items()}, grads(model)
    torch.save(found, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_loss_and_gradient_of_one(tmp_path: Any) -> None:
    """The same wrong labels and patches, whoever holds which samples; each class's own point once."""
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    for objective in ("joint", "reference", "images"):
        parts, expected = gradients(objective, whole())
        for name in PARTS:
            for rank in (one, two):
                torch.testing.assert_close(rank[objective, name][0], parts, rtol=1e-5, atol=1e-5)
            averaged = {key: (grad + two[objective, name][1][key]) / 2 for key, grad in one[objective, name][1].items()}
            torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-5)


    model = normed("joint", swap=0.5)
    expected_parts = Accumulated(model)(accumulated(), [3, 5])
    expected_parts["loss"].backward()
    for rank in (one, two):
        torch.testing.assert_close(rank["cached"][0], {k: v.detach() for k, v in expected_parts.items()}, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["cached"][1], grads(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["joint", "reference", "images"])
def test_accumulated_batches_have_the_loss_and_the_gradient_of_one(objective: Any, monkeypatch: Any) -> None:
    """SIGReg's statistics and the batch norm's are the whole batch's, for the same directions."""
    compute_loss = JEPA.compute_loss
    monkeypatch.setattr(JEPA, "compute_loss", lambda self, embedded: torch.manual_seed(3) and compute_loss(self, embedded))
    found = []
    for call in (lambda model: Accumulated(model)(accumulated(), [3, 5]), lambda model: model(whole())):
        model = normed(objective, swap=0.0)
        parts = call(model)
        parts["loss"].backward()
        found.append(({name: part.detach() for name, part in parts.items()}, grads(model)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    separate = [normed(objective, swap=0.0)(part)["sigreg"].item() for part in accumulated()]
    assert abs(sum(separate) / 2 - found[1][0]["sigreg"].item()) > 1e-2  # the mean of the batches' would be another


@pytest.mark.parametrize("objective", ["joint", "reference", "images"])
def test_the_uninformed_value_is_that_of_embeddings_at_zero(objective: Any) -> None:
    model, data = jepa(objective), batch([0, 1, 2, 0])
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.zero_()
        parts = {name: float(value) for name, value in model(data).items()}
    assert model.uninformed(4) == pytest.approx(parts, rel=1e-5)


def test_a_loss_that_states_no_uninformed_value_leaves_it_out() -> None:
    model = jepa()
    model.loss = nn.Module()
    assert model.uninformed(4) == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jepa("joined"), "objective is 'joined'; .*expected 'joint', 'reference', 'images'"),
        (lambda: jepa(keep=0.0), r"keep is 0.0; expected a number in \(0, 1\]"),
        (lambda: jepa(swap=1.5), r"swap is 1.5; expected a number in \[0, 1\]"),
        (
            lambda: jepa()({"images": torch.zeros(2, 8, 8), "labels": torch.zeros(2)}),
            r"images are \(2, 8, 8\) and labels \(2,\)",
        ),
        (lambda: jepa()(batch([0, 3])), "label 3 is not one of this model's 3 classes"),
        (lambda: jepa("reference")(batch([0, 3])), "label 3 is not one of this model's 3 classes"),
    ],
)
def test_wrong_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
