"""The page of results: what is written, and what headless Chromium makes of it."""

import fnmatch
import json
import math
import pathlib
import re
import time
import tomllib

import browser
import numpy as np
import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from osv_jax.evaluation import page
from osv_jax.runtime.media import write_video

ROOT = pathlib.Path(__file__).parents[2]
REAL, TEACHER, STUDENT = "real", "teacher </script><b>&amp;\"'\\ \u2028", "Schüler 学生, 1 step " + 5 * "and so on "
BROKEN, LAST = "broken", "7"
COLUMNS = [
    page.Column("steps", "Steps", "", None, 0),
    page.Column("fvd", "FVD", "", "low", 1),
    page.Column("psnr", "PSNR", "dB", "high", 2),
    page.Column("solver", "<i>Solver", "", None, 0),
    page.Column("seconds", "Time", "s a clip", "low", 2),
]
ROWS = [
    {"name": REAL, "fvd": 0.0},
    {"name": TEACHER, "steps": 25, "fvd": 300.04, "fvd_low": 250.0, "fvd_high": 350.0, "psnr": 20.0, "solver": "Euler"},
    {"name": STUDENT, "steps": 1, "fvd": -1.5, "fvd_low": -50, "fvd_high": 47, "psnr": 30.5, "seconds": 2},
    {"name": BROKEN, "steps": 10, "fvd": None, "psnr": math.nan, "solver": "TTS", "seconds": 2.001},
    {"name": LAST, "steps": 2, "fvd": 300.0, "psnr": -3.0},
]
FPS, FRAMES = 10, 20
SECONDS = FRAMES / FPS


def shade(name, frame):
    """Of all pixels of a frame, 0 to 255: each method has its own, and every frame is lighter than the last."""
    return 8 * frame + {REAL: 0, TEACHER: 20, STUDENT: 90, LAST: 60}[name]


