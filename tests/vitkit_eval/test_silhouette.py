"""The silhouette is scikit-learn's, however many distances are held at once."""

import pytest
import torch
from sklearn.metrics import silhouette_samples, silhouette_score

from vitkit import evaluators
from vitkit.errors import UsageError
from vitkit_eval import silhouette
from vitkit_eval.silhouette import silhouettes


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_it_is_scikit_learns(monkeypatch, rows):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (90,), generator=generator) * 3
    labels[0] = 100  # the only one of its class
    features = torch.randn(90, 4, generator=generator) + labels[:, None] * 0.1
    features[1:4], labels[1:4] = features[1], labels[1]  # at one point
    monkeypatch.setattr(silhouette, "DISTANCES", 90 * rows)
    found = silhouettes(features, labels)
    torch.testing.assert_close(found, torch.from_numpy(silhouette_samples(features.double().numpy(), labels.numpy())))
    assert float(found[0]) == 0
    assert float(found.mean()) == pytest.approx(silhouette_score(features.double().numpy(), labels.numpy()))


def test_its_limits():
    labels = torch.arange(40) % 2
    far = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + labels[:, None] * 1e4
    assert float(silhouettes(far, labels).mean()) == pytest.approx(1, abs=1e-3)
    assert float(silhouettes(torch.zeros(40, 3), labels).abs().max()) == 0
    turned = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    torch.testing.assert_close(silhouettes(far @ turned * 7 + 1, labels), silhouettes(far, labels), atol=1e-4, rtol=0)


def test_the_evaluator(dataset, encoder):
    scores = evaluators.build("silhouette")(encoder, dataset)
    (batch,) = dataset.test.batches(45).epoch(0)
    encoder.eval()
    with torch.no_grad():
        expected = silhouette_score(encoder.encode_image(batch["images"]).numpy(), batch["labels"].numpy())
    assert scores == {"silhouette": pytest.approx(expected, abs=1e-6)}
    protocol = scores.protocols["silhouette"]
    assert (protocol.split, protocol.samples, protocol.chance, protocol.frozen) == ("test", 45, 0.0, "encoder")
    assert evaluators.build("silhouette", test_size=9)(encoder, dataset).protocols["silhouette"].samples == 9


def test_one_class_is_no_clustering():
    with pytest.raises(UsageError, match="a silhouette needs images of at least two classes"):
        silhouettes(torch.randn(4, 2), torch.ones(4, dtype=torch.int64))
