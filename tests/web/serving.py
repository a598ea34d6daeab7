"""A server process, and its page in headless Chromium."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import av
import jax
import numpy as np
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By

ROOT = pathlib.Path(__file__).parents[2]


def command(program, *arguments):
    """What `subprocess` is given to run one of the programs on the CPU."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "PYTHONUNBUFFERED": "1",
    }
    return {
        "args": [sys.executable, "-m", f"osv_jax.{program}", *map(str, arguments)],
        "cwd": ROOT,
        "env": environment,
    }


@contextlib.contextmanager
def served(*arguments, log):
    """Runs `osv_jax.serve` and gives its address; ends it in good order."""
    with log.open("w") as file:
        started = command("serve", "--port=0", *arguments)
        process = subprocess.Popen(**started, stdout=file, stderr=subprocess.STDOUT)
    try:
        until(lambda: "The page is at" in log.read_text() or process.poll() is not None, 300)
        assert process.poll() is None, log.read_text()
        yield re.search(r"http://\S+", log.read_text())[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert process.returncode == 128 + signal.SIGTERM, log.read_text()
        assert "Traceback" not in log.read_text()


def until(holds, seconds=120.0):
    """What a condition gives when it first holds."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StaleElementReferenceException):
            if found := holds():
                return found
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def assert_same_video(actual, expected):
    """Of two processes, whose programs round as they were compiled: next to nothing apart, as both are shown."""
    frames = []
    for file in (actual, expected):
        with av.open(str(file)) as opened:
            rate = opened.streams.video[0].average_rate
            frames.append((rate, np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])))
    (rate, made), (wanted_rate, wanted) = frames
    assert rate == wanted_rate and made.shape == wanted.shape
    difference = np.abs(made.astype(np.float64) - wanted)
    assert difference.mean() < 0.1 * wanted.std() and wanted.std() > 2


class Page:
    """One person's browser."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url

    def open(self, ready, width=1100, height=1000, mobile=False):
        """Shows the page, and waits for an element."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.get(self.url)
        until(lambda: self.all(ready))

    def run(self, script, *given):
        return self.browser.execute_script(script, *given)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def click(self, selector):
        self.run("document.querySelector(arguments[0]).click()", selector)

    def set_number(self, selector, value):
        """Of a slider."""
        self.run(
            "const field = document.querySelector(arguments[0] + ' input[type=number]'); field.value = arguments[1];"
            "for (const name of ['input', 'change']) field.dispatchEvent(new Event(name, {bubbles: true}));",
            *(selector, value),
        )

    def set_text(self, selector, text):
        """Of a text box."""
        self.run(
            "const field = document.querySelector(arguments[0] + ' textarea, ' + arguments[0] + ' input');"
            "field.value = arguments[1]; field.dispatchEvent(new Event('input', {bubbles: true}));",
            *(selector, text),
        )

    def choose(self, selector, option):
        """Of a menu."""
        until(lambda: self.all(f"{selector} input"))[0].click()
        until(lambda: [found for found in self.all("[role=option]") if found.text.strip().endswith(option)])[0].click()
        until(lambda: self.value(selector) == option)

    def value(self, selector):
        """Of what a control has in its field."""
        return self.run("return document.querySelector(arguments[0] + ' input').value", selector)

    def text(self, selector):
        """What is seen of an element; "" if there is none."""
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def upload(self, file):
        """Gives a file to the page, and waits until it is shown, if it can be."""
        with contextlib.suppress(IndexError):
            self.all("#image [aria-label='Remove Image']")[0].click()
        until(lambda: self.all("#image input[type=file]"))[0].send_keys(str(file))
        until(lambda: self.all("#image img"))

    def shown(self):
        """The result in the player, by its identifier."""
        return self.run("return document.querySelector('.player')?.dataset.result")

    def generate(self, *, seconds=120.0):
        """Asks for a video, and waits for it."""
        before = self.shown()
        self.click("#generate")
        return until(lambda: (now := self.shown()) != before and now, seconds)

    def resources(self):
        """What the browser has asked for."""
        return self.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")

    def messages(self):
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
