"""The report in headless Chromium: it draws, reports no error, and goes from a run to a layer to a step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from hecate.report import html, levels
from tests.report.synthetic import EXPERTS, LAYERS, profiled, run

pytest.importorskip("plotly", reason="plotly is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(DRIVER is None, reason="chromedriver is not installed (Debian: chromium-driver)")
STEPS = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two runs; the map of the first has 30 columns of two steps when it is whole."""
    root = tmp_path_factory.mktemp("browser")
    folders = [run(root / "one", STEPS), run(root / "two", STEPS // 2)]
    profiled(folders[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hecate.report.page.OVERVIEW", 30)
        patch.setattr(levels, "STEP_CELLS", 10 * LAYERS * (EXPERTS + 8))
        path = html(folders, root / "report.html")
    browser.get(path.as_uri())
    wait(browser, "return document.body.dataset.ready === '1'")
    return browser


def wait(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 120, poll_frequency=0.2).until(lambda driver: driver.execute_script(condition))


def drag(browser: Any, plot: str, begin: float, end: float | None = None) -> None:
    """Press at `begin` of the width of a plot's area, release at `end`; without it, click."""
    from selenium.webdriver import ActionChains

    area = browser.execute_script(
        f"const plot = document.getElementById('{plot}'); plot.scrollIntoView({{ block: 'center' }});"
        "const size = plot._fullLayout._size, box = plot.getBoundingClientRect();"
        "return [box.left + size.l, box.top + size.t + size.h / 2, size.w];"
    )
    mouse = ActionChains(browser)
    mouse.w3c_actions.pointer_action.move_to_location(int(area[0] + begin * area[2]), int(area[1]))
    mouse.pause(0.3)
    if end is None:
        mouse.click()
    else:
        mouse.w3c_actions.pointer_action.pointer_down()
        mouse.w3c_actions.pointer_action.move_to_location(int(area[0] + end * area[2]), int(area[1]))
        mouse.pause(0.3)
        mouse.w3c_actions.pointer_action.pointer_up()
    mouse.perform()


def value(browser: Any, expression: str) -> Any:
    return browser.execute_script(f"return {expression}")


def test_all_views_are_drawn_without_an_error(page: Any) -> None:
    plots = value(page, "[...document.querySelectorAll('.plot')].map((p) => [p.id, (p.data ?? []).length])")
    assert len(plots) == 9 + 2 + 11, plots  # charts, a chart of kinds for each run, and the other views
    assert all(traces for _, traces in plots), plots
    assert value(page, "document.getElementById('chart0').data.filter((t) => t.showlegend).map((t) => t.name)") == [
        "one",
        "two",
    ]
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_zooming_goes_from_the_run_to_a_layer_to_a_step(page: Any) -> None:
    assert value(page, "document.getElementById('map').data[0].z[0].length") == STEPS // 2
    drag(page, "map", 0.25, 0.5)
    wait(page, "return document.getElementById('map').data[0].z[0].length < 20")
    columns, first, last = value(
        page, "(d => [d.z[0].length, d.x[0], d.x.at(-1)])(document.getElementById('map').data[0])"
    )
    assert columns == last - first, "after zooming there is a column per step"
    assert 14 <= first <= 17
    assert 29 <= last <= 32
    drag(page, "map", 0.5)  # the layer in the middle, at the step in the middle
    wait(page, "return location.hash.includes('layer=1')")
    wait(page, "return document.getElementById('loads').layout.title.text.includes('layers.1')")
    assert value(page, "document.getElementById('loads').data[0].z.length") == EXPERTS
    drag(page, "loads", 0.9)
    wait(page, "return Number(new URLSearchParams(location.hash.slice(1)).get('step')) > 45")
    step = value(page, "Number(new URLSearchParams(location.hash.slice(1)).get('step'))")
    assert step in value(page, "meta.runs[0].steps")
    wait(page, "return !document.getElementById('step-hint').textContent.startsWith(' ')")
    bars = "object(0, `step${state.step}`).then((d) => d.loads[1])"
    exact = page.execute_async_script(f"const done = arguments[0]; {bars}.then(done)")
    wait(page, f"return document.getElementById('expert-bars').data[0].y.join() === '{','.join(map(str, exact))}'")
    assert value(page, "document.getElementById('timeline').data.map((t) => t.name)") == ["gather"]
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_another_run_can_be_opened(page: Any) -> None:
    page.execute_script(
        "const p = document.getElementById('pick-run'); p.value = 1; p.dispatchEvent(new Event('change'))"
    )
    wait(page, f"return document.getElementById('map').data[0].x.at(-1) === {STEPS // 2 + 0.5}")
    wait(page, "return document.getElementById('timeline-box').hidden")
    assert value(page, "document.getElementById('no-timeline').hidden") is False
