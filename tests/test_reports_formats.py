"""The report in its other formats, as files and through the command line; runs that are damaged or bare."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from fakes_run import SAMPLES, empty_run, full_run, hostile_run, limited, run, trial
from nightpress.reports import FORMATS
from nightpress.reports.images import write_images
from nightpress.reports.markdown import markdown
from nightpress.search.folder import read_run
from nightpress.search.records import RunRecord
from nightpress.search.store import JOURNAL
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import Policy

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with three complete trials and nothing else."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({"task": "t", "limits": {}, "search": {"storage": None}}))
    (path / "state.json").write_text(json.dumps({"state": "done", "phase": "report"}))
    for ratio in (0.0, 0.25, 0.5):
        tiny.add_trial(path, Policy(model="m", prune={"a": ratio}))
    return path


# Markdown


@pytest.mark.parametrize("night", [*SAMPLES.values(), hostile_run("a | b")], ids=[*SAMPLES, "pipes in names"])
def test_markdown_has_the_words_and_the_tables(night: RunRecord) -> None:
    text = markdown(night)
    for heading in ("What you get", "What to distrust", "Picks", "The front", "Baselines", "Decisions", "Environment"):
        assert f"\n## {heading}\n" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in {5, 10} for line in rows)


def test_markdown_of_names_is_no_markup() -> None:
    text = markdown(hostile_run("</script> | *a* [b](c) `d`\n# e"))
    assert "</script>" not in text.replace("\\<", "")
    assert "\n# e" not in text
    assert re.search(r"(?<!\\)[*`\[]a?", text.replace("**", "")) is None


# Files


def test_every_format_writes_what_it_says(tmp_path: Path) -> None:
    for name in ("html", "md", "csv", "parquet"):
        out = tmp_path / FORMATS[name].default
        assert FORMATS[name].write(full_run(24), out) == [out]
        assert out.stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<svg")])
def test_pictures_are_drawn_in_the_systems_browser(tmp_path: Path, kind: str, start: bytes) -> None:
    pytest.importorskip("kaleido", reason="kaleido is in the extra 'figures'")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed: apt-get install chromium")
    files = write_images(full_run(24), tmp_path / f"front.{kind}", kind)
    assert files == [tmp_path / f"front.{kind}"]
    assert files[0].read_bytes().startswith(start)


def test_a_run_without_a_picture_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no figure to draw: no trial of the run is known in full"):
        write_images(empty_run(), tmp_path / "front.png", "png")


# The command line


def test_formats_through_the_command_line(cli: tiny.Cli, folder: Path, tmp_path: Path) -> None:
    data = cli("report", folder, "--format", "md", "--json").json
    assert data["files"] == [str(folder / "report.md")]
    assert (folder / "report.md").read_text().startswith("# run\n")
    assert cli("report", folder, "--format", "csv", "--out", tmp_path / "t.csv").code == 0
    assert cli("report", folder, "--out", tmp_path / "r.md").code == 0
    assert (tmp_path / "r.md").read_text().startswith("# ")
    assert (tmp_path / "t.csv").read_text().count("\n") == 4
    sentence = tiny.refused(cli("report", folder, "--format", "pdf"))
    assert sentence == "--format must be one of html, md, csv, parquet, png, svg, but got 'pdf'."


def test_comparison_through_the_command_line(cli: tiny.Cli, folder: Path, tmp_path: Path) -> None:
    data = cli("compare", folder, folder, "--out", tmp_path / "c.html", "--json").json
    assert data["page"] == str(tmp_path / "c.html")
    assert "What changed" in (tmp_path / "c.html").read_text()
    assert cli("compare", folder, folder).code == 0


def damage(folder: Path, needle: bytes) -> int:
    """Cut the first line of the journal that holds the needle in half; its number."""
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if needle in line)
    lines[at] = lines[at][: len(lines[at]) // 2] + b"\n"
    (folder / JOURNAL).write_bytes(b"".join(lines))
    return at + 1


def test_a_damaged_study_is_reported_and_its_loss_named(cli: tiny.Cli, folder: Path) -> None:
    line = damage(folder, b'"qualities"')
    assert cli("report", folder).code == 0
    page = (folder / "report.html").read_text()
    assert f"trial 0 (line {line} of study.journal is damaged; what it said is missing)" in page
    assert [t.number for t in read_run(folder).trials] == [0, 1, 2]
    assert cli("status", folder, "--json").json["trials"]["COMPLETE"] == 3
    sentence = tiny.refused(cli("approve", folder, "1", "--note", "x"))
    assert f"study.journal: line {line} is damaged" in sentence


@pytest.mark.parametrize(("name", "rule"), [("config.yaml", "YAML mapping"), ("state.json", "JSON object")])
def test_a_run_whose_config_or_state_is_damaged_is_refused(cli: tiny.Cli, folder: Path, name: str, rule: str) -> None:
    (folder / name).write_bytes(b"{\xff[")
    sentence = tiny.refused(cli("report", folder, "--json"))
    assert sentence.startswith(f"{folder / name}: ")
    assert rule in sentence


@pytest.mark.parametrize("name", ["target.json", "sensitivity.json", "layers.json"])
def test_a_part_that_is_damaged_is_left_out_and_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    assert read_run(folder).unreadable == (f"{name} (it is not JSON)",)


@pytest.mark.parametrize(
    ("night", "words"),
    [
        (run(), "No trial was recorded."),
        (run([trial(0, accuracy=None)]), "there is no front"),
        (run([trial(0)]), "Few trials: the search completed only 1."),
        (limited([trial(0)], max_latency_ms=0.1), "No trial is within the limits; trial 0 comes nearest"),
    ],
)
def test_bare_runs_make_every_text_format(night: RunRecord, words: str, tmp_path: Path) -> None:
    for name in ("html", "md"):
        out = tmp_path / FORMATS[name].default
        FORMATS[name].write(night, out)
        assert words in out.read_text()


def test_policies_of_a_later_schema_are_packed_and_read_back(tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "schema": 2,
        "model": "m",
        "prune": {"a": 0.25},
        "bits": {"a": {"weights": 4, "activations": 16}},
        "sparsity": {"a": 0.5},
        "removed_blocks": ["b"],
        "importance": "taylor",
        "ranges": "percentile",
        "distill": {"method": "logit+feature", "feature_weight": 0.1, "layers": ["x", "y"]},
        "finetune": {"learning_rate": 0.01, "stages": 2, "nested": {"deep": None}},
    }
    FORMATS["html"].write(run([trial(0, policy=how), trial(1)]), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    data = json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])
    card = data["trials"][0]["policy"]
    for key in ("prune", "bits", "sparsity", "distill", "finetune"):
        column = data["packed"][key]
        pairs = zip(column["names"], card[key], strict=False)
        assert {name: column["values"][at] for name, at in pairs if at >= 0} == how[key]
    assert (card["removed_blocks"], card["importance"], card["ranges"]) == (["b"], "taylor", "percentile")
