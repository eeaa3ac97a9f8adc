"""Kill every verb at random file operations, and verify that no part of an output and no loss of an older one remains.

A trial forks a process, which runs a verb and dies of SIGKILL, SIGTERM or SIGINT just before a random file operation.
OUT is new, an empty folder, or has an older output. A trial passes if

* under the final name is the older output, unchanged, or the complete new one;
* after SIGTERM and SIGINT no temporary file remains;
* the same call afterwards gives the result of an uninterrupted run, and removes all temporary files.

    python -m scripts.checkpoints.kill --trials 300 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STATES = ("new", "empty", "existing")
FAILURES = ("part under final name", "older output lost", "temporary left", "rerun differs")
_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "os.chown", "shutil.")
Contents = dict[str, str]


@dataclass
class Operations:
    """Counter of the file operations below a folder, which kills the process before one of them.

    Attributes:
        folder: The folder; None counts nothing.
        count: Operations until now.
        at: Operation to die before; None for no death.
        signal: The signal.
    """

    folder: str | None = None
    count: int = 0
    at: int | None = None
    signal: int = signal.SIGKILL

    def tick(self) -> None:
        """Count one operation."""
        if self.folder is None:
            return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.signal)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count an operation that Python reports."""
        if self.folder is not None and event.startswith(_OPERATIONS):
            named = any(isinstance(item, str | Path) and self.folder in str(item) for item in arguments)
            if named or event in ("os.link", "os.rename"):
                self.tick()


@dataclass(frozen=True)
class Verb:
    """A verb, and its treatment of an older output.

    Attributes:
        run: Function that writes the output.
        is_file: The output is a file, so that no empty folder can be in its place.
        older: Function that makes an older output; None if the verb refuses each.
        replaces: The new output replaces the older one.
        entry: Files that make an output; the others of a folder are judged only together with these. Empty for all.
    """

    run: Callable[[Path], Any]
    is_file: bool = False
    older: Callable[[Path], Any] | None = None
    replaces: bool = False
    entry: tuple[str, ...] = ()


