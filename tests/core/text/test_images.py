"""Images that are read for prompts: formats, orientation, limits, and files that are damaged."""

import base64
import os
import sys
import zlib

import numpy as np
import pytest

from treeflash.errors import ConfigError, PromptError
from treeflash.text.images import MAX_BYTES, data_url, read_image, read_images

Image = pytest.importorskip("PIL.Image")
from stub_images import chunk, claiming, written

QUADRANTS = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
PIXELS = QUADRANTS.repeat(16, 0).repeat(24, 1)  # 32 high, 48 wide


PNG = written(Image.fromarray(PIXELS), "PNG")


class TestSources:
    def test_every_source_gives_the_same_pixels(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(PNG)
        url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
        in_lines = f"data:image/png;base64,{base64.encodebytes(PNG).decode()}"
        for source in (path, str(path), PNG, url, in_lines, Image.open(path), data_url(path)):
            assert np.array_equal(read_image(source), PIXELS)

    @pytest.mark.parametrize("format", ["WEBP", "GIF", "JPEG"])
    def test_formats(self, format):
        exact = {"WEBP": {"lossless": True}, "GIF": {}, "JPEG": {"quality": 100}}[format]
        pixels = read_image(written(Image.fromarray(PIXELS), format, **exact))
        assert pixels.shape == PIXELS.shape
        assert pixels.dtype == np.uint8
        corners = np.abs(pixels.astype(int) - PIXELS)[::31, ::47]
        assert corners.max() <= (2 if format == "JPEG" else 0)

    @pytest.mark.parametrize("format", ["BMP", "TIFF", "PPM"])
    def test_other_formats_are_refused(self, format):
        with pytest.raises(PromptError, match="not a PNG, JPEG, WebP or GIF image"):
            read_image(written(Image.fromarray(PIXELS), format))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("no-such-file.png", r"no-such-file.png cannot be read: No such file"),
            ("https://example.org/a.png", "is a URL, and images are never fetched"),
            ("file:///etc/passwd", "is a URL, and images are never fetched"),
            ("a\0.png", "cannot be read: "),
            ("data:image/png,%89PNG", "must have the form data:image/png;base64,"),
            ("data:image/png;base64", "must have the form"),
            ("data:image/png;base64,!!", "is not base64"),
            ("data:image/png;base64,iVBO Rw0K x\n", "is not base64"),
            ("data:;base64," + "A" * (MAX_BYTES * 4 // 3 + 100), "more than 20 MiB"),
            (b"", "not a PNG, JPEG, WebP or GIF image"),
            (b"<svg/>", "not a PNG, JPEG, WebP or GIF image"),
            (b"\0" * (MAX_BYTES + 1), "more than 20 MiB"),
            (7, "got int"),
            (None, "got NoneType"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_source_that_is_no_image_is_one_line(self, source, message):
        with pytest.raises(PromptError, match=message) as raised:
            read_image(source)
        assert "\n" not in str(raised.value)

    def test_folders_and_pipes_are_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe"):
            with pytest.raises(PromptError, match="is not a file"):
                read_image(path)

    def test_a_large_file_is_not_read_whole(self, tmp_path):
        path = tmp_path / "a.png"
        with path.open("wb") as file:
            file.truncate(1 << 40)  # it takes no space
        with pytest.raises(PromptError, match="more than 20 MiB"):
            read_image(path)

    def test_the_number_of_an_image_is_told(self):
        with pytest.raises(PromptError, match=r"^image 2: the file is not"):
            read_images([PNG, b"?"])

    def test_without_pillow(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ConfigError, match="images need Pillow; pip install pillow"):
            read_image(PNG)


class TestPixels:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_the_camera_says_which_side_is_up(self, orientation):
        turned = {
            1: PIXELS,
            2: PIXELS[:, ::-1],
            3: PIXELS[::-1, ::-1],
            4: PIXELS[::-1],
            5: PIXELS.swapaxes(0, 1),
            6: np.rot90(PIXELS),
            7: PIXELS[::-1, ::-1].swapaxes(0, 1),
            8: np.rot90(PIXELS, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(turned))
        assert np.array_equal(read_image(written(stored, "PNG", exif=exif)), PIXELS)

    @pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
    def test_the_first_frame_of_an_animation(self, format):
        frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
        settings = {"lossless": True} if format == "WEBP" else {}
        data = written(frames[0], format, save_all=True, append_images=frames[1:], **settings)
        assert read_image(data).tolist() == [[[255, 0, 0]] * 8] * 6

    def test_transparency_lies_on_white(self):
        ink = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
        ink.putpixel((0, 0), (0, 0, 0, 255))
        ink.putpixel((1, 0), (255, 0, 0, 51))
        expected = [[[0, 0, 0], [255, 204, 204], [255, 255, 255]]]
        assert read_image(written(ink, "PNG")).tolist() == expected
        assert read_image(ink).tolist() == expected
        palette = Image.new("P", (1, 1), 0)
        assert read_image(written(palette, "GIF", transparency=0)).tolist() == [[[255] * 3]]

    def test_modes(self):
        grey = Image.fromarray(np.full((1, 1), 40000, np.uint16))
        assert read_image(written(grey, "PNG")).tolist() == [[[40000 >> 8] * 3]]
        bit = Image.new("1", (1, 1), 1)
        assert read_image(written(bit, "PNG")).tolist() == [[[255] * 3]]
        cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        (red, green, blue) = read_image(written(cmyk, "JPEG"))[8, 8].tolist()
        assert red > 250
        assert max(green, blue) < 5

    @pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
    def test_extreme_shapes(self, size):
        assert read_image(written(Image.new("RGB", size), "PNG")).shape == (*size[::-1], 3)


def reads_or_tells(data: bytes) -> bool:
    """Whether an image is read, or an error is one line; other errors are raised."""
    try:
        return read_image(data).shape[2] == 3
    except PromptError as error:
        return "\n" not in str(error)


class TestHostileFiles:
    @pytest.mark.parametrize("size", [(60_000, 60_000), (10_000, 10_000), (5_657, 5_657)])
    def test_the_header_decides_before_anything_is_decoded(self, size, recwarn):
        with pytest.raises(PromptError, match="more than 32 megapixels"):
            read_image(claiming(*size))
        assert not recwarn.list

    def test_an_image_of_pillow_has_the_same_limit(self):
        with pytest.raises(PromptError, match="6000 x 6000 pixels, more than 32 megapixels"):
            read_image(Image.new("1", (6_000, 6_000)))

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
    def test_half_a_file(self, format):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        data = written(Image.fromarray(noise), format)
        for length in (len(data) // 2, 40, 12, 4):
            with pytest.raises(PromptError) as raised:
                read_image(data[:length])
            assert "\n" not in str(raised.value)

    def test_a_header_without_pixels(self):
        with pytest.raises(PromptError, match=r"cannot be decoded|damaged"):
            read_image(claiming(5_000, 5_000))

    def test_flipped_bytes_are_read_or_one_line(self):
        rng = np.random.default_rng(1)
        for format in ("PNG", "JPEG", "WEBP", "GIF"):
            data = written(Image.fromarray(PIXELS), format)
            for _ in range(60):
                broken = bytearray(data)
                for place in rng.integers(0, len(data), 3):
                    broken[place] ^= 1 << rng.integers(8)
                assert reads_or_tells(bytes(broken))

    def test_scans_that_repeat_are_not_decoded(self):
        data = written(Image.new("L", (64, 64)), "JPEG", progressive=True)
        end = data.rfind(b"\xff\xd9")
        scan = data[data.rfind(b"\xff\xda") : end]
        assert read_image(data[:end] + scan * 20 + data[end:]).shape == (64, 64, 3)
        with pytest.raises(PromptError, match="more than 200 scans"):
            read_image(data[:end] + scan * 300 + data[end:])

    def test_a_text_that_expands_is_not_kept(self):
        bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (4 << 20)))
        head, tail = PNG[:33], PNG[33:]
        assert reads_or_tells(head + bomb + tail)
