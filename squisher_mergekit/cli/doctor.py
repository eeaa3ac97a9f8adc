"""``squisher doctor``: versions, the start-up hook, and the problems that would stop a merge."""

from __future__ import annotations

import json
import os
import platform
import shutil
import site
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from squisher_mergekit.cli.options import HELP_OPTIONS, report_options
from squisher_mergekit.cli.tables import pairs

PACKAGES = ("squisher-mergekit", "mergekit", "torch", "transformers", "safetensors")
METHODS = ("squisher", "ubgm_squisher")
HOOK_FILES = ("squisher_mergekit.pth", "squisher_mergekit.start")
SWITCH = "SQUISHER_MERGEKIT_AUTOLOAD"
LITTLE_DISK = 100_000_000
PROBE_SECONDS = 300
REINSTALL = "run: pip install --force-reinstall --no-deps PATH, with PATH the repository of squisher-mergekit"

# A fresh interpreter runs this and imports mergekit alone, as the command mergekit-yaml does. The working directory
# leaves the path, because a checkout of this package there would count as installed.
PROBE = """
import json, sys, warnings
sys.path = [entry for entry in sys.path if entry]
found = {"started": False, "methods": {}, "devices": ["cpu"], "errors": []}
try:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import mergekit.merge, mergekit.options, mergekit.merge_methods as methods
    found["started"] = "squisher_mergekit" in sys.modules
    found["errors"] += [str(each.message) for each in caught if "squisher-mergekit" in str(each.message)]
    for name in sys.argv[1:]:
        try:
            methods.get(name)
            found["methods"][name] = None
        except Exception as error:
            found["methods"][name] = " ".join(str(error).split())
    import torch
    if getattr(torch, "accelerator", None) is not None and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        found["devices"] += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    if not found["started"]:
        import squisher_mergekit
except Exception as error:
    found["errors"].append(f"{type(error).__name__}: {error}")
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Diagnosis:
    """State of an environment.

    Args:
        versions: Package -> installed version, None if it is missing.
        mergekit_supported: Range of the supported versions of mergekit.
        hook_files: Paths of the start-up files.
        hook_switched_off: True if the environment variable switches the hook off.
        hook_started: True if importing mergekit imported this package.
        methods: Merge method -> True if mergekit knows it.
        devices: Names of the devices that torch sees.
        free_disk_bytes: Free bytes in the working directory.
        problems: A line with its cure for each problem that stops a merge.
    """

    versions: dict[str, str | None]
    mergekit_supported: str
    hook_files: list[str]
    hook_switched_off: bool
    hook_started: bool
    methods: dict[str, bool]
    devices: list[str]
    free_disk_bytes: int
    problems: list[str]


@click.command("doctor", context_settings=HELP_OPTIONS)
@report_options
@click.pass_context
def command(ctx: click.Context, quiet: bool, json_file: Path | None) -> None:
    """Check whether a merge can run in this environment.

    The exit code is 0 if mergekit-yaml can run both methods, and 1 otherwise. Each problem is one line with its cure.
    --quiet prints only problems.

    \b
    Example:
        squisher doctor --json doctor.json
    """
    from squisher_mergekit.cli.output import write_report

    if not quiet:
        click.echo("asking mergekit in a fresh interpreter, which takes some seconds ...", err=True)
    diagnosis = examine()
    write_report(json_file, asdict(diagnosis))
    if not quiet:
        click.echo("\n".join(lines(diagnosis)))
    for problem in diagnosis.problems:
        click.echo(f"problem: {problem}")
    ctx.exit(1 if diagnosis.problems else 0)


def examine() -> Diagnosis:
    """Examine this environment, and ask a fresh interpreter for the methods that mergekit knows."""
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    supported = supported_mergekit()
    files = hook_files()
    off = os.environ.get(SWITCH) == "0"
    free = shutil.disk_usage(Path.cwd()).free
    problems = version_problems(versions, supported)
    found: dict[str, object] = {}
    if versions["mergekit"] is not None:
        found = probe()
        problems += method_problems(found, files, off)
    if free < LITTLE_DISK:
        problems.append(
            f"a merged model needs as much disk as one of its inputs, but {Path.cwd()} has {free / 1e6:.0f} MB free; "
            "make room, or write the output elsewhere"
        )
    answers = found.get("methods")
    answers = answers if isinstance(answers, dict) else {}
    devices = found.get("devices")
    return Diagnosis(
        versions=versions,
        mergekit_supported=supported,
        hook_files=[str(file) for file in files],
        hook_switched_off=off,
        hook_started=bool(found.get("started")),
        methods={name: name in answers and answers[name] is None for name in METHODS},
        devices=devices if isinstance(devices, list) else [],
        free_disk_bytes=free,
        problems=problems,
    )


def supported_mergekit() -> str:
    """Return the range of mergekit versions in the metadata of this package, such as ``<0.2,>=0.1.5``."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("squisher-mergekit") or []]
    except metadata.PackageNotFoundError:
        return ""
    return next((str(each.specifier) for each in requirements if each.name == "mergekit"), "")


