"""What earlier releases wrote, kept as files: a folder for each release."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RELEASES = sorted(path for path in FOLDER.iterdir() if path.is_dir() and path.name[0].isdigit())


def read_json(path: Path) -> Any:
    """What a file holds."""
    return json.loads(path.read_text(encoding="utf-8"))
