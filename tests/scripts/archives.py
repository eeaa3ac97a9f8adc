"""Archives in the formats of the registries, with contents of a test."""

import io
import tarfile


def tarball(path, files):
    """Write a compressed archive of files, given as name -> bytes; return ``path``."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
