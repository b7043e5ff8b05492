"""A person's own pictures: every kind of file, folders as they come, and what is left out."""

import os
import struct
import subprocess
import sys
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from vitkit.contracts import UNLABELLED
from vitkit.data.image_files import class_order, list_images
from vitkit.data.image_folder import folder_labels, import_folder, read_layout
from vitkit.data.store import read_store, store_path, stored_names, write_store
from vitkit.errors import DatasetError, UsageError


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pets"


def picture(path: Path, colour=(200, 30, 60), size=(20, 10), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def fill(folder: Path, **counts: int) -> None:
    for number, (label, count) in enumerate(counts.items()):
        for index in range(count):
            picture(folder / label / f"{index:03}.png", colour=(40 * number, 255 - 40 * number, index))


def centre(folder: Path, path: Path, size: int = 8) -> tuple[int, ...]:
    """The colour in the middle of one picture after importing it."""
    picture(folder / "another" / "x.png")
    import_folder(folder, "pets", img_size=size, test_fraction=0)
    stored = read_store(store_path("pets"))
    index = stored.train.labels.tolist().index(stored.classes.index(path.parent.name))
    return tuple(stored.train.images[index, :, size // 2, size // 2].tolist())


def near(found: tuple[int, ...], expected: tuple[int, ...], tolerance: int = 3) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(found, expected, strict=True))


def test_a_folder_becomes_a_dataset(folder):
    fill(folder, cat=10, dog=5)
    assert import_folder(folder, "pets", img_size=8, test_fraction=0.2) == []
    stored = read_store(store_path("pets"))
    assert (stored.name, stored.classes) == ("pets", ["cat", "dog"])
    assert stored.train.images.shape == (12, 3, 8, 8)
    assert stored.train.labels.bincount().tolist() == [8, 4]
    assert stored.test.labels.bincount().tolist() == [2, 1]
    assert (stored.train.images[stored.train.labels == 1][:, 0] == 40).all()
    # No picture is in both splits: the blue channel numbers them.
    blue = [split.images[split.labels == 0][:, 2, 0, 0].tolist() for split in (stored.train, stored.test)]
    assert sorted(blue[0] + blue[1]) == list(range(10))


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "dev", "Testing"), ("training", "VALID", "test")])
def test_given_splits_are_kept_whatever_tool_named_them(folder, names):
    train, val, test = names
    fill(folder / train, cat=4, dog=3)
    fill(folder / val, cat=1, dog=2)
    fill(folder / test, cat=2, dog=1)
    assert import_folder(folder, "pets", img_size=8) == []
    stored = read_store(store_path("pets"))
    assert stored.classes == ["cat", "dog"]
    assert stored.train.labels.tolist() == [0] * 4 + [1] * 3
    assert stored.val.labels.tolist() == [0] + [1] * 2
    assert stored.test.labels.tolist() == [0] * 2 + [1]
    for role, name, count in (("train", train, 7), ("val", val, 3), ("test", test, 3)):
        assert f"{role}: {count} images in {folder / name}" in stored.metadata["layout"].splitlines()


def test_a_val_folder_without_a_test_folder_stays_val_and_testing_comes_off_training(folder):
    fill(folder / "train", cat=10, dog=10)
    fill(folder / "val", cat=2, dog=1)
    import_folder(folder, "pets", img_size=8)
    stored = read_store(store_path("pets"))
    assert stored.val.labels.tolist() == [0, 0, 1]
    assert stored.train.labels.bincount().tolist() == [8, 8]
    assert stored.test.labels.bincount().tolist() == [2, 2]
    assert "test: 20% of the training images of each class" in stored.metadata["layout"]


def test_an_unlabelled_test_folder_is_named_and_testing_comes_off_training(folder):
    fill(folder / "train", cat=10, dog=10)
    fill(folder / "val", cat=2, dog=2)
    fill(folder, test=4)
    (line,) = import_folder(folder, "pets", img_size=8)
    assert line == f"{folder / 'test'}: 4 images without a class folder have no label; `vitkit predict` can label them"
    stored = read_store(store_path("pets"))
    assert [len(split) for split in (stored.train, stored.val, stored.test)] == [16, 4, 4]


