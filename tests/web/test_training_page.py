"""The page of runs, served by a process of its own, as headless Chromium shows it."""

import json
import re
import shutil
import urllib.error
import urllib.request

import browser
import numpy as np
import pytest
import toy_objective_config
from PIL import Image
from serving import Page, served, until
from toy_unet import toy_training

from osv_jax import train

pytestmark = pytest.mark.integration


def write_run(folder, steps, num_steps, scale):
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"objective": "stage2", "num_steps": num_steps}))
    for step in (0, 10):
        picture = np.full((20, 30, 3), 10 * step, np.uint8)
        Image.fromarray(picture).save(folder / "pictures" / f"sample_{step:07d}.png")
    lines = [json.dumps({"step": step, "loss": scale / step, "eval_mse": scale}) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\nbroken line\n{"step": 9, "lo')


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "first", 20, 20, 1.0)
    write_run(folder / "more" / "second <b>", 12, 40, 2.0)
    rows = [{"name": "real", "motion": 1.5}, {"name": "student <i>", "fvd": 312.04, "fvd_low": 300, "fvd_high": 320.0}]
    (folder / "eval").mkdir()
    (folder / "eval" / "table.json").write_text(json.dumps({"rows": rows}))
    (folder / "secret.png").write_bytes(b"secret")
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory, runs):
    with served(f"--runs={runs}", log=tmp_path_factory.mktemp("log") / "log.txt") as address:
        yield address


@pytest.fixture(scope="module")
def page(tmp_path_factory, url):
    opened = browser.open_chromium(tmp_path_factory.mktemp("profile"))
    page = Page(opened, url)
    page.open("#panels svg")
    yield page
    opened.quit()


def contents(folder):
    """Of all files in it, with when they were written."""
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def curves(page, panel):
    script = (
        "return [...document.querySelectorAll(`svg[aria-label='${arguments[0]}'] .curve`)].map((c) => c.textContent)"
    )
    return page.run(script, panel)


def test_curves_of_two_runs_over_one_another_with_tables_and_pictures(page, url):
    until(lambda: sorted(set(curves(page, "loss"))) == ["first", "more/second <b>"])
    assert set(curves(page, "eval_mse")) == {"first", "more/second <b>"}
    overview = page.text("#overview")
    assert "finished" in overview and "20 of 20" in overview and "running" in overview and "12 of 40" in overview
    assert "312.0 (300.0 to 320.0)" in page.text("#tables") and "student <i>" in page.text("#tables")
    until(
        lambda: (
            page.run("return [...document.querySelectorAll('.pictures img')].map((i) => i.naturalWidth)") == [30, 30]
        )
    )
    assert "sample_0000010.png" in page.text("#pictures")
    assert all(name.startswith((url, "data:")) for name in page.resources())
    assert [text for text in page.messages() if "Security Policy" in text] == []


def test_it_follows_a_run_that_trains(page, runs):
    before = page.run("return document.querySelector(\"svg[aria-label='loss'] .curve\").getAttribute('d')")
    with (runs / "more" / "second <b>" / "metrics.jsonl").open("a") as file:
        file.write('ss": 3}\n{"step": 13, "loss": 0.5, "new": 1.0}\n{"step": 14, "lo')
    until(lambda: "13 of 40" in page.text("#overview"))
    until(lambda: curves(page, "new") == ["more/second <b>"])
    assert page.run("return document.querySelector(\"svg[aria-label='loss'] .curve\").getAttribute('d')") != before


def test_runs_are_chosen_and_may_disappear(page, runs):
    page.click("#runs input[type=checkbox]:checked")
    until(lambda: len(set(curves(page, "loss"))) == 1)
    page.click("#runs input[type=checkbox]:not(:checked)")
    until(lambda: len(set(curves(page, "loss"))) == 2)
    shutil.move(runs / "more", runs.parent / f"{runs.name}-moved")
    until(lambda: set(curves(page, "loss")) == {"first"})
    shutil.move(runs.parent / f"{runs.name}-moved", runs / "more")


def test_a_run_is_shown_while_it_really_trains(page, runs, monkeypatch):
    """Its steps, its curves over another run's, and its end; the page is looked at between two steps."""
    config = toy_objective_config.get_config()
    config.num_steps, config.log_every = 8, 1
    global_batches = train.mesh.global_batches

    def watched(local_batches, devices):
        def read():
            for number, batch in enumerate(local_batches, 1):
                if number == 6:
                    until(lambda: "toy" in page.text("#runs"))
                    page.run("[...document.querySelectorAll('#runs label')].find((l) => l.innerText == 'toy').click()")
                    until(lambda: re.search(r"running\s+[1-5] of 8", page.text("#overview")))
                    until(lambda: {"toy", "first"} <= set(curves(page, "loss")))
                yield batch

        return global_batches(read(), devices)

    monkeypatch.setattr(train.mesh, "global_batches", watched)
    with toy_training():
        train.train(config, runs / "toy")
    until(lambda: re.search(r"finished\s+8 of 8", page.text("#overview")))
    shutil.rmtree(runs / "toy")


def test_a_phone_needs_no_sideways_scrolling(page):
    page.open("#panels svg", width=360, height=740, mobile=True)
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]


def test_nothing_is_written_and_only_pictures_are_read(page, url, runs):
    before = contents(runs)
    page.open("#panels svg")
    until(lambda: page.all(".pictures img"))
    assert urllib.request.urlopen(f"{url}/pictures/first/sample_0000000.png").read(4)[1:] == b"PNG"
    tried = {"GET": ["pictures/secret.png", "pictures/first/..%2f..%2fsecret.png", "pictures/first/config.json"]}
    tried["GET"] += [
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={runs}/secret.png",
        f"gradio_api/file={runs}/first",
    ]
    tried["POST"] = ["gradio_api/upload", "gradio_api/component_server", "pictures/first/sample_0000000.png", "login"]
    tried["PUT"] = ["pictures/first/sample_0000000.png"]
    answers = {}
    for method, paths in tried.items():
        for path in paths:
            request = urllib.request.Request(f"{url}/{path}", b"x" if method != "GET" else None, method=method)
            try:
                answers[path] = urllib.request.urlopen(request, timeout=60).status
            except urllib.error.HTTPError as error:
                answers[path] = error.code
    assert set(answers.values()) <= {403, 404, 413}
    assert contents(runs) == before
