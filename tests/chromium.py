"""A page in headless Chromium, over the DevTools protocol: what it asks for, what it complains of, how wide it is."""

import asyncio
import base64
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]
START_S = 60.0


@dataclass
class Visit:
    """What became of one page."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console, exceptions, and loads that failed."""
    scroll_width: int = 0
    wider: list[str] = field(default_factory=list)
    """Elements that reach beyond the right edge and are not within something that scrolls by itself."""
    picture: bytes = b""


def visit(page: Path, width: int, *, dark: bool = False, scale: float = 1.0) -> Visit:
    """Opens a file in a window of `width` CSS pixels."""
    assert PROGRAM is not None
    # Its helper processes may still write there for a moment after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        process = subprocess.Popen(
            [PROGRAM, *FLAGS, f"--user-data-dir={home}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "DevTools listening on" in line:
                    return asyncio.run(_visit(line.split()[-1], page, width, dark, scale))
            raise RuntimeError("Chromium ended before it listened")
        finally:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


async def _visit(browser: str, page: Path, width: int, dark: bool, scale: float) -> Visit:
    host = browser.split("/")[2]
    found = Visit()
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://{host}/json/new?about:blank") as answer:
            target = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(target, max_msg_size=0) as socket:
            number = 0
            loaded = False

            async def call(method: str, **parameters: Any) -> dict[str, Any]:
                nonlocal number
                number += 1
                mine = number
                await socket.send_json({"id": mine, "method": method, "params": parameters})
                while True:
                    message = await socket.receive_json(timeout=START_S)
                    if message.get("id") == mine:
                        assert "error" not in message, message
                        return dict(message["result"])
                    note(message)

            def note(message: dict[str, Any]) -> None:
                nonlocal loaded
                kind, details = message.get("method"), message.get("params", {})
                if kind == "Network.requestWillBeSent":
                    found.requests.append(details["request"]["url"])
                elif kind == "Network.loadingFailed":
                    found.complaints.append(details["errorText"])
                elif kind == "Runtime.exceptionThrown":
                    found.complaints.append(str(details["exceptionDetails"]))
                elif kind == "Runtime.consoleAPICalled":
                    found.complaints.append(str(details["args"]))
                elif kind == "Log.entryAdded":
                    found.complaints.append(details["entry"]["text"])
                elif kind == "Page.loadEventFired":
                    loaded = True

            for domain in ("Page", "Network", "Runtime", "Log"):
                await call(f"{domain}.enable")
            size = {"width": width, "height": 844, "deviceScaleFactor": scale, "mobile": width < 600}
            await call("Emulation.setDeviceMetricsOverride", **size)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await call("Emulation.setEmulatedMedia", features=[scheme])
            loaded = False
            await call("Page.navigate", url=page.absolute().as_uri())
            while not loaded:
                note(await socket.receive_json(timeout=START_S))
            found.scroll_width = await _value(call, "document.documentElement.scrollWidth")
            found.wider = await _value(call, _WIDER)
            shot = await call("Page.captureScreenshot", captureBeyondViewport=True)
            found.picture = base64.b64decode(shot["data"])
    return found


_WIDER = """[...document.querySelectorAll('body *')].filter(e => {
  if (e.getBoundingClientRect().right <= document.documentElement.clientWidth + 0.5) return false;
  for (let p = e; p; p = p.parentElement) if (getComputedStyle(p).overflowX == 'auto') return false;
  return true;
}).map(e => e.outerHTML.slice(0, 100))"""


async def _value(call: Any, expression: str) -> Any:
    return (await call("Runtime.evaluate", expression=expression, returnByValue=True))["result"]["value"]
