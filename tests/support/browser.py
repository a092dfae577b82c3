"""A headless Chromium, spoken to over a pipe in the DevTools protocol; no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "no Chromium: install it with `apt-get install -y chromium` (Debian, Ubuntu), or on a Mac "
    "`brew install --cask google-chrome`, so that one of these is in PATH: " + ", ".join(NAMES)
)
# Chromium reads from 3 and writes to 4; these may be in use here, so a process between sets them.
WIRE = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def find_browser() -> str:
    """The path of a Chromium; AssertionError with the remedy if there is none."""
    found = [path for name in (*NAMES, MAC) if (path := shutil.which(name))]
    assert found, MISSING
    return found[0]


class Browser:
    """One browser with one page.

    Args:
        profile: an empty folder for its files.
    """

    def __init__(self, profile: Path) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        browser, flags = (
            find_browser(),
            ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        flags += ["--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe"]
        flags += ["--disable-background-networking", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", WIRE, str(to_read), str(to_write), browser, *flags],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_read), os.close(to_write)
        self._number, self._rest, self._session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One call of the protocol; what happens meanwhile is kept in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._number:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]
            self.events.append(said)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from, 1 << 20)
            assert more, "the browser has gone"
            self._rest += more
        said, self._rest = self._rest.split(b"\0", 1)
        return json.loads(said)

    def open(self, page: Path, width: int, theme: str, height: int = 900) -> None:
        """Loads a file in a window of a width, as who prefers a light or a dark theme sees it."""
        phone = width < 600
        scale = 2 if phone else 1
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=phone,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        said = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """A PNG of the whole page, or of the window alone."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**{k: size[k] for k in ("x", "y", "width", "height")}, "scale": 1}}

    def requests(self) -> list[str]:
        """What was fetched since the page was opened."""
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """Errors and warnings of the page since it was opened."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(str(params["args"]))
        return found

    def close(self) -> None:
        """Ends the browser."""
        os.close(self._to), os.close(self._from)
        self._process.terminate()
        self._process.wait(10)