def test_images_without_class_folders_have_no_labels(folder):
    for number in range(10):
        picture(folder / f"{number}.jpg", colour=(number, 0, 0))
    assert import_folder(folder, "photos", img_size=8) == []
    stored = read_store(store_path("photos"))
    assert stored.classes == []
    assert (len(stored.train), len(stored.test)) == (8, 2)
    assert set(torch.cat([stored.train.labels, stored.test.labels]).tolist()) == {UNLABELLED}
    assert "images without labels: 10" in stored.metadata["layout"]


def test_folders_are_no_classes_where_that_is_asked_for(folder):
    fill(folder, holiday=5, home=5)
    import_folder(folder, "photos", img_size=8, unlabelled=True)
    stored = read_store(store_path("photos"))
    assert (stored.classes, len(stored.train) + len(stored.test)) == ([], 10)
    fill(folder / "flat" / "train", a=4)
    fill(folder / "flat" / "test", b=2)
    import_folder(folder / "flat", "photos", img_size=8, unlabelled=True)
    stored = read_store(store_path("photos"))
    assert (len(stored.train), len(stored.test)) == (4, 2)


def test_split_folders_with_images_directly_in_them_have_no_labels(folder):
    fill(folder, Train=6, test=3)
    import_folder(folder, "photos", img_size=8)
    stored = read_store(store_path("photos"))
    assert (stored.classes, len(stored.train), len(stored.test)) == ([], 6, 3)


def test_a_split_without_images_is_refused(folder):
    fill(folder / "train", cat=3, dog=3)
    (folder / "Test").mkdir()
    with pytest.raises(DatasetError, match="Test is the folder of the test split and holds no image; fill it or remove it"):
        import_folder(folder, "pets", img_size=8)
    for label in ("cat", "dog"):
        picture(folder / "Test" / label / "a.png").write_bytes(b"no")
    with pytest.raises(DatasetError, match=r"has no readable image for the test split; left out: .*a\.png: Unidentified"):
        import_folder(folder, "pets", img_size=8)
    assert stored_names() == []


def test_numbered_classes_are_in_the_order_of_their_numbers(folder):
    fill(folder, **{str(number): 2 for number in range(12)})
    import_folder(folder, "numbers", img_size=8)
    stored = read_store(store_path("numbers"))
    assert stored.classes == [str(number) for number in range(12)]
    red = stored.train.images[:, 0, 0, 0]
    assert torch.equal(red.long(), (stored.train.labels * 40).clamp(max=255))
    assert sorted(["class10", "class2", "b", "a", "007", "7"], key=class_order) == ["007", "7", "a", "b", "class2", "class10"]


def test_a_training_folder_alone_is_divided_and_other_folders_are_named(folder):
    fill(folder / "train", cat=4, dog=4)
    fill(folder / "notes", sketches=3)
    skipped = import_folder(folder, "pets", img_size=8, test_fraction=0.25)
    assert skipped == [f"{folder / 'notes'}: 3 images in a folder other than train, val and test"]
    stored = read_store(store_path("pets"))
    assert stored.classes == ["cat", "dog"]
    assert (len(stored.train), len(stored.test)) == (6, 2)


def test_a_class_may_be_called_train(folder):
    fill(folder, train=3, plane=3)
    assert {file.label for file in read_layout(folder, 0.2).files} == {"train", "plane"}


def test_each_class_has_something_to_test_and_to_train_on(folder):
    fill(folder, one=1, two=2, many=30)
    for fraction, expected in ((0.01, [0, 1, 1]), (0.99, [0, 1, 29]), (0.0, [0, 0, 0])):
        files = read_layout(folder, fraction).files
        counts = [sum(file.split == "test" and file.label == label for file in files) for label in ("one", "two", "many")]
        assert counts == expected


