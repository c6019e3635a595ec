"""Chromium without a window, driven by its DevTools protocol over two pipes: no package is needed for it."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Page", "browser"]

CHROMIUM = "CHROMIUM"
"""Variable with the program; without it, `chromium` of the path."""

TIMEOUT_S = 60.0


class Browser:
    """A running Chromium; messages are JSON with a zero byte behind it, on its descriptors 3 and 4."""

    def __init__(self, profile: str) -> None:
        program = os.environ.get(CHROMIUM) or shutil.which("chromium")
        assert program, f"chromium is missing: apt-get install chromium, or set {CHROMIUM}"
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # A shell moves the pipes to where Chromium looks for them.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
                   "--hide-scrollbars", "--force-color-profile=srgb", f"--user-data-dir={profile}")  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", script, "chromium", program, *options, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers = itertools.count(1)
        self._read = b""
        self.events: list[dict[str, Any]] = []

    def __call__(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Sends a command, and returns its result; events that come meanwhile are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            found = self._message(deadline_s)
            if found.get("id") == number:
                assert "error" not in found, f"{method}: {found['error']}"
                return dict(found["result"])
            if "method" in found:
                self.events.append(found)

    def _message(self, deadline_s: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0 and select.select([self._in], [], [], left_s)[0], "Chromium did not answer"  # noqa: PT018
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(message))

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)


class Page:
    """One tab.

    Attributes:
        url: What it shows.
    """

    def __init__(self, browser: Browser, width: int = 1200, height: int = 800) -> None:
        self._browser = browser
        target = browser("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._do(f"{domain}.enable")
        self.resize(width, height)

    def _do(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser(method, self._session, **parameters)

    def resize(self, width: int, height: int) -> None:
        self._do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url: str, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self._do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._browser.events.clear()
        self._do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def eval(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Waits until an expression is true; fails if it never is."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not self.eval(script):
            assert time.monotonic() < deadline_s, (
                f"never true: {script}; the page says {self.eval('document.body.innerText')}"
            )
            time.sleep(0.05)

    def key(self, name: str, code: int, modifiers: int = 0, text: str = "") -> None:
        """Presses a key; modifiers: 1 Alt, 2 Control, 8 Shift."""
        for kind in ("keyDown", "keyUp"):
            self._do("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code,
                     modifiers=modifiers, **({"text": text} if text and kind == "keyDown" else {}))  # fmt: skip

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self._do("Input.insertText", text=text)

    def faults(self) -> list[str]:
        """What the browser complained about since the page was opened: errors of scripts, what its policy refused."""
        found = []
        for event in self._browser.events:
            values = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(values["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
                found.append(f"{values['entry']['text']} ({values['entry'].get('url')})")
        return found

    def asked(self) -> set[str]:
        """Addresses that it asked since it was opened."""
        events = (event for event in self._browser.events if event["method"] == "Network.requestWillBeSent")
        return {event["params"]["request"]["url"] for event in events}

    def screenshot(self, path: Path) -> None:
        """Saves a picture of the whole page."""
        size = self._do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self._do("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        running = Browser(profile)
        try:
            yield running
        finally:
            running.close()
