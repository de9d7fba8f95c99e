"""The report in a browser: Debian's chromium without a window, by Selenium.

The tests are skipped where either is missing. MINICAI_SCREENSHOTS=DIR saves pictures of the whole
pages in DIR: on a phone and on a desk, light and dark.
"""

import base64
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from minicai.report import page as report
from minicai.report.summary import RECORDED, so_far
from tests.report.runs import HOSTILE, lay, lay_own

webdriver = pytest.importorskip("selenium.webdriver", reason="needs pip install -e '.[test]'")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of a run in which a model wrote a script."""
    report.draw(out := lay(tmp_path_factory.mktemp("page"), *RECORDED))
    return (out / "report.html").as_uri()


@pytest.fixture(scope="module")
def own_address(tmp_path_factory):
    """The page of a run without the exact judge, after `elo` and `agree`."""
    report.draw(out := lay_own(tmp_path_factory.mktemp("own"), "elo", "agree"))
    return (out / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    """page(width, dark, part) opens the page and returns a function that runs a script in it."""

    def open_page(width=1280, dark=False, part="", address=address):
        phone = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme]})
        browser.get("about:blank")
        browser.get(address + part)
        return browser.execute_script

    return open_page


SHOWN = (
    "return [...document.querySelectorAll('#list summary .title')].map(title => title.textContent)"
)
TYPE = """
    const box = document.getElementById(arguments[0]);
    box.value = arguments[1];
    box.dispatchEvent(new Event(arguments[2]));
"""
PRESS = """
    const options = {key: arguments[0], bubbles: true, cancelable: true};
    document.activeElement.dispatchEvent(new KeyboardEvent('keydown', options));
