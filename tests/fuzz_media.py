"""What the fuzz test reads of videos, images and archives of videos; see `fuzz.py`."""

import pathlib
from collections.abc import Iterator

import numpy as np
import synthetic_video
import tiny_openvid
from PIL import Image

from osv_jax.data import cutting, pixels, video
from osv_jax.data.cutting import Cutting, Location, Task
from osv_jax.data.image import read_image
from osv_jax.evaluation.features import resize
from osv_jax.evaluation.protocols import PROTOCOLS
from osv_jax.preparation import openvid

HEIGHT, WIDTH, FRAMES, FPS = 24, 32, 4, 10.0
CUTTING = Cutting(num_frames=FRAMES, fps=FPS, height=HEIGHT, width=WIDTH, stride=0.3)
_VIDEOS = {
    "a.mp4": {"codec": "libx264"},
    "b.mov": {"codec": "mpeg4", "rotation": 90, "pixel_aspect": 2},
    "c.avi": {"codec": "mpeg4"},
    "d.webm": {"codec": "libvpx"},
    "e.ts": {"codec": "libx264"},
    "f.mkv": {"codec": "ffv1"},
    "g.flv": {"codec": "flv"},
    "h.wmv": {"codec": "wmv2"},
    "i.webm": {"codec": "libvpx-vp9"},
}
# What decoding told, and in it what stands for the folder.
_CACHE, _HERE = "clips.json", "@here@"


def make_videos(target: pathlib.Path) -> None:
    for name, options in _VIDEOS.items():
        synthetic_video.write_constant(target / name, 14, 10, **options)
    write_gif(target / "j.gif")
    _index(target, target / _CACHE)
    text = (target / _CACHE).read_text().replace(str(target), _HERE)
    (target / _CACHE).write_text(text)


def write_gif(file: pathlib.Path) -> None:
    first, *rest = (Image.new("L", (WIDTH, HEIGHT), 15 * number) for number in range(14))
    first.save(file, save_all=True, append_images=rest, duration=100)


def use_videos(source: pathlib.Path, damaged: str) -> Iterator[str]:
    """As preparing, a run on videos, evaluation and a folder's index read them."""
    file = source / damaged
    if damaged == _CACHE:
        file.write_bytes(file.read_bytes().replace(_HERE.encode(), str(source).encode()))
        found = _index(source, file)
        assert 0 < len(found.clips) < 1000 and all(np.isfinite(clip.start_seconds) for clip in found.clips)
        return
    yield from _cut(Location((str(file),)), damaged)
    try:
        info = video.probe(file)
    except video.VideoError as error:
        yield error.reason
    else:
        check_info(info)
        if CUTTING.unfit(info) is None:
            starts = CUTTING.starts(info)
            assert 0 < len(starts) <= info.num_frames
            for start in starts:
                check_clip(_read_what_was_probed(file, start), (FRAMES, HEIGHT, WIDTH, 3))
    for fps in (None, FPS / 2):
        try:
            frames = video.read_frames(file, FRAMES, fps)
        except video.VideoError as error:
            yield error.reason
        else:
            check_clip(frames, (FRAMES, *frames.shape[1:3], 3))
            check_clip(resize(frames[:1], PROTOCOLS["stylegan-v"], WIDTH), (1, WIDTH, WIDTH, 3), np.float32)


def _read_what_was_probed(file: pathlib.Path, start: float) -> np.ndarray:
    """A clip of a file of which the index said that it can be used: a run that begins with it must not end there."""
    try:
        return video.read_clip(file, start, FRAMES, FPS, HEIGHT, WIDTH)
    except video.VideoError as error:
        raise AssertionError(f"probed, but not read: {error.reason}") from error


def _index(folder: pathlib.Path, cache: pathlib.Path) -> pixels.ClipIndex:
    return pixels.index_clips(folder, FRAMES, FPS, HEIGHT, WIDTH, cache)


def check_info(info: video.VideoInfo) -> None:
    assert info.num_frames > 0 and info.height > 0 and info.width > 0
    assert np.isfinite([info.start, info.end]).all() and info.end > info.start
    assert info.height * info.width <= 2**26


def check_clip(frames: np.ndarray, shape: tuple[int, ...], dtype: type = np.uint8) -> None:
    assert frames.shape == shape and frames.dtype == dtype and frames.size > 0


def _cut(location: Location, name: str) -> Iterator[str]:
    result = cutting.cut(Task((0, 0), name, location, CUTTING))
    if result.reason is not None:
        assert not result.clips
        yield result.reason
        return
    assert len(result.clips) == min(result.num_clips, cutting.CLIPS_AT_ONCE) > 0
    assert np.isfinite(result.start)
    clips, rest = list(result.clips), range(cutting.CLIPS_AT_ONCE, result.num_clips)
    if rest:
        clips += cutting.cut(Task((0, 0), name, location, CUTTING, rest=rest, start=result.start)).clips
    assert len(clips) == result.num_clips
    for number, clip in enumerate(clips):
        assert clip.number == number and np.isfinite(clip.start) and 0 <= clip.motion <= 255
        if clip.reason is None:
            check_clip(clip.frames, (FRAMES, HEIGHT, WIDTH, 3))
        else:
            yield clip.reason


def make_images(target: pathlib.Path) -> None:
    ramp = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    grey = Image.fromarray(ramp.astype(np.uint8))
    grey16 = Image.fromarray((ramp * 257).astype(np.uint16))
    rgb = Image.merge("RGB", [grey, grey.rotate(180), grey])
    rgba = Image.merge("RGBA", [*rgb.split(), grey])
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker", 0x011A: 72.0, 0x0132: "2026:11:26 12:00:00"})
    rgb.save(target / "a.png")
    rgba.save(target / "b.png", exif=exif)
    grey16.save(target / "c.png")
    rgb.quantize(16).save(target / "d.png", transparency=3)
    rgb.save(target / "e.jpg", exif=exif)
    rgb.save(target / "f.webp", lossless=True)
    rgba.save(target / "g.webp")
    rgb.save(target / "h.tif", compression="tiff_lzw", exif=exif)
    grey16.save(target / "i.tif")
    Image.fromarray((ramp / 255).astype(np.float32)).save(target / "j.tif")
    rgb.save(target / "k.tif", compression="jpeg")
    rgb.save(target / "l.bmp")
    rgb.save(target / "m.ppm")
    rgb.save(target / "n.jp2")
    rgb.save(target / "o.avif")
    rgba.save(target / "p.tif", compression="tiff_adobe_deflate")
    grey.convert("1").save(target / "q.tif", compression="group4")
    write_gif(target / "r.gif")


def use_image(source: pathlib.Path, damaged: str) -> Iterator[str]:
    pixels = read_image(source / damaged)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
    assert pixels.shape[0] * pixels.shape[1] <= 2 * Image.MAX_IMAGE_PIXELS
    return iter(())


def make_archives(target: pathlib.Path) -> None:
    tiny_openvid.write_openvid(target, num_videos=5, clip_frames=8)


def use_archives(source: pathlib.Path, damaged: str) -> Iterator[str]:
    cutting.open_archive.cache_clear()  # The same names, other files.
    videos, skipped = openvid.read_openvid(source, {"aesthetic score": 0}, {"motion score": 100})
    # What is left out is said, each row and each member once or more; no video is there twice.
    assert len({found.name for found in videos}) == len(videos) > 0
    yield from (reason for _, reason in skipped)
    for found in videos:
        assert found.size >= 0 and isinstance(found.caption, str)
        yield from _cut(found.location, found.name)
