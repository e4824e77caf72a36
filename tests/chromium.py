"""A page in a real browser: headless Chromium, driven by a script appended to a copy of the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

NARROWEST = 500
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
        width: of the window, pixels; the browser makes none narrower than 500, so the page is put into a frame then.
        dark: what `prefers-color-scheme` says.

    Returns:
        That value, and what the page wrote to the console (errors included).
    """
    place = "<pre id='probe'></pre>"
    framed = width < NARROWEST
    probe = f"<script>{'parent.' * framed}document.getElementById('probe').textContent = JSON.stringify("
    probe += f"(() => {{ {script} }})() ?? null);</script>"
    text = page.read_text(encoding="utf-8").replace("</body>", place * (not framed) + probe + "</body>")
    if framed:
        frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{escape(text)}"></iframe>'
        text = f"<!doctype html><meta charset='utf-8'><body style='margin: 0'>{place}{frame}</body>"
    copy = folder / "probed.html"
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            find(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--v=0",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={max(width, NARROWEST)},900",
            "--virtual-time-budget=5000",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    found = re.search(r"<pre id=[\"']probe[\"']>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(unescape(found[1]) or "null"), console
