"""Distributions: contents of wheel and sdist, installation, cost of the start-up hook, uninstallation."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import environments
from tests.environments import SWITCH

ROOT = Path(__file__).parents[1]
STARTUP = {"squisher_mergekit.pth", "squisher_mergekit.start", "squisher_mergekit_startup.py"}
ASK = "import mergekit.merge_methods as m; print([m.get(n).spec.name for n in ('linear', 'squisher', 'ubgm_squisher')])"
KNOWN = "['linear', 'squisher', 'ubgm_squisher']\n"

pytestmark = pytest.mark.slow


def _python(*arguments):
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)


def _build(source, out):
    """Build a wheel with pip as a user does, without a network."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(out)]
    _python("-m", "pip", "wheel", *options, str(source))
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Return the wheel of the checkout."""
    return _build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """Return the source distribution built from the checkout."""
    out = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out], check=True, cwd=ROOT)
    [file] = out.glob("*.tar.gz")
    return file


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """Return an environment that has the wheel installed and sees this one's dependencies."""
    environment = environments.make(tmp_path_factory.mktemp("installed") / "venv")
    environment.pip("install", "--no-deps", "--no-index", str(wheel))
    environment.see_dependencies()
    return environment


def _files(folder):
    files = (file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir())
    return sorted(file.as_posix() for file in files if "__pycache__" not in file.parts)


def test_the_wheel_holds_the_package_and_the_start_up_files(wheel):
    """The wheel has modules, manuals, the page's style and script, py.typed, licence, start-up files, and no others."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if name.startswith("squisher_mergekit-0.1.0.dist-info/")}
    package = ROOT / "squisher_mergekit"
    files = [file for kind in ("*.py", "README.md", "*.css", "*.js") for file in package.rglob(kind)]
    content = {file.relative_to(ROOT).as_posix() for file in files if "_startup" not in file.parts}
    assert names - info == content | STARTUP | {"squisher_mergekit/py.typed"}
    assert "squisher_mergekit-0.1.0.dist-info/licenses/LICENSE" in info


def test_the_start_up_lines_have_the_required_form(wheel):
    """The .pth has one import line, as site.py requires, and the .start has one entry point, as PEP 829 requires."""
    with zipfile.ZipFile(wheel) as archive:
        [line] = archive.read("squisher_mergekit.pth").decode().splitlines()
        [point] = archive.read("squisher_mergekit.start").decode().splitlines()
    assert line.startswith("import ")
    assert point == "squisher_mergekit_startup:start"


def test_the_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    """The sdist has tests and scripts, and its wheel has the same files with the same bytes."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    [source] = (tmp_path / "source").iterdir()
    for name in ("README.md", "LICENSE", "pyproject.toml", "tests/test_package.py", "scripts/benchmarks/merge.py"):
        assert (source / name).is_file(), name
    with zipfile.ZipFile(_build(source, tmp_path / "wheel")) as built, zipfile.ZipFile(wheel) as direct:
        assert {item.filename: item.CRC for item in built.infolist()} == {
            item.filename: item.CRC for item in direct.infolist()
        }


def test_stock_mergekit_knows_the_methods_after_an_installation(installed):
    """In a fresh environment with the wheel, mergekit alone has both methods. Switched off, it has not."""
    done = installed.run("-c", ASK)
    assert (done.stdout, done.stderr) == (KNOWN, "")
    off = installed.run("-c", ASK, **{SWITCH: "0"})
    assert off.returncode == 1
    assert off.stderr.endswith("RuntimeError: Unimplemented merge method squisher\n")


def test_the_console_scripts_are_installed(installed):
    """The wheel brings ``squisher`` and ``squisher-mergekit-yaml``, which runs in this environment's interpreter."""
    for program in ("squisher", "squisher-mergekit-yaml"):
        done = installed.run(installed.root / "bin" / program, "--help", **{SWITCH: "0"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"Usage: {program} ")


def test_the_fallback_script_knows_the_methods_without_the_hook(installed, tmp_path):
    """With the hook switched off, mergekit-yaml does not find the method.

    The command squisher-mergekit-yaml goes on to look for a Fisher.
    """
    from scripts.benchmarks.models import make_model

    model = tmp_path / "a"
    sizes = {"hidden": 36, "layers": 2, "intermediate": 47, "vocab": 61, "shards": 3}
    make_model(model, 0, sizes | {"dtype": "float32", "fisher_dtype": "float32"})
    for file in model.glob("fisher*"):
        file.unlink()
    config = tmp_path / "merge.yml"
    config.write_text(f"merge_method: squisher\nmodels:\n- model: {model}\n")
    stock = "from mergekit.scripts.run_yaml import main; main()"
    ours = "from squisher_mergekit.cli.mergekit_yaml import main; main()"
    out = tmp_path / "out"
    arguments = [str(config), str(out), "--no-write-model-card", "--no-copy-tokenizer"]
    refused, known = (installed.run("-c", code, *arguments, **{SWITCH: "0"}) for code in (stock, ours))
    assert "Unimplemented merge method squisher" in refused.stderr
    assert known.returncode == 1
    assert known.stderr.splitlines()[-1].startswith("Error: no Fisher for ")
    assert not out.exists()


def test_an_editable_installation_works_and_leaves_nothing(tmp_path):
    """``pip install -e`` gives the same results, and its uninstallation leaves none of our files."""
    environment = environments.make(tmp_path / "venv")
    environment.see_dependencies()
    before = _files(environment.packages)
    environment.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", str(ROOT))
    assert set(_files(environment.packages)) >= STARTUP
    done = environment.run("-c", ASK)
    assert (done.stdout, done.stderr) == (KNOWN, "")
    environment.pip("uninstall", "--yes", "squisher-mergekit")
    assert _files(environment.packages) == before


def test_uninstalling_the_wheel_leaves_nothing(wheel, tmp_path):
    """After ``pip uninstall`` there is no .pth, .start, start-up module or package, and Python starts silently."""
    environment = environments.make(tmp_path / "venv")
    before = _files(environment.root)
    environment.pip("install", "--no-deps", "--no-index", str(wheel))
    assert set(_files(environment.packages)) >= STARTUP
    started = environment.run("-c", "import sys; print('squisher_mergekit_startup' in sys.modules)")
    assert started.stdout == "True\n"
    environment.pip("uninstall", "--yes", "squisher-mergekit")
    assert _files(environment.root) == before
    done = environment.run("-c", "pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("value", [None, "0"])
def test_a_start_imports_one_small_module(wheel, tmp_path, value):
    """An interpreter with the hook has one more module, our small one."""
    environment = environments.make(tmp_path / "venv")
    environment.pip("install", "--no-deps", "--no-index", str(wheel))
    variables = {} if value is None else {SWITCH: value}
    loaded = [
        set(where.run("-c", "import sys; print(*sys.modules)", **variables).stdout.split())
        for where in (environment, environments.make(tmp_path / "without"))
    ]
    assert loaded[0] - loaded[1] == {"squisher_mergekit_startup"}
    assert loaded[1] <= loaded[0]
