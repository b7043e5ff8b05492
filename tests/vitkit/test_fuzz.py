"""Whatever is typed or stands in a file: it works, or one message says what is wrong. Nothing else is raised, nothing hangs."""

import copy
import hashlib
import json
import struct
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_bytes

from vitkit import backbones, heads
from vitkit.cli.main import guarded
from vitkit.cli.run import run
from vitkit.data.store import read_store
from vitkit.errors import CheckpointError, DatasetError, VitkitError
from vitkit.models.saving import load, save
from vitkit.training.checkpoint import load_state, save_state

BOUNDED = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
RECIPE = '''
"""Takes everything that a flag can be."""
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal
from vitkit import Run

class Colour(Enum):
    RED = "red"

def main(run: Run, count: int = 1, rate: Annotated[float | None, "a rate"] = None, on: bool = True, name: str = "x",
         place: Path = Path("."), kind: Literal["a", "b"] = "a", colour: Colour = Colour.RED, sizes: list[int] = [1]):
    run.say(str(count))
'''
NAMES = [
    "count", "rate", "on", "no-on", "name", "place", "kind", "colour", "sizes", "seed", "device", "precision", "compile",
    "resume", "grad-accum", "report-to", "overwrite", "help", "out", "cuont",
]  # fmt: skip
# Numbers that a damaged or malicious file may hold: none, negative, huge, not finite.
NUMBERS = st.sampled_from([0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=6) | st.sampled_from(["vit", "linear", "vitkit", "mean"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3))
WORDS = st.one_of(
    st.sampled_from(NAMES).map("--{}".format),
    st.tuples(st.sampled_from(NAMES), st.text(max_size=5)).map("--{0[0]}={0[1]}".format),
    st.sampled_from(["--", "-", "", "1", "-1", "0x10", "1e400", "nan", "a", "red", "csv", "csv,nothing", "true", str(2**70)]),
    st.text(max_size=6),
)


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@BOUNDED
@given(words=st.lists(WORDS, max_size=5))
def test_flags_of_a_recipe(folder, capfd, monkeypatch, words):
    monkeypatch.chdir(folder)
    (folder / "any.py").write_text(RECIPE)
    capfd.readouterr()
    code = guarded(lambda: run(folder / "any.py", ["--dry-run", *words]), debug=False)
    message = capfd.readouterr().err
    assert code in (0, 1, 2)
    assert "vitkit did not expect this error" not in message
    assert "Traceback" not in message
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("__")) == ["any.py"]


@BOUNDED
@given(name=st.text(max_size=8).filter(lambda text: "/" not in text and text not in ("", ".", "..")), seed=st.integers())
def test_names_of_a_run_directory(folder, name, seed):
    from vitkit import Run

    out = folder / "runs" / name
    opened(lambda: Run(out, seed=seed, device="cpu", precision="fp32", overwrite=True).close(), VitkitError)


@pytest.fixture(scope="module")
def model(folder):
    """A saved model's directory and its config as it was."""
    backbone = backbones.build("vit", img_size=8, in_chans=1, embed_dim=8, depth=1, num_heads=2, positions="sincos2d")
    modules = {"backbone": backbone, "classifier": heads.build("mlp", in_dim=8, out_dim=2)}
    preprocessing = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "pad"}
    save(folder / "model", modules, preprocessing=preprocessing, classes=["a", "b"], arguments={"lr": 0.1})
    return folder / "model", json.loads((folder / "model" / "config.json").read_text())


def places(value, path=()):
    """Every place in a JSON value, as keys from the outside in."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value, path, new):
    """`value` with something else at a place, or without it where `new` is `...`."""
    if not path:
        return new if new is not ... else {}
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return whole


def opened(read, *kinds):
    """`read()`, or None where it raises one of `kinds` with a message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read()
        except kinds as error:
            text = str(error)
    assert text
    return None