def write_film(file, name, frames):
    file.parent.mkdir(parents=True, exist_ok=True)
    shades = np.array([shade(name, frame) for frame in range(frames)], np.uint8)
    write_video(file, np.tile(shades[:, None, None, None], (1, 48, 64, 3)), FPS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a page and the films that it names; one is damaged, one missing, and one method has one clip."""
    folder = tmp_path_factory.mktemp("a b#1 ü?%20")
    films = {}
    for number, name in enumerate([REAL, TEACHER, STUDENT, LAST]):
        files = [f"films/{number} #? %20 ü/{clip}.mp4" for clip in range(1 if name == LAST else 2)]
        films[name] = files
        for file in files:
            write_film(folder / file, name, FRAMES)
    films[BROKEN] = ["films/damaged.mp4", "films/missing.mp4"]
    (folder / "films/damaged.mp4").write_bytes(b"no film")
    about = [("What", "<b>bold</b>"), ("Device", "2 cores")]
    page.write_page(folder, "A <title>", about, COLUMNS, ROWS, films)
    return folder


# ---- What is written


def test_the_data_is_in_the_page_as_it_was_given(written):
    text = (written / "index.html").read_text("utf-8")
    (embedded,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    data = json.loads(embedded)
    assert data["title"] == "A <title>" and data["about"] == [["What", "<b>bold</b>"], ["Device", "2 cores"]]
    assert [page.Column(**column) for column in data["columns"]] == COLUMNS
    assert data["rows"] == [*ROWS[:3], {**ROWS[3], "psnr": None}, ROWS[4]]
    assert [name for name, _ in data["films"]] == [REAL, TEACHER, STUDENT, LAST, BROKEN]
    assert dict(data["films"])[BROKEN] == ["films/damaged.mp4", "films/missing.mp4"]
    assert "<" not in embedded and text.isascii()
    assert text.count("</script>") == 2
    assert {file.name for file in written.iterdir()} == {"index.html", "films"}


def test_the_page_asks_nobody_else_for_anything(written):
    text = (written / "index.html").read_text("utf-8")
    assert re.findall(r"https?:|//\w+\.|@import|url\(|fetch\(|import\(", text) == []
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]


def test_the_template_is_installed_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["osv_jax"]
    template = pathlib.Path(page.__file__).with_suffix(".html").relative_to(ROOT / "osv_jax").as_posix()
    assert any(fnmatch.fnmatch(template, pattern) for pattern in patterns)


# ---- What a browser shows


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = browser.open_chromium(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.quit()


@pytest.fixture
def shown(chromium, written):
    yield browser.Shown(chromium, written)
    # All but the films that are not there.
    messages = [entry["message"] for entry in chromium.get_log("browser")]
    assert [message for message in messages if "missing.mp4" not in message] == []


def test_texts_are_shown_as_they_are(shown):
    shown.open()
    assert shown.browser.title == "A <title>" and shown.one("h1").text == "A <title>"
    assert shown.texts("dd") == ["<b>bold</b>", "2 cores"]
    assert shown.run("return document.querySelectorAll('body b:not(.key b), body i').length") == 0
    assert shown.run("return [...document.querySelectorAll('tbody th')].map((th) => th.textContent)") == [
        row["name"] for row in ROWS
    ]


def test_numbers_intervals_and_the_best(shown):
    shown.open()
    numbers = shown.texts("tbody .number")
    assert [numbers[start : start + 5] for start in range(0, 25, 5)] == [
        ["–", "0.0", "–", "–", "–"],
        ["25", "300.0", "20.00", "Euler", "–"],
        ["1", "−1.5", "30.50", "–", "2.00"],
        ["10", "–", "–", "TTS", "2.00"],
        ["2", "300.0", "−3.00", "–", "–"],
    ]
    # Numbers that are printed alike are equally good; the real clips compete with nobody.
    assert shown.texts(".best .number") == ["−1.5", "30.50", "2.00", "2.00"]
    assert shown.texts(".interval") == ["250.0 to 350.0", "−50.0 to 47.0"]
    places = shown.run("return [...document.querySelectorAll('.bar span')].map((s) => parseFloat(s.style.left))")
    np.testing.assert_allclose(places, [75, 100 * 350.04 / 400, 0, 100 * 48.5 / 400], atol=0.01)


def test_a_click_sorts_and_what_is_missing_comes_last(shown):
    shown.open()

    def order():
        return shown.run("return [...document.querySelectorAll('tbody th')].map((th) => th.textContent)")

    headers = shown.all(".sort")
    headers[2].click()
    assert order() == [STUDENT, REAL, LAST, TEACHER, BROKEN]
    headers[2].send_keys(Keys.ENTER)
    assert order() == [TEACHER, LAST, REAL, STUDENT, BROKEN]
    headers[3].send_keys(Keys.SPACE)  # High is good, and comes first.
    assert order() == [STUDENT, TEACHER, LAST, REAL, BROKEN]
    sorts = "return [...document.querySelectorAll('thead th')].map((th) => th.getAttribute('aria-sort'))"
    assert shown.run(sorts) == [None, None, None, "descending", None, None]
    headers[4].click()
    assert order()[:2] == [TEACHER, BROKEN]
    headers[0].click()
    assert order()[0] == LAST


def test_films_play_in_step(shown):
    shown.open(playing=True)
    assert shown.videos("v.videoWidth") == [64] * 4
    assert shown.videos("v.muted && v.playsInline") == [True] * 4
    shown.until(lambda: not any(shown.videos("v.paused || v.readyState < 2")))
    shown.until(lambda: shown.spread() < 0.15)
    # One is thrown out of step, and is back before all begin again; slow films leave time for that.
    Select(shown.one(".speed")).select_by_value("0.25")
    shown.scrub(0.1)
    shown.until(lambda: 0.1 * SECONDS <= min(before := shown.videos("v.currentTime")) <= max(before) < 0.3 * SECONDS)
    throw = "const [first, thrown] = document.querySelectorAll('video'); thrown.currentTime += 0.9;"
    first, thrown = shown.run(f"{throw} return [first.currentTime, thrown.currentTime]")
    assert thrown > first + 0.7
    shown.until(lambda: shown.spread() < 0.15)
    assert first < min(shown.videos("v.currentTime"))


def test_films_begin_again_together(shown):
    shown.open(playing=True)
    Select(shown.one(".speed")).select_by_value("2")
    shown.scrub(0.9)
    shown.until(lambda: max(shown.videos("v.currentTime")) > 0.85 * SECONDS)
    # Three tenths less or more than the chosen speed is what a film makes up for.
    assert min(shown.videos("v.playbackRate")) > 1.35
    shown.until(lambda: 0.05 < max(shown.videos("v.currentTime")) < 0.7 * SECONDS)
    shown.until(lambda: shown.spread() < 0.15)


def test_a_shorter_film_waits_for_the_longest_at_its_end(chromium, tmp_path):
    for name, frames in {REAL: 6, LAST: FRAMES}.items():
        write_film(tmp_path / f"{name}.mp4", name, frames)
    page.write_page(tmp_path, "Two lengths", [], [], [], {name: [f"{name}.mp4"] for name in (REAL, LAST)})
    shown = browser.Shown(chromium, tmp_path)
    shown.open(playing=True)
    shown.until(lambda: shown.videos("v.ended") == [True, False])
    shown.until(lambda: shown.videos("v.currentTime")[1] < 0.2 * SECONDS)
    shown.until(lambda: shown.videos("v.ended") == [False, False])


def test_the_bar_moves_all_films(shown):
    shown.open()
    for fraction in (0.725, 0.275):
        shown.scrub(fraction)
        frame = int(fraction * FRAMES)
        for name, video in zip((REAL, TEACHER, STUDENT, LAST), shown.all("video"), strict=True):
            shown.until_near(lambda video=video: np.median(browser.picture(video)), shade(name, frame))
    assert shown.one(".time").text == f"{0.275 * SECONDS:.1f} / {SECONDS:.1f} s"


def test_what_asks_for_less_motion_stands_still(shown):
    shown.open()
    time.sleep(0.3)
    assert shown.videos("v.paused && v.currentTime") == [0] * 4
    shown.one(".play").click()
    shown.until(lambda: min(shown.videos("v.currentTime")) > 0.1)


def test_clips_and_keys(shown):
    shown.open()
    body = shown.one("body")
    assert shown.run("return [...document.querySelectorAll('video')].every((v) => v.src.endsWith('/0.mp4'))")
    assert not shown.one(".previous").is_enabled()
    body.send_keys(Keys.ARROW_RIGHT)
    shown.until_ready()
    assert shown.one(".clip").get_attribute("value") == "1" and not shown.one(".next").is_enabled()
    assert shown.run("return [...document.querySelectorAll('video')].every((v) => v.src.endsWith('/1.mp4'))")
    assert len(shown.all("video")) == 3
    assert "There is no film of this clip." in shown.texts(".broken")
    body.send_keys(Keys.ARROW_LEFT)
    Select(shown.one(".clip")).select_by_value("1")
    shown.one(".previous").click()
    shown.until_ready()
    assert shown.one(".clip").get_attribute("value") == "0"
    body.send_keys(Keys.SPACE)
    shown.until(lambda: not any(shown.videos("v.paused")))
    body.send_keys(Keys.SPACE)
    shown.until(lambda: all(shown.videos("v.paused")))
    # A bar has arrow keys of its own.
    shown.one(".scrub").send_keys(Keys.ARROW_RIGHT)
    assert shown.one(".clip").get_attribute("value") == "0"


def test_films_that_cannot_be_played_say_so(shown):
    shown.open()
    shown.until(lambda: shown.texts(".broken") == ["This film is missing or cannot be played: films/damaged.mp4"])
    shown.one(".next").click()
    shown.until(lambda: "This film is missing or cannot be played: films/missing.mp4" in shown.texts(".broken"))


def test_methods_are_chosen(shown):
    shown.open()
    shown.scrub(0.6)
    boxes = shown.all(".methods input")
    boxes[0].click()
    assert len(shown.all("video")) == 3
    captions = shown.texts("figcaption")
    assert "FVD −1.5" in captions[1] and "PSNR 30.50" in captions[1]
    assert captions[2].startswith(LAST) and captions[3] == f"{BROKEN}\nTime 2.00"
    boxes[0].click()
    assert len(shown.all("video")) == 4
    # A film that comes later comes to where the others are, at rest and when they play.
    shown.until(lambda: np.allclose(shown.videos("v.currentTime"), 0.6 * SECONDS, atol=0.01))
    boxes[0].click()
    Select(shown.one(".speed")).select_by_value("0.25")
    shown.one(".play").click()
    boxes[0].click()
    shown.until(lambda: len(shown.all("video")) == 4 and shown.spread() < 0.15)
    assert min(shown.videos("v.currentTime")) > 0.5 * SECONDS


def test_two_methods_under_a_slider(shown):
    shown.open()
    shown.choose("two")
    assert len(shown.all("video")) == 1  # The other is damaged.
    Select(shown.one(".left")).select_by_value(REAL)
    Select(shown.one(".right")).select_by_value(STUDENT)
    shown.until_ready()
    assert len(shown.all("video")) == 2
    shown.scrub(0.225)
    left, right = shade(REAL, 4), shade(STUDENT, 4)

    def until_seen(shades):
        """Of the stage, by fractions of its width."""

        def seen():
            picture = browser.picture(shown.one(".stage"))
            return picture[5, [int(fraction * picture.shape[1]) for fraction in shades]]

        shown.until_near(seen, list(shades.values()))

    def cut():
        clip = "return getComputedStyle(document.querySelectorAll('.stage > .film')[1]).clipPath"
        return shown.run(clip)

    middle = cut()
    until_seen({0.4: left, 0.6: right})
    shown.one(".split input").send_keys(Keys.HOME)
    start = cut()
    until_seen({0.1: right})
    shown.one(".split input").send_keys(Keys.ARROW_RIGHT)
    assert len({middle, start, cut()}) == 3
    stage = shown.one(".stage")
    actions = ActionChains(shown.browser, duration=50)
    actions.move_to_element(stage).click_and_hold().move_by_offset(stage.size["width"] // 4, 10).release().perform()
    until_seen({0.7: left, 0.8: right})
    assert float(shown.one(".split input").get_attribute("value")) == pytest.approx(75, abs=0.6)
    # Not after it was let go of.
    ActionChains(shown.browser, duration=50).move_to_element(stage).perform()
    assert float(shown.one(".split input").get_attribute("value")) == pytest.approx(75, abs=0.6)


def test_a_phone_scrolls_the_table_and_not_the_page(shown):
    shown.open(360, 740, mobile=True)
    width = "return [document.documentElement.scrollWidth, innerWidth]"
    assert shown.run(width) == [360, 360]
    scroll, client = shown.run("const b = document.querySelector('.scroll'); return [b.scrollWidth, b.clientWidth]")
    assert scroll > client
    lefts = {round(figure.rect["x"]) for figure in shown.all("figure")}
    assert len(lefts) == 2
    shown.choose("two")
    assert shown.run(width) == [360, 360]


def test_light_and_dark(shown):
    shades = {}
    for scheme in ("light", "dark"):
        shown.open(scheme=scheme)
        colours = shown.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        shades[scheme] = [sum(map(int, re.findall(r"\d+", colour))) for colour in colours]
    assert shades["light"][0] > 700 and shades["light"][1] < 150
    assert shades["dark"][0] < 150 and shades["dark"][1] > 600


def test_nothing_to_show_is_not_shown(chromium, tmp_path):
    page.write_page(tmp_path, "Empty", [], COLUMNS, [], {"none": []})
    chromium.get((tmp_path / "index.html").as_uri())
    assert chromium.find_element(By.TAG_NAME, "main").text == "Empty"
