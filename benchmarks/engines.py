"""Which sources a child loads the library from: this checkout's, or the foundation's, the engine of a former commit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOUNDATION = "a074998"  # the last commit before reads were hidden behind compute


def source_of(kind: str, work: Path) -> Path:
    """The folder to put first on a child's module path. Extracts the foundation into `work` if it is not there yet."""
    return foundation(work) if kind == "foundation" else ROOT / "src"


def foundation(work: Path) -> Path:
    """The sources of the foundation, from the history of this repository."""
    folder = work / f"foundation-{FOUNDATION}"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", FOUNDATION, "src"], capture_output=True)
        if archive.returncode:
            raise SystemExit(
                f"error: the foundation arms need the history of this repository: {archive.stderr.decode().strip()}; "
                f"fetch commit {FOUNDATION}, or leave these arms out with --arms"
            )
        subprocess.run(["tar", "-x", "-C", str(partial)], input=archive.stdout, check=True)
        partial.rename(folder)
    return folder / "src"