def make_world(folder: Path) -> None:
    """Make a base, two trained models with optimizer state and Fisher, a mask and a difference."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from squisher_mergekit import save_squisher
    from squisher_mergekit.applications.fish_mask.files import reset_files, select_files
    from tests.small_models import word_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    for number in (1, 2):
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            ids = torch.randint(64, (2, 8))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        place = folder / f"m{number}"
        model.save_pretrained(place)
        torch.save(optimizer.state_dict(), place / "optimizer.pt")
        save_squisher(model, optimizer, folder / f"f{number}", weights=place, examples_per_step=2)
        save_squisher(model, optimizer, place)
    word_tokenizer().save_pretrained(folder / "m1")
    (folder / "rows.jsonl").write_text('{"text": "the cat sat on a mat"}\n' * 6, encoding="utf-8")
    lines = [f"- model: {folder}/m{n}\n  parameters: {{fisher: {folder}/f{n}}}\n" for n in (1, 2)]
    text = f"merge_method: squisher\nmodels:\n{''.join(lines)}dtype: float32\nbase_model: {folder}/m1\n"
    (folder / "merge.yml").write_text(text, encoding="utf-8")
    select_files(folder / "m1", None, folder / "mask.safetensors", 0.1, score="random")
    reset_files(folder / "m1", folder / "base", folder / "reset", mask=folder / "mask.safetensors")
    shutil.copytree(folder / "m1", folder / "other")


def verbs(world: Path) -> dict[str, Verb]:
    """Return the verbs by name."""
    from squisher_mergekit.cli.main import main
    from squisher_mergekit.fisher.files import read_fisher
    from squisher_mergekit.training.writing import copy_fisher, replace_fisher

    model, base, fisher = world / "m1", world / "base", world / "f1"

    def cli(*arguments: object) -> Callable[[Path], Any]:
        return lambda out: main([str(out if item is OUT else item) for item in arguments], standalone_mode=False)

    def stock(out: Path) -> None:
        from mergekit.scripts.run_yaml import main as mergekit_yaml

        mergekit_yaml([str(world / "merge.yml"), str(out), "--no-copy-tokenizer", "--quiet"], standalone_mode=False)

    def note(out: Path) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes((world / "m2" / "model.safetensors").read_bytes())

    def sharded(out: Path) -> None:
        from squisher_mergekit.fisher.write import write_fisher

        write_fisher(read_fisher(world / "f2"), out, shard_bytes=4000)

    def text(out: Path) -> None:
        out.write_text("older", encoding="utf-8")

    files = ("fisher.safetensors", "fisher.safetensors.index.json")
    difference = world / "reset" / "difference.safetensors"
    return {
        "extract": Verb(cli("extract", model, "-o", OUT), older=note, entry=files),
        "estimate": Verb(
            cli("estimate", model, "--task", "causal-lm", "--data", world / "rows.jsonl", "--batch-size", 2,
                "--save-every", 2, "-o", OUT), older=note, entry=files
        ),
        "prune": Verb(cli("prune", model, "--fisher", fisher, "--sparsity", "0.5", "-o", OUT)),
        "mask select": Verb(
            cli("mask", "select", model, "--keep", "0.1", "--score", "random", "-o", OUT), True, text, True
        ),
        "mask reset": Verb(
            cli("mask", "reset", model, "--base", base, "--keep", "0.1", "--score", "movement", "-o", OUT)
        ),
        "mask apply": Verb(cli("mask", "apply", base, "--difference", difference, "-o", OUT)),
        "mask remove": Verb(cli("mask", "remove", world / "reset", "--difference", difference, "-o", OUT)),
        "task2vec embed": Verb(cli("task2vec", "embed", f"a={fisher}", f"b={world / 'f2'}", "-o", OUT), older=note),
        "task2vec file": Verb(cli("task2vec", "embed", f"a={fisher}", "-o", OUT), is_file=True),
        "merge": Verb(cli("merge", world / "merge.yml", OUT, "--no-copy-tokenizer", "--quiet")),
        "mergekit-yaml": Verb(stock, older=note, replaces=True, entry=("model.safetensors",)),
        "inspect --json": Verb(cli("inspect", fisher, "--json", OUT), True, text, True),
        "compare --json": Verb(cli("compare", fisher, world / "f2", "--json", OUT), True, text, True),
        "replace_fisher": Verb(
            lambda out: replace_fisher(read_fisher(fisher), out), older=sharded, replaces=True, entry=files
        ),
        "copy_fisher": Verb(lambda out: copy_fisher(fisher, out), older=sharded, replaces=True, entry=files),
    }  # fmt: skip


OUT = object()


def contents(out: Path) -> Contents:
    """Return name -> digest of the files of an output; readers of a Fisher see a replacement under way."""
    from squisher_mergekit.fisher.write import fisher_files
    from squisher_mergekit.tensors.folder_moves import settled

    if out.is_file():
        return {"": digest(out)}
    files = [path for path in out.rglob("*") if path.is_file() and not hidden(path, out)] if out.is_dir() else []
    place = settled(out)
    if place != out:
        files = [path for path in files if not path.name.startswith("fisher")] + fisher_files(out)
    return {str(path.relative_to(place if place in path.parents else out)): digest(path) for path in files}


def digest(file: Path) -> str:
    """Return a hash of a file; the order of the keys in a safetensors header does not count."""
    data = file.read_bytes()
    with contextlib.suppress(ValueError):
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        data = json.dumps(header, sort_keys=True).encode() + data[8 + size :]
    return hashlib.sha256(data).hexdigest()


def hidden(path: Path, out: Path) -> bool:
    """Return True for a file in a temporary folder."""
    return any(".squisher" in part for part in path.relative_to(out).parts)


def left_over(folder: Path) -> list[str]:
    """Return the temporary files below a folder."""
    return [str(path) for path in folder.rglob("*") if ".squisher" in path.name]


def forked(work: Callable[[], Any]) -> int:
    """Run a function in a child process without output, and return the child's status: 0, 1, or minus the signal."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    with contextlib.suppress(BaseException):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        code = 0
    os._exit(code)


