"""Start-up hook: its activation of the plug-in, and its safety for Python and stock merges."""

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from squisher_mergekit import _autoload
from tests import environments
from tests.environments import SWITCH

PACKAGE = Path(_autoload.__file__).parent
STARTUP = PACKAGE / "_startup"

# Replaces the module that gets mergekit's modules from the hook, and records them.
RECORDER = """
import sys, types
seen = []
def activate(name, module):
    seen.append([name, module.ran])
sys.modules["squisher_mergekit.merging.mergekit.hooks"] = types.SimpleNamespace(activate=activate)
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return an environment with the start-up files of an installation, without mergekit."""
    environment = environments.make(tmp_path_factory.mktemp("started") / "venv")
    for file in STARTUP.glob("squisher_mergekit*"):
        shutil.copy(file, environment.packages)
    (environment.packages / PACKAGE.name).symlink_to(PACKAGE)
    return environment


@pytest.fixture
def fake(tmp_path):
    """Return a folder with a tiny package ``mergekit`` that has all watched modules, and one more."""
    for name in (*_autoload.WATCHED, "mergekit.io"):
        file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("ran = True\n")
        for folder in file.relative_to(tmp_path).parents:
            (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "__init__.py").unlink()
    return tmp_path


def _answer(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


IMPORT_ALL = "\n".join(f"import {name}" for name in ("mergekit.io", *_autoload.WATCHED))
SHOW = "\nimport json; print(json.dumps(seen))"
IMPORTED = (
    "import sys; m, n = sys.modules, 'squisher_mergekit'; before = n in m; import mergekit; print(before, n in m)"
)


# ---- the files that an interpreter reads when it starts


@pytest.mark.parametrize(("value", "loaded"), [(None, True), ("1", True), ("", True), ("0", False)])
def test_the_pth_file_imports_the_package_with_mergekit_unless_switched_off(started, fake, value, loaded):
    """The package is imported together with mergekit and not before. With the variable set to 0 it is not imported."""
    variables = {} if value is None else {SWITCH: value}
    done = started.run("-c", IMPORTED, path=fake, **variables)
    assert (done.stdout, done.stderr) == (f"False {loaded}\n", "")


def test_the_start_file_names_a_function_with_the_same_effect(started, fake):
    """The entry point of the .start file (PEP 829) exists, watches for mergekit, and obeys the variable."""
    module, _, function = (STARTUP / "squisher_mergekit.start").read_text().strip().partition(":")
    code = f"import {module}; {module}.{function}(); {IMPORTED}"
    path = f"{started.packages}{os.pathsep}{fake}"
    assert started.run("-S", "-c", code, path=path).stdout == "False True\n"
    assert started.run("-S", "-c", code, path=path, **{SWITCH: "0"}).stdout == "False False\n"


@pytest.mark.parametrize("damage", ["gone", "raises", "syntax"])
def test_python_and_mergekit_run_when_the_package_is_damaged(fake, tmp_path, damage):
    """Python starts silently with a missing, raising or unreadable package, and mergekit runs with one warning."""
    broken = environments.make(tmp_path / "venv")
    for file in STARTUP.glob("squisher_mergekit*"):
        shutil.copy(file, broken.packages)
    if damage != "gone":
        (broken.packages / PACKAGE.name).mkdir()
        text = "raise OSError('broken')" if damage == "raises" else "def ("
        (broken.packages / PACKAGE.name / "__init__.py").write_text(text)
    done = broken.run("-c", "print('runs')", path=fake)
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs\n", "")
    done = broken.run("-c", "import mergekit.plan; print(mergekit.plan.ran)", path=fake)
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert done.stderr.count("squisher-mergekit is not active in mergekit") == 1
    assert "Traceback" not in done.stderr


def test_a_pth_file_without_the_package_is_silent(tmp_path):
    """An interpreter starts silently if all files but the .pth were removed by hand."""
    left = environments.make(tmp_path / "venv")
    shutil.copy(STARTUP / "squisher_mergekit.pth", left.packages)
    done = left.run("-c", "print('runs')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs\n", "")


def test_python_without_mergekit_is_not_affected(started):
    """Importing mergekit fails in the usual way if it is not installed."""
    done = started.run("-c", "import mergekit.plan")
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'mergekit'\n")


def test_an_interpreter_starts_with_nothing_else_imported(started, tmp_path):
    """The hook adds one module to the start of an interpreter that reads a start-up file."""
    code = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    bare = environments.make(tmp_path / "venv")
    bare.packages.joinpath("other.pth").write_text("# Python 3.13 loads a codec for the first line\n")
    with_hook, without = (set(_answer(each.run("-c", code))) for each in (started, bare))
    assert with_hook - without == {"squisher_mergekit_startup"}


# ---- activation by the hook


def test_each_watched_module_is_activated_once_after_its_code(started, fake):
    """Watched modules are activated once, in the order of import and after they ran. No other module is."""
    done = started.run("-c", RECORDER + IMPORT_ALL + "\n" + IMPORT_ALL + SHOW, path=fake)
    assert _answer(done) == [[name, True] for name in _autoload.WATCHED]


def test_modules_imported_before_the_package_are_activated_late(started, fake):
    """``import squisher_mergekit`` after mergekit activates the imported modules and watches the others."""
    first, *rest = _autoload.WATCHED
    code = f"{RECORDER}import {first}\nimport squisher_mergekit\n{IMPORT_ALL}{SHOW}"
    assert _answer(started.run("-c", code, path=fake, **{SWITCH: "0"})) == [[name, True] for name in (first, *rest)]


def test_importing_the_package_activates_although_the_start_is_switched_off(started, fake):
    """The variable switches off the start-up only. An explicit import still activates."""
    code = f"{RECORDER}import squisher_mergekit\n{IMPORT_ALL}{SHOW}"
    assert _answer(started.run("-c", code, path=fake, **{SWITCH: "0"})) == [[name, True] for name in _autoload.WATCHED]
    without = f"{RECORDER}{IMPORT_ALL}{SHOW}"
    assert _answer(started.run("-c", without, path=fake, **{SWITCH: "0"})) == []


def test_a_second_install_does_nothing(started, fake):
    """Repeated installs of the hook give one finder and one activation per module."""
    code = (
        f"{RECORDER}from squisher_mergekit import _autoload\n_autoload.install(); _autoload.install()\n{IMPORT_ALL}\n"
        "_autoload.install()\nimport sys\n"
        "seen.append(sum(type(finder).__module__ == _autoload.__name__ for finder in sys.meta_path))" + SHOW
    )
    *activated, finders = _answer(started.run("-c", code, path=fake))
    assert activated == [[name, True] for name in _autoload.WATCHED]
    assert finders == 1


def test_an_exception_in_the_activation_is_one_warning(started, fake):
    """Activations that raise give one warning, and all modules of mergekit are imported completely."""
    code = (
        "import sys, types\ndef activate(name, module): raise KeyError('surprise')\n"
        "sys.modules['squisher_mergekit.merging.mergekit.hooks'] = types.SimpleNamespace(activate=activate)\n"
        f"{IMPORT_ALL}\nprint(mergekit.plan.ran, mergekit.multigpu_executor.ran)"
    )
    done = started.run("-c", code, path=fake)
    assert (done.returncode, done.stdout) == (0, "True True\n")
    assert done.stderr.count("squisher-mergekit is not active in mergekit") == 1
    assert "KeyError('surprise')" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plugin_that_cannot_be_imported_is_a_warning(started, fake):
    """A plug-in that cannot be imported does not stop the import of mergekit's modules."""
    absent = "import sys; sys.modules['squisher_mergekit.merging.mergekit.hooks'] = None"
    code = f"{absent}\n{IMPORT_ALL}\nprint(mergekit.plan.ran)"
    done = started.run("-c", code, path=fake)
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert "squisher-mergekit is not active in mergekit" in done.stderr


def test_an_error_of_mergekit_is_raised_unchanged(started, fake):
    """An error in a watched module reaches the importer unchanged and activates nothing."""
    (fake / "mergekit" / "plan.py").write_text("raise ZeroDivisionError('its own')\n")
    code = f"{RECORDER}\ntry: import mergekit.plan\nexcept ZeroDivisionError as error: seen.append(str(error)){SHOW}"
    assert _answer(started.run("-c", code, path=fake)) == ["its own"]


def test_mergekit_in_a_zip_file_is_activated_too(started, fake, tmp_path):
    """The hook works with the loader of zip files, which serves all modules of an archive."""
    archive = tmp_path / "mergekit.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for source in fake.rglob("*.py"):
            file.write(source, source.relative_to(fake))
    shutil.rmtree(fake / "mergekit")
    done = started.run("-c", RECORDER + IMPORT_ALL + SHOW, path=archive)
    assert _answer(done) == [[name, True] for name in _autoload.WATCHED]


def test_a_loader_that_cannot_be_wrapped_is_a_warning(started, fake):
    """A finder whose loader takes no attributes disables the plug-in with a warning, and the import succeeds."""
    code = (
        "import sys, importlib.util\nfrom importlib.machinery import SourceFileLoader\n"
        "class Loader(SourceFileLoader):\n"
        "    def __setattr__(self, name, value):\n"
        "        if name == 'exec_module': raise TypeError('read-only')\n"
        "        super().__setattr__(name, value)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mergekit.plan':\n"
        "            file = path[0] + '/plan.py'\n"
        "            return importlib.util.spec_from_file_location(name, file, loader=Loader(name, file))\n"
        "sys.meta_path.insert(1, Finder())\nimport mergekit.plan\nprint(mergekit.plan.ran)"
    )
    done = started.run("-c", code, path=fake)
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert "read-only" in done.stderr


def test_the_console_script_activates_although_switched_off(started, fake):
    """``squisher-mergekit-yaml`` registers the methods and then runs mergekit's own command."""
    (fake / "mergekit" / "scripts" / "run_yaml.py").write_text("import mergekit.plan\ndef main(): print('merged')\n")
    code = f"{RECORDER}from squisher_mergekit.cli.mergekit_yaml import main\nmain()\nprint(seen)"
    done = started.run("-c", code, path=fake, **{SWITCH: "0"})
    assert done.stdout == "merged\n[['mergekit.plan', True]]\n"


def test_the_public_names_are_listed_without_being_imported(started):
    """``dir`` shows the public names, and an unknown one is an AttributeError. Neither imports torch."""
    code = (
        "import sys, squisher_mergekit as s\nassert {'load_fisher', 'extract', 'Fisher'} <= set(dir(s))\n"
        "try: s.nothing\nexcept AttributeError as error: print(error, 'torch' in sys.modules)"
    )
    done = started.run("-c", code)
    assert done.stdout == "module 'squisher_mergekit' has no attribute 'nothing' False\n"


# ---- an unsupported mergekit

OLD_REGISTRY = """
REGISTERED_MERGE_METHODS = {"linear": "the linear method"}
def get(method):
    if method in REGISTERED_MERGE_METHODS:
        return REGISTERED_MERGE_METHODS[method]
    raise RuntimeError(f"Unimplemented merge method {method}")
"""


def test_an_unsupported_mergekit_refuses_our_methods_alone(tmp_path):
    """Stock methods work with a registry that is a plain dict. Ours are refused with the supported versions."""
    methods = tmp_path / "mergekit" / "merge_methods"
    methods.mkdir(parents=True)
    (tmp_path / "mergekit" / "__init__.py").touch()
    (methods / "registry.py").write_text(OLD_REGISTRY)
    (methods / "__init__.py").write_text("from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS, get\n")
    info = tmp_path / "mergekit-0.1.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mergekit\nVersion: 0.1.4\n")
    code = (
        "import squisher_mergekit, mergekit.merge_methods as m\nprint(m.get('linear'))\n"
        "for name in ('squisher', 'ubgm_squisher', 'other'):\n"
        "    try: m.get(name)\n    except Exception as error: print(type(error).__name__, error)\n"
    )
    done = environments.run(sys.executable, "-c", code, cwd=tmp_path, path=tmp_path)
    assert done.returncode == 0, done.stderr
    linear, *ours, other = done.stdout.splitlines()
    assert linear == "the linear method"
    assert len(ours) == 2
    for line in ours:
        assert line.startswith("UnsupportedMergekitError")
        assert ">=0.1.5,<0.2" in line
        assert "0.1.4" in line
    assert other == "RuntimeError Unimplemented merge method other"
    assert "squisher-mergekit is not active in mergekit" in done.stderr


