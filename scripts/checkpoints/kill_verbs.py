"""Verbs that the kill test runs, and the small models, Fishers and files that they read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = object()


@dataclass(frozen=True)
class Verb:
    """A verb, and its treatment of an older output.

    Attributes:
        run: Function that writes the output.
        is_file: The output is a file, so that no empty folder can be in its place.
        older: Function that makes an older output; None if the verb refuses each.
        replaces: The new output replaces the older one.
        entry: Files that make an output; the others of a folder are judged only together with these. Empty for all.
        separate: Each file is a whole output of its own, which nobody reads together with the others.
    """

    run: Callable[[Path], Any]
    is_file: bool = False
    older: Callable[[Path], Any] | None = None
    replaces: bool = False
    entry: tuple[str, ...] = ()
    separate: bool = False


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
        "task2vec embed": Verb(
            cli("task2vec", "embed", f"a={fisher}", f"b={world / 'f2'}", "-o", OUT), older=note, separate=True
        ),
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