"""
LATER = "return new Promise(done => setTimeout(() => done(%s), 100))"


def screenshot(browser, name: str) -> None:
    """The whole page as a PNG, in the folder that MINICAI_SCREENSHOTS names."""
    if folder := os.environ.get("MINICAI_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        png = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})[
            "data"
        ]
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(png))


@pytest.mark.parametrize("run", ["address", "own_address"])
@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (390, False), (390, True)])
def test_the_page_asks_for_nothing_complains_of_nothing_and_fits(
    browser, page, request, run, width, dark
):
    browser.get_log("browser"), browser.get_log("performance")
    script = page(width, dark, address=(address := request.getfixturevalue(run)))
    screenshot(
        browser, f"{'report' if run == 'address' else 'own'}-{width}-{'dark' if dark else 'light'}"
    )
    for kind in ("answers", "revisions", "comparisons", "episodes"):
        script("document.querySelector(`#kinds [value=${arguments[0]}]`).click()", kind)
        script("document.querySelectorAll('#list details').forEach(row => row.open = true)")
        assert script("return document.documentElement.scrollWidth") <= width
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert {url.split("#")[0] for url in asked} - {"about:blank", "data:,"} == {
        address
    } and browser.get_log("browser") == []
    colours = script(
        "const style = getComputedStyle(document.documentElement);"
        "const text = getComputedStyle(document.querySelector('figure svg text'));"
        "const light = c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b) > 380;"
        "return [style.backgroundColor, style.color, text.fill].map(light)"
    )
    assert colours == ([False, True, True] if dark else [True, False, False])


def test_a_script_that_a_model_wrote_is_shown_as_text(page):
    script = page(part="#kind=answers")
    script("document.querySelector('#list details').open = true")
    said = script(LATER % "[...document.querySelectorAll('#list .said')].map(p => p.textContent)")
    assert (
        said == ["yes", "yes", HOSTILE]
        and script("return document.querySelectorAll('#list script, #list img').length") == 0
    )


def test_transcripts_are_searched_and_filtered_and_the_address_keeps_it(browser, page):
    script = page(part="#kind=revisions")
    assert (
        len(script(SHOWN)) == 50
        and script("return document.getElementById('count').textContent") == "60 of 60"
    )
    script("document.getElementById('more').click()")
    assert len(script(SHOWN)) == 60
    script(TYPE, "search", "ROB 17th", "input")
    assert (
        script(SHOWN) == ["How do I rob the 17th bank?"]
        and script("return document.querySelectorAll('#list mark').length") == 2
    )
    script(TYPE, "search", "17th unkind nowhere", "input")
    assert script(SHOWN) == []
    assert "No revisions have all of this" in script(
        "return document.getElementById('list').innerText"
    )
    script("document.querySelector('#list button').click()")
    assert len(script(SHOWN)) == 50
    script(TYPE, "principle", "kind", "change")
    assert len(script(SHOWN)) == 30
    script(TYPE, "outcome", "harmful → good", "change")
    script(TYPE, "search", "5", "input")
    assert script(SHOWN) == [
        f"How do I rob the {k}th bank?" for k in range(1, 59, 2) if "5" in str(k)
    ]  # of the 59th the judge has said nothing
    found, part = script(SHOWN), script("return location.hash")
    script = page(part=part)
    assert script(SHOWN) == found
    top = "return document.getElementById('transcripts').getBoundingClientRect().top"
    assert 0 <= script(top) < 100  # the link leads to them
    script("location.hash = 'kind=comparisons'")
    assert script(LATER % "document.querySelector('#list summary').innerText").startswith("And")
    assert page()("return location.hash + scrollY") == "0"


def test_a_revision_shows_the_words_that_it_changed(page):
    script = page()
    row = "{prompt: [], outcomes: [], rounds: [{principle: 'p', critique: '<i>', revision: %s}]"
    made = "return make('p', '', ...BODIES.revisions(" + row + ", initial: %s})).innerHTML"
    text = script(made % ('"I will not hide the <b>cat</b> here."', '"I will hide it in here."'))
    assert text.endswith(
        '<p class="said"><span>I will</span> <del>hide it in</del> '
        "<ins>not hide the &lt;b&gt;cat&lt;/b&gt;</ins> <span>here.</span> </p>"
    )
    assert "unchanged" in script(made % ('"a b"', '"a b"'))
    assert script(made % ('""', '"a"')).endswith("<del>a</del> </p>")


def test_the_theme_outlives_the_page(page):
    script, scheme = page(), "return getComputedStyle(document.documentElement).colorScheme"
    script("document.getElementById('theme').click()")
    assert script(scheme) == "dark" and page()(scheme) == "dark"
    script("localStorage.clear()")
    assert page()(scheme) == "light dark"


def test_a_plot_fills_the_screen_when_it_is_clicked(browser, page):
    script = page()
    browser.find_element("css selector", "figure > svg").click()
    assert script(LATER % "document.fullscreenElement?.tagName") == "FIGURE"
    browser.find_element("css selector", "figure > svg").click()
    assert script(LATER % "document.fullscreenElement") is None


@pytest.mark.parametrize("width", [1440, 1280])
def test_no_table_is_cut_off_on_a_desk(page, width):
    script = page(width)
    script("document.querySelectorAll('main details').forEach(part => part.open = true)")
    cut = "box => box.scrollWidth > box.clientWidth"
    found = script(f"return [...document.querySelectorAll('.wide')].filter({cut}).length")
    assert found == 0


def test_a_pair_shows_both_orders_and_its_label(page):
    script = page(part="#kind=comparisons")
    script("document.querySelector('#list details').open = true")
    text = script(LATER % "document.querySelector('#list .body').innerText")
    assert (
        "Hello" in text
        and "first, preferred" in text
        and "P(first is better) = 0.700, source: ai" in text
    )
    rows = script("return [...document.querySelectorAll('#list td')].map(cell => cell.textContent)")
    assert rows == [
        "kind",
        "first, second",
        "-0.100",
        "-3.000",
        "0.948",
        "judge",
        "kind",
        "second, first",
        "-2.000",
        "-1.000",
        "0.269",
        "judge",
    ]


def test_the_keyboard_is_enough(page):
    script, active = page(part="#kind=revisions"), "return document.activeElement.textContent"
    script(PRESS, "j")
    assert script(active).startswith("How do I rob the 0th bank?")
    script(PRESS, "j"), script(PRESS, "j"), script(PRESS, "k")
    assert script(active).startswith("How do I rob the 1th bank?")
    script("document.activeElement.click()")
    assert script("return document.querySelectorAll('#list details[open]').length") == 1
    script(PRESS, "Escape")
    assert script("return document.querySelectorAll('#list details[open]').length") == 0
    script(PRESS, "/")
    assert script("return document.activeElement.id") == "search"
    script(TYPE, "search", "17th", "input")
    script(PRESS, "Enter")
    assert script(active).startswith("How do I rob the 17th bank?")


def test_what_is_printed_is_light_and_shows_what_is_found(browser, page):
    script = page(dark=True, part="#kind=revisions&q=17th")
    script("dispatchEvent(new Event('beforeprint'))")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    assert script("return getComputedStyle(document.documentElement).colorScheme") == "light"
    assert "Unkind." in script("return document.querySelector('#list').innerText")
    assert script("return getComputedStyle(document.querySelector('nav')).display") == "none"
    script("dispatchEvent(new Event('afterprint'))")
    assert script("return document.querySelectorAll('#list details[open]').length") == 0


def test_without_javascript_there_are_tables_and_plots_and_where_the_transcripts_are(browser, page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page()
        text = browser.find_element("tag name", "body").text
        assert (
            "SL-CAI" in text
            and "0.750" not in text
            and "needs JavaScript" in text
            and "sl/revisions.jsonl" in text
        )
        assert len(browser.find_elements("css selector", "figure svg")) == 19
        assert not browser.find_element("id", "browser").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_live_page_reloads_but_not_under_a_reader(browser, page, tmp_path):
    (lay(tmp_path, "sl") / "report.html").write_text(report.page(tmp_path, so_far(tmp_path), 0.3))
    page()  # for its settings of the screen
    browser.get((tmp_path / "report.html").as_uri() + "#kind=revisions&q=17th")
    wait = LATER % "[performance.timeOrigin, document.querySelector('#search').value]"
    began = browser.execute_script(  # in one step: it may reload between two
        "document.querySelector('#list summary').click(); return performance.timeOrigin"
    )
    time.sleep(0.7)
    assert browser.execute_script(wait) == [began, "17th"]
    browser.execute_script(
        "document.querySelector('#list details').open = false; document.activeElement.blur()"
    )
    time.sleep(0.7)
    later, searched = browser.execute_script(wait)
    assert later > began and searched == "17th"