# Each case starts from mergekit as it is, in a fork, so that mergekit is imported once.
LACKING = {
    "registered_methods": "del registry.registered_methods",
    "_resolve_name": "del tasks.LoadTensor._resolve_name",
    "input_parameters": "del adapter.ExecuteMergeMethodTask.model_fields['input_parameters']",
    "normalize_config": "del plan.MergePlanner.normalize_config",
    "Executor.run": "del graph.Executor.run",
}
CASES = LACKING | {
    "as it is": "pass",
    "a bug of ours": "sys.modules['squisher_mergekit.merging.mergekit.hooks'] = None",
}
FORKED = """
import json, os, sys, warnings
import mergekit.plan as plan, mergekit.graph as graph, mergekit.io.tasks as tasks
import mergekit.merge_methods as methods, mergekit.merge_methods.registry as registry
import mergekit.merge_methods.task_adapter as adapter

def ask(name):
    try:
        return methods.get(name).spec.name
    except Exception as error:
        return f"{type(error).__name__}: {error}"

for case, change in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    if os.fork() == 0:
        exec(change)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import squisher_mergekit
        answers = {name: ask(name) for name in ("linear", "squisher", "ubgm_squisher")}
        print(json.dumps([case, answers, [str(each.message) for each in caught]]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return the answers of the real mergekit for three methods, after one change and a late import of the package."""
    folder = tmp_path_factory.mktemp("forked")
    done = environments.run(sys.executable, "-c", FORKED, json.dumps(CASES), cwd=folder, **{SWITCH: "0"})
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {case: (found, warned) for case, found, warned in lines}


