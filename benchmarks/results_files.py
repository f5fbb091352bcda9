"""Reading benchmarks/results (schema: results/README.md). A file without a machine and a commit is refused."""

import json
from collections.abc import Iterator
from pathlib import Path


def measured_files(results: Path, name: str) -> Iterator[tuple[dict, list[dict]]]:
    """(environment, rows) of every `<machine>/<name>`, in the order of the folders' names.

    Raises:
        ValueError: a file names no machine or no commit.
    """
    for path in sorted(results.glob(f"*/{name}")):
        if path.parent.name == "predicted":
            continue
        content = json.loads(path.read_text())
        about = content["environment"]
        if not (about.get("gpu") or about.get("cpu")) or not about.get("commit"):
            raise ValueError(f"{path} must name the machine and the commit it was measured at, got {about}")
        yield about, content["results"]


def predicted_file(results: Path, name: str) -> tuple[dict, dict, list[dict]] | None:
    """(environment, device specs, rows) of predicted/<name>.json, None where there is none.

    Raises:
        ValueError: it names no commit.
    """
    path = results / "predicted" / f"{name}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    if not content["environment"].get("commit"):
        raise ValueError(f"{path} must name the commit that was counted, got {content['environment']}")
    return content["environment"], content["specs"], content["results"]


def machine_of(about: dict) -> str:
    """The GPU, or the CPU and its threads."""
    threads = about.get("threads", 1)
    return about.get("gpu") or f"{about['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def about_line(about: dict) -> str:
    """Machine, software and commit, as they stand below a table."""
    driver = f", driver {about['driver']}" if about.get("driver") else ""
    triton = f", triton {about['triton']}" if about.get("triton") and about.get("gpu") else ""
    return f"{machine_of(about)}{driver}, torch {about['torch']}{triton}, commit {about['commit'][:12]}"
