"""The HTML report: what it holds, and how it behaves in a real browser."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from kvq_core.bench.charts import Axis, Dot, Scale, Series, bars, chart, nice, short
from kvq_core.bench.compare import compare_records
from kvq_core.bench.html import page


def sweep(bench):
    """int4 is slower than none at 1 request and quicker at 8, at both contexts."""
    records = []
    for name, number, speeds in (("none", 0, (1.0, 1.0)), ("int4", 4, (0.9, 1.4))):
        for context in (64, 512):
            for concurrency, speed in zip((1, 8), speeds, strict=True):
                record = bench.record(
                    name,
                    number,
                    speed=speed * concurrency,
                    concurrency=concurrency,
                    workload={"input_len": context, "mean_input_len": context, "mean_output_len": 5},
                    env={"command": "kvq compare <script>alert(1)</script>", "git_sha": "abcdef0123456"},
                )
                record.quantiles.update(
                    ttft=[5.0 + i for i in range(101)], itl=[1.0 + i / 50 for i in range(101)]
                )
                record.timeline.update(time_s=[0.0, 1.0, 2.0], kv_tokens=[0, 400, 90], waiting=[3, 1, 0])
                records.append(record)
    return records


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.0, 110.0, [1, 2, 5, 10, 20, 50, 100]),
        (1030.0, 1960.0, [1200, 1400, 1600, 1800]),
        (60.0, 110.0, [60, 70, 80, 90, 100, 110]),
        (101.0, 103.0, [101, 101.5, 102, 102.5, 103]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low, high, ticks):
    """However narrow the range, there are several."""
    assert Scale(low, high, True, 0, 100).ticks() == pytest.approx(ticks)


@pytest.fixture
def report(bench):
    quality = [bench.record("none", 0), bench.record("int4", 4), bench.record("qjl", None)]
    for record, bits, kl in zip(quality, (16.0, 4.5, 3.2), (0.0, 0.1, 0.5), strict=True):
        record.metrics.update(kl=kl, ppl=20 + kl)
        record.kv["bits_per_element"] = bits
    comparison = compare_records(sweep(bench))
    return page(comparison, advice=["recommended: 4 int4"], warnings=["<odd>"], quality=quality)


def test_nothing_from_outside_and_nothing_unescaped(report):
    assert not re.search(r"(src|href)=|@import|url\(|https?://(?!www\.w3)", report)
    assert "alert(1)" in report and "<script>alert" not in report and "&lt;odd&gt;" in report
    assert len(report) < 300_000


def test_every_part_is_there(report):
    for text in (
        "Throughput against latency", "TTFT (markers", "ITL (markers", "tokens in the cache", "Memory",
        "KL divergence", "break-even", "abcdef0123", "Recommended: 4 int4", "context 512",
        "prefers-color-scheme", "@media print",
    ):  # fmt: skip
        assert text in report, text
    depth: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br", "path", "line", "polyline", "rect"):
                depth.append(tag)

        def handle_endtag(self, tag):
            if tag in ("path", "line", "polyline", "rect"):
                return
            assert depth.pop() == tag

    Balance().feed(report)
    assert not depth


def test_every_chart_is_well_formed(report):
    charts = re.findall(r"<svg.*?</svg>", report, re.DOTALL)
    assert len(charts) > 20
    for text in charts:
        for node in ET.fromstring(text).iter():
            for value in node.attrib.values():
                assert "nan" not in value and "inf" not in value


def test_a_single_record_without_distributions(bench):
    text = page(compare_records([bench.record()]))
    assert "Throughput against latency" in text and "TTFT (markers" not in text and "break-even" not in text


def test_scales():
    assert [nice(span, 5) for span in (1, 7, 99, 0.3)] == [0.2, 2, 20, 0.1]
    assert [short(value) for value in (0.05, 12, 1500, 2e6)] == ["0.05", "12", "1.5k", "2M"]
    assert chart("empty", Axis("x"), Axis("y"), [Series(0, [])]) == "" == bars("none", [])
    flat = chart("flat", Axis("x", log=True), Axis("y"), [Series(0, [Dot(3, 0, "tip", "label"), Dot(3, 0)])])
    assert "tip" in flat and "nan" not in flat


@pytest.fixture
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.mark.browser
def test_in_a_browser(report, tmp_path, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    def find(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def style(name):
        return browser.execute_script(f"return getComputedStyle(document.body).{name}")

    def scheme(media="", value="light"):
        features = [{"name": "prefers-color-scheme", "value": value}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    file = tmp_path / "report.html"
    file.write_text(report, "utf-8")
    scheme()
    browser.get(file.as_uri())
    seen = [chart for chart in find("figure svg") if chart.is_displayed()]
    assert len(seen) >= 9 and all(chart.size["width"] > 250 and chart.size["height"] > 60 for chart in seen)

    # Policies
    button = find("button[data-toggle='1']")[0]
    lines = [part for part in find("[data-series='1']") if part.is_displayed()]
    assert button.text == "4 int4" and lines
    button.click()
    assert not any(part.is_displayed() for part in lines) and button.get_attribute("aria-pressed") == "false"
    assert any(part.is_displayed() for part in find("[data-series='0']"))
    button.click()
    assert all(part.is_displayed() for part in lines)

    # Views
    views = {view.get_attribute("data-name"): view for view in find("[data-view='cdf']")}
    assert set(views) == {"64-1", "64-8", "512-1", "512-8"}
    assert [name for name, view in views.items() if view.is_displayed()] == ["512-8"]
    find("button[data-group='cdf'][data-show='64-1']")[0].click()
    assert [name for name, view in views.items() if view.is_displayed()] == ["64-1"]

    # Hovering
    marker = next(part for part in find("[data-view='trade'] path[data-tip]") if part.is_displayed())
    ActionChains(browser).move_to_element(marker).perform()
    tip = find("#tip")[0]
    assert tip.is_displayed() and "output tok/s" in tip.text

    # Light, dark, print, and a telephone
    def brightness(color):
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    assert brightness(style("backgroundColor")) > 200 > 100 > brightness(style("color"))
    scheme(value="dark")
    assert brightness(style("backgroundColor")) < 60 < 180 < brightness(style("color"))
    scheme("print", "dark")
    assert brightness(style("backgroundColor")) == 255 and brightness(style("color")) == 0
    scheme()
    metrics = {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 380
    assert browser.get_log("browser") == []
