"""Pages of the site that are not Markdown files in docs/.

These are the README and its neighbours, and the tour with its output. mkdocs.yml names this file as
a hook. The tour is run while the site is built, so that its output is never out of date.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie under docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = relinked((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    text, pictures = run_tour(ROOT / "docs" / "tour.ipynb")
    files.append(File.generated(config, "tour.md", content=text))
    for name, picture in pictures.items():
        files.append(File.generated(config, name, content=picture))
    return files


def relinked(text: str) -> str:
    """The text of a page at the top of the repository, its links as they must be inside docs/."""
    text = text.replace("](docs/", "](").replace("](README.md", "](index.md")
    text = text.replace("](tour.ipynb", "](tour.md")
    return re.sub(r"\[([^]]+)\]\((?:LICENSE|CITATION\.cff)\)", r"\1", text)  # not on the site


def run_tour(path: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown with what its cells print and draw; the pictures by file name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    names: dict[str, Any] = {}
    plt.close("all")  # what somebody drew before is none of the tour's
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, str(path), "exec"), names)
        parts.append(f"```python\n{source}\n```")
        if printed.getvalue():
            parts.append(f"```text\n{printed.getvalue().rstrip()}\n```")
        for number in plt.get_fignums():
            name, picture = f"tour-{len(pictures)}.png", io.BytesIO()
            plt.figure(number).savefig(picture, dpi=110, bbox_inches="tight")
            pictures[name] = picture.getvalue()
            parts.append(f"![The figure that this cell draws]({name})")
        plt.close("all")
    return "\n\n".join(parts) + "\n", pictures
