"""A page of `inr-kernels app` in a headless Chromium."""

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

OPTIONS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
OPTIONS += " --disable-component-update --disable-sync --enable-unsafe-swiftshader --window-size=1400,900"
PATIENCE = 300  # seconds; a busy machine of two cores needs minutes
TOAST = "[data-testid=toast-body]"

# Runs the command, and writes every address of another machine that it asks for into a file.
SERVER = """
import ipaddress, sys
def is_here(host):
    try:
        return host in ("", "localhost", None) or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
def watch(event, values):
    host = {"socket.connect": lambda: values[1], "socket.getaddrinfo": lambda: values}.get(event, lambda: [None])()[0]
    if not isinstance(host, int) and not is_here(host):
        print(event, values, file=open(sys.argv[1], "a"))
sys.addaudithook(watch)
from inr_kernels import cli
cli.main(["app", *sys.argv[2:]])
"""


@contextmanager
def app(log, *words):
    """Runs `inr-kernels app` with these words on a free port; gives its address.

    log: a file for what it asks other machines for; it is not made if there is nothing.
    """
    command = [sys.executable, "-c", SERVER, str(log), "--port", "0", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.match(r"http://\S+", line)
            assert found, line + process.stderr.read()
            yield found[0]
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)


class Page:
    """What a user does on the page. downloads: the browser's folder for them."""

    shown = 0  # pictures, on all pages

    def __init__(self, driver, address, downloads):
        self.driver, self.downloads = driver, downloads
        driver.get(address)
        self.wait(lambda: self.all("#editor canvas"), "the page")

    def wait(self, ready, what):
        """The first true value of `ready()`."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if value := ready():
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{what}: the page shows {self.driver.find_element(By.TAG_NAME, 'body').text!r}")

    def all(self, selector):
        """The elements of a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait_for(self, words, selector="#status"):
        """Waits until an element shows the words; returns its text."""
        return self.wait(
            lambda: next((one.text for one in self.all(selector) if words in one.text), ""), f"{words} in {selector}"
        )

    def load(self, file):
        """Chooses a file."""
        self.all("#load input[type=file]")[0].send_keys(str(file))

    def show(self, file):
        """Chooses a picture, by a name that is new to the page, and waits until it is loaded; returns that file.

        The editor may show it a moment later, see `fill`.
        """
        Page.shown += 1
        copy = Path(shutil.copy(file, file.with_stem(f"{file.stem}{Page.shown}")))
        self.load(copy)
        self.wait_for(copy.name)
        self.wait(lambda: "processing" not in self.all("#status")[0].text, "the end of loading")
        return copy

    def paint(self, *moves):
        """Draws a stroke from the middle of the picture."""
        canvas = self.all("#editor canvas")[0]
        actions = ActionChains(self.driver, duration=50).move_to_element(canvas).click_and_hold()
        for x, y in moves:
            actions.move_by_offset(x, y)
        actions.release().perform()

    def fill(self, *moves):
        """Paints a stroke and presses Fill; again, where the editor showed its new picture only after the stroke."""

        def answer():
            slider = self.all("#slider")[0].text
            is_running = "%" in slider or "queue" in slider
            return self.all(TOAST) or is_running or "command line" in self.all("#status")[0].text

        for _ in range(5):
            self.paint(*moves)
            self.press("run")
            self.wait(answer, "an answer")
            if not self.all(TOAST):
                return
            assert "Paint over" in self.error()
        raise AssertionError("the editor loses its strokes")

    def choose(self, model):
        """Chooses a network by the beginning of its label."""
        self.all("#model input")[0].click()

        def option():
            return next((one for one in self.all("#model [role=option]") if one.text.startswith(model)), None)

        self.wait(option, f"{model} in the list of networks").click()

    def press(self, name):
        """Clicks a button when it is enabled."""
        self.wait(lambda: self.all(f"#{name}:enabled"), f"button {name}")[0].click()

    def download(self, name):
        """The file that a button downloads."""
        before = {*self.downloads.iterdir()}
        self.press(name)

        def complete():
            new = {*self.downloads.iterdir()} - before
            finished = (file.suffix != ".crdownload" and file.name[0] != "." and file.stat().st_size for file in new)
            return new if all(finished) else None

        (file,) = self.wait(complete, f"download of {name}")
        return file

    def error(self):
        """The text of an error message, which is then closed."""
        text = self.wait(lambda: "".join(message.text for message in self.all(TOAST)), "an error message")
        self.all("[data-testid=toast-close]")[0].click()
        self.wait(lambda: not self.all(TOAST), "its end")
        return text

    def requests(self):
        """The addresses that the browser asked for."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]


@contextmanager
def chromium(folder):
    """Starts the browser with a new profile; downloads go into folder/downloads."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program and driver, "the test of the page needs Debian's packages chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in [*OPTIONS.split(), f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(option)
    downloads = folder / "downloads"
    downloads.mkdir()
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser, downloads
    finally:
        browser.quit()
