"""The report page in a real browser: it draws, answers clicks, and asks the network for nothing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browsing import Opened, open_page, scroll_through
from fakes_run import SAMPLES, full_run, hostile_run
from nightpress.reports import candidates, point, write_report
from nightpress.reports.figures import panels
from nightpress.reports.front import front, picks
from nightpress.search.records import RunRecord

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow  # a page with its 5 MB of script takes a second or more to open

NIGHT = full_run()
DRAWN = 8
"""Figures of that night: all but the staircase, which its target did not measure."""


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
    # The front stands at once, the others when they come near the window.
    assert it.page.locator("#plot-front.js-plotly-plot").count() == 1
    assert it.page.locator("#plot-seconds.js-plotly-plot").count() == 0
    scroll_through(it.page)
    assert it.page.locator(".js-plotly-plot").count() == DRAWN
    assert it.complaints == []
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


def test_arrow_keys_walk_along_the_front_in_the_picture(opened: Opened) -> None:
    numbers = [trial.number for trial in front(NIGHT)]
    opened.page.locator("#plot-front").focus()
    opened.page.keyboard.press("End")
    assert opened.page.locator("#choose").input_value() == str(numbers[-1])
    opened.page.keyboard.press("Home")
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.locator("#choose").input_value() == str(numbers[1])
    opened.page.keyboard.press("ArrowLeft")
    assert opened.page.locator("#choose").input_value() == str(numbers[0])


def test_every_control_is_reached_and_named_by_the_keyboard(opened: Opened) -> None:
    nameless = opened.page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, a[href], [tabindex='0']")]
            .filter((part) => !part.closest("[hidden]") && !part.closest(".modebar"))
            .filter((part) => part.tabIndex < 0 || !(part.textContent.trim() || part.getAttribute("aria-label")
                || (part.labels && part.labels.length)))
            .map((part) => part.outerHTML.slice(0, 80))"""
    )
    assert nameless == []


def points_of(page: "Page") -> dict[str, list[float]]:
    """What the front's picture shows of each trial: across, accuracy in %, opacity."""
    return page.evaluate(
        """() => Object.fromEntries(document.getElementById("plot-front").data
            .filter((trace) => trace.customdata)
            .flatMap((trace) => trace.customdata.map((custom, i) =>
                [custom[0], [trace.x[i], trace.y[i], trace.marker.opacity[i]]])))"""
    )


def test_limits_can_be_tried_and_reset(opened: Opened) -> None:
    page = opened.page
    page.locator("#max-latency").fill("0.3")
    page.locator("#min-accuracy").fill("80")
    shown = points_of(page)
    assert {tuple(opacity for *_, opacity in shown.values() if opacity not in {1, 0.3})} == {()}
    for ms, percent, opacity in shown.values():
        assert (opacity == 1) is (ms <= 0.3 and percent >= 80 - 1e-7)
    allowed = [
        t for t in candidates(NIGHT) if (found := point(t)) and found.latency_ms <= 0.3 and found.accuracy >= 0.8 - 1e-9
    ]
    assert f"{len(allowed)} of {len(candidates(NIGHT))} comparable points" in page.locator("#within").inner_text()
    shapes = page.evaluate("document.getElementById('plot-front').layout.shapes.map((s) => [s.x0, s.y1])")
    assert shapes == [[0.3, 1], [0, 80]]
    page.locator("#max-latency").fill("0.0001")
    assert page.locator("#within").inner_text().startswith("0 of ")
    page.get_by_role("button", name="Reset", exact=True).click()
    # The config's own limit is what the picture started with.
    assert page.locator("#max-latency").input_value() == "0.8"
    page.wait_for_timeout(50)
    assert not page.locator("#within").inner_text().startswith("0 of ")
    assert opened.complaints == []


def test_what_stands_across_and_the_third_value_can_be_switched(opened: Opened) -> None:
    page = opened.page
    sizes = {str(t.number): found.size_bytes for t in NIGHT.trials if (found := point(t))}
    page.locator("#across").select_option("size_bytes")
    assert {n: x for n, (x, *_) in points_of(page).items()} == pytest.approx(
        {n: sizes[n] / 1000 for n in points_of(page)}, rel=1e-5
    )
    assert page.evaluate("document.getElementById('plot-front').layout.xaxis.title.text") == "size, kB"
    page.locator("#third").select_option("area")
    widths = page.evaluate(
        "document.getElementById('plot-front').data.find((t) => t.name === 'predicted' && t.customdata).marker.size"
    )
    assert len(set(widths)) > 3
    page.locator("#across").select_option("macs")
    page.get_by_role("button", name="Reset", exact=True).click()
    page.wait_for_timeout(50)
    assert page.evaluate("document.getElementById('plot-front').layout.xaxis.title.text") == "latency, ms"
    assert opened.complaints == []


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


