"""Tables as files, and the report page as text."""

import json
import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fakes_run import (
    SAMPLES,
    START,
    big_run,
    hostile_run,
    limited,
    original,
    policy,
    run,
    trial,
    verify,
)
from nightpress.reports import page
from nightpress.reports.cards import packed
from nightpress.reports.figure_base import MOST_TRIALS
from nightpress.reports.figures import (
    front_info,
    front_text,
)
from nightpress.reports.html import embedded_json, unbroken, write_report
from nightpress.reports.page import why
from nightpress.reports.tables import COLUMNS, write_tables
from nightpress.reports.text import digits, duration, local_time, plain, size
from nightpress.reports.verdict import answer, doubts
from nightpress.search.records import RunRecord, TrialState, row
from nightpress.spaces.files import write_whole

ATTACK = "</script><script>alert(1)</script>"


# Words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.3278, "0.328"),
        (9.996, "10.0"),
        (12.34, "12.3"),
        (15234.6, "15,235"),
        (0, "0"),
        (math.nan, "–"),
        (-2.5, "-2.50"),
    ],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.25, "0.25 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (26_000, "7 h 13 min"),
        (None, "–"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(999, "999 bytes"), (1234, "1.23 kB"), (2e6, "2.00 MB")])
def test_size(value: float, text: str) -> None:
    assert size(value) == text


def test_times_keep_their_zone_and_nonsense_stays_readable() -> None:
    assert local_time("2026-11-21T22:30:00+09:00") == "2026-11-21 22:30:00"
    assert local_time("yesterday") == "yesterday"
    assert local_time(None) == "–"
    assert re.fullmatch(r"2026-11-2\d \d\d:\d\d:\d\d", local_time(START.timestamp()))


def test_plain_data_has_no_nan_and_no_foreign_types() -> None:
    data = {"a": (1, math.nan, {"b": math.inf}), 3: TrialState.FAILED, "p": Path("x"), "t": True, "n": None}
    assert plain(data) == {"a": [1, None, {"b": None}], "3": "FAILED", "p": "x", "t": True, "n": None}


def test_numbers_and_units_stay_on_one_line() -> None:
    text = unbroken("88.2 % ± 0.3 in 7 h 12 min, 3 trials")
    assert text.replace("\u00a0", "_") == "88.2_%_±_0.3 in 7_h 12_min, 3 trials"


# Tables


def read_back(folder: Path) -> tuple[Any, Any]:
    """trials.csv and trials.parquet as data frames."""
    dtypes: Any = COLUMNS
    return pd.read_csv(folder / "trials.csv", dtype=dtypes), pd.read_parquet(folder / "trials.parquet")


@pytest.mark.parametrize("night", SAMPLES.values(), ids=SAMPLES)
def test_tables_give_back_every_trial(night: RunRecord, tmp_path: Path) -> None:
    assert [path.name for path in write_tables(night, tmp_path)] == [
        "trials.csv",
        "trials.parquet",
        "front.csv",
        "baselines.csv",
    ]
    from_csv, from_parquet = read_back(tmp_path)
    pd.testing.assert_frame_equal(from_csv, from_parquet)
    assert dict(from_parquet.dtypes.astype(str)) == COLUMNS
    rows = from_parquet.astype(object).where(from_parquet.notna(), None).to_dict("records")
    for record, cells in zip(night.trials, rows, strict=True):
        assert {**cells, "policy": json.loads(cells["policy"])} == row(record)


def test_front_and_baselines_have_their_own_tables(tmp_path: Path) -> None:
    write_tables(run([original(0.9), trial(1, 0.9, 0.4, 100), trial(2, 0.8, 0.9)]), tmp_path)
    assert pd.read_csv(tmp_path / "front.csv")["trial"].tolist() == [1]
    assert pd.read_csv(tmp_path / "baselines.csv")["name"].tolist() == ["uncompressed"]


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_text_that_a_spreadsheet_would_run_is_made_text(start: str, tmp_path: Path) -> None:
    record = verify(trial(0, name=start, reason=start, digest="-4"), struck_out=start)
    write_tables(run([record]), tmp_path)
    from_csv, from_parquet = read_back(tmp_path)
    assert [from_csv[column][0] for column in ("name", "reason", "struck_out")] == [f"'{start}"] * 3
    assert from_csv["digest"][0] == "-4"
    assert from_parquet["name"][0] == start


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    write_whole(target, lambda beside: beside.write_text("first"))
    assert target.stat().st_mode & 0o777 == 0o644

    def fail(beside: Path) -> None:
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(target, fail)
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


# The page


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts.append(data)


