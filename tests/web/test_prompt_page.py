"""The page that makes videos of prompts, served by a process of its own, as headless Chromium shows it."""

import json
import subprocess

import browser
import jax
import pytest
import tiny_animatediff
from flax.traverse_util import unflatten_dict
from serving import Page, assert_same_video, command, served, until

from osv_jax.convert.lora_files import write_peft
from osv_jax.convert.text_to_video import video_unet_shapes
from osv_jax.convert.weights import load_config
from osv_jax.inference.bases import PARTS
from osv_jax.models.lora import init_lora, target_modules

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small AnimateDiff, and a student of it."""
    folder = tmp_path_factory.mktemp("animatediff")
    tiny_animatediff.save_checkpoint(folder, levels=4)
    tiny_animatediff.import_all(folder, folder / "weights")
    shapes = unflatten_dict(video_unet_shapes(*(load_config(folder / "weights", part) for part in PARTS)))
    lora = init_lora(jax.random.key(0), shapes, 2, target_modules(shapes, "all"))
    (folder / "lora").mkdir()
    write_peft(folder / "lora", jax.tree.map(lambda x: x + 0.02, lora))
    return [f"--weights={folder / 'weights'}", f"--lora={folder / 'lora'}"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def page(tmp_path_factory, model, output):
    log = tmp_path_factory.mktemp("log") / "log.txt"
    opened = browser.open_chromium(tmp_path_factory.mktemp("profile"))
    offered = ["--num_frames=8", "--size", "32x48", "24x40", f"--output={output}"]
    with served(*model, *offered, log=log) as url:
        page = Page(opened, url)
        page.open("#generate")
        yield page
    opened.quit()


def test_it_says_that_it_compiles_for_both_sizes(page):
    page.run(
        "window.seen = new Set(); new MutationObserver(() => seen.add(document.querySelector('#notice').innerText))"
        ".observe(document.querySelector('#notice'), {childList: true, subtree: true, characterData: true})"
    )
    until(lambda: page.all(".notice"))
    assert page.text("#notice").startswith("Compiling ahead; videos wait until it is done.")
    until(lambda: not page.all(".notice"), 400)
    assert page.text("h1") == "From a prompt to a video"
    assert page.all("#image") == page.all("#motion") == []


def test_student_and_teacher_of_a_prompt_as_the_program_makes_them(page, model, output, tmp_path):
    page.choose("#size", "24 x 40")
    page.set_text("#prompt", "The cat on the <car>")
    page.set_text("#negative", "it's 25 cars")
    page.set_number("#guidance", 4.5)
    old = page.value("#seed")
    page.click("#dice")
    seed = until(lambda: (now := page.value("#seed")) != old and now)
    page.click(".label-wrap")
    until(lambda: page.all("#fps input"))
    page.set_number("#fps", 6)
    page.click("#beside input")
    page.set_number("#teacher_steps", 3)
    made = page.generate()
    assert f"“The cat on the <car>” at 24 x 40, seed {seed}, 6 fps, guidance 4.5, without “it's 25 cars”" in page.text(
        ".how"
    )
    captions = page.run("return [...document.querySelectorAll('figcaption')].map((c) => c.innerText)")
    assert "few-step, 4 steps, 4 network evaluations" in captions[0]
    assert "ddim, 3 steps, 6 network evaluations" in captions[1]
    for caption in captions:
        assert all(f"{part} " in caption for part in ("text", "UNet", "decode", "write"))
        assert "Download mp4 gif" in caption
    until(lambda: page.run("return [...document.querySelectorAll('video')].every((v) => v.readyState >= 2)"))
    assert {"image.png", "teacher.mp4", "teacher.gif", "student.mp4", "student.gif", "result.json"} == {
        file.name for file in (output / made).iterdir()
    }
    assert page.run("return document.querySelector('.card').dataset.result") == made
    assert "student and teacher" in page.text(".card") and "The cat on the <car>" in page.text(".card")

    settings = ["--sampler=ddim", "--steps=3", "--guidance_scale=4.5", f"--seed={seed}", "--fps=6", "--num_frames=8"]
    prompts = ["--prompt=The cat on the <car>", "--negative_prompt=it's 25 cars"]
    file = tmp_path / "teacher.mp4"
    subprocess.run(
        **command("sample", model[0], *prompts, *settings, "--height=24", "--width=40", f"--output={file}"),
        check=True,
        timeout=300,
    )
    assert_same_video(output / made / "teacher.mp4", file)


def test_an_empty_and_an_overlong_prompt_are_messages(page, output):
    page.open(".card")
    page.click("#generate")
    until(lambda: "A prompt is empty: say what the video is to show." in page.text("#status"))
    until(lambda: "A prompt is empty" in page.text(".toast-wrap"))
    page.set_text("#prompt", "cat " * 600)
    page.click("#generate")
    until(lambda: "A prompt has 2,400 letters, more than 2,000: shorten it." in page.text("#status"))
    page.set_text("#prompt", "the cat")
    page.set_text("#negative", "cars")
    page.click("#generate")
    until(lambda: "The negative prompt has no effect without guidance" in page.text("#status"))
    page.set_text("#negative", "")
    page.set_text("#prompt", "and then " * 60 + "the cat")
    made = page.generate()
    words = "is longer than the 77 tokens of the text encoder, which will not see its end: "
    assert words in page.text("#shown .notice") and "the cat" in page.text("#shown .notice").split(words)[1]
    assert json.loads((output / made / "result.json").read_text())["videos"][0]["sampler"] == "few-step"


def test_cancel_and_progress_by_network_evaluation(page, output):
    before = {folder.name for folder in output.iterdir()}
    page.set_text("#prompt", "the cat")
    page.click("#beside input")
    page.set_number("#steps", 50)
    page.set_number("#teacher_steps", 50)
    page.click("#generate")
    until(lambda: "UNet" in page.text("#status") and "of 50" in page.text("#status"))
    page.click("#cancel")
    until(lambda: page.text("#status") == "Cancelled.")
    assert {folder.name for folder in output.iterdir()} == before


def test_a_phone_needs_no_sideways_scrolling(page):
    page.open(".card", width=360, height=740, mobile=True)
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]


def test_a_page_of_prompts_takes_no_files(page):
    script = "return fetch('gradio_api/upload', {method: 'POST', body: new FormData()}).then((answer) => answer.status)"
    assert page.run(script) == 403
