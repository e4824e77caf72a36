"""A page in a real browser: headless Chromium, driven by a script appended to a copy of the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """Path of a browser, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def run(page: Path, script: str, folder: Path, width: int = 1100, dark: bool = False) -> tuple[object, list[str]]:
    """Open `page` with `script` behind its own, whose `return` value is handed back as JSON.

    Args:
        page: the file.
        script: a function's body.
        folder: for a copy and the browser's profile.
        width: of the window, pixels; the browser makes none narrower than 500.
        dark: what `prefers-color-scheme` says.

    Returns:
        That value, and what the page wrote to the console (errors included).
    """
    probe = "<pre id='probe'></pre><script>document.getElementById('probe').textContent = JSON.stringify("
    probe += f"(() => {{ {script} }})() ?? null);</script>"
    copy = folder / "probed.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            find(), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<pre id=[\"']probe[\"']>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(unescape(found[1]) or "null"), console
