"""Both towers: shapes, halves, positions, words, lengths, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitkit import backbones
from vitkit.errors import UsageError
from vitkit_clip import PairViT, TextTransformer, captions, vocabulary_of

SMALL: dict[str, dict[str, Any]] = {
    "baseline": {"embed_dim": 16, "mlp_dim": 24, "patch_size": 4},
    "enhanced": {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "patch_size": 4},
    "best": {"stem": [8, 16], "depth": 2, "num_heads": 2, "mlp_dim": 32},
}


def small(preset: str, **more: Any) -> PairViT:
    torch.manual_seed(0)
    return PairViT(img_size=8, preset=preset, **SMALL[preset], **more).eval()


def pairs(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", SMALL)
def test_pairs_become_tokens_halves_and_features(preset: str) -> None:
    tower, x = small(preset), pairs()
    assert tower(x).shape == (3, 8, 16)
    halves = tower.encode_halves(x)
    assert halves.shape == (3, 2, 16)
    torch.testing.assert_close(tower.encode_image(x), tower.join(halves))
    maps = tower.attention_maps(x)
    assert maps.shape == (3, 2, 4)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(3))


@pytest.mark.parametrize("preset", SMALL)
def test_left_and_right_can_be_told_apart(preset: str) -> None:
    tower, x = small(preset), pairs()
    exchanged = torch.cat([x[..., 8:], x[..., :8]], dim=-1)
    assert (tower.encode_image(x) - tower.encode_image(exchanged)).norm(dim=1).min() > 1e-3


def test_both_halves_share_one_encoder_where_no_block_sees_both() -> None:
    tower, x = small("best", joint_depth=0), pairs()
    exchanged = torch.cat([x[..., 8:], x[..., :8]], dim=-1)
    with torch.no_grad():
        tower.get_parameter("tower.sides").zero_()
        torch.testing.assert_close(tower.encode_halves(x).flip(1), tower.encode_halves(exchanged))
    with pytest.raises(UsageError, match="with joint_depth=0 no block sees both halves"):
        tower.attention_maps(x)


@pytest.mark.parametrize("preset", ["enhanced", "best"])
def test_the_feature_of_a_pair_tells_left_from_right(preset: str) -> None:
    tower = small(preset)
    halves = torch.randn(3, 2, 16)
    assert not torch.allclose(tower.join(halves), tower.join(halves.flip(1)), atol=1e-2)


def test_one_half_does_not_reach_the_other_before_the_joint_blocks() -> None:
    x, other = pairs(), pairs(seed=1)
    mixed = torch.cat([x[..., :8], other[..., 8:]], dim=-1)
    for depth, equal in ((0, True), (1, False)):
        tower = small("best", joint_depth=depth)
        same = torch.allclose(tower.encode_halves(x)[:, 0], tower.encode_halves(mixed)[:, 0], atol=1e-6)
        assert same is equal


def test_the_attention_of_the_report_is_what_torch_computes() -> None:
    tower, x = small("enhanced"), pairs()
    vit: Any = tower.get_submodule("tower.vit")
    torch.testing.assert_close(tower.attention_maps(x).flatten(1), vit.attention_maps(x)[:, -1].mean(dim=(1, 2)))


@pytest.mark.parametrize(("preset", "count"), [("baseline", 2_500_608), ("enhanced", 19_555_328), ("best", 3_757_312)])
def test_presets_have_the_parameters_that_are_told(preset: str, count: int) -> None:
    with torch.device("meta"):
        tower = PairViT(preset=preset)
    assert sum(parameter.numel() for parameter in tower.parameters()) == count
    assert f"{count:,}" in (PairViT.__doc__ or "")


def test_enhanced_is_drawn_by_xaviers_rule() -> None:
    torch.manual_seed(0)
    tower = PairViT(preset="enhanced", img_size=8, embed_dim=64, depth=1, num_heads=2, mlp_dim=64)
    weight = tower.get_parameter("tower.vit.blocks.0.mlp.fc1.weight")
    assert weight.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairViT(preset="huge"), "preset is 'huge'; expected 'baseline', 'enhanced', 'best', 'small'"),
        (lambda: PairViT(embed_dim=64), "embed_dim is 64, but with preset='best' there is none: it follows from stem"),
        (
            lambda: PairViT(preset="enhanced", stem=[8]),
            r"stem is \[8\], but .* there is none: it belongs to preset='best'",
        ),
        (lambda: PairViT(stem=[8, 0]), r"stem widths are \[8, 0\]"),
        (lambda: PairViT(img_size=12), r"12×12 pixels do not divide into cells of 8×8; resize the images"),
        (lambda: PairViT(num_heads=3), "num_heads=3, width 256: expected a block, and heads that divide it"),
        (lambda: PairViT(joint_depth=4), "joint_depth is 4; expected from 0 to depth=2 blocks"),
        (lambda: small("enhanced")(torch.zeros(2, 3, 8, 8)), r"pairs are \(2, 3, 8, 8\); expected \(batch, 3, 8, 16\)"),
        (
            lambda: PairViT(preset="baseline", img_size=8)(torch.zeros(1, 3, 8, 16)),
            "8×16 pixels do not divide into cells of 16×16",
        ),
    ],
)
def test_wrong_images_and_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.fixture
def text() -> TextTransformer:
    torch.manual_seed(0)
    said = captions(["ant", "sea_lion", "cat"])
    return TextTransformer(vocabulary=vocabulary_of(said), embed_dim=16, depth=1, context_length=20).eval()


def test_texts_of_several_lengths_are_encoded_as_each_alone(text: TextTransformer) -> None:
    said = ["the photo on the left is ant", "a sea lion", "cat", "the photo on the left is sea lion", "The CAT!"]
    whole = text.encode_text(said)
    assert whole.shape == (5, 16)
    torch.testing.assert_close(whole, torch.cat([text.encode_text([one]) for one in said]))
    torch.testing.assert_close(text.encode_text(["cat"]), text.encode_text(["_Cat."]))
    tokens = text(text.tokenize(said))
    assert tokens.shape == (5, 8, 16)
    assert (tokens[2, 1:] == 0).all()
    torch.testing.assert_close(text.pool(tokens, text.tokenize(said)), whole)


def test_every_caption_has_an_embedding_of_its_own(text: TextTransformer) -> None:
    found = text.encode_text(captions(["ant", "sea_lion", "cat"]))
    distance = torch.cdist(found, found) + torch.eye(9) * 1e3
    assert distance.min() > 1e-4  # left and right matter


def test_unknown_words_are_one_word_and_can_be_asked_for(text: TextTransformer) -> None:
    assert text.unknown_words("a small ant") == ["a", "small"]
    torch.testing.assert_close(text.encode_text(["big ant"]), text.encode_text(["tiny ant"]))


def test_padding_takes_no_part_and_no_text_at_all_is_fine(text: TextTransformer) -> None:
    ids = text.tokenize(["the cat"])
    torch.testing.assert_close(text(nn.functional.pad(ids, (0, 3)))[:, :2], text(ids))
    assert text(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 16)
    assert text.encode_text([]).shape == (0, 16)


def test_it_is_rebuilt_from_its_vocabulary(text: TextTransformer) -> None:
    built: Any = backbones.build(
        "text_transformer", vocabulary=text.vocabulary, embed_dim=16, depth=1, context_length=20
    )
    built.load_state_dict(text.state_dict())
    torch.testing.assert_close(built.eval().encode_text(["the cat"]), text.encode_text(["the cat"]))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda t: t.encode_text([""]), "the caption '' has no word; give some text"),
        (lambda t: t.encode_text(["…, !"]), "the caption '…, !' has no word"),
        (lambda t: t.encode_text(["cat " * 21]), "has 21 words; this text encoder reads 20 at most: shorten it"),
        (
            lambda t: t.encode_text(["zebra"]),
            "has no word of this text encoder's vocabulary; its 11 words are and, ant, cat",
        ),
        (
            lambda t: t.encode_text("cat"),
            "encode_text takes a list of texts; given one text, 'cat': put it into a list",
        ),
        (
            lambda t: t(torch.zeros(2, 21, dtype=torch.int64)),
            r"ids are torch.int64 \(2, 21\); expected int64 \(texts, 1 to 20",
        ),
        (lambda t: t(torch.tensor([[2, 40]])), "ids run to 40; this vocabulary has 11 words, ids to 12"),
        (lambda t: t(torch.tensor([[2, 0, 3]])), "padding, id 0, stands before a word; it belongs at the end of a row"),
        (lambda _: TextTransformer(vocabulary=[]), "vocabulary has 0 entries; expected at least one"),
        (lambda _: TextTransformer(vocabulary=["sea lion"]), "vocabulary has 1 entries, among them 'sea lion'"),
        (lambda _: TextTransformer(vocabulary=["a"], num_heads=3), "embed_dim=128, depth=2, num_heads=3"),
        (
            lambda _: TextTransformer(vocabulary=["a"], dropout=1.0),
            r"dropout is 1.0; expected a probability in \[0, 1\)",
        ),
    ],
)
def test_wrong_texts_say_what_was_expected(text: TextTransformer, use: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        use(text)
