"""``squisher doctor``: what is installed, whether mergekit knows the methods, and what would stop a merge."""

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

from squisher_mergekit.errors import ConfigError

PACKAGES = ("squisher-mergekit", "mergekit", "torch", "transformers", "safetensors")
METHODS = ("squisher", "ubgm_squisher")
HOOK_FILES = ("squisher_mergekit.pth", "squisher_mergekit.start")
SWITCH = "SQUISHER_MERGEKIT_AUTOLOAD"
LITTLE_DISK = 100_000_000
PROBE_SECONDS = 300

# Runs in an interpreter of its own and imports mergekit alone, as the command mergekit-yaml does. The working
# directory leaves the path, where a checkout of this package would otherwise be found without being installed.
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
class Report:
    """What the doctor saw; ``problems`` has a line for each thing that stops a merge, with its cure."""

    versions: dict[str, str | None]
    mergekit_supported: str
    hook_files: list[str]
    hook_switched_off: bool
    hook_started: bool
    methods: dict[str, bool]
    devices: list[str]
    free_disk_bytes: int
    problems: list[str]


@click.command("doctor")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the report there.")
@click.option("--quiet", is_flag=True, help="Print problems only.")
@click.pass_context
def command(ctx: click.Context, json_file: Path | None, quiet: bool) -> None:
    """Say whether a merge can run here, and what would stop it.

    Exits with 0 if mergekit-yaml can run both methods in this environment, and with 1 if not: each problem is one line
    with its cure.
    """
    if not quiet:
        click.echo("asking mergekit in a fresh interpreter, which takes some seconds ...", err=True)
    report = examine()
    if json_file is not None:
        _write(json_file, json.dumps(asdict(report), indent=2) + "\n")
    if not quiet:
        click.echo("\n".join(lines(report)))
    for problem in report.problems:
        click.echo(f"problem: {problem}")
    ctx.exit(1 if report.problems else 0)


def examine() -> Report:
    """Look at this environment, and ask a fresh interpreter which methods mergekit knows."""
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
    return Report(
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
    """Return the range of mergekit versions that this package was installed for, such as ``<0.2,>=0.1.5``."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("squisher-mergekit") or []]
    except metadata.PackageNotFoundError:
        return ""
    return next((str(each.specifier) for each in requirements if each.name == "mergekit"), "")


def hook_files() -> list[Path]:
    """Return the start-up files of this package in the folders where the interpreter looks for such files."""
    folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    unique = dict.fromkeys(Path(folder) for folder in folders)
    return [folder / name for folder in unique for name in HOOK_FILES if (folder / name).is_file()]


def probe() -> dict[str, object]:
    """Ask a fresh interpreter; never raises: what went wrong is under ``errors``."""
    arguments = [sys.executable, "-c", PROBE, *METHODS]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return {"errors": [f"a fresh interpreter gave no answer: {' '.join(str(error).split())[:300]}"]}
    return answer


def version_problems(versions: dict[str, str | None], supported: str) -> list[str]:
    """Return a line for each package that is missing or of an unsupported version."""
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
        found: The answer of :func:`probe`.
        files: The start-up files found.
        off: Whether the environment variable switches the hook off.
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
            "Python; run: pip install --force-reinstall --no-deps squisher-mergekit, or use squisher-mergekit-yaml"
        )
    elif not found.get("started"):
        problems.append(
            f"mergekit-yaml does not know {names}, because {files[0]} could not import the package; "
            "run: pip install --force-reinstall --no-deps squisher-mergekit"
        )
    else:
        problems += [f"mergekit-yaml does not know {name}: {why}" for name, why in unknown.items()]
    return problems


def lines(report: Report) -> list[str]:
    """Return the report as lines for a person."""
    rows = [(name, version or "missing") for name, version in report.versions.items()]
    hook = "started" if report.hook_started else f"off ({SWITCH}=0)" if report.hook_switched_off else "not started"
    known = [name for name, yes in report.methods.items() if yes]
    rows += [
        ("mergekit range", report.mergekit_supported or "unknown: squisher-mergekit is not installed"),
        ("start-up hook", f"{hook}; {', '.join(report.hook_files) or 'no file in site-packages'}"),
        ("known methods", ", ".join(known) or "none of this package"),
        ("devices", ", ".join(report.devices) or "unknown"),
        ("free disk", f"{report.free_disk_bytes / 1e9:.1f} GB in {Path.cwd()}"),
    ]
    if not report.problems:
        rows.append(("verdict", "a merge can run here"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _write(file: Path, text: str) -> None:
    """Write a file so that it is whole or absent."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"the report cannot be written to {file}: {error}; choose another place") from error
