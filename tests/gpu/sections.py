"""A page of which several programs write a part each: docs/compatibility.md."""

import pathlib


def write(path, name, text):
    """Puts `text` where the part of this name is, or at the end, and leaves the others as they are."""
    path = pathlib.Path(path)
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    page = path.read_text() if path.exists() else "# Compatibility\n"
    part = f"{begin}\n{text.strip()}\n{end}"
    if begin in page and end in page:
        before, _, rest = page.partition(begin)
        page = before + part + rest.partition(end)[2]
    else:
        page = page.rstrip() + f"\n\n{part}\n"
    path.write_text(page)
