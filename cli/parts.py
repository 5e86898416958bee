"""Commands on a task, a target or policies; each is one step of a night, on its own."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Batch, Force, ForceProfile, Json, PolicyFiles, TargetRef, TaskRef, Threads
from .output import check_file, emit, log_to_stderr, say, table

if TYPE_CHECKING:
    from ..evaluators.latency.target import Target
    from ..evaluators.task import Task
    from ..spaces.anatomy import Anatomy
    from ..spaces.policy import Policy


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    force: Force = False,
) -> None:
    """Write a starter config and task file. Example: nightpress init my-model"""
    from ..spaces.errors import InputError
    from .starter import CONFIG, TASK

    for name, text in (("config.yaml", CONFIG), ("task.py", TASK)):
        if (folder / name).exists() and not force:
            raise InputError(f"{folder / name}: the file exists already; --force replaces it.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be written: {error.strerror}.") from None
        say(f"wrote {folder / name}")
    say(f"next: put your model into {folder / 'task.py'}, then nightpress run {folder / 'config.yaml'} --until 07:00")


def doctor(
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure the kernels anew, for all threads and batches.")
    ] = False,
    json: Json = False,
) -> None:
    """What is installed, devices, kernels, and how noisy this machine is. Example: nightpress doctor"""
    from .doctor import examine, kernel_lines

    log_to_stderr()
    found = examine(fresh)
    if json:
        emit(found)
        return
    table("Packages", [{"package": k, "version": v} for k, v in found["packages"].items()])
    table("Machine", [{"what": k, "value": v} for k, v in found["machine"].items()])
    table("Runtimes", found["runtimes"])
    for line in kernel_lines(found["kernels"]):
        say(line)
    say(found["noise"]["meaning"])


def inspect(task: TaskRef, target: TargetRef = "onnxruntime", json: Json = False) -> None:
    """The anatomy of a model: what can be compressed. Example: nightpress inspect mnist5k-resnet"""
    from ..spaces.anatomy import anatomy_to_dict

    log_to_stderr()
    found, anatomy, where = find_anatomy(task, target, runs_here=False)
    choices = tuple((p.weights, p.activations) for p in where.bit_choices((8, 32), (8, 32)))
    data = anatomy_to_dict(anatomy, choices)
    if json:
        emit(data)
        return
    say(f"{found.name}: {anatomy.params:,} parameters, {anatomy.macs / 1e6:.1f} M MACs, model {anatomy.digest}")
    # A head of attention is one channel of several rows: "12 × 64".
    groups = [{**g, "channels": f"{g['channels']} × {g['unit']}" if g["unit"] > 1 else g["channels"]}
              for g in data["groups"]]  # fmt: skip
    table("Prunable groups", groups, ["name", "channels", "step", "macs", "layers"])
    offered = ", ".join(f"{weights}/{activations}" for weights, activations in choices)
    layers = [{**layer, "bits of weights/activations": offered} for layer in data["layers"]]
    table("Quantisable layers", layers, ["name", "kind", "macs", "params", "bits of weights/activations"])
    table("Removable blocks", data["blocks"], ["name", "macs", "layers"])
    table("Left out", data["left_out"], ["name", "reason"])


def sample(
    task: TaskRef,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the policy files.")],
    target: TargetRef = "onnxruntime",
    count: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    json: Json = False,
) -> None:
    """Random policies of the space, one file each. Example: nightpress sample mnist5k-resnet -n 5 --out policies"""
    import numpy as np

    from ..search.config import RunConfig
    from ..search.prepare import space_of
    from ..spaces.errors import InputError
    from ..spaces.policy import digest, policy_to_json

    log_to_stderr()
    _, anatomy, where = find_anatomy(task, target, runs_here=False)
    space = space_of(anatomy, RunConfig(task=task, base=None, out=out, target=where))
    generator = np.random.default_rng(seed)
    files: list[dict[str, str]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            policy = space.random(generator)
            path = out / f"{number:04d}-{digest(policy)}.json"
            path.write_text(policy_to_json(policy))
            files.append({"file": str(path), "digest": digest(policy)})
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}.") from None
    if json:
        emit({"policies": files})
    else:
        say(f"wrote {count} policies to {out}")


def calibrate(
    task: TaskRef,
    out: Annotated[Path, typer.Option("--out", metavar="PROFILE.json", help="The profile file.")],
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="T", help="onnxruntime (the default), openvino, … or a profile file."),
    ] = None,
    threads: Threads = None,
    batch: Batch = None,
    results: Annotated[
        Path | None, typer.Option("--from", metavar="results.json", help="What a kit measured on another device.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("-n", min=10, max=500, help="Policies to measure; without it, until the error stops falling."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the policies; 0 by default.")] = None,
    json: Json = False,
) -> None:
    """Measure policies on a target and fit the latency predictor.
    Example: nightpress calibrate mnist5k-resnet --out here.json"""
    from ..spaces.errors import InputError
    from .measuring import calibrate_from_results, calibrate_to_file

    log_to_stderr()
    check_file(out)
    if results is not None:
        given = {"--target": target, "--threads": threads, "--batch": batch, "-n": count, "--seed": seed}
        for name, value in given.items():
            if value is not None:
                raise InputError(f"{name} belongs to what is measured here, but --from takes what the kit measured.")
        data = calibrate_from_results(find_anatomy(task, "onnxruntime", runs_here=False)[1], results, out)
    else:
        found, where = find_task(task, target or "onnxruntime", threads=threads, batch=batch)
        data = calibrate_to_file(found, where, out, count, seed or 0)
    if json:
        emit(data)
        return
    held, truth = data["heldout"], data["truth_repeat"]
    say(
        f"wrote {out}: {data['models_measured']} policies in {data['seconds']:.0f} s; held-out error "
        f"{held['mape']:.1%} (within 10 %: {held['within_10']:.0%}), the truth against itself {truth['mape']:.1%}"
    )


def predict(
    task: TaskRef, policies: PolicyFiles, target: Annotated[Path, typer.Option("--target", metavar="PROFILE.json")],
    force: ForceProfile = False, json: Json = False,
) -> None:  # fmt: skip
    """Latency, size and MACs of policies from a profile.
    Example: nightpress predict mnist5k-resnet a.json --target here.json"""
    from ..evaluators.latency.capabilities import fewer_bits_are_faster
    from ..evaluators.latency.insitu import UnseenKernelError
    from ..evaluators.latency.profile_file import load_profile
    from ..search.session import file_size
    from ..spaces.errors import InputError
    from ..spaces.plan import plan
    from ..spaces.policy import digest
    from ..spaces.space import bits_name

    log_to_stderr()
    _, anatomy, where = find_anatomy(task, str(target), runs_here=False, given=True)
    profile = load_profile(target, anatomy, force=force)
    rows: list[dict[str, Any]] = []
    unpriced = fewer_bits_are_faster(target, where)
    for path, policy in _policies(policies, anatomy, where):
        if unpriced and (name := next((n for n, pair in policy.bits.items() if pair.int8 and pair.weights < 8), None)):
            raise InputError(
                f"{path}: integers of fewer than 8 bits take faster kernels on the device of {target} than those of 8, "
                f"which are all that it holds, but bits.{name} is {bits_name(policy.bits[name])}: make a kit of 7 with "
                f"nightpress kit --target {target}."
            )
        planned = plan(anatomy, policy)
        try:
            latency, low, high = (float(value) for value in profile.predict([policy])[0])
        except UnseenKernelError as error:
            remedy = "make a larger kit" if profile.remote else "measure it, or calibrate with more policies"
            raise InputError(f"{path}: {error}: {remedy}.") from None
        rows.append(
            {"file": str(path), "digest": digest(policy), "latency_ms": latency, "low_ms": low, "high_ms": high,
             "size_bytes": file_size(planned), "macs": planned.macs, "forced": profile.caveat}
        )  # fmt: skip
    if profile.caveat and not json:
        say(f"These numbers may not hold: {profile.caveat}.")
    _show("policies", "Predicted", rows, json)


def measure(
    task: TaskRef, policies: PolicyFiles, target: TargetRef = "onnxruntime", threads: Threads = None,
    batch: Batch = None, force: ForceProfile = False, json: Json = False,
) -> None:  # fmt: skip
    """True latency of policies, without training. Example: nightpress measure mnist5k-resnet a.json b.json"""
    from ..evaluators.latency.measure import measure_policies
    from ..evaluators.latency.profile_file import measured_elsewhere
    from ..spaces.policy import digest
    from .config import parse_target
    from .measuring import warn_of_noise

    log_to_stderr()
    profile = parse_target(target, Path(), "--target")[1]
    caveat = measured_elsewhere(Path(profile), force=force) if profile is not None else None
    _, anatomy, where = find_anatomy(task, target, given=True, threads=threads, batch=batch)
    read = _policies(policies, anatomy, where, any_bits=True)
    keys = {path: digest(policy) for path, policy in read}
    timings, sizes = measure_policies(anatomy, {keys[path]: policy for path, policy in read}, where)
    rows = [
        {"file": str(path), "digest": key, "latency_ms": timings[key].latency_ms,
         "repeat_error": timings[key].repeat_error, "reference_ms": timings[key].reference_ms,
         "ratio": timings[key].ratio, "settled": timings[key].settled, "size_bytes": sizes[key], "forced": caveat}
        for path, key in keys.items()
    ]  # fmt: skip
    warn_of_noise(timings)
    if caveat and not json:
        say(f"These are times of this machine: {caveat}.")
    _show("policies", "Measured", rows, json)


def apply(
    policy: Annotated[Path, typer.Argument(metavar="POLICY.json", help="A policy file.")],
    task: TaskRef,
    out: Annotated[
        Path, typer.Option("--out", metavar="model.pt", help="model.pt (a module) or .safetensors (weights).")
    ],
    weights: Annotated[Path | None, typer.Option("--weights", help="model.safetensors of an export.")] = None,
    json: Json = False,
) -> None:
    """The compressed module on your own training side.
    Example: nightpress apply policy.json mnist5k-resnet --out m.pt"""
    from .measuring import apply_to_file

    log_to_stderr()
    check_file(out)
    found, anatomy, where = find_anatomy(task, "onnxruntime")
    [(_, chosen)] = _policies([policy], anatomy, where, any_bits=True)
    data = apply_to_file(found, anatomy, chosen, out, weights)
    if json:
        emit(data)
    else:
        say(f"wrote {out}: {data['params']:,} parameters, {data['macs'] / 1e6:.1f} M MACs")


def find_anatomy(
    task: str, target: str, runs_here: bool = True, given: bool = False, **settings: int | None
) -> "tuple[Task, Anatomy, Target]":
    """Task, anatomy and target of a command, as :func:`find_task`; ``given`` is for policies that are given: they are
    taken as they are written, not moved to the steps of a target that would not have proposed them. Raises
    InputError."""
    from ..evaluators.inspect import inspect as look
    from ..evaluators.latency.target import Target

    found, where = find_task(task, target, runs_here, **settings)
    anatomy, _ = look(found, step_of=(Target() if given else where).channel_step)
    return found, anatomy, where


def find_task(task: str, target: str, runs_here: bool = True, **settings: int | None) -> "tuple[Task, Target]":
    """Task and target of a command; ``settings`` that are not None replace fields of the target. Raises InputError."""
    from ..evaluators.latency.target import check_target
    from ..evaluators.task import check_task, load_task
    from .config import parse_target

    chosen: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    where = replace(parse_target(target, Path(), "--target")[0], **chosen)
    if runs_here:
        check_target(where)
    found = load_task(task, Path.cwd())
    check_task(found)
    return found, where


def _policies(
    paths: list[Path], anatomy: "Anatomy", target: "Target", any_bits: bool = False
) -> "list[tuple[Path, Policy]]":
    from ..spaces.errors import InputError
    from ..spaces.policy import ACTIVATION_BITS, INT8, WEIGHT_BITS, policy_from_json
    from ..spaces.space import canonical, check_policy

    choices = None if any_bits else target.bit_choices(WEIGHT_BITS, ACTIVATION_BITS)
    found: list[tuple[Path, Policy]] = []
    for path in paths:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: the policy cannot be read: {error}.") from None
        policy = policy_from_json(text, str(path))
        if choices is not None and target.integer_bits < 8 and INT8 in policy.bits.values():
            name = next(name for name, pair in policy.bits.items() if pair == INT8)
            raise InputError(
                f"{path}: bits.{name} is 8/8, but integer weights of this target have {target.integer_bits} bits, as "
                "those of 8 take slower kernels, which its profile has not measured: sample with this --target."
            )
        check_policy(policy, anatomy, choices, str(path))
        found.append((path, canonical(policy, anatomy)))
    return found


def _show(key: str, title: str, rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        emit({key: rows})
    else:
        table(title, [{k: v for k, v in row.items() if k != "forced"} for row in rows])
