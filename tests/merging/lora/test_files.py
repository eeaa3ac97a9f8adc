"""Files of a LoRA in a merge: the weights that it keeps."""

import json
from pathlib import Path

import pytest

from squisher_mergekit.merging.lora.files import LoraFiles
from squisher_mergekit.models.weights import Weights
from tests.adapters import train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


def _files(folder: Path) -> LoraFiles:
    return LoraFiles(Weights(folder / "adapter", "adapter_model"), Weights(folder / "base"))


@pytest.mark.parametrize("targets", [["q_proj"], ["o_proj", "gate_proj"]])
def test_a_lora_keeps_what_it_does_not_wrap(targets: list[str], tmp_path: Path) -> None:
    """Every weight of the base is kept, apart from the wrapped ones."""
    train(tmp_path, target_modules=targets)
    files = _files(tmp_path)
    changed = {name for name in files.base.infos if not files.keeps(name)}
    assert changed == {name for name in files.base.infos if name.split(".")[-2] in targets}


@pytest.mark.parametrize("change", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_an_adapter_of_another_kind_keeps_nothing_for_certain(change: dict[str, object], tmp_path: Path) -> None:
    """Its weights are merged by peft, and none is copied from the base."""
    train(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    files = _files(tmp_path)
    assert not any(files.keeps(name) for name in files.base.infos)