def test_adding_a_picture_hardly_moves_others_between_the_splits(folder):
    fill(folder, cat=50, dog=50)
    before = {p.path: p.split for p in read_layout(folder, 0.2).files}
    picture(folder / "cat" / "new.png")
    after = {p.path: p.split for p in read_layout(folder, 0.2).files}
    assert sum(after[path] != split for path, split in before.items()) <= 1


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.png", "RGB", {}),
        ("a.PNG", "RGB", {}),
        ("a.jpg", "RGB", {"quality": 95}),
        ("a.JPEG", "CMYK", {"quality": 95}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.png", "P", {}),
        ("a.png", "RGBA", {}),
        ("a.bmp", "RGB", {}),
        ("a.TIF", "RGB", {}),
        ("a.tiff", "CMYK", {}),
        ("a.gif", "P", {}),
        ("a.jfif", "RGB", {"quality": 95, "format": "JPEG"}),
        ("a.webp", "RGB", {"lossless": True, "save_all": True, "append_images": [Image.new("RGB", (20, 10), "blue")]}),
        pytest.param("a.avif", "RGB", {}, marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")),
    ],
)
def test_files_of_every_kind_keep_their_colour(folder, name, mode, options):
    path = picture(folder / "cat" / name, mode=mode, **options)
    assert near(centre(folder, path), (200, 30, 60), tolerance=16)  # a palette is coarse


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_pictures_become_rgb(folder, mode):
    path = picture(folder / "cat" / "a.png", colour=(255, 255, 255), mode=mode)
    assert centre(folder, path) == (255, 255, 255)


def test_sixteen_bits_become_eight(folder):
    path = folder / "cat" / "a.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full((10, 10), 128 * 257, dtype=np.uint16)).save(path)
    assert centre(folder, path) == (128, 128, 128)


def test_transparent_pictures_lie_on_white(folder):
    path = folder / "cat" / "a.png"
    path.parent.mkdir(parents=True)
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(path)
    assert centre(folder, path) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_lies_on_white(folder):
    path = folder / "cat" / "a.png"
    path.parent.mkdir(parents=True)
    Image.new("P", (10, 10), 0).save(path, transparency=0)
    assert centre(folder, path) == (255, 255, 255)


def test_exif_orientation_turns_a_picture_upright(folder):
    image = Image.new("RGB", (16, 16))
    image.paste((255, 0, 0), (0, 0, 16, 8))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    path = folder / "cat" / "a.jpg"
    path.parent.mkdir(parents=True)
    image.save(path, exif=exif, quality=95)
    centre(folder, path)
    found = read_store(store_path("pets")).train
    cat = found.images[found.labels == 1][0]
    assert cat[0, 0].float().mean() < 50
    assert cat[0, -1].float().mean() > 200


def test_the_middle_is_kept_and_nothing_is_stretched(folder):
    image = Image.new("RGB", (300, 100), "blue")
    image.paste((255, 0, 0), (100, 0, 200, 100))
    path = folder / "cat" / "a.png"
    path.parent.mkdir(parents=True)
    image.save(path)
    centre(folder, path)
    found = read_store(store_path("pets")).train
    cat = found.images[found.labels == 1][0]
    assert (cat[0] > 230).all()
    assert (cat[2] < 25).all()


