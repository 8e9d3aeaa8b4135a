"""The collector of blocks sees them all, and takes only a comment right before one for its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import blocks as module

PAGE = """# Page

Text with `code`.

```sh
echo fenced
```

    echo indented

    echo more

<!-- not run: it takes
hours -->

    sleep 9999

<!-- another comment -->
```python
print(1)
```

<!-- not run: because of that -->
Text between.

    echo run

- an item
  that goes on

    still the item

- an item

    its paragraph
"""


def test_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    found = [(block.line, block.language, block.text, block.reason) for block in module.blocks(path)]
    assert found[:5] == [
        (5, "sh", "echo fenced\n", None),
        (9, "indented", "echo indented\n\necho more\n", None),
        (16, "indented", "sleep 9999\n", "it takes hours"),
        (19, "python", "print(1)\n", None),
        (26, "indented", "echo run\n", None),
    ]
    assert [line for line, *_ in found[5:]] == [31]  # doubtful: so it is taken for one
