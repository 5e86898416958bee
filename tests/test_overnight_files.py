"""The job files of examples/overnight: whole, and consistent with what the command does."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "examples" / "overnight"
NIGHT = FOLDER / "night.sh"


def fake(folder: Path, script: str) -> dict[str, str]:
    """An environment whose nightpress is a shell script."""
    path = folder / "nightpress"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"NIGHTPRESS": str(path), "PATH": "/usr/bin:/bin"}


def night(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    env = fake(folder, 'echo "$@"; exit "${CODE:-0}"')
    return subprocess.run(["sh", NIGHT, *map(str, words)], env=env, capture_output=True, text=True, check=False)


def test_a_night_is_begun_with_its_limit_and_gone_on_with_without(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("c.yaml", run, "--until", "07:00")
    assert night(tmp_path, *words).stdout == f"run c.yaml --out {run} --until 07:00\n"
    run.mkdir()  # it was killed before it began
    assert night(tmp_path, *words).stdout == f"run c.yaml --out {run} --until 07:00\n"
    (run / "state.json").write_text("{}")
    assert night(tmp_path, *words).stdout == f"run c.yaml --out {run} --resume\n"


def test_what_is_missing_is_said() -> None:
    done = subprocess.run(["sh", NIGHT, "c.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: night.sh CONFIG.yaml RUN")


def test_signals_and_exit_codes_are_the_command_s_own(tmp_path: Path) -> None:
    env = fake(tmp_path, 'trap "exit 130" TERM; echo ready; while :; do sleep 0.05; done')
    with subprocess.Popen(["sh", NIGHT, "c", "r"], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130


@pytest.mark.parametrize("path", [NIGHT, FOLDER / "slurm.sbatch"], ids=lambda p: p.name)
def test_the_shell_can_parse_it(path: Path) -> None:
    shell = "bash" if path.read_text().startswith("#!/bin/bash") else "sh"
    subprocess.run([shell, "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_slurm_ends_the_night_before_it_ends_the_job() -> None:
    """Graceful ending takes minutes, and the limit is longer than the budget."""
    lines = (FOLDER / "slurm.sbatch").read_text().splitlines()
    pairs = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    options = {name: value for name, _, value in pairs}
    assert options["signal"] == "B:TERM@300"
    hours, minutes, _ = map(int, options["time"].split(":"))
    assert hours * 60 + minutes >= 8 * 60 + 10
    assert "requeue" in options
    assert lines[-1] == 'exec sh night.sh config.yaml "runs/job-$SLURM_JOB_ID" --budget 8h'


def test_the_units_are_what_systemd_takes(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd is not installed")
    for name in ("nightpress.service", "nightpress.timer"):
        shutil.copy(FOLDER / name, tmp_path)
    done = subprocess.run(
        [tool, "verify", "--user", tmp_path / "nightpress.service", tmp_path / "nightpress.timer"],
        capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if "nightpress" in line], done.stderr


def test_the_date_of_the_run_folder_does_not_change_at_midnight() -> None:
    """The unit's own command, as systemd hands it to the shell, at ten in the evening and at two."""
    [line] = [s for s in (FOLDER / "nightpress.service").read_text().splitlines() if s.startswith("ExecStart=")]
    script = line.partition("-c '")[2].removesuffix("'").replace("%%", "%").replace("$$", "$")
    said = script.replace("exec sh night.sh", "echo").replace('date -d "12 hours ago"', 'date -u -d "$AT 12 hours ago"')
    names = [
        subprocess.run(["sh", "-c", said], env={"AT": at, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
                       check=True).stdout
        for at in ("2026-03-28 22:00", "2026-03-29 02:00")
    ]  # fmt: skip
    assert names == ["config.yaml runs/2026-03-28 --until 07:00\n"] * 2


def test_the_crontab_has_times_and_whole_commands() -> None:
    lines = [s for s in (FOLDER / "crontab").read_text().splitlines() if s and not s.startswith("#")]
    assert lines[0].startswith("NIGHTPRESS=/")
    for line in lines[1:]:
        command = line.partition(" cd ")[2]
        assert command
        assert "%" not in command.replace("\\%", "")
        subprocess.run(["sh", "-n", "-c", "cd " + command.replace("\\%", "%")], check=True)
    assert lines[1].split()[:5] == ["0", "22", "*", "*", "1-5"]
    assert lines[2].startswith("@reboot ")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def pods(document: Any) -> Iterator[dict[str, Any]]:
    """All pod specifications below a node."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


@pytest.mark.parametrize("name", ["job.yaml", "rayjob.yaml"])
def test_pods_have_whole_cores_and_mount_what_they_declare(name: str) -> None:
    claim, job = documents(name)
    found = list(pods(job))
    assert len(found) == (1 if name == "job.yaml" else 3)
    for pod in found:
        [container] = pod["containers"]
        needs = container["resources"]
        assert needs["requests"] == needs["limits"]
        assert int(needs["limits"]["cpu"]) >= 1
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounted <= volumes.keys()
        claimed = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert claimed == {claim["metadata"]["name"]}


def test_the_kubernetes_job_tries_again_only_where_that_helps() -> None:
    spec = documents("job.yaml")[1]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[0]["action"] == "FailJob"
    assert rules[0]["onExitCodes"]["values"] == [2]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # what a failure policy asks for
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
    assert spec["activeDeadlineSeconds"] > 8 * 3600


def test_the_ray_job_names_a_target_and_a_config_that_is_taken(tmp_path: Path) -> None:
    from nightpress.cli.config import load_config

    spec = documents("rayjob.yaml")[1]["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert yaml.safe_load(yaml.safe_load(groups["target"]["rayStartParams"]["resources"])) == {"nightpress_target": 1}
    assert groups["target"]["rayStartParams"]["num-cpus"] == "0"
    text = (FOLDER / "rayjob.yaml").read_text()
    [search] = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   search:")]
    (tmp_path / "config.yaml").write_text(f"task: mnist5k-resnet\n{search}\n")
    assert load_config(tmp_path / "config.yaml").search.address == "127.0.0.1:6379"


def test_a_killed_shell_leaves_no_sleeper(tmp_path: Path) -> None:
    """exec: there is one process, and its end is the end."""
    env = fake(tmp_path, "echo $$; exec sleep 30")
    with subprocess.Popen(["sh", NIGHT, "c", "r"], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.kill()
        process.wait(10)
    assert not Path(f"/proc/{process.pid}").exists()
