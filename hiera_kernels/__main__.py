"""`python -m hiera_kernels`: what runs where on this machine, and why not the faster one."""

import argparse
import json
import shutil

from hiera_kernels import platform_report


def main(arguments: list[str] | None = None) -> None:
    """Print the report, as text or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m hiera_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args(arguments).json
    report = platform_report.collect()
    columns = max(shutil.get_terminal_size((120, 24)).columns, 80)
    print(json.dumps(report, indent=2) if as_json else platform_report.render(report, columns))


if __name__ == "__main__":
    main()
