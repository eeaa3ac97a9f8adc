"""Archives as the registries give them, of contents made up by a test."""

import io
import tarfile


def tarball(path, files):
    """Write a compressed archive of files, name -> bytes; returns ``path``."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
