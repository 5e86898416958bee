"""A written page, opened in the browser of the fixture ``browser``."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page


class Opened(NamedTuple):
    """A page with what it wrote to the console, what it asked for and what it raised."""

    page: "Page"
    complaints: list[str]
    requests: list[str]
    dialogs: list[str]


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


def scroll_through(page: "Page") -> None:
    """Bring every figure into the window, and wait until it stands."""
    for place in page.locator(".plot").all():
        place.scroll_into_view_if_needed()
        page.locator(f"#{place.get_attribute('id')}.js-plotly-plot").wait_for()
