"""How long does the report of a long night take to build, and its first picture to stand in Chromium?

    python benchmarks/report.py                     # 2,000 trials of 120 dimensions
    python benchmarks/report.py old.html new.html   # written pages beside each other, in turns
    python benchmarks/report.py --busy 2            # while so many other processes keep the cores busy

Every opening has a browser of its own, so that nothing is cached. Times are from the start of the navigation to the end
of the frame that shows it: the words, the points of the front's picture, and the list of all trials.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nightpress.reports import write_report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from fakes_run import big_run

if TYPE_CHECKING:
    from playwright.sync_api import BrowserType

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
PARTS = ("first words", "first picture", "list of trials")
WATCH = """(() => {
    const signs = { "first picture": "#plot-front .points path.point", "list of trials": "#choose option" };
    window.seen = {};
    const look = () => {
        for (const [part, selector] of Object.entries(signs))
            if (!(part in seen) && document.querySelector(selector)) {
                seen[part] = null;
                setTimeout(() => (seen[part] = performance.now()));
            }
        if (Object.keys(seen).length < 2) requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
})()"""
READ = """async () => {
    while (Object.values(seen).filter(Boolean).length < 2) await new Promise((done) => setTimeout(done, 20));
    return [performance.getEntriesByName("first-contentful-paint")[0].startTime, ...%s.map((part) => seen[part])];
}"""


def build(folder: Path) -> Path:
    """Write the page of a long night; print how long it took and what it weighs."""
    night = big_run(2000, 120)
    start = time.perf_counter()
    out = folder / "report.html"
    write_report(night, out)
    print(f"built in {time.perf_counter() - start:.1f} s, {out.stat().st_size / 1e6:.2f} MB")
    return out


def open_once(chromium: "BrowserType", page: Path) -> list[float]:
    """Milliseconds until each of PARTS stands."""
    browser = chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    tab.add_init_script(WATCH)
    tab.goto(page.as_uri())
    found = tab.evaluate(READ % list(PARTS[1:]))
    browser.close()
    return found


def spin() -> None:
    while True:
        pass


@contextmanager
def busy(processes: int) -> Generator[None]:
    """So many processes that compute without end."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=spin, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    yield
    for process in started:
        process.terminate()


def measure(pages: Sequence[Path], rounds: int) -> None:
    """Open the pages in turns; print the median and the range of each part."""
    from playwright.sync_api import sync_playwright

    times: dict[Path, list[list[float]]] = {page: [] for page in pages}
    with sync_playwright() as playwright:
        for page in pages:
            open_once(playwright.chromium, page)  # the browser's own files come into memory
        for _ in range(rounds):
            for page in pages:
                times[page].append(open_once(playwright.chromium, page))
    for page, rows in times.items():
        columns = zip(PARTS, zip(*rows, strict=True), strict=True)
        said = [f"{part} {statistics.median(ms):.0f} ({min(ms):.0f} to {max(ms):.0f})" for part, ms in columns]
        print(f"{page.name}, {rounds} times, ms: {', '.join(said)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first picture of a report.")
    parser.add_argument("pages", nargs="*", type=Path, help="written pages instead of a new one")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--busy", type=int, default=0, help="processes that keep the cores busy meanwhile")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages = [page.resolve() for page in given.pages] or [build(Path(folder))]
        with busy(given.busy):
            measure(pages, given.rounds)


if __name__ == "__main__":
    main()
