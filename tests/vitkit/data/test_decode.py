"""One decoder for every image file: allowed formats only, upright, on white, within bounds, and no process-wide state changed."""

import io
import os
import struct
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, features

import vitkit.data.decode as decode
from vitkit.data.decode import ImageReadError, MemoryBudget, read_image, read_square

RED = (200, 30, 60)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    body = io.BytesIO()
    image.save(body, kind, **options)
    return body.getvalue()


def colour(body: bytes, channels: int = 3) -> list[int]:
    return read_square(body, 8, channels)[:, 4, 4].tolist()


def plain(mode: str = "RGB", size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF"))
KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", AVIF]


@pytest.mark.parametrize("kind", KINDS)
def test_every_allowed_format_is_read_whatever_its_name_says(kind, tmp_path):
    path = tmp_path / "image.dat"
    path.write_bytes(encoded(plain(), kind))
    for image in (read_image(path), read_image(str(path)), read_image(path.read_bytes())):
        assert (image.mode, image.size) == ("RGB", (20, 10))
        assert np.abs(np.asarray(image)[5, 10].astype(int) - RED).max() <= 16
    assert max(abs(a - b) for a, b in zip(colour(path.read_bytes()), RED, strict=True)) <= 16


@pytest.mark.parametrize("body", [EPS, b"%PDF-1.4", b"P6 1 1 255\n\0\0\0", b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n"])
def test_other_formats_are_refused_and_nothing_is_started(body, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "x.png"
    path.write_bytes(body)
    with pytest.raises(ImageReadError, match="cannot identify image file; expected JPEG, PNG, WEBP"):
        read_image(path)


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    blue = Image.new("RGB", (20, 10), "blue")
    body = encoded(plain(), kind, save_all=True, append_images=[blue, blue])
    assert max(abs(a - b) for a, b in zip(colour(body), RED, strict=True)) <= 16


def test_sixteen_bits_keep_their_shades():
    deep = Image.fromarray(np.full((10, 10), 128 * 257, dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert colour(encoded(deep, kind)) == [128] * 3
        assert read_image(encoded(deep, kind)).mode == "L"


@pytest.mark.parametrize(
    ("mode", "kind"), [("P", "PNG"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("LA", "PNG"), ("1", "PNG"), ("YCbCr", "JPEG")]
)
def test_every_mode_becomes_rgb_or_grey(mode, kind):
    body = encoded(plain(mode), kind)
    assert read_square(body, 8).shape == (3, 8, 8)
    assert read_square(body, 8, 1).shape == (1, 8, 8)
    assert read_image(body).mode in ("RGB", "L")


def test_transparency_is_white_at_any_size():
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert colour(encoded(clear, "PNG")) == [255] * 3
    assert np.asarray(read_image(encoded(clear, "PNG"), least=(4, 4))).min() == 255
    half = encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 128)), "PNG")
    assert abs(colour(half)[0] - 127) <= 1


def test_orientation_turns_upright_and_damaged_exif_data_do_not_stop():
    image = Image.new("RGB", (16, 8), "black")
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_image(encoded(image, "PNG", exif=exif))
    assert turned.size == (8, 16)
    assert np.asarray(turned)[:8, :, 0].min() > 150  # the left half is above
    damaged = encoded(image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03")
    with warnings.catch_warnings(action="ignore"):
        assert read_image(damaged).size == (16, 8)


noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (encoded(noise, "JPEG", quality=95)[:2000], "OSError: image file is truncated"),
        (encoded(noise, "PNG")[:2000], "OSError: image file is truncated"),
    ],
)
def test_a_cut_file_says_so(body, message):
    with pytest.raises(ImageReadError, match=message):
        read_square(body, 8)


def test_files_that_are_not_regular_are_not_waited_for(tmp_path):
    with pytest.raises(ImageReadError, match="there is no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageReadError, match="it is not a regular file"):
        read_image(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ImageReadError, match="it is not a regular file"):
            read_image(tmp_path / "pipe.png")


def test_a_file_of_too_many_bytes_is_not_read(monkeypatch):
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 100)
    with pytest.raises(ImageReadError, match=r"the file has [\d,]+ bytes; expected at most 100"):
        read_image(encoded(plain(), "BMP"))


def flat_png(width: int, height: int) -> bytes:
    """A real PNG of white pixels, small as a file and large in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + b"\xff" * (3 * width)) * height, 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("factor", [1.5, 3])
def test_too_many_pixels_are_refused_before_they_are_unpacked_and_without_a_warning(factor, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    body = encoded(Image.new("L", (100, int(10 * factor))), "PNG")
    with warnings.catch_warnings(record=True) as warned:
        with pytest.raises(ImageReadError, match=rf"100×{int(10 * factor)} pixels are more than the 1,000 .* decompression bomb"):
            read_square(body, 8)
    assert warned == []


def test_filters_of_warnings_stay_as_they_were_whoever_reads_in_turn(tmp_path):
    """Two readers that overlap, as two iterators do, and threads."""
    before, filters = list(warnings.filters), warnings.filters
    bodies = [encoded(plain(mode), "PNG") for mode in ("RGB", "P", "LA", "1")] * 10
    with ThreadPoolExecutor(4) as one, ThreadPoolExecutor(4) as other:
        for first, second in zip(one.map(read_image, bodies), other.map(lambda body: read_square(body, 4), bodies), strict=True):
            assert first.size == (20, 10)
            assert second.shape == (3, 4, 4)
            assert warnings.filters is filters
    assert warnings.filters == before


def test_threads_share_a_bound_on_memory():
    budget = MemoryBudget(100)
    lock, held, most = threading.Lock(), 0, 0

    def work(size: int) -> None:
        nonlocal held, most
        with budget.held(size):
            with lock:
                held += size
                most = max(most, held)
            time.sleep(0.002)
            with lock:
                held -= size

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [30, 60, 10, 90, 45] * 20))
    assert 60 < most <= 100
    with budget.held(1000):  # one alone may be larger
        pass
    with pytest.raises(KeyError), budget.held(100):
        raise KeyError
    with budget.held(100):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_sixteen_small_files_that_unpack_to_gigabytes_stay_within_the_bound(tmp_path):
    """16 PNGs of 25 megapixels each: 100 MB apiece as pixels, 1.6 GB together if threads took them all at once."""
    import subprocess

    path = tmp_path / "flat.png"
    path.write_bytes(flat_png(5000, 5000))
    script = """if True:
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from vitkit.data.decode import read_square
        def peak():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        before = peak()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda _: read_square(sys.argv[1], 8), range(16)))
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < decode.DECODED_BYTES * 1.2


def test_a_large_image_is_reduced_while_it_is_read_and_looks_the_same():
    y, x = np.mgrid[0:600, 0:900] / 100.0
    photo = Image.fromarray(np.stack([128 + 100 * np.sin(x), 128 + 100 * np.cos(y), 25 * x], -1).astype(np.uint8))
    for kind, options in (("JPEG", {"quality": 95}), ("PNG", {})):
        body = encoded(photo, kind, **options)
        small = read_image(body, least=(20, 20))
        assert 60 <= min(small.size) <= 150
        expected = photo.resize((45, 30), Image.Resampling.BOX)
        found = small.resize((45, 30), Image.Resampling.BOX)
        assert np.abs(np.asarray(expected).astype(float) - np.asarray(found)).mean() < 2
    assert read_image(body).size == (900, 600)
    assert read_image(body, least=(250, 250)).size == (900, 600)


def test_squares_are_the_middle_of_the_image():
    image = Image.new("RGB", (30, 10), "blue")
    image.paste(RED, (10, 0, 20, 10))
    square = read_square(encoded(image, "PNG"), 10)
    assert torch.equal(square, torch.tensor(RED, dtype=torch.uint8)[:, None, None].expand(3, 10, 10))
