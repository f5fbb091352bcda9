"""Print the requirements of the named extras of pyproject.toml, one a line.

`pip install .[test]` would build the package first; this installs what it is built with.
"""

import re
import sys
from pathlib import Path

text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
section = re.sub(r"#.*", "", section)  # tomllib exists from Python 3.11 on only; the table holds lists of plain strings
extras = {name: re.findall(r'"([^"]+)"', body) for name, body in re.findall(r"(\w+)\s*=\s*\[(.*?)\]", section, re.S)}

unknown = [name for name in sys.argv[1:] if name not in extras]
if unknown:
    sys.exit(f"no such extra in pyproject.toml: {', '.join(unknown)}; there are {', '.join(extras)}")
print("\n".join(sorted({requirement for name in sys.argv[1:] for requirement in extras[name]})))
