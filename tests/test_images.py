"""Decoding and preprocessing, against Pillow and torchvision."""

import dataclasses
import os
import struct
import zlib

import infer

import numpy as np
import pytest
import torch
from conftest import SAMPLES
from PIL import Image, ImageOps
from torchvision import transforms

from wwts import torch_engine

torch_engine.import_torch()


def spec_of(**pixels):
    return infer.Spec.parse({"name": "identity", "num_classes": 2, "labels": ["a", "b"], **pixels}, "identity")


CLASSIC = spec_of(resize=256, crop=224, interpolation="bilinear", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
LITE = spec_of(resize=292, crop=260, interpolation="bicubic", mean=[127 / 255] * 3, std=[128 / 255] * 3)
SPECS = [CLASSIC, LITE, dataclasses.replace(LITE, resize=260, interpolation="bilinear")]


def torchvision_pipeline(spec):
    mode = transforms.InterpolationMode(spec.interpolation)
    return transforms.Compose(
        [
            transforms.Resize(spec.resize, mode),
            transforms.CenterCrop(spec.crop),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )


def engine(spec):
    """An engine around a network that gives its input back, so that nothing but the input is seen."""
    model = torch_engine.HubModel(torch.nn.Identity(), spec, weights="none", files=None, own=False)
    return torch_engine.TorchEngine(model, "cpu", "float32")


SIZES = [(260, 260), (292, 292), (224, 224), (500, 375), (375, 500), (1, 1), (2, 3), (7, 5), (259, 261), (293, 291)]
SIZES += [(1000, 30), (31, 999), (3, 400), (400, 3), (1, 300), (300, 1), (257, 1024), (1023, 4001), (999, 1001)]


@pytest.mark.parametrize("spec", SPECS, ids=["classic", "lite", "square"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocessing_is_bit_identical_to_torchvision(size, spec):
    noise = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pixels = infer.preprocess(image, spec)
    assert pixels.dtype == np.uint8 and pixels.shape == (spec.crop, spec.crop, 3)
    ours = engine(spec).normalize(np.stack([pixels]))[0]
    assert torch.equal(ours, torchvision_pipeline(spec)(image))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_real_photos_in_every_mode_are_bit_identical_to_torchvision(path, mode):
    image = Image.open(path).convert(mode)
    rgb = infer.to_rgb(image)
    assert rgb.mode == "RGB" and rgb.tobytes() == image.convert("RGB").tobytes()
    ours = engine(LITE).normalize(np.stack([infer.preprocess(rgb, LITE)]))[0]
    assert torch.equal(ours, torchvision_pipeline(LITE)(image.convert("RGB")))


def test_a_line_of_pixels_does_not_exhaust_memory():
    for size in [(1, 20000), (20000, 1), (2, 60000)]:
        image = Image.linear_gradient("L").convert("RGB").resize(size)
        assert infer.preprocess(image, LITE).shape == (260, 260, 3)


def read_image(path):
    with infer.open_image(path) as file:
        return infer.decode_image(file)


@pytest.fixture(scope="module")
def large_photo(tmp_path_factory):
    """A JPEG of 12 megapixels, upright only by its EXIF tag."""
    path = tmp_path_factory.mktemp("large") / "palace.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(SAMPLES[2]).resize((4032, 3024)).save(path, quality=90, exif=exif)
    return path


def test_drafts_leave_twice_what_is_resized_to_and_the_same_answer(large_photo):
    draft = dataclasses.replace(LITE, draft=True)
    with open(large_photo, "rb") as file:
        small, full = infer.decode_image(file, draft), infer.decode_image(file, LITE)
    assert full.size == (3024, 4032) and small.size == (756, 1008)  # a quarter: an eighth would leave less than 584
    results = [infer.Recognizer("wwts_cn_lite", device="cpu", draft=draft)(large_photo) for draft in (False, True)]
    first, second = (result.predictions[0] for result in results)
    assert first.label == second.label and 0 < abs(first.confidence - second.confidence) < 0.1
    assert results[0].version != results[1].version


def test_drafts_leave_small_photos_and_opened_images_alone(large_photo):
    draft = dataclasses.replace(LITE, draft=True)
    with open(SAMPLES[2], "rb") as file:
        assert infer.decode_image(file, draft).tobytes() == read_image(SAMPLES[2]).tobytes()
    with Image.open(large_photo) as image:
        assert infer.decode_image(image, draft).size == (3024, 4032)


def saved(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixel(image):
    return image.getpixel((image.width // 2, image.height // 2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L", "RGB"])
def test_transparency_lies_over_white(tmp_path, mode):
    """Black that is wholly transparent must not show; what is opaque must."""
    black = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    black.paste((204, 204, 204, 255), (4, 0, 8, 8))
    if mode in ("RGBA", "LA", "PA"):
        converted = black.convert("RGB").convert("P").convert("PA") if mode == "PA" else black.convert(mode)
        if mode == "PA":  # Pillow's own conversion lost the transparency up to version 11
            converted.putalpha(black.getchannel("A"))
        image = infer.to_rgb(converted)
    else:  # one colour is named transparent, as in a PNG's tRNS chunk or a GIF
        solid = Image.new("RGB", (8, 8), (0, 0, 0))
        solid.paste((204, 204, 204), (4, 0, 8, 8))
        solid = solid.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else solid.convert(mode)
        key = (0, 0, 0) if mode == "RGB" else solid.getpixel((0, 0))
        image = read_image(saved(tmp_path, solid, "key.png", transparency=key))
    assert image.mode == "RGB"
    assert image.getpixel((1, 4)) == (255, 255, 255)
    assert image.getpixel((6, 4)) == pytest.approx((204, 204, 204), abs=1)


def test_half_transparency_is_mixed_with_white():
    assert pixel(infer.to_rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))) == pytest.approx((127,) * 3, abs=1)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, mode):
    values = np.linspace(0, 65535, 256).astype(np.uint16)
    big_endian = mode == "I;16B"
    data = np.tile(values, (4, 1)).astype(">u2" if big_endian else "<u2" if mode == "I;16" else np.int32)
    image = Image.frombytes(mode, (256, 4), data.tobytes())
    expected = np.tile(np.round(values / 65535 * 255), (4, 1))
    assert np.array_equal(np.asarray(infer.to_rgb(image))[..., 0], expected)
    if mode == "I;16":
        for name in ("16.png", "16.tiff"):
            decoded = read_image(saved(tmp_path, image, name))
            assert np.array_equal(np.asarray(decoded)[..., 1], expected)


def test_floating_point_images():
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(2, 0)
    for scaled in (ramp, ramp * 1000 - 500, np.round(ramp * 255)):
        image = np.asarray(infer.to_rgb(Image.fromarray(scaled)))
        assert np.array_equal(image[0, :, 0], np.arange(256))
    assert pixel(infer.to_rgb(Image.fromarray(np.zeros((4, 4), np.float32)))) == (0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    image = Image.open(SAMPLES[0]).resize((64, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, "turned.png", exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert read_image(path).tobytes() == expected.tobytes()
    assert read_image(path).size == ((64, 40) if orientation < 5 else (40, 64))


@pytest.mark.parametrize("name", ["frames.gif", "frames.webp", "frames.png", "frames.tiff"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert pixel(read_image(path)) == (250, 0, 0)


def error_of(path):
    with pytest.raises(Exception) as caught:
        read_image(path)
    return infer.describe_image_error(caught.value)


def test_what_is_no_image_has_one_clear_line(tmp_path):
    jpeg = SAMPLES[0].read_bytes()
    files = {
        "empty.jpg": b"",
        "text.jpg": b"hello",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "head.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    expected = {
        "empty.jpg": "无法识别的图像格式",
        "text.jpg": "无法识别的图像格式",
        "half.jpg": "图像数据不完整",
        "head.png": "",
        "fifo.jpg": "不是普通文件",
        "folder.jpg": "是文件夹",
        "missing.jpg": "文件不存在",
        "loop.jpg": "无法读取图像",
    }
    for name, message in expected.items():
        text = error_of(tmp_path / name)
        assert message in text and text and "\n" not in text, name


def test_a_decompression_bomb_is_refused_and_a_large_photo_is_not(tmp_path, monkeypatch):
    # A PNG header that promises 30,000 × 30,000 pixels; Pillow stops before any is decoded.
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(90001)))):
        bomb += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert "图像过大" in error_of(tmp_path / "bomb.png")
    path = saved(tmp_path, Image.new("RGB", (150, 100)), "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)  # once, not twice beyond: Pillow only warns
    assert read_image(path).size == (150, 100)


def test_odd_tags_do_not_cost_a_photo(tmp_path):
    # Orientation 6, and XResolution, which is a number, as text.
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    path = saved(tmp_path, Image.open(SAMPLES[0]).resize((64, 40)), "odd.jpg", exif=exif)
    with Image.open(path) as image, pytest.raises(TypeError):
        ImageOps.exif_transpose(image)  # or it would show nothing
    assert read_image(path).size == (40, 64)


def test_a_lifted_pixel_limit_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    image = read_image(SAMPLES[0])
    assert infer.preprocess(image, LITE).shape == (260, 260, 3)


@pytest.mark.parametrize("odd", [1.2, 50.0, np.nan, np.inf, -np.inf])
def test_one_broken_pixel_does_not_blacken_an_image(odd):
    values = np.random.default_rng(0).random((64, 64), np.float32)
    wanted = np.asarray(infer.to_rgb(Image.fromarray(values))).mean()
    values[5, 5] = odd
    assert np.asarray(infer.to_rgb(Image.fromarray(values))).mean() == pytest.approx(wanted, abs=1)


def test_thirty_two_bits_are_scaled_to_their_own_range():
    ramp = np.linspace(-(2**31), 2**31 - 128, 256).astype(np.int32)[None].repeat(4, 0)
    row = np.asarray(infer.to_rgb(Image.fromarray(ramp)))[0, :, 0].astype(int)
    assert row[0] == 0 and row[-1] == 255 and (np.diff(row) >= 0).all() and np.diff(row).max() <= 2


def test_what_follows_a_progressive_jpeg_is_not_its_scans(tmp_path):
    path = saved(tmp_path, Image.open(SAMPLES[0]), "motion.jpg", progressive=True)
    path.write_bytes(path.read_bytes() + b"\xff\xda" * 500)
    assert read_image(path).size == Image.open(SAMPLES[0]).size
