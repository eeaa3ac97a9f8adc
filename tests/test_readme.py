"""Fenced blocks and links of every README.md, all of which must work.

Conventions for whoever writes a README.md:

* A fence names its language: ``bash``, ``console``, ``python``, ``yaml``, ``json``, ``text`` or ``bibtex``.
* The blocks of one file run in order, in one working folder. ``tests/readme_world.py`` makes the folders that the file
  names: ``runs/NAME/checkpoint-N`` is a real checkpoint of the Trainer with a small model, and so on.
* ``bash``: one command a line (a backslash continues it); no pipes and no redirections. ``squisher``, ``mergekit-yaml``
  and ``squisher-mergekit-yaml`` run in this process, ``python``, ``accelerate``, ``torchrun`` and ``./scripts/...`` in
  a process of their own. Paths under ``configs/`` are those of the repository. ``squisher push`` and ``pull``, and Hub
  ids, meet a stand-in for the Hub that has the repositories that the file names with ``@fisher``.
* ``console``: lines that begin with ``$`` are such commands. Every other line must stand in their output, where
  numbers may differ, and so may the lengths of runs of spaces or dashes; a line ``...`` matches anything.
* ``python``: runs with the names of ``World.names`` (``model``, ``base``, ``optimizer``, ``data``, ``batches``,
  ``fisher``, ``loss_of``, ``args``, ``Trainer``, ...), fresh in each block, and with the names that earlier blocks
  of the file assigned. ``NAMES`` replaces some of them for single files.
* ``yaml``: a configuration of a merge is planned by ``squisher plan``. Where its first line is a comment with a file's
  name (``# merge.yml``), it is written there, so that later commands find it. Other YAML is parsed only.
* ``json`` is parsed. ``text`` and ``bibtex`` are not looked at.
* A block that needs a network, an accelerator or minutes has ``<!-- not run: reason -->`` on the line before its fence.
  There are at most ``MOST_NOT_RUN`` of them.
"""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests import hub_server
from tests.readme_world import World
from tests.readmes import READMES, ROOT, Block, anchors, blocks, links, named

LANGUAGES = {"bash", "console", "python", "yaml", "json", "text", "bibtex"}
MOST_NOT_RUN = 4
# File -> name in its Python blocks -> the name of World.names that it takes.
NAMES = {"configs/README.md": {"base": "theta_0"}}
BLOCKS = {named(file): list(blocks(file.read_text(encoding="utf-8"), named(file))) for file in READMES}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft's call
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Return the trained runs that all examples share."""
    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty working folder with the repository's recipes and a stand-in for the Hub."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(work)
    with hub_server.serve() as hub:
        hub_server.point_at(hub, tmp_path / "home", monkeypatch)
        yield work, hub


def _publish(hub, world, text):
    """Put a model and its Fisher into each repository that a text pulls or merges from."""
    for repo in set(re.findall(r"\b([\w-]+/[\w-]+)@fisher\b", text)) - set(
        re.findall(r"squisher push \S+ (\S+)", text)
    ):
        run = world.root / "llama-0"
        hub.add(repo, hub_server.read(run))
        scratch = world.root / "published"
        if not scratch.exists():
            world._fisher(run, scratch)
        hub.add(repo, hub_server.read(scratch), "fisher")


class Failure(AssertionError):
    """Block that fails; the message has its place."""


def _commands(block):
    """Return the commands of a block, each as its words."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[1:] for line in text.splitlines() if line.startswith("$"))
    found = [shlex.split(line, comments=True) for line in text.splitlines()]
    for words in found:
        if {"|", "&&", ";", ">", "<", "||", "&"} & set(words):
            raise Failure(
                f"{block.place}: one command a line, without pipes and redirections, found {shlex.join(words)}"
            )
    return [words for words in found if words]


def _program(name):
    """Return the click command of a program that runs in this process, or None."""
    if name == "squisher":
        from squisher_mergekit.cli.main import main
    elif name in ("mergekit-yaml", "squisher-mergekit-yaml"):
        from mergekit.scripts.run_yaml import main
    else:
        return None
    return main


def _run_command(block, words):
    """Run a command and return its output."""
    command = _program(words[0])
    if command is not None:
        result = CliRunner().invoke(command, words[1:], prog_name=words[0])
        output, failed = result.output, result.exit_code != 0
        output += repr(result.exception) if failed else ""
    else:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        if words[0].startswith("./scripts/"):
            words = [str(ROOT / words[0]), *words[1:]]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        output, failed = done.stdout + done.stderr, done.returncode != 0
    if failed:
        raise Failure(f"{block.place}: {shlex.join(words)} failed:\n{output[-3000:]}")
    return output


def _masked(line):
    """Return a line of output without numbers and without the lengths of runs of spaces and dashes."""
    return re.sub(r"[-─ ]*[-─ ]+", " ", re.sub(r"\d[\d.,]*(?:e[-+]?\d+)?", "#", line)).strip()


def _run_shell(block):
    """Run the commands of a block, and compare the output with the one in the block."""
    output = "".join(_run_command(block, words) for words in _commands(block))
    if block.language == "console":
        printed = {_masked(line) for line in output.splitlines()}
        shown = [line for line in block.text.replace("\\\n", " ").splitlines() if not line.startswith("$")]
        missing = [line for line in shown if line.strip() not in ("", "...") and _masked(line) not in printed]
        if missing:
            raise Failure(f"{block.place}: not in the output: {missing}\nthe output was:\n{output[-3000:]}")


