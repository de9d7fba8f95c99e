"""Makes walkthrough.ipynb of walkthrough.md, and runs it.

    pip install -e '.[docs]' && python docs/notebook.py

Each doctest of the page becomes code cells, one per result. Folded solutions stay folded text.
Comments `<!-- stub ... -->` become cells to fill, and what is between `<!-- page -->` and
`<!-- /page -->` is left out. Figures are drawn as PNG into the text, since Colab shows no files
beside a notebook.
"""

import base64
import doctest
import io
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parent
NOTEBOOK = DOCS / "walkthrough.ipynb"
OPENING = """\
Each exercise has a cell to fill, and below it a folded solution.

```python
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = ""  # where minicai is not installed, as on Colab: its address, https://...
if find_spec("minicai") is None:
    source = ".." if Path("../pyproject.toml").exists() else f"git+{REPOSITORY}"
    assert source != "git+", "write the repository's address into REPOSITORY"
    %pip install -q {source}
```
"""


def code(text: str) -> str:
    return f"```python\n{text.strip()}\n```\n\n"


def cells(block: str) -> str:
    """A doctest block as code cells. Each ends with the statement that gives a result."""
    made, statements = [], ""
    for example in doctest.DocTestParser().get_examples(block):
        statements += example.source
        if example.want:
            made.append(code(statements))
            statements = ""
    return "".join(made) + (code(statements) if statements else "")


def convert(page: str) -> str:
    """The page as Markdown for jupytext."""
    page = re.sub(r"<!-- page -->.*?<!-- /page -->\n+", OPENING + "\n", page, flags=re.S)
    parts = re.split(r"(^<details>.*?^</details>$)", page, flags=re.M | re.S)
    for k, part in enumerate(parts):
        if k % 2:  # a solution: one text cell, in which nothing is run
            parts[k] = f"<!-- #region -->\n{part}\n<!-- #endregion -->"
            continue
        part = re.sub(r"^<!-- stub\n(.*?)^-->$", lambda m: code(m[1]), part, flags=re.M | re.S)
        part = re.sub(r"^```pycon\n(.*?)^```$", lambda m: cells(m[1]), part, flags=re.M | re.S)
        parts[k] = part
    header = "---\njupyter:\n  jupytext:\n    split_at_heading: true\n---\n\n"
    return header + "".join(parts)


def notebook(page: str) -> nbformat.NotebookNode:
    """The notebook without outputs and without the figures' pixels."""
    made = jupytext.reads(convert(page), fmt="md")
    made.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    made.cells = [cell for cell in made.cells if cell.source.strip()]
    for k, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{k}", {}
    return made


def run(made: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs all cells, in docs/, and returns the notebook with their outputs."""
    where = {"metadata": {"path": str(DOCS)}}
    client = NotebookClient(made, timeout=300, record_timing=False, resources=where)
    made = client.execute()
    for cell in made.cells:
        if cell.cell_type == "code":  # warnings of the machine that runs it
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    made.metadata.language_info = {"name": "python"}  # without the version
    return made


def result(cell: nbformat.NotebookNode) -> str:
    """What a code cell printed and showed, without blanks."""
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "".join("".join(texts).split())


def with_figures(made: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Draws each figure that a text cell links to into the cell, in place."""
    from figures import FIGURES, STYLE, rc_context

    for cell in made.cells:
        for name in re.findall(r"\]\(figures/(\w+)\.svg\)", cell.source):
            image = io.BytesIO()
            with rc_context(STYLE):
                FIGURES[name]().savefig(image, dpi=100, metadata={"Software": None})
            pixels = base64.b64encode(image.getvalue()).decode()
            cell.source = cell.source.replace(f"](figures/{name}.svg)", f"][{name}]")
            cell.source += f"\n\n[{name}]: data:image/png;base64,{pixels}"
    return made


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS))
    made = run(notebook((DOCS / "walkthrough.md").read_text(encoding="utf-8")))
    nbformat.write(with_figures(made), NOTEBOOK)
    print(f"{len(made.cells)} cells in {NOTEBOOK}, {NOTEBOOK.stat().st_size // 1024} KiB")
