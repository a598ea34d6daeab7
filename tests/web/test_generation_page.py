"""The page that makes videos, served by a process of its own, as headless Chromium shows it."""

import http.client
import json
import pathlib
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request

import browser
import numpy as np
import pytest
from PIL import Image
from serving import Page, assert_same_video, command, served, until
from small_pictures import png_without_pixels

pytestmark = pytest.mark.integration
MODEL = ["--weights=miniature", "--lora=miniature/stage2"]
SIZE = ["--num_frames=3", "--size", "32x48"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def url(tmp_path_factory, output):
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with served(*MODEL, *SIZE, "--queue=1", f"--output={output}", "--keep=3", log=log) as address:
        yield address
        uploads = upload(address, b"mine").parents[1]
    assert not uploads.exists(), "uploads are deleted when the program ends"


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


def status_of(url, path):
    """What is answered to a path, exactly as it stands here."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    try:
        connection.request("GET", f"/{path}")
        return connection.getresponse().status
    finally:
        connection.close()


def upload(url, data, name="a.png"):
    """Where the server keeps what is uploaded."""
    form = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{url}/gradio_api/upload", form + data + b"\r\n--x--\r\n", headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return pathlib.Path(json.load(answer)[0])


def ask(url, values):
    """Presses the page's button with values of one's own, without a page; what the server tells at the end."""
    with urllib.request.urlopen(f"{url}/config", timeout=60) as answer:
        config = json.load(answer)
    (button,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == "generate"]
    (number,) = [call["id"] for call in config["dependencies"] if [button, "click"] in call["targets"]]
    body = json.dumps({"data": values, "fn_index": number, "session_hash": "mine"}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).close()
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash=mine", timeout=60) as answer:
        return next(line.decode() for line in answer if b"process_completed" in line)


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
    page.set_number("#teacher_steps", 25)
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
    assert sum("teacher: UNet" in text and "of 25" in text for text in seen) > 2
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


def test_a_video_is_that_of_the_program_with_the_same_settings(page, picture, output, tmp_path):
    """Sampler, steps, seed, frames a second and motion bucket are those that were chosen."""
    page.upload(picture)
    page.choose("#sampler", "consistency")
    until(lambda: page.value("#steps") == "1")
    page.set_number("#steps", 2)
    page.set_text("#seed", 5)
    page.click(".label-wrap")
    until(lambda: page.all("#fps input"))
    page.set_number("#fps", 9.5)
    page.set_number("#motion", 200)
    made = page.generate()
    assert "seed 5, 9.5 fps, motion 200" in page.text(".how") and "consistency, 2 steps" in page.text("figcaption")
    settings = ["--sampler=consistency", "--steps=2", "--seed=5", "--fps=9.5", "--motion_bucket_id=200"]
    size = ["--height=32", "--width=48", "--num_frames=3"]
    file = tmp_path / "student.mp4"
    subprocess.run(
        **command("sample", *MODEL, f"--image={picture}", f"--output={file}", *settings, *size),
        check=True,
        timeout=300,
    )
    assert_same_video(output / made / "student.mp4", file)
    page.choose("#sampler", "tts")


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
    page.upload(png_without_pixels(tmp_path / "wide.png", 10_000, 5_001))
    page.click("#generate")
    until(lambda: "wide.png has more than 50,000,000 pixels: scale it down first." in page.text("#status"))
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
    assert status_of(url, f"results/{result.name}/image.png") == 200
    secret = output / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    uploaded = upload(url, b"mine")
    assert status_of(url, f"gradio_api/file={uploaded}") == 200
    link, folder = uploaded.with_name("link.png"), uploaded.with_name("folder")
    link.symlink_to(secret)
    folder.symlink_to(output)
    tried = ["/etc/passwd", secret, result / "result.json", "http://127.0.0.1/", "../etc/passwd"]
    tried += [link, folder / "secret.png", f"{uploaded}/../../../../etc/passwd", f"{uploaded}\0.png", f"/{uploaded}"]
    paths = [f"gradio_api/{kind}{urllib.parse.quote(str(path))}" for kind in ("file=", "file/") for path in tried]
    paths += [f"gradio_api/file={uploaded.parent}/{end}" for end in ("%2e%2e/%2e%2e/x", "..%2f..%2fx", "..%5c..%5cx")]
    paths += [
        f"results/{path}"
        for path in ("..%2Fsecret.png", "%2e%2e/secret.png", "secret.png", f"{result.name}/result.json")
    ]
    paths += [f"results/{result.name}/%2e%2e%2fsecret.png", "static/..%2f..%2froutes.py", "assets/%2e%2e/index.html"]
    paths += ["results/%2fetc/passwd", "results//etc/passwd", "gradio_api/stream/x", "docs", "openapi.json"]
    paths += ["gradio_api/proxy=http://127.0.0.1/", "gradio_api/runs", "gradio_api/vibe-code", "gradio_api/deep_link"]
    assert {path: code for path in paths if (code := status_of(url, path)) not in (400, 403, 404)} == {}


def test_no_image_of_the_server_is_made_a_video_of(url, output, tmp_path):
    """A request names the image: it is one that was uploaded, or an example."""
    before = {folder.name for folder in output.iterdir()}
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    uploaded = upload(url, b"mine").parent
    for path in (secret, uploaded / ".." / ".." / ".." / secret.relative_to("/"), "http://127.0.0.1:1/a.png"):
        image = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        told = ask(url, ["tts", 1, 0, 7, "32 x 48", False, 25, image, 127])
        assert '"success":false' in told.replace(" ", "")
    assert {folder.name for folder in output.iterdir()} == before
    assert not list(uploaded.parent.rglob("secret.png"))


def test_it_is_open_to_this_machine_alone(url):
    address = urllib.parse.urlsplit(url)
    assert address.hostname == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", address.port), 5)


def test_large_uploads_are_refused(url):
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as raised:
        upload(url, bytes(31_000_000))
    assert getattr(raised.value, "code", 413) == 413
