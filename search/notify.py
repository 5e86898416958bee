"""Word to whoever is away: a webhook and a command, both from the user's own config and never from a run's data."""

import json
import logging
import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .config import Notify

log = logging.getLogger("nightpress")
WEBHOOK_SECONDS, COMMAND_SECONDS = 10, 60


def notify(config: Notify, run: Path, event: str, text: str, **more: Any) -> None:
    """Tell ``event``: ``done``, ``interrupted``, ``failed`` or ``trouble``. What goes wrong is logged, never fatal.

    The webhook gets a JSON object by POST, whose ``text`` is a sentence for people, as Slack and Mattermost show it.
    The command runs in a shell; what it is told stands in its environment, so no text of ours becomes a word of it.
    """
    told = {"text": f"nightpress {run}: {text}", "event": event, "run": str(run), "host": socket.gethostname(), **more}
    if config.webhook is not None:
        _post(config.webhook, told)
    if config.command is not None:
        _run(config.command, told)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead anywhere: it counts as an error."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def _post(url: str, told: Mapping[str, Any]) -> None:
    host = urlsplit(url).hostname  # the path of a webhook is its password
    request = urllib.request.Request(
        url, json.dumps(told).encode(), {"Content-Type": "application/json", "User-Agent": "nightpress"}, method="POST"
    )
    opener = urllib.request.build_opener(_NoRedirect())
    try:
        with opener.open(request, timeout=WEBHOOK_SECONDS):
            pass
    except (OSError, ValueError, HTTPException) as error:  # HTTPError and URLError among them
        reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        log.warning("notify.webhook: %s does not take the message (%s)", host, reason)


def _run(command: str, told: Mapping[str, Any]) -> None:
    words = {f"NIGHTPRESS_{key.upper()}": str(told[key]) for key in ("text", "event", "run", "host")}
    try:
        done = subprocess.run(
            command, shell=True, env={**os.environ, **words}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("notify.command: %s", type(error).__name__)
        return
    if done.returncode:
        log.warning("notify.command: exit code %d: %s", done.returncode, done.stderr.strip()[-200:])