def test_the_card_says_why_a_finalist_is_as_it_is(opened: Opened) -> None:
    best = picks(NIGHT)["best"]
    opened.page.locator("#choose").select_option(str(best.number))
    shown = card(opened.page)
    first, fourth = (NIGHT.why or {})[str(best.number)][0], (NIGHT.why or {})[str(best.number)][3]
    assert "Why this policy" in shown
    row = opened.page.get_by_role("row", name=f"width of {first['name']}:")
    assert row.locator("td").all_inner_texts() == [
        f"width of {first['name']}: {100 * first['choice']:.0f} % less", "0.046", "0.4", "0"
    ]  # fmt: skip
    assert fourth["sensitivity"] is None
    assert "0.0085 pred." in shown
    opened.page.locator("#choose").select_option(str(next(t.number for t in NIGHT.trials if t.verified is None)))
    assert "Why this policy" not in card(opened.page)
    assert opened.complaints == []


def test_the_card_says_at_how_many_times_its_rate_a_finalist_was_trained_long(
    browser: "Browser", tmp_path: Path
) -> None:
    best = picks(NIGHT)["best"]
    assert best.verified is not None
    for rate in (1.0, 2.5):
        trained = replace(best, verified=replace(best.verified, rate=rate))
        write_report(replace(NIGHT, trials=(trained,)), tmp_path / f"{rate}.html")
        it = open_page(browser, tmp_path / f"{rate}.html")
        assert ("2.50 times that learning rate" in card(it.page)) is (rate == 2.5)
        assert ("times that learning rate" in card(it.page)) is (rate != 1)
        it.page.close()


def test_the_export_command_can_be_copied(opened: Opened) -> None:
    opened.page.get_by_role("button", name="Copy").click()
    # Where the clipboard is refused, the command is marked to be copied by hand.
    opened.page.get_by_role("button", name="Copied").or_(
        opened.page.get_by_role("button", name="Press Ctrl+C")
    ).wait_for()
    assert opened.complaints == []


def test_nothing_sticks_out_of_the_window(opened: Opened) -> None:
    scroll_through(opened.page)
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


@pytest.mark.parametrize(
    "attack",
    ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"'><b onclick='alert(1)'>", "א ‮ ب"],
)
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


def test_a_name_of_ten_thousand_letters_does_not_widen_the_page(browser: "Browser", tmp_path: Path) -> None:
    write_report(hostile_run("long" * 2500), tmp_path / "report.html")
    it = open_page(browser, tmp_path / "report.html")
    it.page.set_viewport_size({"width": 390, "height": 844})
    scroll_through(it.page)
    assert it.page.evaluate("document.documentElement.scrollWidth") == 390
    assert it.complaints == []
    it.page.close()


def test_the_page_prints_whole_on_few_pages(browser: "Browser", report: Path) -> None:
    it = open_page(browser, report, scheme="dark")
    pages = it.page.pdf(format="A4").count(b"/Type /Page\n")
    # Nobody scrolled to the last figures, and they are on paper all the same.
    assert it.page.locator(".js-plotly-plot").count() == DRAWN
    assert 3 < pages <= 9
    it.page.emulate_media(media="print")
    it.page.set_viewport_size({"width": 710, "height": 1000})
    it.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    sticking_out = it.page.evaluate(
        """() => [...document.querySelectorAll(".card, .card table, .plot .main-svg, pre, code")]
            .filter((part) => part.getBoundingClientRect().right > innerWidth || part.scrollWidth > innerWidth)
            .map((part) => part.outerHTML.slice(0, 80))"""
    )
    assert sticking_out == []
    it.page.evaluate("dispatchEvent(new Event('afterprint'))")
    heights = "Object.fromEntries(drawn.map((plot) => [plot.id, plot._fullLayout.height]))"
    assert it.page.evaluate(heights) == {f"plot-{p.key}": p.figure.layout.height for p in panels(NIGHT) if p.figure}
    assert it.complaints == []
    it.page.close()


def contrast(page: "Page", selector: str) -> float:
    """WCAG contrast of an element's text with the nearest opaque background behind it."""
    return page.evaluate(
        """(selector) => {
            const channels = (text) => text.match(/[\\d.]+/g).map(Number);
            const light = (text) => {
                const [r, g, b] = channels(text).map((v) => v / 255)
                    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const part = document.querySelector(selector);
            let behind = part;
            const clear = (at) => channels(getComputedStyle(at).backgroundColor)[3] === 0;
            while (behind.parentElement && clear(behind)) behind = behind.parentElement;
            const [a, b] = [getComputedStyle(part).color, getComputedStyle(behind).backgroundColor].map(light);
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }""",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(browser: "Browser", report: Path, scheme: str) -> None:
    it = open_page(browser, report, scheme=scheme)
    parts = ["h1", ".facts", ".findings li", ".doubts li", ".doubts h2", ".label", ".tag", "#theme", ".contents a"]
    parts += [".how", ".controls label", ".layers .bits.low", ".layers .count", "code", "footer", ".state"]
    assert {part: contrast(it.page, part) for part in parts if contrast(it.page, part) < 4.5} == {}
    it.page.close()


def test_a_report_without_review_has_no_button_and_may_not_connect(opened: Opened, report: Path) -> None:
    assert opened.page.locator("[data-review]").count() == 0
    text = report.read_text(encoding="utf-8")
    assert "connect-src" not in text.split("</head>")[0]
    assert "reviewControls(trial)" not in text.replace("data.review ? reviewControls(trial) : null", "")