@settings(BOUNDED, max_examples=250)
@given(data=st.data())
def test_a_config_with_something_else_in_it(model, data):
    directory, config = model
    place = data.draw(st.sampled_from(list(places(config))))
    text = json.dumps(changed(config, place, data.draw(VALUES | st.just(...))))
    (directory / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        loaded = opened(lambda: load(directory), CheckpointError)
    finally:
        (directory / "config.json").write_text(json.dumps(config))
    if loaded is not None:
        assert set(loaded.state_dict()) == set(load(directory).state_dict())


@pytest.mark.parametrize(
    ("argument", "value"),
    [("depth", 10**30), ("embed_dim", 2**40), ("img_size", 2**17), ("img_size", 10**30), ("mlp_ratio", 1e12), ("registers", 2**40)],
)
def test_a_config_that_asks_for_more_than_there_is_is_refused_at_once(model, argument, value):
    directory, config = model
    kwargs = {**config["modules"]["backbone"]["kwargs"], argument: value}
    (directory / "config.json").write_text(json.dumps(changed(config, ("modules", "backbone", "kwargs"), kwargs)))
    try:
        with pytest.raises(CheckpointError, match="does not fit its config|has the shape|cannot be built"):
            load(directory)
    finally:
        (directory / "config.json").write_text(json.dumps(config))


def file_of(header, body=b""):
    """A safetensors file with any JSON for its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


DTYPES = st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "C64", "F4", "X", "", None])
TENSORS = st.fixed_dictionaries(
    {}, optional={
        "dtype": DTYPES, "shape": st.lists(NUMBERS, max_size=3) | VALUES, "data_offsets": st.lists(NUMBERS, max_size=3) | VALUES,
    },
)  # fmt: skip
HEADERS = st.one_of(
    VALUES,
    st.dictionaries(st.sampled_from(["backbone.norm.weight", "a", "train.images"]), TENSORS | VALUES, max_size=3),
    st.tuples(st.dictionaries(st.text(max_size=3), VALUES), TENSORS).map(lambda pair: {"__metadata__": pair[0], "a": pair[1]}),
    st.sampled_from([b"", b"{", b'{"a":' * 3000, b"[" * 100_000, b"\xff\xfe", b'{"__metadata__":{"a":"b"}}   ']),
)


@BOUNDED
@given(header=HEADERS, body=st.sampled_from([b"", b"\0" * 4, b"\0" * 64]), cut=st.integers(0, 40), lie=st.none() | NUMBERS)
def test_weights_with_any_header(model, header, body, cut, lie):
    directory, config = model
    whole = (directory / "model.safetensors").read_bytes()
    content = file_of(header, body)
    if isinstance(lie, int) and 0 <= lie < 2**64:
        content = struct.pack("<Q", lie) + content[8:]
    content = content[: max(0, len(content) - cut)]
    weights = {**config["weights"], "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    try:
        (directory / "model.safetensors").write_bytes(content)
        (directory / "config.json").write_text(json.dumps({**config, "weights": weights}))
        assert opened(lambda: load(directory), CheckpointError) is None
    finally:
        (directory / "model.safetensors").write_bytes(whole)
        (directory / "config.json").write_text(json.dumps(config))


METADATA = st.one_of(
    VALUES.map(lambda value: json.dumps(value)),
    st.text(max_size=8),
    st.sampled_from(['["a", "b"]', "DEEP", "[]", '["a", 1]', "null", "NaN", '"ab"']),
)
SHAPES = st.lists(st.integers(0, 3), max_size=4)
KINDS = st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.bool])


@settings(BOUNDED, max_examples=120)
@given(
    metadata=st.dictionaries(st.sampled_from(["classes", "skipped", "name", "other"]), METADATA),
    parts=st.dictionaries(
        st.sampled_from([f"{split}.{part}" for split in ("train", "test") for part in ("images", "labels")]),
        st.tuples(SHAPES, KINDS, st.integers(-1, 2)),
    ),
    sound=st.booleans(), cut=st.sampled_from([0, 0, 0, 1, 9, 200]),
)  # fmt: skip
def test_store_files(folder, metadata, parts, sound, cut):
    tensors = {}
    if sound:
        for split in ("train", "test"):
            tensors |= {f"{split}.images": torch.zeros(2, 1, 2, 2, dtype=torch.uint8), f"{split}.labels": torch.tensor([0, 1])}
        metadata = {"classes": '["a", "b"]', **metadata}
    for name, (shape, kind, value) in parts.items():
        tensors[name] = torch.full(shape, value, dtype=torch.int64).to(kind)
    deep = {key: text.replace("DEEP", "[" * 100_000) for key, text in metadata.items()}
    content = to_bytes(tensors, metadata=deep)
    path = folder / "any.safetensors"
    path.write_bytes(content[: len(content) - cut])
    loaded = opened(lambda: read_store(path), DatasetError)
    path.unlink()
    if loaded is not None:
        assert all(isinstance(name, str) for name in loaded.classes)
        assert all(isinstance(line, str) for line in loaded.skipped)


@BOUNDED
@given(header=HEADERS, body=st.sampled_from([b"", b"\0" * 64]))
def test_store_files_and_states_with_any_header(folder, header, body):
    path = folder / "header.safetensors"
    path.write_bytes(file_of(header, body))
    assert opened(lambda: read_store(path), DatasetError) is None
    assert opened(lambda: load_state(path), CheckpointError) is None
    path.unlink()


@BOUNDED
@given(tree=VALUES | st.text(max_size=8).map(lambda text: {"tensor": text}), data=st.data())
def test_states_with_any_tree_and_the_right_checksum(folder, tree, data):
    path = folder / "state.safetensors"
    save_state(path, model_state={"w": torch.ones(2)}, optimizer={"a": [1]}, ema_state=None, scheduler=None, progress={"x": 1})
    body = path.read_bytes()
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    skeleton = json.loads(header["__metadata__"]["tree"])
    place = data.draw(st.sampled_from(list(places(skeleton))))
    header["__metadata__"] |= {"tree": json.dumps(changed(skeleton, place, tree)), "sha256": "0" * 64}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unset = struct.pack("<Q", len(text)) + text + body[8 + length :]
    digest = hashlib.sha256(unset).hexdigest()
    path.write_bytes(unset.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest.encode()))
    opened(lambda: load_state(path), CheckpointError)
