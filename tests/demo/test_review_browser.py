"""The review page in a real Chromium: thresholds, keys, decisions, and a server that is killed under it."""

import base64
import json
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, TAG2MASK
from PIL import Image
from review_work import make_work
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tag2mask.data.decisions import decisions_path, read_decisions, reviewed_mask
from tag2mask.data.maps import Maps, map_path, read_maps
from tag2mask.export import voc_palette, write_mask
from tag2mask.ops.cams import to_mask
from tag2mask.review.server import ReviewServer
from tag2mask.review.session import open_review
from tag2mask.stages.labels import mask_path

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no Chromium with chromedriver here: apt-get install chromium-driver"
)

SHOWN = """
const canvas = document.getElementById("mask"), {width, height} = canvas;
return [height, width, Array.from(canvas.getContext("2d").getImageData(0, 0, width, height).data)];
"""


FOLLOW = """
const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
const maps = readMaps(bytes.buffer, arguments[1], arguments[2]);
return [Array.from(maps.best), Array.from(maskOf(maps, arguments[3]))];
"""


class Inside:
    """The server in a thread of this process, which is there at once."""

    def __init__(self, work):
        self.work = work

    def __enter__(self):
        self._open = open_review(self.work)
        self._server = ReviewServer(self._open.__enter__())
        self.address = self._server.address
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *fault):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._open.__exit__(None, None, None)


class Served:
    """`tag2mask review` in a process of its own."""

    def __init__(self, work):
        self.work, self.port = work, 0
        self.start()

    def start(self):
        words = [*TAG2MASK, "review", str(self.work), "--port", str(self.port)]
        self.process = subprocess.Popen(
            words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), self.process.communicate()[1]
        self.port = int(self.address.split(":")[2].split("/")[0])

    def stop(self, number):
        self.process.send_signal(number)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said


