"""Every Python block of the README runs, in order, in one namespace; every shell block names commands that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_the_python_blocks_run_as_one_session(tmp_path):
    assert blocks("python")
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(blocks("bash"))))))
def test_the_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ((?:hiera|benchmarks)[\w.]*)", README))))
def test_the_commands_exist(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def links(document: Path) -> list[tuple[Path, str]]:
    return [(document, link) for link in sorted(set(re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text())))]


@pytest.mark.parametrize(
    ("document", "link"),
    [each for name in ("README.md", "docs/results.md") for each in links(ROOT / name)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_links_lead_somewhere(document, link):
    assert (document.parent / link).exists()
