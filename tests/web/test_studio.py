"""What the page asks of the models, images' and prompts', and what it refuses; with models that compute nothing."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image
from small_pictures import png_without_pixels

from osv_jax.convert.tokenizer import Tokens
from osv_jax.errors import UserError
from osv_jax.inference import options, text_options
from osv_jax.inference.programs import Pipeline
from osv_jax.web import render
from osv_jax.web.forms import ImageForm, TextForm
from osv_jax.web.images import ImageRequest, ImageStudio
from osv_jax.web.jobs import Cancelled, Job
from osv_jax.web.results import Results
from osv_jax.web.studio import STUDENT, TEACHER
from osv_jax.web.texts import TextRequest, TextStudio

SHARED = {"steps": 2, "seed": 7, "fps": 9.0, "size": (16, 24)}


class Model(Pipeline):
    """Remembers what it was called with, and goes through the parts of a video."""

    identity = dtype_of = start_decoding = None

    def __init__(self, complete, parts):
        self._complete, self._parts, self.called = complete, parts, []
        self.seconds, self.on_part, self.before_part = {}, None, None

    def __call__(self, **given):
        self.called.append(given)
        for part in self._parts:
            for number in range(1, given["steps"] + 1 if part == "UNet" else 2):
                self.before_part()
                self.on_part(f"UNet {number} of {given['steps']}" if part == "UNet" else part)
                self.seconds[part] += 1
        return np.full((given["num_frames"], given["height"], given["width"], 3), given["seed"], np.uint8)

    def complete(self, options):
        return self._complete(options)

    def tokenize(self, prompts):
        cut = tuple(prompt[77:] for prompt in prompts)
        return Tokens(np.zeros((len(prompts), 77), np.int32), cut)

    def wait(self):
        pass


def image_model():
    own = {"height": 16, "width": 24, "num_frames": 3, "fps": 7}
    return Model(lambda chosen: options.complete(chosen, own, 8, 100), ("CLIP", "VAE encode", "UNet", "decode"))


def text_model():
    return Model(lambda chosen: text_options.complete(chosen, {}, 8, 32), ("text", "UNet", "decode"))


@pytest.fixture(params=["student", "teacher alone"])
def studios(request, tmp_path):
    """One of images and one of prompts."""
    names = [TEACHER] if request.param == "teacher alone" else [STUDENT, TEACHER]
    given = [(16, 24), (32, 16)], 3, Results(tmp_path, keep=9)
    return (
        ImageStudio({name: image_model() for name in names}, *given),
        TextStudio({name: text_model() for name in names}, *given),
    )


@pytest.fixture
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "cat.png"
    Image.new("RGB", (30, 20), "red").save(file)
    return file


def of_image(picture, **changes):
    return ImageRequest(**{"image": picture, "motion_bucket_id": 90.0, "sampler": "tts", **SHARED} | changes)


def of_text(**changes):
    given = {"prompt": "a cat", "guidance_scale": 5.0, "sampler": "ddim", **SHARED}
    return TextRequest(**given | changes)


class Watched(Job):
    """A job that keeps all that it was told."""

    def __init__(self):
        self.told = []
        super().__init__(lambda job: None)

    def __setattr__(self, name, value):
        if name == "fraction":
            self.told.append((self.part, value))
        super().__setattr__(name, value)


@pytest.mark.parametrize("beside", [False, True])
def test_every_control_reaches_the_models(studios, picture, beside):
    """Those of `osv_jax.sample`, under the same names, and the same for student and teacher."""
    image, text = studios
    wanted = {"seed": 7, "height": 16, "width": 24, "num_frames": 3, "fps": 9.0}
    cases = [
        (image, of_image(picture, beside=beside, teacher_steps=4), {"motion_bucket_id": 90.0}, "euler"),
        (text, of_text(negative_prompt="dogs", beside=beside, teacher_steps=4), {"guidance_scale": 5.0}, "ddim"),
    ]
    for studio, request, more, teacher_sampler in cases:
        studio.make(request, Watched())
        main = studio.models[studio.main].called
        (called,) = main
        assert wanted | more | {"sampler": request.sampler, "steps": 2} == {
            name: called[name] for name in (*wanted, *more, "sampler", "steps")
        }
        if studio is text:
            assert (called["prompt"], called["negative_prompt"]) == ("a cat", "dogs")
        else:
            np.testing.assert_array_equal(called["image"], np.asarray(Image.open(picture)))
        if beside and studio.main == STUDENT:
            (teachers,) = studio.models[TEACHER].called
            assert (teachers["sampler"], teachers["steps"]) == (teacher_sampler, 4)
            assert {name: teachers[name] for name in wanted} == wanted
        elif studio.main == STUDENT:
            assert studio.models[TEACHER].called == []


def test_progress_is_by_network_evaluation_and_every_part_has_its_time(studios):
    _, text = studios
    job = Watched()
    result = text.make(of_text(beside=True, teacher_steps=4), job)
    names = [video["name"] for video in result.about["videos"]]
    evaluations = [video["evaluations"] for video in result.about["videos"]]
    assert evaluations == ([4, 8] if len(names) == 2 else [4])
    about = f"{names[0]}: " if len(names) > 1 else ""
    told = [(part, round(fraction * sum(evaluations), 6)) for part, fraction in job.told if "UNet" in part]
    assert told[:2] == [(f"{about}UNet 1 of 2", 0), (f"{about}UNet 2 of 2", 2)]
    assert [fraction for part, fraction in told[2:]] == ([4, 6, 8, 10] if len(names) > 1 else [])
    seconds = result.about["videos"][0]["seconds"]
    assert {"text": 1, "UNet": 2, "decode": 1}.items() <= seconds.items() and seconds["write"] > 0


def test_a_cancelled_video_ends_before_its_next_part(studios, picture):
    image, text = studios
    for studio, request in ((image, of_image(picture)), (text, of_text())):
        job = Watched()
        job.cancel()
        with pytest.raises(Cancelled):
            studio.make(request, job)
        assert studio.results.newest() == []


def test_all_sizes_are_compiled_with_the_samplers_that_the_page_begins_with(studios):
    for studio in studios:
        studio.compile(Watched())
        for name, model in studio.models.items():
            sampler = studio.teacher_sampler if name == TEACHER else studio.student_sampler
            made = [(call["height"], call["width"], call["sampler"], call["steps"]) for call in model.called]
            assert made == [(16, 24, sampler, 1), (32, 16, sampler, 1)]
        assert studio.first_sampler == (studio.student_sampler if len(studio.models) > 1 else studio.teacher_sampler)


def test_a_result_says_how_it_was_made(studios, picture):
    image, text = studios
    shown = render.player(image.make(of_image(picture), Watched()))
    assert "cat.png at 16 x 24, seed 7, 9 fps, motion 90" in shown
    result = text.make(of_text(prompt="<i> " + "cat " * 30, negative_prompt="dogs & co"), Watched())
    shown = render.player(result)
    assert "at 16 x 24, seed 7, 9 fps, guidance 5, without “dogs &amp; co”" in shown and "<i>" not in shown
    assert re.search(r"The prompt .* is longer than the 77 tokens of the text encoder", shown)
    cards = render.gallery(text.results.newest())
    assert "seed 7: &lt;i&gt; cat cat" in cards and "<i>" not in cards and cards.count("<img") == 2
    stored = json.loads((text.results.file(result.identifier, "image.png").parent / "result.json").read_text())
    assert stored == result.about


def test_a_student_of_few_steps_has_no_guidance(studios):
    _, text = studios
    text.make(of_text(sampler="few-step", guidance_scale=9.0), Watched())
    assert text.models[text.main].called[0]["guidance_scale"] == 1
    assert "guidance" not in render.player(text.results.newest()[0])


@pytest.mark.parametrize(
    ("size", "words"), [((10_000, 5_001), "more than 50,000,000 pixels"), ((10_000, 5_000), "read")]
)
def test_more_than_50_megapixels_are_refused_before_they_are_decoded(studios, tmp_path, size, words):
    with pytest.raises(UserError, match=words) as error:
        studios[0].check(of_image(png_without_pixels(tmp_path / "wide.png", *size)))
    assert str(tmp_path) not in str(error.value)


def test_more_than_30_megabytes_are_refused(studios, tmp_path):
    file = tmp_path / "large.png"
    file.touch()
    with file.open("r+b") as opened:
        opened.truncate(30_000_001)
    with pytest.raises(UserError, match=r"^large\.png has more than 30 MB: scale it down first\.$"):
        studios[0].check(of_image(file))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (64, 64)}, "64 x 64 is not offered here: choose 16 x 24, 32 x 16"),
        ({"steps": 51}, "steps=51 is too many for this page: at most 50"),
        ({"steps": 0}, "steps"),
        ({"seed": 2**32}, "seed"),
        ({"seed": -1}, "seed"),
        ({"fps": 60.0}, "is too fast for"),
        ({"fps": float("nan")}, "fps"),
        ({"sampler": "magic"}, "sampler"),
    ],
)
def test_what_cannot_be_made_is_refused_before_it_waits(studios, picture, changes, words):
    """Whatever the page's controls allow: requests are anybody's."""
    image, text = studios
    for studio, request in ((image, of_image(picture, **changes)), (text, of_text(**changes))):
        with pytest.raises((UserError, KeyError), match=words):
            studio.check(request)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": " \n "}, "A prompt is empty: say what the video is to show"),
        ({"prompt": "a" * 2001}, "A prompt has 2,001 letters, more than 2,000: shorten it"),
        ({"negative_prompt": "a" * 2001}, "2,001 letters"),
        ({"prompt": "a \ud800"}, "is not UTF-8"),
        ({"negative_prompt": "\udcff"}, "is not UTF-8"),
        ({"sampler": "few-step", "negative_prompt": "dogs"}, "negative prompt has no effect without guidance"),
        ({"guidance_scale": 1.0, "negative_prompt": "dogs"}, "negative prompt has no effect without guidance"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"sampler": "tts"}, "not one of ddim, few-step"),
    ],
)
def test_prompts_that_cannot_be_made_are_refused(studios, changes, words):
    with pytest.raises(UserError, match=words) as error:
        studios[1].check(of_text(**changes))
    assert "\n" not in str(error.value)


def test_a_negative_prompt_may_be_the_teachers_alone(studios):
    _, text = studios
    request = of_text(sampler="few-step", negative_prompt="dogs", beside=True)
    if len(text.models) > 1:
        text.check(request)
    else:
        with pytest.raises(UserError, match="no effect"):
            text.check(request)


def test_sizes_that_the_models_cannot_make_end_the_program(tmp_path):
    for kind, model in ((ImageStudio, image_model()), (TextStudio, text_model())):
        with pytest.raises(UserError, match="height=20 is not divisible by 8"):
            kind({TEACHER: model}, [(20, 24)], None, Results(tmp_path, keep=1))


def test_forms_name_what_is_missing_and_pass_on_the_rest():
    shared = {"sampler": "tts", "steps": 1, "seed": 0, "fps": 7.0, "size": (8, 8)}
    with pytest.raises(UserError, match="There is no image: upload one"):
        ImageForm([]).request(None, 127, **shared)
    assert dataclasses.asdict(ImageForm([]).request("a.png", 127, **shared)).items() >= shared.items()
    request = TextForm().request(None, None, 7.5, **shared)
    assert (request.prompt, request.negative_prompt, request.guidance_scale) == ("", "", 7.5)
