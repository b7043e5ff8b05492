"""The average of a model's weights: short in the first steps, and resumed."""

import torch
from torch import nn

from vitkit.training import ModelEma


def averaged(decay, weights):
    """The average after each of these weights, of a model of one weight."""
    model = nn.Linear(1, 1, bias=False)
    average, values = ModelEma(model, decay), []
    for weight in weights:
        nn.init.constant_(model.weight, weight)
        average.update(model)
        values.append(float(average.weights()["weight"]))
    return values


def test_the_decay_grows_from_a_tenth_to_its_value():
    weights = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    expected = [weights[0]]
    for n, weight in enumerate(weights[1:], start=1):
        decay = min(0.6, (1 + n) / (10 + n))
        expected.append(decay * expected[-1] + (1 - decay) * weight)
    torch.testing.assert_close(averaged(0.6, weights), expected)


def test_a_short_training_does_not_end_near_its_first_weights():
    assert averaged(0.99, [0.0] + [1.0] * 20)[-1] > 0.999


def test_a_restored_average_continues_as_an_undisturbed_one():
    model = nn.Linear(2, 2)
    whole, cut = ModelEma(model, 0.9), ModelEma(model, 0.9)
    for step in range(6):
        nn.init.constant_(model.weight, float(step))
        if step == 3:
            state, cut = cut.state_dict(), ModelEma(nn.Linear(2, 2), 0.9)
            cut.load_state_dict(state)
        whole.update(model)
        cut.update(model)
    assert all(torch.equal(a, b) for a, b in zip(whole.weights().values(), cut.weights().values(), strict=True))
