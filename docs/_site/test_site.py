"""The built site in a browser, ``make docs-test``: on a desk and on a phone, in the light and in the dark."""

import functools
import http.server
import os
import threading
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SITE = Path(__file__).resolve().parents[2] / "build" / "site"
PICTURES = os.environ.get("LIGHTNING_REG_PICTURES")  # a folder, to look at the pages
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
LOOKED_AT = [
    "index.html",
    "troubles.html",
    "techniques.html",
    "techniques/noisy_labels/ELRCallback.html",
    "techniques/sparsity/NMSparsity.html",
    "techniques/metric_learning/ConR.html",
    "techniques/metric_learning/Loki.html",
    "functions/averaging.html",
    "how-to/pictures.html",
    "measured.html",
    "measured/soups_updates.html",
    "compositions.html",
    "architecture.html",
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address():
    """Where the site is served."""
    assert PAGES, "run `make site` first"
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """A chromium without a window, which reaches nothing but this machine."""
    options = webdriver.ChromeOptions()
    options.binary_location = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    proxy = "--proxy-server=127.0.0.1:9 --proxy-bypass-list=127.0.0.1"
    for argument in ("--headless=new --no-sandbox --disable-dev-shm-usage --disable-gpu " + proxy).split():
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(os.environ.get("CHROMEDRIVER", "/usr/bin/chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def show(browser, address, screen, scheme):
    browser.get("about:blank")  # where no script of the site writes down again what was chosen, light or dark
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": address, "storageTypes": "local_storage"})
    width, height = SCREENS[screen]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": screen == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_load_without_complaint_and_fit(browser, address, screen, scheme):
    show(browser, address, screen, scheme)
    for page in LOOKED_AT:
        browser.get(f"{address}/{page}")
        assert complaints(browser) == [], page
        # Nothing sticks out sideways but what scrolls by itself.
        inner, outer = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert inner <= outer + 1, page
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colour.strip("rgba()").split(",")[:3])) < 380) == (scheme == "dark"), colour
        if PICTURES:
            shoot(browser, f"{screen}-{scheme}-{page.replace('/', '-').removesuffix('.html')}")


def shoot(browser, name):
    Path(PICTURES).mkdir(exist_ok=True)
    browser.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


def test_all_pages_load_ask_nobody_else_and_draw_their_formulas(browser, address):
    """Every formula takes up room, and no mark of TeX or of reStructuredText is left in the words."""
    show(browser, address, "desktop", "light")
    formulas = 0
    for page in PAGES:
        browser.get(f"{address}/{page}")
        assert complaints(browser) == [], page
        asked, sizes, words, not_there = browser.execute_script(
            """
            const copy = document.querySelector('article').cloneNode(true);
            copy.querySelectorAll('math, code, pre').forEach(node => node.remove());
            return [
                performance.getEntriesByType('resource').map(entry => entry.name),
                [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect())
                    .map(box => [box.width, box.height]),
                copy.textContent,
                [...document.images].filter(image => !(image.complete && image.naturalWidth)).map(image => image.src),
            ]
            """
        )
        assert [one for one in asked if not one.startswith((address, "data:", "blob:"))] == [], page
        assert all(width > 3 and height > 3 for width, height in sizes), page
        assert not_there == [], page
        assert not any(mark in words for mark in ("\\", "$", ":math:", ":class:", "``")), page
        formulas += len(sizes)
    assert formulas > 150


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("ELRCallback", "techniques/noisy_labels/ELRCallback.html"),
        ("EWC", "techniques/continual/EWC.html"),
        ("NMSparsity", "techniques/sparsity/NMSparsity.html"),
        ("CutMix", "techniques/augmentation/CutMix.html"),
        ("SoupAverager", "techniques/averaging/SoupAverager.html"),
        ("augment", "arguments.html"),
    ],
)
def test_search_finds(browser, address, screen, words, page):
    show(browser, address, screen, "light")
    browser.get(f"{address}/index.html?q={words}")
    wait = WebDriverWait(browser, 20)
    links = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".md-search-result__link"))
    assert any(page in link.get_attribute("href") for link in links)
    assert complaints(browser) == []


def test_a_page_of_a_technique_is_two_clicks_away(browser, address):
    show(browser, address, "desktop", "light")
    browser.get(f"{address}/index.html")
    browser.find_element(By.CSS_SELECTOR, "article a[href='troubles.html']").click()
    browser.find_element(By.CSS_SELECTOR, "article a[href$='ELRCallback.html']").click()
    assert browser.find_element(By.TAG_NAME, "h1").text.startswith("ELRCallback")


@pytest.mark.parametrize("screen", SCREENS)
def test_from_a_trouble_to_its_page_its_picture_and_what_its_arguments_mean(browser, address, screen):
    """By clicks alone, from the start page: no address is typed."""
    show(browser, address, screen, "light")
    browser.get(f"{address}/index.html")
    click(browser, "article a[href='troubles.html']")
    click(browser, "article a[href='how-to/clean-labels.html']")
    click(browser, "article a[href$='ELRCallback.html']")
    pictures = browser.find_elements(By.CSS_SELECTOR, "article img")
    assert any(picture.size["width"] > 100 for picture in pictures)
    click(browser, "article a[href$='arguments.html#index_key']")
    assert browser.find_element(By.ID, "index_key").is_displayed()


@pytest.mark.parametrize("name", ["loss", "index_key", "input_key", "layer", "head", "views", "augment", "monitor"])
def test_arguments_are_one_click_from_the_start_page(browser, address, name):
    show(browser, address, "desktop", "light")
    browser.get(f"{address}/index.html")
    click(browser, "article a[href='arguments.html']")
    assert name in [heading.text.rstrip("¶") for heading in browser.find_elements(By.CSS_SELECTOR, "article h2")]


def click(browser, selector):
    link = browser.find_element(By.CSS_SELECTOR, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
    link.click()
