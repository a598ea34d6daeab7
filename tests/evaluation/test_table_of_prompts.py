"""Tables of videos that are made of prompts: which there are, against a plain loop, and what is refused.

The whole way is one test, for each of its programs needs what the one before has made: a dataset with captions, a
student that AVDM2 has trained for two steps, a table of it beside its teacher.
"""

import json
import pathlib
import runpy

import jax
import numpy as np
import pytest
import synthetic_video
import tiny
import tiny_texts
from tiny_networks import NUM_FRAMES, save
from workdirs import metrics_of

from osv_jax import compare, evaluate, prepare, train
from osv_jax.data import latents
from osv_jax.errors import UserError
from osv_jax.evaluation import generation, planning
from osv_jax.evaluation.clip_score import CLIPScore
from osv_jax.evaluation.options import default_methods, methods_of, read_options
from osv_jax.inference.text_options import TextOptions
from osv_jax.inference.text_to_video import TextToVideo
from osv_jax.training.config import read_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
HEIGHT, WIDTH, FPS = 16, 24, 7.5
SIZE = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "fps": FPS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`weights` of a teacher, `eval` weights of VideoMAE and CLIP, and a folder of `videos`."""
    folder = tmp_path_factory.mktemp("prompts")
    tiny_texts.save(folder / "weights", tiny_texts.ANIMATEDIFF)
    tiny_texts.save(folder / "eval", tiny_texts.CLIP)
    save(folder / "eval", "videomae")
    (folder / "videos").mkdir()
    for i in range(2):
        synthetic_video.write_constant(folder / "videos" / f"{i}.mp4", 12, 8, first=3 * i)
    (folder / "prompts.txt").write_text("The cat\nThe car\n")
    return folder


def config_of(folder, output, **changes):
    config = runpy.run_path(str(CONFIGS / "eval.py"))["get_config"]()
    config.update(weights=str(folder / "weights"), students=(), videos="world", clips=3, output=str(output), **SIZE)
    config.update(protocol="cd-fvd", fvd_weights=str(folder / "eval"), clip_weights=str(folder / "eval"))
    config.update(bootstrap=3, films=1, **changes)
    return config


def plan_of(config):
    options = read_options(config)
    return planning.make_plan(options, methods_of(options, of_prompts=True))


@pytest.mark.integration
def test_from_captions_over_two_steps_of_avdm2_to_a_table(folder, tmp_path, monkeypatch):
    dataset, workdir = tmp_path / "dataset", tmp_path / "run"
    arguments = ["--source=world", f"--weights={folder / 'weights'}", f"--output={dataset}", "--min_motion=0"]
    arguments += ["--max_videos=4", "--test_videos=2", "--workers=1"]
    prepare.main([*arguments, *(f"--{name}={value}" for name, value in SIZE.items())])

    config = read_config(f"{CONFIGS / 'avdm2'}.py:tiny")
    config.weights, config.random_networks = str(folder / "weights"), {}
    config.data.dataset, config.data.num_frames = str(dataset), NUM_FRAMES
    config.data.resolutions = ((0, HEIGHT, WIDTH),)
    config.sdm_frames, config.discriminator_width = 2, 8
    config.num_steps = config.checkpoint_every = config.picture_every = 2
    with monkeypatch.context() as patch:
        patch.setattr(train.mesh, "make_mesh", lambda *sizes: tiny.one_device_mesh())
        train.train(config, workdir)
    assert all(np.isfinite(value) for row in metrics_of(workdir).values() for value in row.values())

    table = config_of(folder, tmp_path / "table", students=(str(workdir),), videos=str(dataset))
    evaluate._table(table)
    stored = json.loads((tmp_path / "table" / "table.json").read_text(), parse_constant=pytest.fail)
    rows = {row["name"]: row for row in stored["rows"]}
    assert list(rows) == ["real", "teacher, 25 steps", "teacher, 4 steps", "student, 4 steps"]
    assert [row.get("nfe") for row in rows.values()] == [None, 50, 8, 4]
    assert all(0 <= row["clip_score"] <= 100 for row in rows.values())
    assert len({row["clip_score"] for row in rows.values()}) > 1
    assert all(row["fvd_low"] <= row["fvd"] <= row["fvd_high"] for row in list(rows.values())[1:])
    assert not any("first_frame_psnr" in row for row in rows.values())
    assert "| CLIPScore |" in (tmp_path / "table" / "table.md").read_text()
    # The student's row by hand, with the programs that the table has compiled, for eight devices.
    model, score = TextToVideo.load(folder / "weights", workdir, data=8), CLIPScore(str(folder / "eval"))
    video, test = model.complete(TextOptions(decode_chunk_size=7)), latents.open_dataset(dataset, "test")
    prompts = [test.read(number)["caption"] for number in range(2)]
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(2)]
    noise = model.noise(jax.numpy.stack([*keys, *keys[1:] * 6]), video)
    made = model.sample(model.embed([*prompts, *prompts[1:] * 6], [""] * 8), noise, video)
    frames = model.frames(made, video.decode_chunk_size)[:2]
    motion = np.abs(np.diff(frames.astype(float), axis=1)).mean()
    assert rows["student, 4 steps"]["motion"] == pytest.approx(motion, rel=1e-6)
    scores = [score(clip, prompt) for clip, prompt in zip(frames, prompts, strict=True)]
    assert rows["student, 4 steps"]["clip_score"] == pytest.approx(np.mean(scores), rel=1e-6)
    # Another row: what there is is not made again.
    saved, save_part = [], generation.save_part
    monkeypatch.setattr(generation, "save_part", lambda file, part: (saved.append(file), save_part(file, part)))
    table.students = ()
    table.methods = (
        {"name": "teacher, 25 steps", "sampler": "ddim", "steps": 25},
        {"name": "student, 2 steps", "lora": str(workdir), "steps": 2},
    )
    evaluate._table(table)
    again = json.loads((tmp_path / "table" / "table.json").read_text())["rows"]
    assert len(saved) == 1 and again[:2] == stored["rows"][:2] and again[2]["nfe"] == 2


def test_defaults_are_avdm2s_table():
    methods = default_methods(["a", "b"], False, of_prompts=True)
    assert [(m.name, m.sampler, m.steps, m.lora) for m in methods] == [
        ("teacher, 25 steps", "ddim", 25, ""),
        ("teacher, 4 steps", "ddim", 4, ""),
        ("a, 4 steps", "few-step", 4, "a"),
        ("b, 4 steps", "few-step", 4, "b"),
    ]


def test_prompts_are_captions_or_the_lines_of_a_file(folder, tmp_path):
    captions = plan_of(config_of(folder, tmp_path))
    assert captions.prompts_of([2, 0])[0].endswith(".") and len(set(captions.prompts_of([0, 1, 2]))) == 3
    given = plan_of(config_of(folder, tmp_path, videos=str(folder / "videos"), prompts=str(folder / "prompts.txt")))
    assert given.prompts_of([1, 0]) == ["The car", "The cat"]
    (folder / "others.txt").write_text("The cat\nThe dog\n")
    other = plan_of(config_of(folder, tmp_path, videos=str(folder / "videos"), prompts=str(folder / "others.txt")))
    kept = [[plan.file(plan.target, [number]) for number in (0, 1)] for plan in (given, other)]
    assert kept[0][0] == kept[1][0] and kept[0][1] != kept[1][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": "videos"}, "The clips of videos have no captions: give a file with a prompt for each"),
        ({"prompts": "prompts.txt"}, r"prompts.txt has 2 prompts, and there are 3 clips: give a line for each"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ({"lpips": True}, "config.lpips compares with first frames"),
        ({"clip_weights": "weights"}, "clip_text"),
        ({"methods": ({"name": "a", "sampler": "euler"},)}, "sampler='euler' is not one of ddim, few-step"),
        ({"methods": ({"name": "a", "steps": 501},)}, "steps=501 is too many for ddim"),
        ({"num_frames": 33}, "num_frames=33 is too many for this motion adapter"),
        ({"methods": ({"name": "a", "lora": "miniature/stage2"},)}, "does not fit"),
    ],
)
def test_mistakes_are_named(changes, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message) as caught:
        evaluate._table(config_of(folder, tmp_path / "out", **changes))
    assert "\n" not in str(caught.value)


def test_compare_is_for_students_of_images(folder, tmp_path):
    arguments = [f"--weights={folder / 'weights'}", "--lora=x", "--videos=demo", f"--output={tmp_path}"]
    with pytest.raises(UserError, match=r"makes videos of prompts: `python -m osv_jax.evaluate table`"):
        compare.main(arguments)