def test_a_late_import_activates_the_real_mergekit(answers):
    """``import squisher_mergekit`` after mergekit registers both methods without a warning."""
    found, warned = answers["as it is"]
    assert found == {name: name for name in ("linear", "squisher", "ubgm_squisher")}
    assert warned == []


@pytest.mark.parametrize("lacking", LACKING)
def test_a_mergekit_without_an_attribute_refuses_our_methods_alone(answers, lacking):
    """A mergekit without a needed attribute refuses our methods with the versions, and linear still works."""
    found, warned = answers[lacking]
    assert found["linear"] == "linear"
    for method in ("squisher", "ubgm_squisher"):
        assert found[method].startswith("UnsupportedMergekitError: "), found
        assert ">=0.1.5,<0.2" in found[method]
        assert lacking in found[method]
    assert any("squisher-mergekit is not active in mergekit" in text for text in warned)


def test_a_bug_in_the_plugin_leaves_stock_methods_alone(answers):
    """A plug-in that cannot be imported gives a warning, and linear still works."""
    found, warned = answers["a bug of ours"]
    assert found["linear"] == "linear"
    assert found["squisher"] == "RuntimeError: Unimplemented merge method squisher"
    assert any("squisher-mergekit is not active in mergekit" in text for text in warned)


def test_a_stock_command_knows_the_methods_in_this_environment(tmp_path):
    """``import mergekit.merge_methods`` alone, as in mergekit-yaml, registers both methods here."""
    code = "import mergekit.merge_methods as m; print([m.get(n).spec.name for n in ('squisher', 'ubgm_squisher')])"
    done = environments.run(sys.executable, "-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("['squisher', 'ubgm_squisher']\n", "")
