"""Headless Chromium, Debian's, for what tests the pages."""

import os
import shutil
import time
from pathlib import Path
from typing import Any


def start_browser(downloads: Path) -> Any:
    """Start Chromium without a window or a network but loopback; it saves downloads in a folder.

    Raises ImportError or FileNotFoundError, with what has to be installed, where it cannot.
    """
    from selenium import webdriver

    # Named here, since selenium would look for them on the network.
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        raise FileNotFoundError("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = ["headless=new", "disable-dev-shm-usage", "window-size=1280,1200", "lang=zh-CN"]
    switches += ["host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    switches += ["no-sandbox"] * (os.geteuid() == 0)  # which root needs
    for switch in switches:
        options.add_argument(f"--{switch}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def download(browser: Any, name: str) -> Path:
    """The file of that name which a click on the page's #download saves."""
    path = browser.downloads / name
    path.unlink(missing_ok=True)
    browser.find_element("css selector", "#download").click()
    for _ in range(200):
        if path.exists():
            break
        time.sleep(0.05)
    return path
