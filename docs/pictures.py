"""Takes the pictures of a run's report that README.md shows: docs/pictures/report-*.png.

    minicai demo
    pip install -e '.[report,test]' && python docs/pictures.py out/tiny

Needs Debian's chromium and chromium-driver. The page is drawn again first, so the pictures show the
report as it is now: its section "Result". A palette of 64 colours keeps the files small.
"""

import base64
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver

from minicai.report import page

FOLDER = Path(__file__).resolve().parent / "pictures"
WIDTH, COLOURS = 1000, 64  # of the window, in pixels; of the palette
MARGIN = 24  # above the section and below it, in pixels
SECTION = """
    const box = document.getElementById('result').querySelector('h2').getBoundingClientRect();
    const all = document.getElementById('result').getBoundingClientRect();
    return [box.top + scrollY, all.bottom - box.top];
"""


def browser() -> webdriver.Chrome:
    """Chromium without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def take(out: Path, folder: Path) -> list[Path]:
    """Writes report-light.png and report-dark.png of the run in `out`. Returns their paths."""
    page.draw(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths, driver = [], browser()
    try:
        for scheme in ("light", "dark"):
            window = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            driver.get((out / "report.html").resolve().as_uri())
            top, height = driver.execute_script(SECTION)
            clip = {"x": 0, "y": top - MARGIN, "width": WIDTH, "height": height + 2 * MARGIN}
            shot = {"captureBeyondViewport": True, "clip": clip | {"scale": 1}}
            data = driver.execute_cdp_cmd("Page.captureScreenshot", shot)["data"]
            image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
            paths.append(folder / f"report-{scheme}.png")
            # The few coloured pixels keep their colours.
            image = image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            image.save(paths[-1], optimize=True)
    finally:
        driver.quit()
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected the folder of a finished run: python docs/pictures.py out/tiny")
    for path in take(Path(sys.argv[1]), FOLDER):
        print(f"wrote  {path}")
