"""``python -m tests.docs`` writes every generated page and picture."""

from __future__ import annotations

from tests.docs.pages import ROOT, generated_files


def main() -> None:
    for path, text in generated_files().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")


main()