def _plan(block):
    """Plan the merge of a YAML block, or only parse it."""
    from squisher_mergekit.cli.plan import command

    data = yaml.safe_load(block.text)
    first = re.match(r"# ([\w./-]+\.ya?ml)\b", block.text)
    file = Path(first[1] if first else "block.yml")
    if first or "merge_method" in data:
        file.write_text(block.text, encoding="utf-8")
    if "merge_method" in data:
        result = CliRunner().invoke(command, [str(file)])
        if result.exit_code:
            raise Failure(f"{block.place}: squisher plan refused it:\n{result.output}")


def _run_python(block, names, own):
    """Run a block with the given names and the file's own, and keep the names that it assigns."""
    namespace = {**names, **own, "__name__": "example"}
    before = dict(namespace)
    try:
        exec(compile(block.text, block.place, "exec"), namespace)
    except Exception as error:
        raise Failure(f"{block.place}: {type(error).__name__}: {error}") from error
    own.update({name: value for name, value in namespace.items() if value is not before.get(name)})
    own.pop("__builtins__", None)


def run_blocks(world, folder, hub, name, found):
    """Run the blocks of a file in order."""
    text = "".join(block.text for block in found)
    world.prepare(folder, text + "".join(file.read_text(encoding="utf-8") for file in _recipes(text)))
    _publish(hub, world, text)
    own: dict[str, object] = {}
    for block in found:
        if block.not_run:
            continue
        if block.language in ("bash", "console"):
            _run_shell(block)
        elif block.language == "python":
            names = world.names(folder)
            names |= {mine: names[given] for mine, given in NAMES.get(name, {}).items()}
            _run_python(block, names, own)
        elif block.language == "yaml":
            _plan(block)
        elif block.language == "json":
            json.loads(block.text)


def _recipes(text):
    """Return the recipes that a text names; their folders have to exist as well."""
    return [ROOT / name for name in sorted(set(re.findall(r"\bconfigs/\w+\.yml", text)))]


@pytest.mark.parametrize("name", [name for name, found in BLOCKS.items() if found])
def test_the_blocks_of_a_readme_run(name, world, folder):
    """Every command, Python block and configuration of the file works on small models."""
    level = logging.getLogger("squisher_mergekit").level
    try:
        run_blocks(world, *folder, name, BLOCKS[name])
    finally:
        logging.getLogger("squisher_mergekit").setLevel(level)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_fence_names_its_language(name):
    """A fence names its language for the editor of a reader and for this test."""
    assert {block.place: block.language for block in BLOCKS[name] if block.language not in LANGUAGES} == {}


def test_few_blocks_are_not_run():
    """At most a few blocks are not run, and each has a reason."""
    left_out = [f"{block.place}: {block.not_run}" for found in BLOCKS.values() for block in found if block.not_run]
    print("\n".join(left_out))
    assert len(left_out) <= MOST_NOT_RUN, left_out


@pytest.mark.parametrize("file", READMES, ids=named)
def test_links_resolve(file):
    """A link to a file, a folder or a heading of the repository has its target."""
    broken = []
    for link in links(file.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


# ---- the runner itself


def _blocks_of(text):
    return list(blocks(text, "x"))


MERGE = (
    "```yaml\n# merge.yml\nmerge_method: squisher\nmodels:\n- model: runs/math/checkpoint-100\n"
    "- model: runs/code/checkpoint-100\nbase_model: runs/math/checkpoint-100\n```\n"
)


def test_a_quick_start_runs(world, folder):
    """YAML, commands with output, Python with names of earlier blocks, and the Hub work together in one file."""
    text = MERGE + (
        "```console\n$ squisher plan merge.yml\n...\n"
        "```\n```bash\nmergekit-yaml merge.yml merged   # a comment\nsquisher extract runs/math/checkpoint-100 \\\n"
        "    -o fishers/math\nsquisher push fishers/math me/llama-math\n"
        "squisher pull me/llama-math@fisher -o pulled\n```\n"
        "```python\nloss = loss_of(model, batch)\n```\n```python\nloss.backward()\n```\n"
    )
    run_blocks(world, *folder, "x", _blocks_of(text))
    work, _ = folder
    assert (work / "merged" / "model.safetensors").is_file()
    assert (work / "pulled" / "fisher.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nsquisher inspect nowhere\n```\n", "x:1: squisher inspect nowhere failed"),
        ("```bash\nsquisher doctor | head\n```\n", "one command a line"),
        ("```python\nundefined\n```\n", "x:1: NameError"),
        (MERGE.replace("squisher", "squisher\nparameters: {densty: 1}", 1), "squisher plan refused it"),
        (MERGE + "```console\n$ squisher plan merge.yml\nno such line\n```\n", "not in the output: ['no such line']"),
        ("```console\n$ python -c 'raise SystemExit(3)'\n```\n", "failed"),
    ],
)
def test_a_block_that_fails_is_named(text, message, world, folder):
    """The error has the place of the block and the reason."""
    with pytest.raises(Failure) as raised:
        run_blocks(world, *folder, "x", _blocks_of(text))
    assert message in str(raised.value)


def test_a_block_that_is_marked_is_left_out(world, folder):
    """The mark is a comment on the line before the fence."""
    [block] = _blocks_of("text\n\n<!-- not run: needs a network -->\n```bash\nno-such-program\n```\n")
    assert block == Block("x:4", "bash", "no-such-program\n", "needs a network")
    run_blocks(world, *folder, "x", [block])


def test_numbers_may_differ_in_shown_output():
    """Numbers and widths of columns are not compared, but words are."""
    assert _masked("covers 100.0%   of 1,234 ----") == _masked("covers 98.5% of 7 -")
    assert _masked("covers 3") != _masked("misses 3")


def test_anchors_are_those_of_github():
    """Anchors drop punctuation, replace spaces by hyphens, and number repeated headings."""
    assert anchors("# What a Fisher costs, and `x`\n## A: b\n## A: b\n") == {
        "what-a-fisher-costs-and-x",
        "a-b",
        "a-b-1",
    }
