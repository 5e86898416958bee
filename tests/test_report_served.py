"""The report as nightpress review serves it, and the comparison of runs, in a real browser."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from browsing import open_page
from fakes_run import full_run, hostile_run
from nightpress.reports import ReviewLinks, page_html, write_comparison
from nightpress.reports.front import picks

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow  # a page with its 5 MB of script takes a second or more to open

NIGHT = full_run()


class Served(NamedTuple):
    """A server's address, and what pages told it."""

    url: str
    told: list[dict[str, Any]]


# Review


@pytest.fixture
def server() -> Iterator[Served]:
    """A server of the review page on loopback, which keeps what it is told."""
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            links = ReviewLinks(url="/review", token="secret", who="ann")
            self.answer(200, page_html(NIGHT, review=links).encode(), "text/html; charset=utf-8")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.append({**body, "token": self.headers["X-Nightpress-Token"]})
            if body["note"] == "refuse":
                self.answer(409, b'{"error": "Trial 7 has another digest by now."}', "application/json")
            else:
                self.answer(200, json.dumps({**body, "who": "ann", "time": 0}).encode(), "application/json")

        def answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a test's output is its own."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield Served(f"http://127.0.0.1:{httpd.server_port}/", told)
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_word_is_sent_to_the_server_and_shown(browser: "Browser", server: Served) -> None:
    page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    best = picks(NIGHT)["best"]
    for action, name, shown in [
        ("pick", "Pick", "Approved by ann: looks right"),
        ("reject", "Reject", "Rejected by ann: looks right"),
        ("note", "Keep note", "Note by ann: looks right"),
    ]:
        page.locator("#review-note").fill("looks right")
        page.get_by_role("button", name=name, exact=True).click()
        page.locator(f".said-{action}").wait_for()
        assert page.locator(f".said-{action}").inner_text() == shown
        sent = {"trial": best.number, "digest": best.digest, "action": action, "note": "looks right", "token": "secret"}
        assert server.told[-1] == sent
    page.locator("#review-note").fill("refuse")
    page.get_by_role("button", name="Pick", exact=True).click()
    page.get_by_text("Trial 7 has another digest by now.").wait_for()
    assert complaints == []
    page.close()


# Comparison


def test_the_comparison_opens_and_draws(browser: "Browser", tmp_path: Path) -> None:
    other = replace(hostile_run("</script><script>alert(1)</script>"), path=Path("runs/<b>other"))
    write_comparison([NIGHT, other], tmp_path / "compare.html")
    it = open_page(browser, tmp_path / "compare.html")
    it.page.locator(".js-plotly-plot").wait_for()
    assert (it.complaints, it.dialogs, len(it.requests)) == ([], [], 1)
    for width in (390, 1440):
        it.page.set_viewport_size({"width": width, "height": 900})
        assert it.page.evaluate("document.documentElement.scrollWidth") == width
    it.page.locator("#theme").click()
    assert it.page.locator("#theme").inner_text() == "Light"
    it.page.close()
