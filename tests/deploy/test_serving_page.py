"""The page at / of deploy/simple_serving in a real Chromium. Skipped where there is none."""

import shutil

import pytest
from test_simple_serving import post, start, stop

from helpers import ROOT, read_lines

pytest.importorskip("selenium", reason="selenium is missing: make setup-test installs it")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver")
TOKEN = "0123456789abcdef"
ODD = ["<img src=x onerror=document.title='pwned'>", "مرحبا بالعالم: كيف حالك؟", "👨‍👩‍👧 发烧 </textarea><b>"]


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--lang=en-US", "--window-size=1280,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def find(driver, name):
    return driver.find_element(By.ID, name)


def texts_of(driver, selector):
    """The texts of all elements of a selector, as the page holds them."""
    return driver.execute_script("return [...document.querySelectorAll(arguments[0])].map(item => item.textContent)", selector)


def classify(driver, texts):
    """Put texts, lines, into the field and send them; returns what the page says when it is done."""
    driver.execute_script("arguments[0].value = arguments[1]", find(driver, "texts"), "\n".join(texts))
    find(driver, "texts").send_keys(Keys.CONTROL, Keys.ENTER)
    WebDriverWait(driver, 30, 0.02).until(lambda _: find(driver, "send").is_enabled())
    return find(driver, "state").text


def test_texts_are_labelled_in_parts_with_the_token(exported, driver, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    process, port = start(exported, tmp_path / "log", "--token_file", tmp_path / "token", "--max_texts", 8,
                          "--max_text_length", 100)
    try:
        driver.get(f"http://127.0.0.1:{port}/")
        texts = [line.split("\t")[0][:90] for line in read_lines(ROOT / "data/dev.txt")][:17] + ODD
        assert "Bearer <token> is missing or wrong" in classify(driver, texts) and not texts_of(driver, ".answer")
        assert "No text" in classify(driver, ["", " "])
        find(driver, "token").send_keys(TOKEN)
        assert classify(driver, [*texts[:5], "", "  ", *texts[5:]]) == "Texts: 20"
        assert texts_of(driver, ".text") == texts and driver.title == "Text classification"
        right, token = [], [("Authorization", f"Bearer {TOKEN}")]
        for text in texts:
            request = {"data": {"text": [text]}, "parameters": {"top_k": 3}}
            right += post(port, request, headers=token)[1]["result"][0]["top_k"]
        assert texts_of(driver, ".label") == [top["label"] for top in right]
        shown = [float(number.rstrip(" %")) for number in texts_of(driver, ".number")]
        assert shown == pytest.approx([100 * top["confidence"] for top in right], abs=0.1)
        widths = driver.execute_script("return [...document.querySelectorAll('.bar')].map(bar =>"
                                       " bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width)")
        assert widths == pytest.approx([top["confidence"] for top in right], abs=0.02)
        assert classify(driver, [*texts[:10], "长" * 101]).startswith("Text 11: ")
        find(driver, "language").click()
        assert find(driver, "send").text == "分类" and driver.title == "文本分类"
        assert not [entry for entry in driver.get_log("browser") if "Content Security Policy" in entry["message"]]
    finally:
        stop(process)


def test_an_index_shows_the_nearest_texts_on_a_narrow_screen_too(search_export, driver, tmp_path):
    process, port = start(search_export, tmp_path / "log", "--index_dir", search_export / "index")
    try:
        driver.get(f"http://127.0.0.1:{port}/")
        assert not find(driver, "token").is_displayed()
        texts = [read_lines(ROOT / "data/dev.txt")[0].split("\t")[0], "长" * 3000, *ODD]
        assert classify(driver, texts) == "Texts: 5"
        answer = post(port, {"data": {"text": texts[:1]}, "parameters": {"num_nearest": 2}})[1]["result"][0]
        assert texts_of(driver, ".answer:first-child .nearest li") == [
            f"{near['text']} · {near['label']} · {near['similarity']:.3f}" for near in answer["nearest"]]
        assert texts_of(driver, ".answer:first-child .known")[0].startswith("Probability of a known label ")
        driver.set_window_size(420, 900)
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        stop(process)
    assert "cannot be reached" in classify(driver, texts)
