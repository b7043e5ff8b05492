"""Every registered name keeps the contract of its kind: a name that is added is tested by being registered."""

from pathlib import Path

import pytest
import torch

from vitkit.data import write_store
from vitkit.registry import REGISTRIES
from vitkit.testing import CHECKS, find

STAND_INS = {"mnist": (1, 28, 10), "fashion_mnist": (1, 28, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100)}
"""Channels, side and classes of the datasets that are downloaded; small made-up ones take their place here."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITKIT_DATA", str(folder))
        for name, (channels, side, classes) in STAND_INS.items():
            tensors = {}
            for split, count in (("train", 2 * classes), ("test", classes)):
                shape = (count, channels, side, side)
                tensors[f"{split}.images"] = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
                tensors[f"{split}.labels"] = torch.arange(count) % classes
            write_store(name, tensors, [f"class {index}" for index in range(classes)])
    return folder


@pytest.mark.vitkit("vitkit")
def test_every_registered_name(vitkit_check, store, monkeypatch):
    monkeypatch.setenv("VITKIT_DATA", str(store))
    vitkit_check()


def test_no_registered_name_is_left_out():
    checked = {(case.kind, case.name) for case in find("vitkit")}
    registered = {(e.kind, e.name) for r in REGISTRIES.values() for e in r.entries() if e.distribution == "vitkit"}
    assert checked == registered
    assert {kind for kind, _ in checked} == set(CHECKS) == set(REGISTRIES)
