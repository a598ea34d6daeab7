"""The page of results in headless Chromium."""

import io
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By


def open_chromium(profile):
    """Debian's browser, with a new profile in a folder; without a browser the test is skipped."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("there is no Chromium; run `apt-get install chromium chromium-driver` to test the page in it")
    os.environ["SE_OFFLINE"] = os.environ["SE_AVOID_STATS"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
        # Nor does it find anybody to talk to, but a server of the tests.
        *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}"),
    ):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(executable_path=driver))


def picture(element):
    """How light its pixels are, as the browser has painted them: 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("L"), np.float64)


class Shown:
    """The page in the browser."""

    def __init__(self, browser, written):
        self.browser, self.url = browser, (written / "index.html").as_uri()

    def open(self, width=900, height=1400, mobile=False, scheme="light", playing=False):
        """Without `playing` as for those who have asked for less motion, which leaves tests more of the processor."""
        motion = "no-preference" if playing else "reduce"
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.browser.get(self.url)
        self.until_ready()

    def run(self, script, *given):
        return self.browser.execute_script(script, *given)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        """Of all elements, as they are seen."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText.trim())", selector)

    def videos(self, what, *given):
        """An expression of every video `v`."""
        return self.run(f"return [...document.querySelectorAll('video')].map((v) => {what})", *given)

    def until(self, holds, seconds=60.0):
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.03)

    def until_near(self, seen, shades, atol=3.5):
        """What is seen has these shades; a frame that has arrived may be painted later."""
        try:
            self.until(lambda: np.allclose(seen(), shades, atol=atol, rtol=0))
        except AssertionError:
            np.testing.assert_allclose(seen(), shades, atol=atol, rtol=0)

    def until_ready(self):
        self.until(lambda: (ready := self.videos("v.readyState >= 2 && !v.seeking")) and all(ready))

    def scrub(self, fraction):
        """Moves the bar; of films that stand still, until all have arrived."""
        events = "bar.dispatchEvent(new Event('input')); bar.dispatchEvent(new Event('change'));"
        self.run(f"const bar = document.querySelector('.scrub'); bar.value = arguments[0]; {events}", fraction)
        if self.texts(".play") == ["Play"]:
            arrived = "Math.abs(v.currentTime - arguments[0] * v.duration) < 0.01"
            self.until(lambda: all(self.videos(arrived, fraction)))
            self.until_ready()

    def spread(self):
        """Between the first and the last film [s], the middle one of five moments."""
        spreads = []
        for _ in range(5):
            times = self.videos("v.currentTime")
            spreads.append(max(times) - min(times))
            time.sleep(0.05)
        return sorted(spreads)[2]

    def choose(self, view):
        self.run(f"document.querySelector('[value={view}]').click()")
        self.until_ready()
