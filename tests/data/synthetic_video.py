"""Test videos whose frames carry their number as brightness."""

import fractions

import av
import numpy as np

_DARKEST, _STEP = 20, 5
MAX_FRAMES = 46


def write(
    path,
    times,
    *,
    width=32,
    height=24,
    codec="libx264",
    pix_fmt="yuv420p",
    rate=30,
    rotation=None,
    red_corner=False,
    pixel_aspect=None,
    first=0,
):
    """A video whose frame i, counted from `first`, is uniformly grey, brighter with i, and shown from its time [s] on.

    `rate` [1/s] decides how long the last one is shown, and no more.
    """
    assert len(times) <= MAX_FRAMES
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = fractions.Fraction(1, 3000)
        # Several key frames, and predictions from later frames: what makes seeking and ordering hard.
        stream.codec_context.gop_size = 10
        if codec == "libx264":
            stream.codec_context.max_b_frames = 2
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(times, first):
            picture = np.full((height, width, 3), _DARKEST + _STEP * number, np.uint8)
            if red_corner:
                picture[: height // 2, : width // 2] = (250, 0, 0)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 3000), stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_constant(path, num_frames, fps, **options):
    """The same at a constant frame rate [1/s]."""
    return write(path, [i / fps for i in range(num_frames)], rate=fps, **options)


def numbers(clip):
    """The frame numbers that the brightness of a clip [f h w 3] tells."""
    return np.round((clip[:, 4:-4, 4:-4].mean((1, 2, 3)) - _DARKEST) / _STEP).astype(int).tolist()


def write_sound(path):
    """A file with one audio stream and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_damaged(path, where=0.33, num_bytes=200, **options):
    """A video with a stretch of compressed data overwritten: it opens, and goes wrong on the way."""
    write_constant(path, 40, 10, width=64, height=48, **options)
    data = bytearray(path.read_bytes())
    begin, end = data.index(b"mdat"), data.index(b"moov")
    middle = begin + int(where * (end - begin))
    data[middle : middle + num_bytes] = bytes(np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8))
    path.write_bytes(data)
    return path


def write_unknown(path):
    """A video whose codec has a name that nobody knows."""
    data = write_constant(path, 12, 10).read_bytes()
    path.write_bytes(data.replace(b"avc1", b"zzzz"))
    return path


def write_growing(path):
    """Twelve frames at 10 fps, of which the last six are 16 times as wide. MPEG-TS can be joined as it is."""
    small, large = (path.with_name(f"{path.stem}_{name}.ts") for name in ("small", "large"))
    write(small, [i / 10 for i in range(6)], codec="mpeg4", rate=10)
    write(large, [i / 10 for i in range(6, 12)], codec="mpeg4", rate=10, width=512, height=384, first=6)
    path.write_bytes(small.read_bytes() + large.read_bytes())
    small.unlink(), large.unlink()
    return path
