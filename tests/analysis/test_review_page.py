"""The page of analysis/review.py in a real Chromium: keys, a killed server, two persons, files. Skipped where there is none."""

import re
import shutil

import pytest

import review_person
from helpers import read_lines, run_here, write_lines
from review_server import LABELS, Server, entries, make_data

pytest.importorskip("selenium", reason="selenium is missing: make setup-test installs it")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver")


class Page:
    """A browser window on the page of a server."""

    def __init__(self, address):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--lang=en-US", "--window-size=1280,900"):
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.open(address)

    def open(self, address):
        self.driver.get("about:blank")  # another fragment alone would not load the page again
        self.driver.get(address)
        self.wait(lambda: self.shown("card") or self.shown("done"))

    def shown(self, name):
        return self.driver.find_element(By.ID, name).is_displayed()

    def text(self, name="text"):
        return self.driver.find_element(By.ID, name).text

    def wait(self, condition):
        WebDriverWait(self.driver, 30, 0.02).until(lambda _: condition())

    def press(self, *keys):
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def decide(self, *keys):
        """Press keys and wait for the next card; returns the text that they were pressed on."""
        before = self.text()
        self.press(*keys)
        self.wait(lambda: not self.shown("card") or self.text() != before)
        return before

    def click(self, selector):
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def fits(self):
        """Whether nothing is wider than the window, and the keys are in sight."""
        return self.driver.execute_script("""
            const keys = document.getElementById("keys").getBoundingClientRect();
            return document.documentElement.scrollWidth <= innerWidth && keys.bottom <= innerHeight + 1 && keys.height > 0""")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """(the page, its server, its data folder): three suspect rows at the top are hard to show."""
    folder = make_data(tmp_path_factory.mktemp("page") / "data", 100)
    odd = ["一二三四五六七八九十" * 500, "مرحبا بالعالم: كيف حالك؟ <script>alert(1)</script>",
           "👨‍👩‍👧 发烧 <img src=x onerror=alert(1)>"]
    write_lines(folder / "data.txt", [*odd, *read_lines(folder / "data.txt")])
    server = Server(folder, "--overlap", 1, "--num_suspects", 40)
    page = Page(server.address)
    yield page, server, folder
    page.driver.quit()
    server.kill()


def test_thirty_rows_by_keyboard_reload_a_killed_server_and_undo(browser):
    page, server, folder = browser
    made = []
    for number in range(10):
        text = page.decide(*(("2",), ("k",), (Keys.ARROW_DOWN, Keys.ENTER), (Keys.ENTER,), ("d",))[number % 5])
        made.append(text)
        entry = entries(folder)[-1]
        assert entry["text"] == text and entry["action"] == ("label", "keep", "label", "label", "drop")[number % 5]
    page.driver.refresh()
    page.wait(lambda: page.shown("card"))
    for number in range(10):  # by pinyin initials, by "/" and a part of the name
        made.append(page.decide(*(("b", "q", "z", "d", Keys.ENTER), ("/", "医疗费", Keys.ENTER))[number % 2]))
        assert entries(folder)[-1]["after"] == ("病情诊断", "医疗费用")[number % 2]
    server.kill()
    text = page.text()
    page.press("k")
    page.wait(lambda: "not saved yet" in page.text("banner"))
    assert page.text() == text and len(entries(folder)) == 21
    server.start()
    page.open(server.address)
    for _ in range(10):
        made.append(page.decide(Keys.ENTER))
    assert made[20] == text and len(set(made)) == 30 == sum(entry["action"] != "opened" for entry in entries(folder))
    for back in reversed(made[-3:]):
        page.press("u")
        page.wait(lambda back=back: page.text() == back)
    assert "27 decided by you" in page.text("pace")
    log = [line for line in page.driver.get_log("browser") if "ERR_CONNECTION" not in line["message"]]
    assert not log


def test_odd_texts_are_text_and_nothing_is_out_of_sight(browser):
    page, _, folder = browser
    page.click("#kinds button:nth-last-child(1)")  # the unlabelled ones
    page.wait(lambda: "unlabelled" in page.text("why"))
    wanted, seen = set(read_lines(folder / "data.txt")), set()
    for _ in range(len(wanted)):
        shown = page.driver.execute_script("return document.getElementById('text').textContent")
        assert shown in wanted and page.fits()
        seen.add(shown)
        page.decide("s")
    assert seen == wanted
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": 420, "height": 850, "deviceScaleFactor": 1, "mobile": True})
    page.click("#kinds button:first-child")
    page.wait(lambda: "train" in page.text("why"))
    assert page.fits()
    first = page.driver.find_element(By.CSS_SELECTOR, "#labels button")
    before = page.text()
    first.click()
    page.wait(lambda: page.text() != before)
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    before = page.text()
    page.click("#keys button:nth-child(4)")  # drop, by mouse: Enter does not drop the next one, too
    page.wait(lambda: page.text() != before)
    page.decide(Keys.ENTER)
    assert [entry["action"] for entry in entries(folder)[-2:]] == ["drop", "label"]


def test_two_browsers_a_conflict_a_new_label_and_the_files(browser):
    page, server, folder = browser
    other = Page(server.address + "&name=bob")
    try:
        other.decide("d")
        text = entries(folder)[-1]["text"]
        assert entries(folder)[-1]["who"] == "bob"
        [first] = [entry for entry in entries(folder) if entry.get("text") == text and entry["who"] != "bob"][:1]
        assert first["after"] is not None  # the other one has decided differently
        page.click("#language")
        page.driver.refresh()  # once: what others decide comes with the next request
        page.wait(lambda: "意见不同" in page.text("kinds"))
    finally:
        other.driver.quit()
    page.driver.find_element(By.XPATH, "//nav/button[contains(., '意见不同')]").click()
    page.wait(lambda: page.text() == text)
    assert "bob：删去" in page.text("current")
    page.press("k")
    page.wait(lambda: page.shown("done"))
    assert entries(folder)[-1]["final"] is True
    page.click("#open-labels")
    page.driver.find_element(By.ID, "new-label").send_keys("新标签")
    page.click("#add-label")
    page.wait(lambda: len(page.driver.find_elements(By.CSS_SELECTOR, "#dialog tr")) == len(LABELS) + 1)
    page.press(Keys.ESCAPE)
    page.click("#open-apply")
    page.click("#write")
    page.wait(lambda: "train_reviewed.txt" in page.text("dialog"))
    assert "python train.py" in page.text("dialog") and read_lines(folder / "label_reviewed.txt")[-1] == "新标签"


def test_a_browser_decides_as_a_person_would(tmp_path):
    """benchmarks/review_person.py: wrong labels are planted, found and mended."""
    source = make_data(tmp_path / "source", 100)
    process = run_here(review_person.main, "--source_dir", source, "--model_name_or_path", "none", "--output_dir",
                       tmp_path / "out", "--noise", 0.2, "--decisions", 12, "--no_training")
    assert process.returncode == 0, process.stderr
    decided, found, suspects, in_all = map(int, re.search(
        r"(\d+) decisions;.*\nsuspect rows: (\d+) of (\d+) .*; (\d+) of \d+ were found", process.stdout).groups())
    assert decided == 12 and suspects >= 10 and found <= in_all
    changes = [line.split("\t") for line in read_lines(tmp_path / "out/data/review_changes.tsv")][1:]
    true = dict(line.split("\t") for line in reversed(read_lines(source / "train.txt")))
    assert len(changes) >= in_all > 0 and all(row[4] == true[row[2]] != row[3] for row in changes)
