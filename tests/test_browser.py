"""The kiosk page in a real chromium, against a real server on a free port, over a double of the engine.

Fails where chromium is missing: a page that nobody looked at is not tested.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from urllib.parse import urlsplit

import cv2
import judged
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from appliance import reliability, render, study
from appliance.errors import SpineNotFound
from appliance.journal import Journal
from appliance.report import DISCLAIMER, Curve, Finding, Frontal, Heatmap, Mask, Measurement, Omission, Pfirrmann, Report
from appliance.web import Server, WebSettings, create_app
from tests.inprocess import InProcess

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SIDE = 256
SIZES = ((1024, 600), (1280, 800), (390, 844))
# Where the double of the engine says that something is; (x0, y0, x1, y1) in source pixels.
CANAL = (((164.0, 158.0), (186.0, 162.0)),)
DISC, UNNAMED, VERTEBRA = (100.0, 150.0, 160.0, 170.0), (100.0, 60.0, 160.0, 80.0), (98.0, 84.0, 162.0, 146.0)


# Of a radiograph: vertebrae from the top down, and a curve whose end plates are drawn towards its hollow side, the right one.
COLUMN = tuple((100.0 + 4 * min(i, 6 - i), 20.0 + 32 * i, 150.0 + 4 * min(i, 6 - i), 48.0 + 32 * i) for i in range(7))
PLATES = (((90.0, 14.0), (160.0, 30.0)), ((90.0, 246.0), (160.0, 230.0)))

ENGINES = reliability.engines({"grader": judged.MODEL}, {"grader": "openvino"})
IN_USE: dict = {}  # what the appliance says of the engines in use; a test may change it


@pytest.fixture(autouse=True)
def in_use():
    IN_USE.update(digest="0" * 64, engines=ENGINES)


def picture(shade: int) -> bytes:
    ramp = np.tile(np.linspace(20, 200, SIDE).astype(np.uint8), (SIDE, 1))
    ramp[:4, :4] = shade
    return cv2.imencode(".png", ramp)[1].tobytes()


def corners(box):
    x0, y0, x1, y1 = box
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def blob_at(box):
    x0, y0, x1, y1 = box
    values = np.zeros((SIDE, SIDE), np.float32)
    values[int(y0) : int(y1), int(x0) : int(x1)] = 1.0
    return values


def radiograph(instance, measured: bool) -> Report:
    curves = (Curve("main thoracic", 7, 4, 1, 24.6, 4.2, "left"), Curve("thoracolumbar or lumbar", 3, 2, 1, 11.2, 3.0, "right"))
    boxes = COLUMN if measured else COLUMN[:4]
    return Report(
        status="complete" if measured else "partial",
        protocol="spine-xray-ap",
        source=instance.source,
        findings=tuple(Finding("vertebra", 0.75, box, len(boxes) - i) for i, box in enumerate(boxes)),
        heatmaps=(
            Heatmap(
                "cam",
                "features",
                "scoliosis",
                blob_at(DISC) if measured else None,
                "spine_class",
                None if measured else "it does not add up",
            ),
            Heatmap("class-evidence", "class_heads.0", "vertebra", blob_at(VERTEBRA), "vertebra_ap"),
        ),
        naming="Levels are not named",
        notes=("a note for the reader",),
        measurements=(Measurement("cobb_angle", 24.6, "deg", PLATES, "main thoracic"),) if measured else (),
        omitted=() if measured else (Omission("cobb_angle", "4 vertebrae stand in one column; an angle needs 5"),),
        frontal=Frontal(
            curves if measured else (),
            "mild" if measured else None,
            {"normal": 0.03, "scoliosis": 0.96, "spondylolisthesis": 0.01},
        ),
        engine={"backends": {"spine_class": "openvino"}, "precision": "int8", "threads": 1},
        bundle={"name": "double", "digest": "0" * 64, "spinebox": "0"},
    )


def scripted_run(instance, deadline):
    """The first pixel says what this double of the engine answers: 0 a whole report, 1 one without heatmap, 2 a refusal, 3 a
    radiograph, 4 one of which no angle could be measured and whose class has no map."""
    kind = int(instance.pixels[0, 0])
    if kind == 2:
        raise SpineNotFound("no row of vertebrae was found", value="0 discs")
    time.sleep(0.2)
    if kind in (3, 4):
        return radiograph(instance, measured=kind == 3)
    report = Report(
        status="complete",
        protocol="lumbar-mri-sagittal",
        source=instance.source,
        findings=(
            Finding(
                "disc",
                0.9,
                DISC,
                1,
                level="L5/S1",
                pfirrmann=Pfirrmann(4, (0.01, 0.04, 0.2, 0.65, 0.1), (3, 4)),
                flags={"herniation": 0.7, "narrowing": 0.2, "bulging": 0.1},
                outline_px=corners(DISC),
                measurements=(
                    Measurement("canal_diameter", 11.25, "mm", CANAL),
                    Measurement("slip", -4.0, "mm", CANAL),
                    Measurement("meyerding_grade", 1.0, "grade", where="retrolisthesis"),
                ),
                omitted=(Omission("disc_angle", "the vertebra above is odd"), Omission("segment_angle", "the vertebra above is odd")),
            ),
            Finding("disc", 0.6, UNNAMED, 2, pfirrmann=Pfirrmann(1, (0.9, 0.1, 0.0, 0.0, 0.0)), outline_px=corners(UNNAMED)),
            Finding("vertebra", 0.8, VERTEBRA, 1, level="L5", outline_px=corners(VERTEBRA)),
        ),
        heatmaps=(
            Heatmap("class-evidence", "decoder", "disc", np.maximum(blob_at(DISC), blob_at(UNNAMED)), "segmenter"),
            Heatmap("cam", "features", "L5/S1 Pfirrmann 4", blob_at(DISC), "grader"),
            Heatmap("cam", "features", "disc 2 Pfirrmann 1", None, "grader", reason="it does not add up to its logit"),
        ),
        mask=Mask((blob_at(DISC) * 2).astype(np.uint8)),
        naming="Levels are counted from the sacrum",
        notes=("a note for the reader",),
        measurements=(Measurement("canal_diameter_narrowest", 11.25, "mm", CANAL, "L5/S1"),),
        omitted=(Omission("lumbar_lordosis", "no vertebra is named L1"),),
        engine={"backends": {"detector": "onnxruntime", "grader": "openvino"}, "precision": "int8", "threads": 1},
        bundle={"name": "double", "digest": "0" * 64, "spinebox": "0"},
    )
    if kind == 1:
        return dataclasses.replace(report, status="partial", rung="no-heatmap", shed=("heatmap",), heatmaps=())
    return report


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(service=Service("/usr/bin/chromedriver"), options=options)
    yield browser
    browser.quit()


@pytest.fixture
def page(tmp_path, driver):
    """The page open at 1024 x 600; afterwards: no request went elsewhere, and no script failed."""
    with Journal(tmp_path / "data", reserve_bytes=0) as journal:
        app = create_app(
            device=InProcess(study.read, scripted_run),
            read=study.read,
            render=render,
            journal=journal,
            health=lambda: {"ready": True},
            engines=lambda: {"bundle": {"name": "double", "digest": IN_USE["digest"], "spinebox": "0"}, "engines": IN_USE["engines"]},
            settings=WebSettings(max_bytes=300_000, reads=("sagittal lumbar MRI", "frontal radiographs of the spine")),
        )
        server = Server(app, port=0, max_bytes=300_000)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            made = Page(driver, server.url, tmp_path)
            made.size(1024, 600)
            driver.get_log("performance")
            driver.get_log("browser")
            driver.get(server.url + "/")
            made.wait(lambda: made.text("history-empty") != "Loading…")
            yield made
            assert made.foreign_requests() == []
            assert [line for line in driver.get_log("browser") if line["source"] not in ("network",)] == []
            driver.get("about:blank")
        finally:
            server.stop()
            thread.join(30)


class Page:
    def __init__(self, driver, url, folder) -> None:
        self.driver, self.url, self.folder = driver, url, folder
        self.requests: list[str] = []

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, identity: str) -> str:
        return self.driver.execute_script("return document.getElementById(arguments[0]).textContent", identity).strip()

    def script(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition) -> None:
        WebDriverWait(self.driver, 20, poll_frequency=0.05).until(lambda _: condition())

    def view(self) -> str:
        return self.find("body").get_attribute("data-view")

    def send(self, content: bytes, name: str) -> None:
        path = self.folder / name
        path.write_bytes(content)
        self.find("#file").send_keys(str(path))

    def loaded(self) -> bool:
        code = "return ['base'].every(i => { const e = document.getElementById(i); return e.complete && e.naturalWidth > 0; })"
        return self.view() == "result" and self.script(code)

    def answer(self, shade: int = 0, name: str = "spine.png") -> None:
        self.send(picture(shade), name)
        self.wait(self.loaded)
        self.wait(lambda: self.all(".finding-mark"))

    def shown(self, selector: str) -> bool:
        return self.script(
            "return [...document.querySelectorAll(arguments[0])].some(e => getComputedStyle(e).display !== 'none')", selector
        )

    def heatmaps(self) -> list[str]:
        return [i.get_attribute("src").rpartition("/")[2].removesuffix(".png") for i in self.all("#heat img")]

    def toggle(self, name: str) -> None:
        self.find(f"#show-{name}").click()

    def foreign_requests(self) -> list[str]:
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
        assert any(url.startswith(self.url) for url in self.requests)  # the log is really there
        own = urlsplit(self.url).netloc
        return [u for u in self.requests if urlsplit(u).netloc != own and urlsplit(u).scheme not in ("data", "blob", "about")]


def test_a_file_becomes_an_answer(page):
    assert page.view() == "home"
    assert DISCLAIMER in page.find(".disclaimer").text
    page.answer()
    assert page.text("banner-title") == "Complete: 2 discs, 1 vertebra"
    assert "of 3.00 s allowed" in page.text("banner-time")
    assert "spine.png" in page.text("banner-time")
    assert page.text("naming") == "Levels are counted from the sacrum."
    assert page.text("notes") == "A note for the reader."
    discs = [item.text for item in page.all("#discs .finding")]
    assert "Disc 2" in discs[0]  # the upper one first, as in the image
    assert "(level not named)" in discs[0]
    for word in ("L5/S1", "Pfirrmann 4", "65 %", "Herniation 70 %", "Narrowing 20 %", "Bulging 10 %"):
        assert word in discs[1]
    assert "L5" in page.find("#vertebrae").text
    assert [a.text for a in page.all("#downloads a")] == ["Overlay", "JSON", "Labels"]
    links = [a.get_attribute("href") for a in page.all("#downloads a")]
    statuses = page.script("return Promise.all(arguments[0].map(u => fetch(u).then(r => r.status)))", links)
    assert statuses == [200, 200, 200]
    assert DISCLAIMER in page.find(".disclaimer").text
    assert page.script("return document.activeElement.id") == "banner-title"


def test_measurements_are_listed_drawn_and_switched_off(page):
    page.answer()
    column = page.text("column")
    assert "Canal diameter narrowest11.3 mmL5/S1" in column
    assert "Not measured: lumbar lordosis; no vertebra is named L1." in column
    page.find("#discs .finding:last-child button").click()
    detail = page.find(".finding.selected .detail").text
    for words in (
        "Slip\n−4.0 mm",
        "Meyerding grade\n1\nretrolisthesis",
        "Not measured: disc angle and segment angle; the vertebra above is odd.",
    ):
        assert words in detail
    over = page.script(
        "const l = document.querySelector('#marks .measure .over'); return ['x1', 'y1', 'x2', 'y2'].map(a => +l.getAttribute(a))"
    )
    assert over == [164, 158, 186, 162]
    assert [e.text for e in page.all(".measure-words")] == ["11.3 mm"]
    assert page.shown(".measures")
    page.toggle("measures")
    assert not page.shown(".measures")


def test_the_start_page_says_what_the_bundle_reads(page):
    assert page.text("reads") == "Sagittal lumbar MRI or frontal radiographs of the spine"
    assert "One image per file: DICOM, PNG or JPEG" in page.find("#drop").text


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def test_a_radiograph_is_answered_with_its_curves_and_its_class(page):
    page.answer(shade=3, name="ap.png")
    assert plain(page.text("banner-title")) == "Complete: 7 vertebrae, scoliosis 96 %, severity mild"
    curves = [item.text for item in page.all("#curves li")]
    assert curves == [
        "Main thoracic\n25° ± 5°\nVertebrae 7 to 1, apex 4, convex to the left",
        "Thoracolumbar or lumbar\n11° ± 3°\nVertebrae 3 to 1, apex 2, convex to the right",
    ]
    assert "Severity, by the largest angle: mild" in page.find("#curves-words").text
    bars = page.find("#classes .bars")
    assert bars.get_attribute("aria-label") == "Normal 3 %, Scoliosis 96 %, Spondylolisthesis 1 %"
    assert [float(bar.get_attribute("width")) for bar in page.all("#classes rect")] == [3, 96, 1]
    assert [e.text for e in page.all("#classes .chosen")] == ["Scoliosis", "96 %"]
    # One short list, upper first; what no vertebra has is said once.
    panel = page.find(".panel").text
    assert [e.text for e in page.all("#vertebrae .level")] == ["7", "6", "5", "4", "3", "2", "1"]
    assert panel.count("level not named") == 0
    assert panel.count("Levels are not named.") == 1
    assert page.find("#vertebrae").size["height"] < 200
    assert "A note for the reader." in panel
    # Nothing of what a radiograph has not: discs, grades, outlines; nor its angles a second time.
    for word in ("Disc", "Pfirrmann", "Outlines", "Grades"):
        assert word not in page.find("#result").text
    assert page.text("column") == ""
    assert not page.find("#column-title").is_displayed()
    assert [e.text for e in page.all("#tools .switch") if e.is_displayed()] == ["Boxes", "Numbers", "Measures", "Heatmap"]
    assert page.shown("#marks .box")
    page.find('#vertebrae button[data-finding="2"]').click()
    assert page.find("#marks .selected").get_attribute("data-finding") == "2"
    assert page.find('#vertebrae button[data-finding="2"]').get_attribute("aria-pressed") == "true"
    # And an MRI after it is shown as one: with outlines, discs and their words, without the boxes that stood in for outlines.
    page.find("#go-home").click()
    page.answer(name="mri.png")
    assert page.text("banner-title") == "Complete: 2 discs, 1 vertebra"
    assert not page.find("#frontal").is_displayed()
    assert [e.text for e in page.all("#tools .switch") if e.is_displayed()] == ["Boxes", "Outlines", "Grades", "Measures", "Heatmap"]
    assert not page.shown("#marks .box")
    assert "Pfirrmann" in page.find("#caption").text
    assert page.find("#naming").location["y"] < page.find("#discs").location["y"] < page.find("#notes").location["y"]


def test_cobb_angles_are_drawn_and_switched_off(page):
    page.answer(shade=3)
    code = """
        return [...document.querySelectorAll('#marks .measure.strong .over')]
            .map(l => ['x1', 'y1', 'x2', 'y2'].map(a => +l.getAttribute(a)))
    """
    assert page.script(code) == [[*a, *b] for a, b in PLATES]
    assert [e.text for e in page.all(".measure-words")] == ["Cobb 25°"]
    edges = "const r = arguments[0].getBoundingClientRect(); return [r.left, r.right]"
    for width, height in SIZES:
        page.size(width, height)
        page.driver.refresh()
        page.wait(page.loaded)
        page.wait(lambda: page.all("#marks .cobb"))
        stage = page.script(edges, page.find("#stage"))
        lines = [page.script(edges, e) for e in page.all("#marks .cobb line, #marks .cobb path, #marks .cobb text")]
        assert all(stage[0] <= left and right <= stage[1] for left, right in lines), (width, stage, lines)
        plates = [page.script(edges, e)[1] for e in page.all("#marks .measure.strong .over")]
        assert page.script(edges, page.find("#marks .cobb text"))[0] > max(plates)  # on the hollow side, beside the bow
    assert [e.text for e in page.all("#marks .name")] == ["7", "6", "5", "4", "3", "2", "1"]
    for name, selector in (("measures", ".measures"), ("grades", "#marks .words")):
        assert page.shown(selector)
        page.script("document.getElementById(arguments[0]).click()", f"show-{name}")
        assert not page.shown(selector)


def test_a_radiograph_without_angles_says_why(page):
    page.answer(shade=4)
    assert plain(page.text("banner-title")) == "Partial answer: 4 vertebrae, scoliosis 96 %, no angle measured"
    assert page.text("banner-text") == "The heatmap for scoliosis is withheld: it does not add up."
    words = page.find("#curves-words").text
    assert words == "No curve was measured.\nNot measured: cobb angle; 4 vertebrae stand in one column; an angle needs 5."
    assert page.all("#curves li") == []
    assert not page.find("#show-measures").is_enabled()


def test_sets_of_grades_promise_no_more_than_was_measured(page):
    page.answer()
    page.wait(lambda: page.find("#trust").is_displayed())  # what the appliance says of its engines has come
    button = '#discs button[data-finding="0"]'
    page.find(button).click()
    made = "Grades 3 and 4 are plausible. Such sets are made to hold the true grade in nine discs of ten"
    sets = reliability.of_engine(judged.ENGINE).sets
    assert plain(page.find(".plausible").text) == f"{made}; on held-out patients they held it in {sets.coverage}."
    # Nothing was measured of an engine that answers no more.
    IN_USE["digest"] = "f" * 64
    page.driver.refresh()
    page.wait(page.loaded)
    page.wait(lambda: page.find("#trust").is_displayed())
    page.find(button).click()
    assert page.find(".plausible").text == f"{made}."


def test_the_measured_share_comes_to_a_disc_that_is_open_already(page):
    page.script("""
        const real = window.fetch;
        window.later = [];
        const wait = () => new Promise(r => window.later.push(r));
        window.fetch = (url, more) => url === '/api/engines' ? wait().then(() => real(url, more)) : real(url, more);
    """)
    page.answer()
    page.find('#discs button[data-finding="0"]').click()
    assert page.find(".plausible").text.endswith("in nine discs of ten.")
    page.script("window.later.forEach(go => go())")
    page.wait(lambda: "held-out patients they held it in" in page.find(".plausible").text)


def test_marks_lie_where_the_report_says(page):
    for width, height in SIZES:
        page.size(width, height)
        page.answer()
        image = page.script("const r = document.getElementById('stage').getBoundingClientRect(); return [r.x, r.y, r.width, r.height]")
        scale = min(image[2], image[3]) / SIDE
        left, top = image[0] + (image[2] - SIDE * scale) / 2, image[1] + (image[3] - SIDE * scale) / 2
        edges = "const r = arguments[0].getBoundingClientRect(); return [r.x, r.y, r.right, r.bottom]"
        outline = page.script(edges, page.find('.finding-mark[data-finding="0"] .outline'))
        expected = [left + DISC[0] * scale, top + DISC[1] * scale, left + DISC[2] * scale, top + DISC[3] * scale]
        assert np.abs(np.array(outline) - expected).max() < 2.5  # half a stroke


def test_switches_show_and_hide_their_layer(page):
    page.answer()
    assert not page.shown("#marks .box")
    for name, selector in (("boxes", "#marks .box"), ("outlines", "#marks .outline"), ("grades", "#marks .words")):
        before = page.shown(selector)
        page.toggle(name)
        assert page.shown(selector) is not before
        page.toggle(name)
        assert page.shown(selector) is before
    opacity = lambda: float(page.script("return getComputedStyle(document.getElementById('heat')).opacity"))  # noqa: E731
    assert opacity() == pytest.approx(0.4)
    page.find("#opacity").send_keys(Keys.ARROW_RIGHT)
    assert opacity() == pytest.approx(0.45)
    page.toggle("heatmap")
    assert opacity() == 0
    page.toggle("heatmap")
    assert opacity() == pytest.approx(0.45)


def test_list_and_image_select_each_other_and_the_heatmap(page):
    page.answer()
    assert page.heatmaps() == ["1"]  # the maps of single discs, not the general one
    page.find('#discs button[data-finding="0"]').send_keys(Keys.ENTER)  # by keyboard
    assert page.find("#marks .selected").get_attribute("data-finding") == "0"
    assert page.find('#discs button[data-finding="0"]').get_attribute("aria-expanded") == "true"
    assert page.heatmaps() == ["1"]
    assert page.text("heat-target") == "Heatmap: L5/S1 Pfirrmann 4"
    assert "65 %" in page.find(".detail .bars").get_attribute("aria-label")
    page.script("document.querySelector('.finding-mark[data-finding=\"1\"] .hit').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert page.find("#discs .selected").get_attribute("data-finding") == "1"
    assert "withheld: it does not add up to its logit" in page.find(".detail").text
    assert [o.text for o in page.all("#heat-choice option")] == [
        "Disc (class evidence)",
        "L5/S1 Pfirrmann 4 (class activation map)",
        "Disc 2 Pfirrmann 1 (withheld)",
    ]
    page.all("#heat-choice option")[0].click()
    assert page.heatmaps() == ["0"]
    assert page.text("heat-target") == "Heatmap: disc"
    page.wait(lambda: page.script("return document.querySelector('#heat img').naturalWidth") == SIDE)
    page.find('#discs button[data-finding="1"]').click()
    assert page.all(".selected") == []


def test_what_was_left_out_is_said(page):
    page.answer(shade=1)
    assert page.text("banner-title").startswith("Partial answer")
    assert page.text("banner-text") == "To be in time, the heatmap was left out."
    assert page.text("heat-target") == "No heatmap: left out to be in time"
    assert not page.find("#show-heatmap").is_enabled()
    assert page.heatmaps() == []


def test_a_refused_image_is_shown_with_its_reason(page):
    page.send(picture(2), "cat.png")
    page.wait(page.loaded)
    assert page.text("banner-title") == "No answer"
    assert page.text("banner-text") == "No row of vertebrae was found. (0 discs)"
    assert page.text("banner-remedy") == SpineNotFound.default_remedy
    assert page.all(".finding") == []
    assert page.find("#stage-note").is_displayed()
    page.find("#go-home").click()
    page.send(picture(2), "cat.png")  # the same again: not stuck
    page.wait(page.loaded)


def test_a_file_that_is_no_image_shows_the_remedy(page):
    page.send(b"hello, this is a letter" * 20, "letter.txt")
    page.wait(lambda: page.view() == "error")
    assert "DICOM" in page.text("error-remedy")
    assert "study.not-an-image" in page.text("error-detail")
    page.find("#error-home").click()
    page.wait(lambda: page.view() == "home")
    page.send(b"x" * 300_001, "big.dcm")  # stopped before it is sent
    page.wait(lambda: page.view() == "error")
    assert "study.too-large" in page.text("error-detail")
    page.find("#error-home").click()
    page.answer()


def test_how_far_the_percentages_can_be_believed(page):
    page.answer()
    page.wait(lambda: page.find("#trust").is_displayed())
    assert not page.find("#trust-body").is_displayed()
    page.find("#trust summary").click()
    text = page.find("#trust-body").text.replace("\u00a0", " ")
    assert "Grader on openvino, INT8, measured on held-out patients" in text
    heads = reliability.of_engine(judged.ENGINE)
    for words in heads.words:
        assert words in text
    for drawn, head in zip(page.all(".reliability"), heads.heads, strict=True):
        assert len(drawn.find_elements(By.CSS_SELECTOR, "circle.after")) == len(head.after)
        assert len(drawn.find_elements(By.CSS_SELECTOR, "circle.before")) == len(head.before)
        counts = [e.text for e in drawn.find_elements(By.CSS_SELECTOR, "text")]
        assert all(str(b.count) in counts for b in head.after)
        # A point lies where its two shares are, on the same square as the dashed line.
        first = drawn.find_element(By.CSS_SELECTOR, "circle.after")
        true = drawn.find_element(By.CSS_SELECTOR, ".true")
        x, y, x1, y1, x2, y2 = (
            float(e.get_attribute(k)) for e, k in [(first, "cx"), (first, "cy"), *((true, k) for k in ("x1", "y1", "x2", "y2"))]
        )
        assert (x - x1) / (x2 - x1) == pytest.approx(head.after[0].confidence, abs=1e-6)
        assert (y - y1) / (y2 - y1) == pytest.approx(head.after[0].observed.value, abs=1e-6)
        assert drawn.get_attribute("aria-label").startswith("Of the ")
    assert "another bundle" not in text
    assert page.script("return document.documentElement.scrollWidth") <= 1024


def test_percentages_of_another_bundle_are_not_passed_for_this_one(page):
    IN_USE["digest"] = "f" * 64
    page.answer()
    page.wait(lambda: page.find("#trust").is_displayed())
    page.find("#trust summary").click()
    assert "This study was answered by another bundle; the figures are of the one in use now." in page.find("#trust-body").text


def test_a_bundle_of_before_shows_its_figures_without_a_diagram(page):
    model = {**judged.MODEL, "engines": {"openvino": judged.changed(judged.older)}}
    IN_USE["engines"] = reliability.engines({"grader": model}, {"grader": "openvino"})
    page.answer()
    page.wait(lambda: page.find("#trust").is_displayed())
    page.find("#trust summary").click()
    assert page.all(".reliability") == []
    text = page.find("#trust-body").text
    assert "Its percentages are off by" in text
    assert "No diagram: the bundle was compiled before reliability diagrams were recorded." in text
    IN_USE["engines"] = []  # and one that nothing judged shows nothing
    page.answer(1, "other.png")
    page.script("return fetch('/api/engines')")
    assert not page.find("#trust").is_displayed()


def test_a_reload_shows_the_study_and_the_history(page):
    page.answer(name="first.png")
    address = page.driver.current_url
    assert len(urlsplit(address).fragment) == 32
    page.driver.refresh()
    page.wait(page.loaded)
    assert "first.png" in page.text("banner-time")
    page.find("#go-home").click()
    page.send(picture(2), "<b>second.png")
    page.wait(page.loaded)
    page.find("#go-history").click()
    page.wait(lambda: len(page.all("#history li")) == 2)
    names = [e.text for e in page.all("#history .name")]
    assert names == ["<b>second.png", "first.png"]  # as text, not as markup
    assert [e.text for e in page.all("#history .tag")] == ["No answer", "Complete"]
    page.all("#history a")[1].click()
    page.wait(page.loaded)
    page.wait(lambda: "first.png" in page.text("banner-time"))
    page.driver.get(page.url + "/#" + "0" * 32)
    page.driver.refresh()
    page.wait(lambda: page.view() == "error")
    assert page.text("error-remedy")


def test_fits_the_screens_with_targets_for_fingers(page):
    for width, height in SIZES:
        page.size(width, height)
        page.driver.get(page.url + "/")
        page.wait(lambda: page.view() == "home")
        for view, shade, first in (("home", 0, ""), ("result", 0, "#discs button"), ("radiograph", 3, "#vertebrae button")):
            if first:
                page.answer(shade)
                page.wait(lambda first=first: page.all(first))
                page.script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", first)
                page.find(first).click()
            # Nothing runs over the side, and on the wide screens the result needs no scrolling of the page.
            assert page.script("return document.documentElement.scrollWidth") <= width, (view, width)
            if width > 720:
                assert page.script("return document.documentElement.scrollHeight") <= height, (view, width)
            disclaimer = page.script("const r = document.querySelector('.disclaimer').getBoundingClientRect(); return [r.top, r.bottom]")
            assert 0 <= disclaimer[0] < disclaimer[1] <= height
            code = """
                const targets = 'button, a.button, label.button, .switch, .slider input, summary, .history a';
                return [...document.querySelectorAll(targets)].filter(e => e.offsetParent !== null)
                    .map(e => [e.id || e.textContent.trim(), e.offsetWidth, e.offsetHeight])
                    .filter(([, w, h]) => w < 48 || h < 48)
            """
            assert page.script(code) == [], (view, width)


CONTRAST = """
const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
const light = ([r, g, b]) => { const f = (v) => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
  return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
const behind = (e) => { const c = parse(getComputedStyle(e).backgroundColor); return c[3] === 1 ? c : behind(e.parentElement); };
const out = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.textContent.trim() || e.closest('svg, noscript, .hidden, .stage-note') || e.offsetParent === null) continue;
  const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) out.push([walk.currentNode.textContent.trim(), ratio]);
}
return [walk.root.textContent.length, out];
"""


def test_every_text_can_be_read(page):
    for shade in (0, 1, 2, 3, 4):
        page.send(picture(shade), f"{shade}.png")
        page.wait(page.loaded)
        if page.all("#discs button"):
            page.find("#discs button").click()
        length, weak = page.script(CONTRAST)
        assert length > 500
        assert weak == []
        page.find("#go-home").click()
        page.wait(lambda: page.view() == "home" and page.all("#history li"))
        assert page.script(CONTRAST)[1] == []
