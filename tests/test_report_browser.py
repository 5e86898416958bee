"""The report page in a real browser: it draws, answers clicks, and asks the network for nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from fakes_run import SAMPLES, full_run, hostile_run
from nightpress.reports import write_report
from nightpress.reports.front import front, picks
from nightpress.search.records import RunRecord

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

pytestmark = pytest.mark.slow  # a page with its 5 MB of script takes a second or more to open

CHROMIUM = Path("/usr/bin/chromium")
NIGHT = full_run()


class Opened(NamedTuple):
    """A page with what it wrote to the console, what it asked for and what it raised."""

    page: "Page"
    complaints: list[str]
    requests: list[str]
    dialogs: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra 'test'")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser: "Browser", out: Path, *, scheme: str = "light") -> Opened:
    """Open a written report; it draws while it loads."""
    page = browser.new_page(
        viewport={"width": 1440, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
    )
    opened = Opened(page, [], [], [])
    page.on("console", lambda message: opened.complaints.append(message.text))
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on("request", lambda request: opened.requests.append(request.url))

    def dismiss(dialog: "Dialog") -> None:
        opened.dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.goto(out.as_uri())
    return opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report(NIGHT, out)
    return out


@pytest.fixture(scope="module")
def opened(browser: "Browser", report: Path) -> Iterator[Opened]:
    """One page for all tests that leave its theme as it was: opening it takes a second or more."""
    it = open_page(browser, report)
    yield it
    it.page.close()


def card(page: "Page") -> str:
    return page.locator("#trial").inner_text()


def test_page_draws_without_a_complaint_or_a_request(browser: "Browser", report: Path) -> None:
    it = open_page(browser, report)
    assert (it.complaints, it.requests) == ([], [report.as_uri()])
    # The first figure stands at once, the others follow.
    it.page.locator(".js-plotly-plot").nth(5).wait_for()
    assert it.page.locator(".js-plotly-plot").count() == 6
    # The default choice is what one sees first.
    best = picks(NIGHT)["best"]
    assert f"Trial {best.number}" in card(it.page)
    assert f"nightpress export runs/plates {best.number} --out DIR" in card(it.page)
    it.page.close()


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "full"])
def test_every_run_opens(browser: "Browser", tmp_path: Path, name: str) -> None:
    write_report(SAMPLES[name], tmp_path / "report.html")
    it = open_page(browser, tmp_path / "report.html")
    assert (it.complaints, it.requests) == ([], [(tmp_path / "report.html").as_uri()])
    assert it.page.locator("#trial-section").is_visible() is bool(SAMPLES[name].trials)
    it.page.close()


def test_a_click_on_a_point_shows_its_trial(opened: Opened) -> None:
    chosen = front(NIGHT)[0]
    assert chosen.number != picks(NIGHT)["best"].number
    place = opened.page.evaluate(
        """number => {
            const plot = document.getElementById("plot-front");
            plot.scrollIntoView({ block: "center" });
            for (const trace of plot.data) {
                const at = (trace.customdata || []).findIndex((custom) => custom[0] === number);
                if (at < 0) continue;
                const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
                const x = box.x + xaxis._offset + xaxis.d2p(trace.x[at]);
                return [x, box.y + yaxis._offset + yaxis.d2p(trace.y[at])];
            }
        }""",
        chosen.number,
    )
    opened.page.mouse.move(*place)
    opened.page.mouse.click(*place)
    opened.page.get_by_role("heading", name=f"Trial {chosen.number}", exact=True).wait_for()
    assert opened.page.locator("#choose").input_value() == str(chosen.number)
    assert opened.page.locator(f"tr.chosen[data-trial='{chosen.number}']").count() == 1
    assert opened.complaints == []


def test_every_trial_can_be_chosen(opened: Opened) -> None:
    chooser = opened.page.locator("#choose")
    values = chooser.locator("option").evaluate_all("options => options.map(option => option.value)")
    assert sorted(map(int, values)) == [trial.number for trial in NIGHT.trials]
    for trial in NIGHT.trials[:12]:
        chooser.select_option(str(trial.number))
        shown = card(opened.page)
        assert trial.digest in shown
        assert (trial.reason or "") in shown
        assert ("nightpress export" in shown) is (trial.state == "COMPLETE")
    assert opened.complaints == []


def test_the_arrows_walk_along_the_front(opened: Opened) -> None:
    numbers = [trial.number for trial in front(NIGHT)]
    opened.page.locator("#choose").select_option(str(numbers[-1]))
    opened.page.locator("#next").click()
    assert opened.page.locator("#choose").input_value() == str(numbers[0])
    opened.page.locator("#previous").click()
    assert opened.page.locator("#choose").input_value() == str(numbers[-1])


def test_layers_show_what_the_policy_keeps(opened: Opened) -> None:
    page = opened.page
    trial = next(t for t in NIGHT.trials if t.policy["removed_blocks"] and t.policy["prune"]["stem"] > 0)
    page.locator("#choose").select_option(str(trial.number))
    rows = page.locator(".layer")
    assert rows.count() == 20
    kept = round(16 * (1 - trial.policy["prune"]["stem"]))
    assert f"{kept} / 16" in rows.first.inner_text()
    assert page.locator(".layer.gone").count() == 2 * len(trial.policy["removed_blocks"])
    widths = rows.first.locator(".fill").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
    bits = trial.policy["bits"].get("stem", {"weights": 32})["weights"]
    assert widths == pytest.approx([100 * kept / 16, 100 * bits / 32])


def test_the_export_command_can_be_copied(opened: Opened) -> None:
    opened.page.get_by_role("button", name="Copy").click()
    # Where the clipboard is refused, the command is marked to be copied by hand.
    opened.page.get_by_role("button", name="Copied").or_(
        opened.page.get_by_role("button", name="Press Ctrl+C")
    ).wait_for()
    assert opened.complaints == []


def test_nothing_sticks_out_of_the_window(opened: Opened) -> None:
    for width in (390, 768, 1440):
        opened.page.set_viewport_size({"width": width, "height": 900})
        # Figures follow a moment later. (wait_for_function evaluates a text, which the page's policy forbids.)
        assert opened.page.evaluate(
            """async (width) => {
                const fits = (plot) => plot._fullLayout.width <= plot.clientWidth;
                for (let i = 0; i < 200 && !drawn.every(fits); i++) await new Promise((done) => setTimeout(done, 20));
                return drawn.every(fits) && document.documentElement.scrollWidth === width;
            }""",
            width,
        )


def test_theme_follows_the_system_and_is_light_on_paper(browser: "Browser", report: Path) -> None:
    it = open_page(browser, report, scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    font = "document.getElementById('plot-front').layout.font.color"
    dark = [it.page.evaluate(paper), it.page.evaluate(font)]
    it.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert it.page.evaluate("document.documentElement.dataset.theme") == "light"
    assert it.page.locator("details:not([open])").count() == 0
    it.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert [it.page.evaluate(paper), it.page.evaluate(font)] == dark
    it.page.locator("#theme").click()
    light = [it.page.evaluate(paper), it.page.evaluate(font)]
    assert dark == ["rgb(15, 19, 26)", "rgb(152, 164, 184)"]
    assert light == ["rgb(245, 246, 248)", "rgb(92, 103, 125)"]
    assert it.page.locator("#theme").inner_text() == "Dark"
    assert it.complaints == []
    it.page.close()


@pytest.mark.parametrize("attack", ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>"])
def test_hostile_names_do_nothing(browser: "Browser", tmp_path: Path, attack: str) -> None:
    night: RunRecord = hostile_run(attack)
    write_report(night, tmp_path / "report.html")
    it = open_page(browser, tmp_path / "report.html")
    for trial in (night.trials[0], night.trials[9], night.trials[-1]):
        it.page.locator("#choose").select_option(str(trial.number))
    it.page.locator("#plot-front .nsewdrag").first.hover()
    assert (it.dialogs, it.complaints, len(it.requests)) == ([], [], 1)
    assert attack in it.page.locator("#trial-title").inner_text()
    it.page.close()
