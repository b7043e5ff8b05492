"""The model and its gradient cache: what is compared, what is kept, the same gradient chunk by chunk and rank by rank."""

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from vitkit import backbones, heads, losses
from vitkit.errors import UsageError
from vitkit_clip import CLIP, GradCache, captions, vocabulary_of

CLASSES = ["ant", "sea_lion", "cat"]
SAID = captions(CLASSES)


def make(
    *, loss: str = "info_nce", classify: bool = True, dropout: float = 0.0, double: bool = False, **more: Any
) -> CLIP:
    torch.manual_seed(0)
    backbone: Any = backbones.build(
        "pair_vit", img_size=8, in_chans=1, stem=[8, 16], depth=2, num_heads=2, mlp_dim=32, dropout=dropout
    )
    text: Any = backbones.build(
        "text_transformer", vocabulary=vocabulary_of(SAID), embed_dim=16, depth=1, dropout=dropout
    )
    projector, text_projector = (heads.build("linear", in_dim=16, out_dim=8) for _ in range(2))
    objective = losses.build("pair_multi_task", contrastive=loss) if classify else losses.build(loss)
    classifier = heads.build("linear", in_dim=16, out_dim=3) if classify else None
    model = CLIP(backbone, text, projector, text_projector, objective, SAID, classifier, **more)
    return model.double() if double else model


def make_batch(count: int = 10, double: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 8, 16, generator=generator)
    left, right = torch.randint(3, (2, count), generator=generator)
    return {"images": images.double() if double else images, "left": left, "right": right, "labels": left * 3 + right}


def gradients(model: nn.Module, batch: dict[str, Tensor], seed: int = 5) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(seed)
    parts = model(batch)
    return parts["loss"].detach(), list(torch.autograd.grad(parts["loss"], list(model.parameters())))


def test_the_loss_is_that_of_the_towers_embeddings() -> None:
    model, batch = make(classify=False).eval(), make_batch()
    image = model.projector(model.encode_image(batch["images"]))
    text = model.text_projector(model.text.encode_text([SAID[i] for i in batch["labels"].tolist()]))
    expected = model.loss(image, text, labels=batch["labels"])["loss"]
    torch.testing.assert_close(model(batch)["loss"], expected)
    negatives = make(classify=False, caption_positives=False).eval()
    torch.testing.assert_close(negatives(batch)["loss"], model.loss(image, text)["loss"])
    # Equal captions have equal embeddings, so InfoNCE has one value either way; the sigmoid loss judges each pair by itself.
    torch.testing.assert_close(negatives(batch)["loss"], model(batch)["loss"])
    apart, together = (make(loss="siglip", classify=False, caption_positives=p).eval() for p in (False, True))
    assert (apart(batch)["loss"] - together(batch)["loss"]).abs() > 0.01


@pytest.mark.parametrize("classify", [True, False])
def test_the_uninformed_value_is_that_of_towers_that_ignore_their_input(classify: bool) -> None:
    model, batch = make(classify=classify).eval(), make_batch(9)
    batch["labels"] = torch.arange(9)  # as many distinct captions
    with torch.no_grad():
        for head in (model.projector, model.text_projector, model.half_classifier):
            for parameter in head.parameters() if head is not None else ():
                parameter.zero_()
        found = {name: float(value) for name, value in model(batch).items()}
    assert model.uninformed(9) == pytest.approx(found, rel=1e-5)
    assert GradCache(model, 4).uninformed(9) == model.uninformed(9)
    assert ("classification" in found) == classify


def test_each_distinct_caption_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make(), []
    encode = model.text.encode_text
    monkeypatch.setattr(model.text, "encode_text", lambda texts: asked.extend(texts) or encode(texts))
    batch = make_batch(30)
    model(batch)
    assert sorted(asked) == sorted({SAID[i] for i in batch["labels"].tolist()})


def test_what_a_frozen_text_tower_says_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text: Any = backbones.build("text_transformer", vocabulary=vocabulary_of(SAID), embed_dim=16, depth=1)
    text.requires_grad_(False)
    first = make()
    model = CLIP(first.backbone, text, first.projector, first.text_projector, first.loss, SAID, first.half_classifier)
    asked: list[str] = []
    encode = text.encode_text
    monkeypatch.setattr(text, "encode_text", lambda texts: asked.extend(texts) or encode(texts))
    batch = make_batch()
    one, other = model(batch)["loss"], model(batch)["loss"]
    assert asked == SAID
    torch.testing.assert_close(one, other)
    one.backward()
    assert all(parameter.grad is None for parameter in text.parameters())
    assert all(parameter.grad is not None for parameter in model.text_projector.parameters())
    assert not any("kept" in name for name in model.state_dict())


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
@pytest.mark.parametrize("loss", ["info_nce", "siglip", "hard_negative_nce"])
def test_the_gradient_cache_gives_the_whole_batchs_gradient(chunk: int, loss: str) -> None:
    batch = make_batch(double=True)
    model = make(loss=loss, double=True)
    expected, whole = gradients(model, batch)
    found, cached = gradients(GradCache(model, chunk), batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(cached, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class Keeping(GradCache):
    """The same chunks, with all that they compute kept for the way back."""

    def embed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        cuts = range(0, len(batch["labels"]), self.chunk)
        parts = [self.model.embed({name: v[i : i + self.chunk] for name, v in batch.items()}) for i in cuts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_the_gradient_cache_replays_dropout() -> None:
    batch, model = make_batch(double=True), make(dropout=0.3, double=True)
    cached = GradCache(model, 4)
    found = gradients(cached, batch)
    expected = gradients(Keeping(model, 4), batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert not torch.equal(gradients(cached, batch, seed=6)[0], found[0])


def test_the_gradient_cache_keeps_one_chunk_of_activations() -> None:
    model, batch = make(), make_batch(32)
    kept = []
    for trained in (model, GradCache(model, 4)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            trained(batch)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 8


def test_labels_that_are_no_captions_and_chunks_of_nothing_are_refused() -> None:
    model, batch = make(), make_batch()
    with pytest.raises(UsageError, match="labels run from 0 to 9; there are 9 captions"):
        model.embed_labels(torch.tensor([0, 9]))
    with pytest.raises(UsageError, match="chunk is 0; expected at least 1"):
        GradCache(model, 0)
    assert model(batch)["loss"].isfinite()


def _worker(number: int, folder: str, batch: dict[str, Tensor]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    part = {name: value.split((7, 3))[number] for name, value in batch.items()}
    results = {chunk: gradients(make() if chunk is None else GradCache(make(), chunk), part) for chunk in (None, 2)}
    torch.save(results, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_uneven_parts_give_the_gradient_of_one(tmp_path: Any) -> None:
    batch = make_batch()
    mp.spawn(_worker, (str(tmp_path), batch), nprocs=2)
    results = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    loss, whole = gradients(make(), batch)
    for chunk in (None, 2):
        for i, expected in enumerate(whole):
            averaged = (results[0][chunk][1][i] + results[1][chunk][1][i]) / 2  # as DDP averages
            torch.testing.assert_close(averaged, expected, rtol=1e-4, atol=1e-5)
        for result in results:
            torch.testing.assert_close(result[chunk][0], loss, rtol=1e-5, atol=1e-5)
