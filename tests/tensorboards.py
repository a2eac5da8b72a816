"""A real TensorBoard server with the Geometry tab, whether or not this checkout is installed, and a real browser."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAB = ROOT / "integrations" / "tensorboard_tab"

if importlib.util.find_spec("torchgeom_tab") is None:  # this checkout is not installed
    spec = importlib.util.spec_from_file_location(
        "torchgeom_tab", TAB / "__init__.py", submodule_search_locations=[str(TAB)]
    )
    sys.modules["torchgeom_tab"] = importlib.util.module_from_spec(spec)


def entry_point():
    """What pyproject.toml tells TensorBoard to load."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^\[project\.entry-points\.tensorboard_plugins\]\ngeometry = "(.*)"$', text, re.MULTILINE)[1]


@contextlib.contextmanager
def serving(log_dir, beside, *arguments):
    """Yield ask(path, **query), with its address as ``ask.address`` and the process as ``ask.process``.

    ``beside``: a folder for what an installed package would have: its entry point, and the tab under its own name.
    """
    package = beside / "torchgeom_probe-0.1.0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torchgeom_probe\nVersion: 0.1.0\n")
    (package / "entry_points.txt").write_text(f"[tensorboard_plugins]\ngeometry = {entry_point()}\n")
    if not (beside / "torchgeom_tab").exists():
        (beside / "torchgeom_tab").symlink_to(TAB)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--host", "127.0.0.1"]
    environment = os.environ | {"PYTHONPATH": str(beside)}
    with (
        (beside / "server.txt").open("w") as output,
        subprocess.Popen(
            [*command, "--port", str(port), *arguments], cwd=beside, env=environment, stdout=output, stderr=output
        ) as process,
    ):

        def ask(path, **query):
            address = f"{ask.address}/data/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(address, timeout=30) as answer:
                return json.load(answer)

        ask.address, ask.process = f"http://127.0.0.1:{port}", process
        try:
            deadline = time.monotonic() + 90
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                    ask("plugins_listing")
                    break
                assert process.poll() is None, (beside / "server.txt").read_text()
                assert time.monotonic() < deadline, (beside / "server.txt").read_text()
                time.sleep(0.2)
            yield ask
        finally:
            process.terminate()


def why_no_browser():
    """Why the tests that need a browser cannot run here, or None."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    missing += [] if importlib.util.find_spec("selenium") else ["selenium"]
    return f"NOBODY LOOKS AT THE GEOMETRY TAB HERE, for want of {' and '.join(missing)}" if missing else None


@contextlib.contextmanager
def chromium(*, downloads=None, width=1440, height=1200):
    """Yield a headless Chromium, driven by Selenium, which keeps what the console says."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"):
        options.add_argument(f"--{switch}")
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--window-size={width},{height}")
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    browser = webdriver.Chrome(service=service, options=options)
    try:
        browser.set_script_timeout(60)
        yield browser
    finally:
        browser.quit()


def open_tab(browser, address, *, dark=False, timeout=60):
    """Open the tab, go into its frame, and wait until it has drawn."""
    browser.get(f"{address}/?darkMode={str(dark).lower()}#geometry")
    (frame,) = wait(lambda: browser.find_elements("css selector", "iframe"), timeout)
    browser.switch_to.frame(frame)
    wait(lambda: browser.execute_script("return document.body.dataset.drawn"), timeout)


def wait(found, timeout=20):
    """Return what ``found`` finds as soon as it is true of something."""
    deadline = time.monotonic() + timeout
    while not (result := found()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.05)
    return result
