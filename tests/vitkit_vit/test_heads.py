import pytest
import torch
import torch.nn.functional as F

from vitkit import heads
from vitkit.errors import UsageError
from vitkit_vit import LinearHead, MLPHead


def test_a_linear_head_is_a_norm_and_a_product() -> None:
    head = LinearHead(8, 3)
    x = torch.randn(5, 8)
    expected = F.layer_norm(x, [8]) @ head.linear.weight.t() + head.linear.bias
    torch.testing.assert_close(head(x), expected)
    assert sum(p.numel() for p in LinearHead(192, 10).parameters()) == 384 + 1930
    plain = LinearHead(8, 3, norm=False)
    torch.testing.assert_close(plain(2 * x), 2 * plain(x))


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_mlp_has_as_many_products_as_its_depth(norm: str, depth: int) -> None:
    head = MLPHead(8, 3, hidden=5, depth=depth, norm=norm)
    shapes = [tuple(m.weight.shape) for m in head.modules() if isinstance(m, torch.nn.Linear)]
    assert shapes == {1: [(3, 8)], 2: [(5, 8), (3, 5)], 3: [(5, 8), (5, 5), (3, 5)]}[depth]
    assert head(torch.randn(6, 8)).shape == (6, 3)
    assert head(torch.randn(2, 6, 8)).shape == (2, 6, 3)


def test_hidden_layers_are_as_wide_as_the_input_unless_told() -> None:
    assert MLPHead(8, 3).layers[0].weight.shape == (8, 8)


def test_a_batch_norm_sees_every_leading_dimension() -> None:
    torch.manual_seed(0)
    head = MLPHead(8, 3, norm="batch")
    views = torch.randn(2, 6, 8)
    torch.testing.assert_close(head(views).flatten(0, 1), head(views.flatten(0, 1)))


def test_the_registry_knows_both() -> None:
    assert isinstance(heads.build("linear", in_dim=4, out_dim=2), LinearHead)
    assert isinstance(heads.build("mlp", in_dim=4, out_dim=2, depth=3), MLPHead)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinearHead(0, 3), "in_dim is 0; expected at least 1"),
        (lambda: MLPHead(4, 3, depth=0), "depth is 0; expected at least 1"),
        (lambda: MLPHead(4, 3, norm="group"), "norm is 'group'; expected 'layer', 'batch', 'none'"),
    ],
)
def test_wrong_arguments_are_answered(build: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build()
    assert message in str(caught.value)
