"""MANIFEST.json: size and SHA-256 of a checkpoint's files, and in its last line its own SHA-256.

That one is over the bytes before the last line, so that a manifest that was altered is told from a
file that was. Manifests from before it was there have no such line and are read as they are.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "MANIFEST.json"

_LAST = re.compile(rb'(.*),\n "sha256": "([0-9a-f]{64})"\n}', re.DOTALL)


class Altered(ValueError):
    """The manifest is not what was written."""


def text(files: Mapping[str, Mapping[str, Any]]) -> str:
    """A manifest's text.

    Args:
        files: Facts of each, by name: "size" and "sha256".
    """
    listed = json.dumps({"files": files}, indent=1).removesuffix("\n}")
    own = hashlib.sha256(listed.encode()).hexdigest()
    return f'{listed},\n "sha256": "{own}"\n}}'


def read(file: Path) -> Any:
    """The files that a manifest lists, in whatever form somebody may have put them there.

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It is no manifest.
        Altered: It is none that was written so.
    """
    data = file.read_bytes()
    content = json.loads(data)
    if not isinstance(content, dict) or "files" not in content:
        raise ValueError("no manifest")
    if content.keys() == {"files"}:  # from before it held its own
        return content["files"]
    match = _LAST.fullmatch(data)
    if match is None or hashlib.sha256(match[1]).hexdigest() != match[2].decode():
        raise Altered("does not match its own checksum")
    return content["files"]
