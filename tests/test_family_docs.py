"""docs/models.md says what the code does: targets, methods, ops, counts and versions."""

import re
from pathlib import Path

from hiera_kernels.adapters import TARGETS
from tests.families import FAMILIES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "models.md").read_text()
# They only say why something stays as it is.
NEVER_SWAPPED = {"transformers.HieraModel"}


def rows(heading):
    """The cells of the table under the row `heading`."""
    lines = TEXT.split(heading, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_targets_methods_and_ops():
    written = {name.strip("`"): (method.strip("`"), ops.replace("`", "")) for name, method, ops in rows("| target |")}
    expected = {t.name: (t.method, ", ".join(t.ops)) for t in TARGETS if t.name not in NEVER_SWAPPED}
    assert written == expected


def test_counts():
    """`test_family_parity.py` holds the same counts against the models."""
    written = {name: (int(blocks), int(count)) for name, blocks, count in rows("| model | blocks |")}
    expected = {
        name: (sum(family.stages), len(family.replaced(family.stages)))
        for name, family in FAMILIES.items()
        if not name.startswith("sam2.0")
    }
    assert written == expected


def test_versions_are_those_that_are_tested_with():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements" / "constraints.txt").read_text(), re.M))
    said = re.search(r"Tested with (.*), against", TEXT).group(1)
    packages = dict(re.findall(r"([a-z0-9-]+) (\d[\d.]*\d)", said))
    assert packages.keys() == {"hiera-transformer", "timm", "transformers", "sam2", "peft"}
    assert packages == {name: pins[name] for name in packages}