class Page:
    """What a person does on the page and sees there."""

    def __init__(self, driver):
        self.driver = driver

    def __getitem__(self, name):
        return self.driver.find_element(By.ID, name)

    def text(self, name):
        return self[name].text

    def press(self, *keys):
        for key in keys:
            self.driver.find_element(By.TAG_NAME, "body").send_keys(key)

    def until(self, true):
        WebDriverWait(self.driver, 30, poll_frequency=0.05).until(lambda _: true())

    def wait_for(self, name, text):
        self.until(lambda: self.text(name) == text)

    def drag(self, slider, value):
        """What a pointer does to a slider: many "input" events."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
        for step in (0.9, 0.3, value):
            self.driver.execute_script(script, slider, step)

    def mask(self, classes):
        """The index mask that the canvas shows."""
        height, width, values = self.driver.execute_script(SHOWN)
        pixels = np.array(values, np.uint8).reshape(height, width, 4)
        found = np.zeros((height, width), np.uint8)
        for k, known in enumerate(classes, start=1):
            found[(pixels[..., :3] == known["colour"]).all(axis=2) & (pixels[..., 3] == 255)] = k
        assert ((pixels[..., 3] == 255) == (found > 0)).all()
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,800",
                 f"--user-data-dir={profile}"):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("browser"))


@pytest.fixture
def work(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "work")


@pytest.fixture
def killable(work):
    found = Served(work)
    yield found
    if found.process.poll() is None:
        found.stop(signal.SIGKILL)


@pytest.fixture
def page(request, work, browser):
    """The page, of the server in a process of its own if the test asks for one."""
    if "killable" in request.fixturenames:
        yield from visited(browser, request.getfixturevalue("killable").address)
    else:
        with Inside(work) as server:
            yield from visited(browser, server.address)


def visited(browser, address):
    browser.get(address)
    found = Page(browser)
    found.until(lambda: found.text("decided") == "0 of 12 decided" and found.text("origin") != "")
    yield found
    faults = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    browser.get("about:blank")
    assert [fault for fault in faults if "ERR_CONNECTION_REFUSED" not in fault] == []


@pytest.fixture
def state(page):
    return page.driver.execute_async_script(
        "const done = arguments[0]; fetch('state.json').then((a) => a.json()).then(done);"
    )


def of_maps(work, image, classes, score):
    """What Python makes of the maps, and where rounding may decide otherwise."""
    stored = read_maps(map_path(next(work.glob("cams-*")), image["name"]))
    full = stored.full()
    close = (full.amax(dim=0) - score).abs() < 1e-4
    if len(full) > 1:
        first, second = full.topk(2, dim=0).values
        close |= first - second < 1e-4
    return to_mask(full, torch.from_numpy(stored.classes), score).numpy(), close.numpy()


def stored_lines(work):
    return [json.loads(line) for line in decisions_path(work).read_text().splitlines()]


def test_threshold_accept_kill_reload(killable, work, page, state):
    """One image from its first sight to its decision, and on after a kill."""
    image, classes = state["images"][0], state["classes"]
    assert page.text("name") == image["name"] and page.text("origin") == "of the run, with CRF"
    of_run = np.asarray(Image.open(mask_path(next(work.glob("crf-*")), image["name"])))
    assert (page.mask(classes) == of_run).all()

    for score in (0.15, 0.4, 0.65):
        page.drag(page["own"], score)
        assert page.text("origin") == "of the maps, no CRF" and page.text("own-value") == f"{score:.2f}"
        expected, close = of_maps(work, image, classes, score)
        seen = page.mask(classes)
        assert (seen == expected)[~close].all() and close.mean() < 0.02
        assert not (seen == of_run).all()

    page.press("a")
    page.wait_for("decided", "1 of 12 decided")
    page.wait_for("name", state["images"][1]["name"])
    assert killable.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    decided = read_decisions(decisions_path(work))
    assert decided[image["name"]].decision == "accepted"
    assert set(decided[image["name"]].scores.values()) == {0.65}
    assert (np.asarray(Image.open(reviewed_mask(work, image["name"]))) == expected).all()

    page.press("a")  # nobody is there to store it: the page says so and stays
    page.until(lambda: "does not answer" in page.text("toast"))
    assert page.text("decided") == "1 of 12 decided" and page.text("name") == state["images"][1]["name"]

    killable.start()
    page.driver.refresh()
    page.wait_for("decided", "1 of 12 decided")
    page.wait_for("name", state["images"][1]["name"])
    page.press(Keys.ARROW_LEFT)
    page.wait_for("name", image["name"])
    assert page.text("status") == "accepted" and page.text("own-value") == "0.65"
    assert (page.mask(classes) == expected)[~close].all()

    code, said = killable.stop(signal.SIGINT)
    assert code == 0 and "1 accepted, 0 rejected, 0 flagged, 11 undecided" in said


@pytest.mark.parametrize(
    "count, small, large",
    [(1, (5, 7), (18, 25)), (3, (9, 12), (36, 45)), (4, (1, 1), (3, 4)), (2, (6, 40), (20, 17)), (3, (8, 8), (8, 8))],
)
def test_the_browser_follows_the_rule_of_python(page, count, small, large):
    """Maps of any shape, enlarged or not, one score for each class, against the mask that would be saved."""
    noise = np.random.default_rng(count)
    maps = noise.random((count, *small)).astype(np.float16)
    maps[:, 0, 0], maps[:, -1, -1] = [0, 1, 6e-8, 0.3][:count], [6e-5, 0.5, 1, 0][:count]  # small ones are subnormal
    classes = noise.permutation(9)[:count]
    body = np.array([*maps.shape, *classes], "<u4").tobytes() + maps.astype("<f2").tobytes()
    scores = noise.random(count).round(2)
    given = [base64.b64encode(body).decode(), *large, scores.tolist()]
    best, mask = (np.array(found).reshape(large) for found in page.driver.execute_script(FOLLOW, *given))

    full = Maps(classes, maps, large, np.zeros(9, np.float32)).full()
    value, place = full.max(dim=0)
    assert np.abs(best - value.numpy()).max() < 5e-6
    ground = torch.tensor(scores, dtype=torch.float32)[place]
    expected = to_mask(full, torch.from_numpy(classes), ground).numpy()
    ranked = full.sort(dim=0, descending=True).values
    close = ((value - ground).abs() < 5e-6) | ((ranked[0] - ranked[1] < 5e-6) if count > 1 else False)
    assert (mask == expected)[~close.numpy()].all() and close.float().mean() < 0.1


def test_keys(work, page, state):
    names = [image["name"] for image in state["images"]]
    for number, (key, decision) in enumerate([("r", "rejected"), ("f", "flagged"), ("a", "accepted")]):
        page.press(key)
        page.wait_for("name", names[number + 1])
        assert stored_lines(work)[-1]["image"] == names[number]
        assert stored_lines(work)[-1]["decision"] == decision
    assert page.text("decided") == "3 of 12 decided"
    page.press("u")
    page.wait_for("name", names[2])
    assert page.text("status") == "undecided" and page.text("decided") == "2 of 12 decided"
    page.press(Keys.ARROW_RIGHT)
    page.wait_for("name", names[3])
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.wait_for("name", names[1])
    assert page.text("status") == "flagged"

    page.press(" ")
    assert page["mask"].value_of_css_property("opacity") == "0"
    page.press(" ")
    assert page["mask"].value_of_css_property("opacity") == "0.6"
    page.press("?")
    assert page["help"].is_displayed()
    page.press("a")  # the help is open: this is no decision
    page.driver.find_element(By.CSS_SELECTOR, "#help button").click()
    assert not page["help"].is_displayed() and page.text("name") == names[1]

    page.press("+", "+", "-")  # the mask is another one now
    page.until(lambda: page.text("status") == "undecided" and page.text("own-value") == "0.31")
    page.until(lambda: stored_lines(work)[-1]["decision"] == "undecided")
    page.press("0")
    assert page.text("origin") == "of the run, with CRF" and page.text("own-value") == "0.30"
    page.until(lambda: stored_lines(work)[-1]["scores"] == {})
    assert not reviewed_mask(work, names[1]).exists()


def test_score_of_a_class(work, page, state):
    """It holds for every undecided image of the class, is kept over a reload, and not for what was accepted before."""
    name = state["images"][0]["tags"][0]
    numbers = [n for n, image in enumerate(state["images"]) if name in image["tags"]]
    first, second = numbers[:2]
    others = [n for n in range(12) if n not in numbers and state["images"][n]["tags"]]
    page.press("a")
    page.wait_for("decided", "1 of 12 decided")
    Select(page["of-class"]).select_by_visible_text(name)
    page.wait_for("name", state["images"][second]["name"])
    page.drag(page.driver.find_element(By.CSS_SELECTOR, f'input[data-name="{name}"]'), 0.75)
    assert page.text("origin") == "of the maps, no CRF"
    page.until(lambda: json.loads((work / "review/review.json").read_text())["classes"] == {name: 0.75})

    page.driver.refresh()
    page.wait_for("decided", "1 of 12 decided")
    page.until(lambda: page.text("name") != "")
    for number in range(12):
        while page.text("place") != f"{number + 1} of 12":
            before = page.text("place")
            page.press(Keys.ARROW_RIGHT)
            page.until(lambda before=before: page.text("place") not in ("", before) and page.text("origin"))
        own = "of the maps, no CRF" if number in numbers and number != first else "of the run, with CRF"
        assert page.text("origin") == own, number
    assert others  # some images are of other classes

    while page.text("place") != f"{second + 1} of 12":
        before = page.text("place")
        page.press(Keys.ARROW_RIGHT)
        page.until(lambda before=before: page.text("place") != before)
    page.press("a")
    page.wait_for("decided", "2 of 12 decided")
    kept = read_decisions(decisions_path(work))[state["images"][second]["name"]]
    assert kept.scores[name] == 0.75 and set(kept.scores) == set(state["images"][second]["tags"])
    assert reviewed_mask(work, state["images"][second]["name"]).exists()


def test_score_of_a_class_is_taken_back(work, page, state):
    name = state["images"][0]["tags"][0]
    row = page.driver.find_element(By.CSS_SELECTOR, f'#by-class .row:has([data-name="{name}"])')
    slider, back = (row.find_element(By.TAG_NAME, tag) for tag in ("input", "button"))
    assert not back.is_displayed()
    page.drag(slider, 0.6)
    row.find_element(By.TAG_NAME, "span").click()  # the words are no button
    assert page.text("origin") == "of the maps, no CRF" and back.is_displayed()
    about = work / "review/review.json"
    page.until(lambda: json.loads(about.read_text())["classes"] == {name: 0.6})
    back.click()
    assert page.text("origin") == "of the run, with CRF" and not back.is_displayed()
    page.until(lambda: json.loads(about.read_text())["classes"] == {})
    assert not decisions_path(work).exists()  # no image was decided on


def test_ignored_pixels_are_shown(work, browser):
    """255 is neither background nor a class."""
    for file in next(work.glob("crf-*")).glob("masks/**/*.png"):
        mask = np.array(Image.open(file))
        mask[:6] = 255
        write_mask(file, mask)
    with Inside(work) as server:
        browser.get(server.address)
        page = Page(browser)
        page.until(lambda: "ignored\n12.5 %" in page.text("legend"))
        _, width, values = browser.execute_script(SHOWN)
        assert values[:4] == [*voc_palette()[255].tolist(), 255] and width == 48
        browser.get("about:blank")


def test_filter_and_end(work, page, state):
    names = [image["name"] for image in state["images"]]
    page.press("f")
    page.wait_for("name", names[1])
    Select(page["filter"]).select_by_value("flagged")
    page.wait_for("name", names[0])
    page.press("a")
    page.wait_for("message", "No image is left on this list.")
    page.press("a")  # nothing is on the screen: nothing is decided
    Select(page["filter"]).select_by_value("all")
    for number in range(1, 12):
        page.wait_for("name", names[number])
        page.press("a")
    page.wait_for("message", "Everything is decided. Export takes it from here.")
    assert [line["image"] for line in stored_lines(work)].count(names[5]) == 1
    assert set(read_decisions(decisions_path(work))) == set(names)
    page.press("u")
    page.wait_for("name", names[11])
    assert page.text("status") == "undecided"


@pytest.mark.parametrize("size", [(1280, 800), (800, 600)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page, size, scheme):
    driver = page.driver
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    scrolls = (
        "const e = document.documentElement; return [e.scrollWidth - e.clientWidth, e.scrollHeight - e.clientHeight]"
    )
    assert driver.execute_script(scrolls) == [0, 0]
    for name in ("accept", "reject", "flag", "undo", "hide", "next", "frame", "filter", "own"):
        box = page[name].rect
        assert box["width"] > 0 and box["x"] >= 0 and box["x"] + box["width"] <= size[0], name
        assert box["y"] >= 0 and box["y"] + box["height"] <= size[1], name
    assert page["frame"].rect["height"] > size[1] / 2
    body = driver.find_element(By.TAG_NAME, "body")
    light = [brightness(body.value_of_css_property(name)) for name in ("color", "background-color")]
    assert abs(light[0] - light[1]) > 450 and (light[0] > light[1]) == (scheme == "dark")


def brightness(colour):
    """Of "rgba(1, 2, 3, 1)": 6."""
    return sum(int(value) for value in colour.partition("(")[2].split(",")[:3])


def test_names_are_text(work, browser):
    """A class or a title may hold what looks like HTML; the page shows it."""
    record = work / "scenes.run.json"
    evil = "<img src=x onerror=\"document.title='evil'\">"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"title": evil}))
    with Inside(work) as server:
        browser.get(server.address)
        page = Page(browser)
        page.wait_for("title", evil)
        assert browser.title == f"Review: {evil}" and browser.find_elements(By.TAG_NAME, "img") == []
        browser.get("about:blank")
