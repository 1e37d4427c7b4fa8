"""The documentation names what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_page_of_faults_names_is_there():
    page = (ROOT / "docs" / "what_happens_when.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("|---", "| fault |"))]
    assert len(rows) > 50
    for row in rows:
        file, test = re.search(r"`([\w/]+\.py)::(test_\w+)` \|$", row).groups()
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), row