def huge_png(path: Path, side: int) -> None:
    """A PNG whose header promises side × side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_unreadable_pictures_are_named_and_left_out(folder):
    fill(folder, cat=4, dog=4)
    whole = picture(folder / "cat" / "cut.jpg", size=(200, 200)).read_bytes()
    (folder / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "empty.png").write_bytes(b"")
    (folder / "dog" / "text.webp").write_text("not a picture")
    huge_png(folder / "dog" / "huge.png", 60_000)
    huge_png(folder / "dog" / "large.png", 12_000)
    with warnings.catch_warnings(record=True) as warned:
        skipped = import_folder(folder, "pets", img_size=8)
    assert warned == []
    assert [Path(line.split(": ")[0]).name for line in sorted(skipped)] == [
        "cut.jpg",
        "empty.png",
        "huge.png",
        "large.png",
        "text.webp",
    ]
    assert "truncated" in next(line for line in skipped if "cut.jpg" in line)
    for name in ("huge", "large"):
        assert "decompression bomb" in next(line for line in skipped if name in line)
    stored = read_store(store_path("pets"))
    assert len(stored.train) + len(stored.test) == 8
    assert stored.skipped == skipped


def test_other_files_and_hidden_ones_are_no_pictures(folder):
    fill(folder, cat=2, dog=2)
    for name in ("notes.txt", ".DS_Store", "._000.png", "clip.mp4", "phone.HEIC"):
        (folder / "cat" / name).write_bytes(b"x")
    for name in (".thumbnails", "cat/.ipynb_checkpoints", "cat/@eaDir", "__MACOSX/cat"):
        picture(folder / name / "a.png")
    picture(folder / "loose.png")
    picture(folder / "dog" / "more" / "deep.png")
    assert import_folder(folder, "pets", img_size=8, test_fraction=0) == [
        "1 file (.heic 1) in formats that are not read; convert them to JPEG or PNG",
        f"{folder}: 1 images beside the class folders have no label",
    ]
    stored = read_store(store_path("pets"))
    assert stored.classes == ["cat", "dog"]
    assert stored.train.labels.bincount().tolist() == [2, 3]
    assert stored.metadata["layout"].splitlines()[1:4] == [
        "skipped: 2 files (.mp4 1, .txt 1) that are not images",
        "skipped: 2 hidden files",
        "skipped: 4 hidden or system folders (.ipynb_checkpoints, .thumbnails, @eaDir, __MACOSX)",
    ]


def test_linked_folders_are_followed_but_never_in_a_circle(folder, tmp_path):
    fill(folder, cat=2)
    fill(tmp_path / "elsewhere", dogs=3)
    (folder / "dog").symlink_to(tmp_path / "elsewhere" / "dogs", target_is_directory=True)
    (folder / "cat" / "round").symlink_to(folder, target_is_directory=True)
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert import_folder(folder, "pets", img_size=8, test_fraction=0) == [
        f"{folder / 'cat' / 'gone.png'}: a broken link",
        f"{folder / 'cat' / 'round'}: a link back to a folder that holds it",
    ]
    assert read_store(store_path("pets")).train.labels.bincount().tolist() == [2, 3]


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX alone")
def test_a_name_that_is_not_utf8_is_shown_escaped_and_stops_nothing(folder):
    fill(folder, cat=2, dog=2)
    broken = os.fsdecode(os.fsencode(folder / "cat") + b"/caf\xe9.png")
    Path(broken).write_bytes(b"no")
    picture(Path(os.fsdecode(os.fsencode(folder / "dog") + b"/gro\xdf.png")))
    (line,) = import_folder(folder, "pets", img_size=8, test_fraction=0)
    assert "caf\\udce9.png: UnidentifiedImageError" in line
    line.encode()
    stored = read_store(store_path("pets"))
    assert stored.skipped == [line]
    assert len(stored.train) == 5


def test_importing_many_images_keeps_few_in_memory(folder, monkeypatch):
    """Decoded images wait for their turn to be written; no more of them than DECODED_AHEAD and one a thread."""
    import vitkit.data.image_folder as module

    fill(folder, cat=150, dog=150)
    alive = weakref.WeakSet()
    most = 0
    original = module.read_square

    class Tracked:
        def __init__(self, tensor):
            self.tensor = tensor

        def numpy(self):
            return self.tensor.numpy()

    def counted(*arguments):
        nonlocal most
        image = Tracked(original(*arguments))
        alive.add(image)
        most = max(most, len(alive))
        return image

    monkeypatch.setattr(module, "read_square", counted)
    monkeypatch.setattr(module, "DECODED_AHEAD", 16)
    import_folder(folder, "pets", img_size=8)
    assert len(read_store(store_path("pets")).train) == 240
    assert most <= 18


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_images(folder):
    """An import of 4,000 images of 64 pixels, 49 MB, in a process of its own, against one of 400."""
    script = """if True:
        import sys
        from pathlib import Path
        from vitkit.data.image_folder import import_folder
        import_folder(Path(sys.argv[1]), sys.argv[2], img_size=64)
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    image = picture(folder / "few" / "a" / "0.png", size=(64, 64)).read_bytes()
    for count, name in ((200, "few"), (2000, "many")):
        for label in ("a", "b"):
            (folder / name / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (folder / name / label / f"{number}.png").write_bytes(image)
    commands = [[sys.executable, "-c", script, str(folder / name), name] for name in ("few", "many")]
    peaks = [int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for command in commands]
    assert peaks[1] - peaks[0] < 12_000  # kB; the pixels alone would be 44,000 more


def test_an_empty_class_is_named_and_left_out(folder):
    fill(folder, cat=2, dog=2)
    (folder / "fish").mkdir()
    assert import_folder(folder, "pets", img_size=8) == [
        f"{folder / 'fish'}: no .png, .jpg, .jpeg, .jfif, .webp, .gif, .bmp, .tif, .tiff, .avif file"
    ]
    assert read_store(store_path("pets")).classes == ["cat", "dog"]


def test_a_class_that_is_only_tested_is_named_and_left_out(folder):
    fill(folder / "train", cat=3, dog=3)
    fill(folder / "test", cats=2, dog=2)
    assert import_folder(folder, "pets", img_size=8) == ["class 'cats': no readable image of it to train on"]
    stored = read_store(store_path("pets"))
    assert stored.classes == ["cat", "dog"]
    assert stored.test.labels.tolist() == [1, 1]


def test_folders_that_are_no_dataset(folder):
    with pytest.raises(
        DatasetError, match=r"there is no folder at .*pets; expected one with images in it, or with a folder for each class"
    ):
        import_folder(folder, "pets")
    folder.mkdir()
    with pytest.raises(DatasetError, match=r"pets holds no image; expected \.png, \.jpg.* files in it or below it"):
        import_folder(folder, "pets")
    fill(folder, cat=3)
    one_class = "at least two classes.*; there is only 'cat'; images without labels are imported with --unlabelled"
    with pytest.raises(DatasetError, match=one_class):
        import_folder(folder, "pets")
    (folder / "dog").mkdir()
    (folder / "dog" / "a.png").write_bytes(b"no")
    with pytest.raises(
        DatasetError, match=r"to train on of 1 classes; expected at least two; left out: .*a\.png: Unident"
    ):
        import_folder(folder, "pets")
    assert stored_names() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"img_size": 0}, "img_size is 0; expected at least 1"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0; expected a number in"),
        ({"test_fraction": -0.1}, "test_fraction is -0.1; expected a number in"),
        ({"name": "../pets"}, "a dataset's name begins with"),
    ],
)
def test_arguments_out_of_range(folder, options, said):
    fill(folder, cat=2, dog=2)
    with pytest.raises(UsageError, match=said):
        import_folder(folder, **({"name": "pets"} | options))


