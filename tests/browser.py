"""Chromium by chromedriver's HTTP interface (W3C WebDriver), which test_report_page.py drives; no package more."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and CHROMEDRIVER else "no chromium with chromedriver (apt-get install chromium-driver)"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that WebDriver gives elements under


class Browser:
    """A headless window: `with Browser(width=1440) as b: b.open(path)`."""

    def __init__(self, width=1440, height=900, dark=False, phone=False):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.driver = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], **quiet)
        self.root = f"http://127.0.0.1:{port}"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options = {"args": [*flags, f"--window-size={width},{height}"], "binary": CHROMIUM}
        if phone:
            options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2}}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            try:
                self.ask("GET", "/status")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        found = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.session = f"/session/{found['sessionId']}"
        if not phone:
            self.cdp(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
        self.media(dark=dark)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.ask("DELETE", self.session)
        finally:
            self.driver.terminate()
            self.driver.wait()

    def ask(self, method, path, body=None):
        data = None if method in ("GET", "DELETE") else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"].splitlines()[0]) from error

    def cdp(self, command, **parameters):
        return self.ask("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def media(self, dark=False, kind=""):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", media=kind, features=[scheme])

    def open(self, path, address=""):
        self.ask("POST", f"{self.session}/url", {"url": f"file://{path}{address}"})

    def run(self, script, *arguments):
        """`return ...` of a script in the page."""
        return self.ask("POST", f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector):
        """Where a user would: at the element's middle, which has to be in view and uncovered."""
        found = self.ask("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self.ask("POST", f"{self.session}/element/{found[ELEMENT]}/click")

    def type(self, selector, text):
        found = self.ask("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self.ask("POST", f"{self.session}/element/{found[ELEMENT]}/value", {"text": text})

    def keys(self, text):
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}
        self.ask("POST", f"{self.session}/actions", body)

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0])?.innerText ?? null", selector)

    def count(self, selector):
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def until(self, script, *arguments, seconds=10):
        """Waits until `return ...` is true."""
        end = time.monotonic() + seconds
        while not self.run(script, *arguments):
            assert time.monotonic() < end, f"not within {seconds} s: {script} {arguments}"
            time.sleep(0.05)

    def errors(self):
        """What the page reported as errors since the last call."""
        log = self.ask("POST", f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]

    def screenshot(self, path, whole=False):
        picture = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        with open(path, "wb") as f:
            f.write(base64.b64decode(picture["data"]))
