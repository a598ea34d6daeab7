"""The program: what it prints, keeps and refuses."""

import numpy as np
import pytest
import synthetic_video
from tiny_networks import NUM_FRAMES, save

from osv_jax import evaluate
from osv_jax.errors import UserError
from osv_jax.evaluation import features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`real` and `fake` videos, and `weights` of VideoMAE."""
    folder = tmp_path_factory.mktemp("evaluate")
    for kind, first in (("real", 0), ("fake", 7)):
        (folder / kind).mkdir()
        for i in range(4):
            times = [frame / 7 for frame in range(NUM_FRAMES + 1)]
            synthetic_video.write(folder / kind / f"{i}.mp4", times, first=first + i * i, codec="mpeg4")
    (folder / "empty").mkdir()
    save(folder / "weights", "videomae")
    return folder


def arguments(folder, *changed, protocol="osv"):
    return [
        "fvd",
        f"--real={folder / 'real'}",
        f"--fake={folder / 'fake'}",
        f"--weights={folder / 'weights'}",
        f"--protocol={protocol}",
        "--network=videomae",
        f"--frames={NUM_FRAMES}",
        "--batch_size=8",
        "--bootstrap=5",
        *changed,
    ]


def test_what_is_printed_and_kept(folder, tmp_path, capsys, monkeypatch):
    cache = f"--cache={tmp_path}"
    evaluate.main(arguments(folder, cache))
    first = capsys.readouterr().out
    assert "protocol: osv, covariances divided by N - 1" in first
    assert "backend: videomae, weights " in first
    assert "frames: the first 10 (by the protocol 14) at 7 fps, resized to 28 x 28, bilinear" in first
    assert "real: 4 videos of 24 x 32\n" in first and "generated: 4 videos of 24 x 32\n" in first
    assert first.count("warning: 4 ") == 2
    assert "FVD by osv: " in first and "95 % interval" in first
    (file,) = tmp_path.glob("*.npz")
    # Kept, so only the generated videos are read; or given by name.
    read = []
    monkeypatch.setattr(evaluate, "make_features", lambda *args: read.append(args[0]) or features.make_features(*args))
    evaluate.main(arguments(folder, cache))
    assert capsys.readouterr().out == first and len(read) == 1
    evaluate.main(arguments(folder, f"--real={file}", f"--fake={file}", cache))
    value = capsys.readouterr().out.split("FVD by osv: ")[1].split()[0]
    assert len(read) == 1 and abs(float(value)) < 1e-3
    with pytest.raises(UserError, match=r"npz: made with protocol osv, and cannot be compared with .* cd-fvd"):
        evaluate.main(arguments(folder, f"--fake={file}", cache, protocol="cd-fvd"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--real=empty"], "The folder empty holds no videos"),
        (["--fake=nowhere"], "The video folder nowhere does not exist"),
        (["--fake=nowhere.npz"], "nowhere.npz does not exist"),
        (["--protocol=fid"], "invalid choice: 'fid'"),
        (["--network=i3d", "--frames=9"], "i3d does not exist: make it with"),
        (["--frames=9"], "takes clips of 10 frames, not of 9"),
        (["--bootstrap=-1"], "--bootstrap: -1 must be a whole number of at least 0"),
        (["--cache=/proc/x"], "/proc/x cannot be written to .*choose another --cache"),
    ],
)
def test_mistakes_are_named(changed, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        evaluate.main(arguments(folder, *changed))


def test_a_command_is_needed():
    with pytest.raises(UserError, match="arguments are required: COMMAND"):
        evaluate.main([])


def test_few_videos_are_warned_of_and_enough_are_not(capsys):
    for count, warned in ((255, True), (256, False)):
        made = features.Features(np.ones((count, 2), np.float32), {(24, 32): count}, [("x.mp4", "is empty")], {})
        evaluate._report("real", made)
        printed = capsys.readouterr().out
        assert ("warning" in printed) == warned and "skipped: x.mp4 is empty" in printed
