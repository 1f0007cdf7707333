"""A headless Chromium, driven through its DevTools protocol: what a person does on a page, and what the page shows."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from rlhf_dist.errors import ActorTimeout, RunError

NAMES = ("chromium", "chromium-browser", "google-chrome")
LIMIT_S = 30.0
KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
SHIFT = 8


def program() -> str:
    """Where Chromium is; empty where there is none (Debian: apt-get install chromium)."""
    return next((found for name in NAMES if (found := shutil.which(name))), "")


class Tab:
    """One page."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.complaints: list[str] = []
        """What the page's console got: exceptions, and what its Content-Security-Policy stopped."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol. Raises RunError where Chromium rejects it, ActorTimeout."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        end = time.monotonic() + LIMIT_S
        while True:
            try:
                message = json.loads(self._socket.recv(timeout=max(0.01, end - time.monotonic())))
            except TimeoutError:
                raise ActorTimeout(f"Chromium did not answer {method} in {LIMIT_S:g} s") from None
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == self._number:
                if "error" in message:
                    raise RunError(f"Chromium rejects {method}: {message['error']}")
                return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, awaited. Raises RunError where it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RunError(f"{expression} threw: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until JavaScript is true. Raises ActorTimeout."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            with suppress(RunError):  # the page is being replaced by another one
                if self.evaluate(f"Boolean({condition})"):
                    return
            time.sleep(0.02)
        raise ActorTimeout(f"the page did not come to `{condition}` in {LIMIT_S:g} s; it shows {self.text()[:300]!r}")

    def go(self, address: str) -> None:
        """Open a page, anew even where only what is behind # differs."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    def text(self) -> str:
        """What the page shows."""
        return self.evaluate("document.body ? document.body.innerText : ''")

    def press(self, key: str, modifiers: int = 0) -> None:
        """One key, as a person presses it."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {}
        common = {"key": key, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common, **code)

    def drag(self, start: str, end: str) -> None:
        """From the middle of one element to a little below the middle of another (CSS selectors)."""
        box = "const box = document.querySelector(selector).getBoundingClientRect();"
        place = f"(selector => {{{box} return [box.x + box.width / 2, box.y + box.height / 2]}})"
        (x, y), (to_x, to_y) = (self.evaluate(f"{place}({json.dumps(selector)})") for selector in (start, end))
        mouse = {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
        for part in (0.5, 1.0):
            self.call(
                "Input.dispatchMouseEvent",
                type="mouseMoved",
                x=x + part * (to_x - x),
                y=y + part * (to_y + 5 - y),
                **mouse,
            )
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=to_x, y=to_y + 5, **mouse)

    def look(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """The size of the window, and what the reader's system prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Save what the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def chromium() -> Iterator[Tab]:
    """A browser with an empty profile; it ends with all its processes. Raises ActorTimeout, RunError."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        options = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--no-proxy-server"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-background-networking"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root otherwise
        process = subprocess.Popen(
            [program(), *options, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with connect(_page(Path(folder), process), max_size=None, proxy=None) as socket:
                yield Tab(socket)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(LIMIT_S)


def _page(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """The address of the first page, once Chromium answers."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RunError(f"Chromium ended at its start with exit code {process.returncode}")
        try:
            port = (folder / "DevToolsActivePort").read_text(encoding="utf-8").split()[0]
            pages = httpx.get(f"http://127.0.0.1:{port}/json", timeout=5, trust_env=False).json()
            return next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        except (OSError, IndexError, StopIteration, httpx.HTTPError):
            time.sleep(0.05)
    raise ActorTimeout(f"Chromium did not start in {LIMIT_S:g} s")
