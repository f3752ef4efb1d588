"""Put the rows that the chaos suite has recorded into docs/reliability.md: python tests/chaos/table.py ROWS.jsonl."""

from __future__ import annotations

import json
import re
import sys
from datetime import date
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table: made by make chaos -->\n", "<!-- end of table -->\n"


def table(rows: list[dict[str, str]]) -> str:
    """Markdown of all rows."""
    lines = [f"{date.today()}, {len(rows)} faults.", "", "| fault | what happened | what was lost |", "|---|---|---|"]
    lines += [f"| {row['fault']} | {row['happened']} | {row['lost']} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    rows.sort(key=lambda row: row["fault"])  # they come as the tests end
    page = PAGE.read_text()
    found = re.search(re.escape(BEGIN) + "(.*)" + re.escape(END), page, re.DOTALL)
    assert found is not None, f"{PAGE} has lost its marks"
    seen = {row["fault"] for row in rows}
    for fault in re.findall(r"^\| (.*?) \|", found.group(1), re.MULTILINE)[2:]:
        if fault not in seen:
            print(f"no longer in the table: {fault}")
    PAGE.write_text(page[: found.start(1)] + table(rows) + page[found.end(1) :])


if __name__ == "__main__":
    main()