@pytest.fixture(scope="module", params=SAMPLES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    night = SAMPLES[request.param]
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(night, out)
    return night, out


def test_page_is_one_small_file(written: tuple[RunRecord, Path]) -> None:
    _, out = written
    assert out.stat().st_size <= 6_000_000
    assert list(out.parent.iterdir()) == [out]


def test_page_loads_nothing(written: tuple[RunRecord, Path]) -> None:
    text = written[1].read_text(encoding="utf-8")
    for _, attributes in Page(text).tags:
        assert not {"src", "srcset", "action", "data"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import", style)
    assert "default-src 'none'" in text


def test_page_has_the_verdict_and_its_data(written: tuple[RunRecord, Path]) -> None:
    night, out = written
    text = out.read_text(encoding="utf-8")
    for sentence in (*answer(night), *doubts(night)):
        assert unbroken(sentence) in unescape(text)
    shown = Page(text)
    data = json.loads(shown.scripts[0])
    assert [card["trial"] for card in data["trials"]] == [t.number for t in night.trials]
    assert len([tag for tag, _ in shown.tags if tag == "script"]) == 3


@pytest.mark.parametrize("attack", [ATTACK, "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "<!--"])
def test_names_cannot_become_markup(attack: str, tmp_path: Path) -> None:
    write_report(hostile_run("name"), tmp_path / "a.html")
    write_report(hostile_run(attack), tmp_path / "b.html")
    harmless, seen = (Page((tmp_path / name).read_text(encoding="utf-8")) for name in ("a.html", "b.html"))
    assert [tag for tag, _ in seen.tags] == [tag for tag, _ in harmless.tags]
    # Reading the data gives the very name: it was escaped, not dropped.
    assert json.loads(seen.scripts[0])["trials"][0]["name"] == attack


def test_embedded_json_has_no_character_that_html_reads() -> None:
    data = {"<&>": "\u2028\u2029 </script> \ud800"}
    text = embedded_json(data)
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()
    assert json.loads(text) == data


def test_a_name_that_is_no_unicode_does_not_stop_the_page(tmp_path: Path) -> None:
    write_report(run([trial(0, name="odd \ud800 name")]), tmp_path / "report.html")
    assert "odd ? name" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_long_night_in_a_large_space_fits_with_every_detail(tmp_path: Path) -> None:
    night = big_run(2000, 120)
    write_report(night, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size <= 6_000_000
    cards = packed(night).cards
    assert len(cards) == 2000
    assert not any("brief" in card for card in cards)


@pytest.mark.slow
def test_many_trials_fit_into_the_page(tmp_path: Path) -> None:
    how = policy({f"layer{i}": 0.25 for i in range(300)})
    night = run(
        [trial(n, 0.9 - n / 1e5, 0.4 + n / 1e4, reason="x" * 3000, policy=how) for n in range(MOST_TRIALS + 200)]
    )
    write_report(night, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size <= 6_000_000
    cards = packed(night).cards
    assert len(cards) == MOST_TRIALS
    assert (cards[0]["trial"], "brief" in cards[0], "brief" in cards[-1]) == (0, False, True)
    assert "1,700 trials more are not drawn." in front_text(front_info(night))


def test_export_command_quotes_the_folder() -> None:
    night = replace(run(), path=Path("my runs/it's"))
    command = page.script_data(night, [])["commands"]
    assert command == {"before": """nightpress export 'my runs/it'"'"'s' """, "after": " --out DIR"}


def test_trials_that_did_not_complete_are_listed_with_their_reasons() -> None:
    records = [
        trial(0, state=TrialState.STOPPED, reason="dominated"),
        trial(1, state=TrialState.FAILED, reason="x" * 500),
        trial(2, state=TrialState.FAILED),
    ]
    failed, stopped = page.unfinished(run(records))
    assert (failed.state, failed.number, failed.rows[1]) == (
        "FAILED",
        2,
        (2, "trial 2", "no reason recorded"),
    )
    assert len(failed.rows[0][2]) == 401
    assert stopped.rows == ((0, "trial 0", "dominated"),)


def test_evidence_of_a_decision_is_written_out() -> None:
    entry = {
        "time": None,
        "phase": "search",
        "decision": {"rungs": [1, 2]},
        "evidence": {"a": {"b": 1}, "c": "d"},
    }
    assert page.decision_row(entry) == {
        "time": "–",
        "phase": "search",
        "decision": '{"rungs": [1, 2]}',
        "reason": "",
        "evidence": "a.b: 1, c: d",
    }


def test_without_limits_a_pick_is_said_to_keep_the_rule() -> None:
    night = run([original(0.9), trial(1, 0.895, 0.3, 250_000)])
    assert why(night, "best") == "the fastest within 1.0 point of the uncompressed model's accuracy"
    assert why(limited(list(night.trials), min_accuracy=0.8), "best") == (
        "the fastest within the limits (accuracy of at least 80.0 %)"
    )
    assert why(night, "most accurate") == "the most accurate point of the front"