def test_large_photographs_are_reduced_as_small_ones_are(folder):
    """A JPEG is decoded at a fraction of its size; the result is that of a careful resize, to a few grey levels."""
    y, x = np.mgrid[0:600, 0:800] / 100.0
    photo = Image.fromarray(np.stack([128 + 100 * np.sin(x), 128 + 100 * np.cos(y), 30 * x], -1).astype(np.uint8))
    path = folder / "cat" / "a.jpg"
    path.parent.mkdir(parents=True)
    photo.save(path, quality=95)
    centre(folder, path, size=32)
    found = read_store(store_path("pets")).train
    expected = photo.crop((100, 0, 700, 600)).resize((32, 32), Image.Resampling.BICUBIC)
    difference = (
        found.images[found.labels == 1][0].float() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
    )
    assert difference.abs().mean() < 2


def test_labels_by_folder_are_the_same_for_every_command(folder):
    """As `embed` and `predict` take them: a class called train is a class, and folders of splits are not."""
    fill(folder / "flat", train=2, plane=2)
    fill(folder / "split" / "Train", cat=2, dog=2)
    fill(folder / "split" / "dev", dog=1)
    picture(folder / "split" / "test" / "a.png")
    expected = {"flat": ["plane"] * 2 + ["train"] * 2, "split": ["cat"] * 2 + ["dog"] * 3 + [""]}
    for name, labels in expected.items():
        root = folder / name
        paths = list_images(root).images
        assert sorted(folder_labels(root, paths)) == sorted(labels)
        given = {file.path: file.label for file in read_layout(root, 0.2).files}
        assert all(label == (given.get(path) or "") for path, label in zip(paths, folder_labels(root, paths), strict=True))


def test_classes_of_folders_and_of_a_store_in_numeric_order_are_the_same(folder):
    names = [str(number) for number in range(12)]
    fill(folder, **dict.fromkeys(names, 2))
    import_folder(folder, "folders", img_size=8)
    images = torch.zeros(12, 3, 8, 8, dtype=torch.uint8)
    parts = {"images": images, "labels": torch.arange(12)}
    tensors = {f"{split}.{part}": value for split in ("train", "test") for part, value in parts.items()}
    assert read_store(write_store("numeric", tensors, names)).classes == read_store(store_path("folders")).classes
