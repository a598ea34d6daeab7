"""The page that makes videos, served by a process of its own, as headless Chromium shows it."""

import json
import urllib.error
import urllib.parse
import urllib.request

import browser
import numpy as np
import pytest
from PIL import Image
from serving import Page, served, until

pytestmark = pytest.mark.integration
SIZE = ["--num_frames=3", "--size", "32x48"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def url(tmp_path_factory, output):
    log = tmp_path_factory.mktemp("log") / "log.txt"
    weights = ["--weights=miniature", "--lora=miniature/stage2"]
    with served(*weights, *SIZE, "--queue=1", f"--output={output}", "--keep=3", log=log) as address:
        yield address


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = browser.open_chromium(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(chromium, url):
    page = Page(chromium, url)
    page.open("#generate")
    return page


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "a & b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), np.uint8)).save(file)
    return file


def status_of(url, data=None):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_says_that_it_compiles_and_loads_nothing_from_elsewhere(page, url):
    until(lambda: page.all(".notice"))
    assert page.text("#notice").startswith("Compiling ahead; videos wait until it is done.")
    until(lambda: not page.all(".notice"), 400)
    assert page.resources() and all(name.startswith((url, "data:", "blob:")) for name in page.resources())
    assert [text for text in page.messages() if "Content Security Policy" in text or "ERR_NAME" in text] == []


def test_a_video_of_an_example(page, output):
    until(lambda: page.all("button.gallery-item, .gallery-item"))[0].click()
    until(lambda: page.all("#image img"))
    made = page.generate()
    about = json.loads((output / made / "result.json").read_text())
    assert about["image"] == "frame_1.png" and [video["name"] for video in about["videos"]] == ["student"]
    assert {"image.png", "student.mp4", "student.gif", "result.json"} == {f.name for f in (output / made).iterdir()}
    assert "tts, 1 step, 2 network evaluations" in page.text("figcaption")
    assert all(f"{part} " in page.text(".seconds") for part in ("CLIP", "VAE encode", "UNet", "decode", "write"))


def test_student_and_teacher_of_an_own_picture_in_step(page, picture, url):
    page.upload(picture)
    page.click("#beside input")
    page.set_number("#teacher_steps", 5)
    page.run(
        "window.seen = new Set(); new MutationObserver(() => seen.add(document.querySelector('#status').innerText))"
        ".observe(document.querySelector('#status'), {childList: true, subtree: true, characterData: true})"
    )
    old = page.text("#seed input") or page.run("return document.querySelector('#seed input').value")
    page.click("#dice")
    seed = until(lambda: (now := page.run("return document.querySelector('#seed input').value")) != old and now)
    page.generate()
    page.click("#beside input")
    seen = page.run("return [...seen]")
    assert sum("teacher: UNet" in text and "of 5" in text for text in seen) > 2
    assert f"seed {seed}," in page.text(".how") and picture.name in page.text(".how")
    until(lambda: page.run("return [...document.querySelectorAll('video')].every((v) => v.readyState >= 2)"))
    assert len(page.all("video")) == 2
    # One is thrown out of step, and comes back.
    page.run("document.querySelectorAll('video')[1].currentTime = 0.2; document.querySelector('.play').click()")
    apart = "const [a, b] = document.querySelectorAll('video'); return Math.abs(a.currentTime - b.currentTime)"
    until(lambda: page.run(apart) < 0.1)
    links = page.run("return [...document.querySelectorAll('figcaption a')].map((a) => a.href)")
    assert [link.rsplit(".")[-1] for link in links] == ["mp4", "gif"] * 2
    for link in links:
        with urllib.request.urlopen(link) as answer:
            begin = answer.read(12)
        assert begin[4:8] == b"ftyp" or begin[:6] == b"GIF89a"


def test_the_gallery_shows_what_was_made_before(page, output):
    latest = page.shown()
    cards = page.run("return [...document.querySelectorAll('.card')].map((card) => card.dataset.result)")
    assert cards == sorted((folder.name for folder in output.iterdir()), reverse=True) and cards[0] == latest
    page.click(f".card[data-result='{cards[-1]}']")
    until(lambda: page.shown() == cards[-1])
    # Another who opens the page, or a server started anew, reads the same folder.
    page.open(".card")
    assert page.run("return document.querySelectorAll('.card').length") == len(cards)


def start_long(page, picture):
    """Begins what takes long: fifty steps beside the teacher's."""
    page.open("#generate")
    page.upload(picture)
    page.click("#beside input")
    page.set_number("#steps", 50)
    page.click("#generate")


def test_cancel(page, picture, output):
    before = {folder.name for folder in output.iterdir()}
    start_long(page, picture)
    until(lambda: "UNet" in page.text("#status"))
    page.click("#cancel")
    until(lambda: page.text("#status") == "Cancelled.")
    assert {folder.name for folder in output.iterdir()} == before
    page.open("#generate")
    page.upload(picture)
    page.generate()


def test_a_bad_image_is_a_message(page, tmp_path):
    page.open("#generate")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.upload(tmp_path / "bad.png")
    page.click("#generate")
    until(lambda: "bad.png cannot be read as an image" in page.text("#status"))
    assert str(tmp_path) not in page.text("body") and "/tmp" not in page.text("#status")
    until(lambda: "bad.png cannot be read as an image" in page.text(".toast-wrap"))
    page.click("#image [aria-label='Remove Image']")
    page.click("#generate")
    until(lambda: "There is no image" in page.text("#status"))


def test_two_people_queue_and_who_leaves_is_cancelled(page, url, picture, tmp_path):
    other, third = (Page(browser.open_chromium(tmp_path / name), url) for name in ("second", "third"))
    try:
        start_long(page, picture)
        until(lambda: "UNet" in page.text("#status"))
        for person in (other, third):
            person.open("#generate")
            person.upload(picture)
        other.click("#generate")
        until(lambda: other.text("#status") == "Waiting: 1 before you")
        third.click("#generate")
        until(lambda: "The queue is full: 1 is waiting already" in third.text("#status"))
        page.browser.get("about:blank")  # Nobody pressed Cancel.
        until(other.shown)
    finally:
        other.browser.quit()
        third.browser.quit()


def test_a_phone_needs_no_sideways_scrolling(page, picture):
    page.open("#generate", width=360, height=740, mobile=True)
    page.upload(picture)
    page.generate()
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]


def test_no_path_of_the_server_is_readable(url, output):
    result = sorted(output.iterdir())[-1]
    assert status_of(f"{url}/results/{result.name}/image.png") == 200
    (output / "secret.txt").write_text("secret")
    tried = [
        "/etc/passwd",
        str(output / "secret.txt"),
        str(result / "result.json"),
        "http://127.0.0.1/",
        "../etc/passwd",
    ]
    paths = [f"gradio_api/{kind}{urllib.parse.quote(path)}" for kind in ("file=", "file/") for path in tried]
    paths += [
        f"results/{path}"
        for path in ("..%2Fsecret.txt", "%2e%2e/secret.txt", "secret.txt", f"{result.name}/result.json")
    ]
    paths += [f"results/{result.name}/%2e%2e%2fsecret.txt", "static/..%2f..%2froutes.py", "assets/%2e%2e/index.html"]
    paths += ["gradio_api/proxy=http://127.0.0.1/", "gradio_api/runs", "gradio_api/vibe-code", "gradio_api/deep_link"]
    assert {path: code for path in paths if (code := status_of(f"{url}/{path}")) not in (403, 404)} == {}


def test_large_uploads_are_refused(url):
    boundary = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    data = boundary + bytes(31_000_000) + b"\r\n--x--\r\n"
    request = urllib.request.Request(
        f"{url}/gradio_api/upload", data, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as raised:
        urllib.request.urlopen(request, timeout=20)
    assert getattr(raised.value, "code", 413) == 413