def died_early(operations: Operations, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the function with the handlers of the command line, whose signals clean up."""
    from squisher_mergekit.tensors.temporary import ENDINGS, cleaned_up_at_signals

    def work() -> None:
        with cleaned_up_at_signals(ENDINGS):
            run()

    return work


def prepare(verb: Verb, state: str, place: Path) -> Path:
    """Make the folder of a trial, and return OUT in it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    out = place / ("out.safetensors" if verb.is_file else "out")
    if state == "empty":
        out.mkdir()
    if state == "existing" and verb.older is not None:
        verb.older(out)
    return out


def judge(verb: Verb, now: Contents, before: Contents, whole: Contents) -> str | None:
    """Return the failure that the contents of OUT after a kill show, if any."""
    if now in (before, whole):
        return None
    if verb.replaces and not verb.entry:
        return FAILURES[0]
    older = {name: now.get(name) for name in before}
    lost = [name for name, digest in before.items() if older[name] not in (digest, whole.get(name))]
    if lost:
        return FAILURES[1]
    entries = verb.entry or tuple(whole)
    made = [name for name in now if name in entries and now[name] != before.get(name)]
    # mergekit itself writes the config after the tensors.
    judged = {name: whole[name] for name in entries} if verb.entry == ("model.safetensors",) else whole
    complete = all(now.get(name) == digest for name, digest in judged.items())
    return FAILURES[0] if made and not complete else None


def main() -> int:
    """Run the trials, print the table, and return 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    import tqdm

    tqdm.tqdm.monitor_interval = 0
    from squisher_mergekit.tensors.writer import SafetensorsWriter

    operations, begin = Operations(), time.monotonic()
    sys.addaudithook(operations.hook)
    synced, written = os.fsync, SafetensorsWriter._write
    os.fsync = lambda descriptor: (operations.tick(), synced(descriptor))[1]
    SafetensorsWriter._write = lambda self, *rest: (operations.tick(), written(self, *rest))[1]  # type: ignore[method-assign]
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="squisher-kill-") as folder:
        root = Path(folder).resolve()
        make_world(root)
        known = verbs(root)
        cases = [
            (name, state)
            for name, verb in known.items()
            for state in STATES
            if not (verb.is_file and state == "empty") and not (state == "existing" and verb.older is None)
        ]
        expected: dict[tuple[str, str], tuple[Contents, Contents, int]] = {}
        for name, state in cases:
            out = prepare(known[name], state, root / "trial")
            before = contents(out)
            operations.folder, operations.count = str(root / "trial"), 0
            with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                known[name].run(out)
            operations.folder = None
            expected[name, state] = before, contents(out), operations.count
            if left_over(root / "trial"):
                print(f"{name}: an uninterrupted run leaves {left_over(root / 'trial')}")
        print(f"{len(cases)} cases, {time.monotonic() - begin:.0f} s", flush=True)
        for number in range(options.trials):
            name, state = cases[number % len(cases)]
            verb, (before, whole, count) = known[name], expected[name, state]
            out = prepare(verb, state, root / "trial")
            ending, at = chance.choice(SIGNALS), chance.randint(1, count)

            def run(verb: Verb = verb, out: Path = out, at: int | None = at, ending: int = ending) -> None:
                operations.folder, operations.count = str(root / "trial"), 0
                operations.at, operations.signal = at, ending
                died_early(operations, lambda: verb.run(out))()

            status = forked(run)
            row = table.setdefault(name, Counter())
            row["trials"] += 1
            row["killed"] += status == -ending
            now, found = contents(out), []
            failure = judge(verb, now, before, whole)
            if failure:
                found.append(failure)
            if ending != signal.SIGKILL and left_over(root / "trial"):
                found.append(FAILURES[2])
            complete = now == whole and not verb.replaces
            if complete:
                row["complete"] += 1
            else:
                forked(lambda run=run: run(at=None))  # type: ignore[misc]
                if contents(out) != whole or left_over(root / "trial"):
                    found.append(FAILURES[3])
            row.update(found)
            if found:
                print(f"{name}, OUT {state}, {ending.name} before operation {at} of {count} ({status}): {found}")
                print(f"   before {sorted(before)}, now {sorted(now)}, left {left_over(root / 'trial')}", flush=True)
    columns = ("trials", "killed", "complete", *FAILURES)
    print(f"seed {options.seed}, {time.monotonic() - begin:.0f} s")
    print("verb".ljust(16), *(column.rjust(max(len(column), 6)) for column in columns))
    total: Counter[str] = sum(table.values(), Counter())
    for name, row in [*table.items(), ("all", total)]:
        print(name.ljust(16), *(str(row[column]).rjust(max(len(column), 6)) for column in columns))
    return int(any(total[failure] for failure in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