def hook_files() -> list[Path]:
    """Return the start-up files of this package in the site-packages folders of this interpreter."""
    folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    unique = dict.fromkeys(Path(folder) for folder in folders)
    return [folder / name for folder in unique for name in HOOK_FILES if (folder / name).is_file()]


def probe() -> dict[str, object]:
    """Return the answer of a fresh interpreter, with its failures under ``errors``; never raises."""
    arguments = [sys.executable, "-c", PROBE, *METHODS]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return {"errors": [f"a fresh interpreter gave no answer: {' '.join(str(error).split())[:300]}"]}
    return answer


def version_problems(versions: dict[str, str | None], supported: str) -> list[str]:
    """Return a line for each package that is missing or has an unsupported version."""
    from packaging.specifiers import SpecifierSet

    problems = []
    for name, version in versions.items():
        if version is None:
            need = f"{name}{supported}" if name == "mergekit" else name
            problems.append(f'{name} must be installed, but this Python has none; run: pip install "{need}"')
    mergekit = versions["mergekit"]
    if mergekit is not None and not SpecifierSet(supported).contains(mergekit, prereleases=True):
        problems.append(f'mergekit must be {supported}, found {mergekit}; run: pip install "mergekit{supported}"')
    return problems


def method_problems(found: dict[str, object], files: list[Path], off: bool) -> list[str]:
    """Return a line for each reason why mergekit does not know the methods.

    Args:
        found: The answer from :func:`probe`.
        files: The start-up files in site-packages.
        off: True if the environment variable switches the hook off.
    """
    errors, answers = found.get("errors"), found.get("methods")
    problems = [f"mergekit or the plug-in fails: {error}; run: pip check" for error in dict.fromkeys(_list(errors))]
    unknown = {name: why for name, why in answers.items() if why} if isinstance(answers, dict) else {}
    if not unknown:
        return problems
    names = " and ".join(unknown)
    if off:
        problems.append(
            f"mergekit-yaml does not know {names}, because {SWITCH} is 0; unset it, or run squisher-mergekit-yaml"
        )
    elif not files:
        problems.append(
            f"mergekit-yaml does not know {names}, because {HOOK_FILES[0]} is in no site-packages folder of this "
            f"Python; {REINSTALL}, or use squisher-mergekit-yaml"
        )
    elif not found.get("started"):
        problems.append(
            f"mergekit-yaml does not know {names}, because {files[0]} could not import the package; {REINSTALL}"
        )
    else:
        problems += [f"mergekit-yaml does not know {name}: {why}" for name, why in unknown.items()]
    return problems


def lines(diagnosis: Diagnosis) -> list[str]:
    """Return the diagnosis as aligned text."""
    rows = [(name, version or "missing") for name, version in diagnosis.versions.items()]
    hook = (
        "started" if diagnosis.hook_started else f"off ({SWITCH}=0)" if diagnosis.hook_switched_off else "not started"
    )
    known = [name for name, yes in diagnosis.methods.items() if yes]
    rows += [
        ("mergekit range", diagnosis.mergekit_supported or "unknown: squisher-mergekit is not installed"),
        ("start-up hook", f"{hook}; {', '.join(diagnosis.hook_files) or 'no file in site-packages'}"),
        ("known methods", ", ".join(known) or "none of this package"),
        ("devices", ", ".join(diagnosis.devices) or "unknown"),
        ("free disk", f"{diagnosis.free_disk_bytes / 1e9:.1f} GB in {Path.cwd()}"),
    ]
    if not diagnosis.problems:
        rows.append(("verdict", "a merge can run here"))
    return list(pairs(rows))


def _list(value: object) -> list[object]:
    """Return a list from the answer of an interpreter; empty if it is none."""
    return value if isinstance(value, list) else []


def _version(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
