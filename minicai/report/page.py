"""report.html: one page of a run that people can read, search and print.

The page is a single file that needs no network. Jinja2 escapes all that a model wrote, and the
page's policy allows only its own script, by its hash. Plots need Matplotlib
(`pip install -e '.[report]'`); without it the page has tables only.
"""

import base64
import hashlib
import json
import time
from pathlib import Path

import jinja2

from minicai import InputError
from minicai.engine.data import finite
from minicai.engine.disk import damaged, write_atomic
from minicai.engine.terminal import warn
from minicai.evaluation.rates import METRICS
from minicai.report.panels import TABLE, panels
from minicai.report.summary import (
    STAGES,
    at,
    config,
    legible,
    number,
    percent,
    principles,
    progress,
    records,
    settings,
    so_far,
    summarise,
)
from minicai.report.transcripts import gather, past_failures

HERE = Path(__file__).parent
RATES = {name: f"share of the {metric.meaning}" for name, metric in METRICS.items()}
GLOSSARY = TABLE["models"] | RATES | TABLE["words"]


def render(template: str, **values) -> str:
    """The text of a page: a template of this folder, filled with `values` and the page's script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent}
    environment.policies["json.dumps_kwargs"] = {}  # does not sort
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    given = {"script": script, "digest": digest, "glossary": GLOSSARY, "metrics": METRICS}
    given["drawn"] = time.strftime("%Y-%m-%d %H:%M:%S")
    return environment.get_template(template).render(given | values)


@legible
def page(out: Path, summary: dict, live: float = 0) -> str:
    """The text of report.html. A page of a watched run reloads itself every `live` seconds."""
    names = STAGES | {model: row["name"] for model, row in at(summary, "elo.ratings").items()}
    return render(
        "report.html.j2",
        summary=summary,
        panels=panels(out, summary),
        transcripts=gather(out, names),
        replayed=past_failures(out, names),
        progress=progress(out),
        principles=principles(out, summary),
        settings=settings(out),
        names=names,
        base=config(out, "sl").get("model", "BASE"),
        out=out,
        live=live,
        title="results of a run",
    )


def write(out: Path, summary: dict, again: bool = True) -> None:
    """DIR/report.html and DIR/summary.json. again: also where there is this summary already."""
    path, text = out / "summary.json", json.dumps(finite(summary), indent=1)
    if again or not path.exists() or path.read_bytes() != text.encode():
        write_atomic(out / "report.html", page(out, summary))
        write_atomic(path, text)


def states(now: dict[str, str]) -> str:
    """How far each stage is, on one line."""
    return "; ".join(f"{name}: {state}" for name, state in now.items())


def draw(out: Path) -> None:
    """DIR/report.html of a run as far as it is, and DIR/summary.json if it is finished.

    Warns of journals that are not as their stage left them. Raises InputError where no stage has
    begun.
    """
    for stage, record in records(out).items():
        files = record.get("files", {})
        for said in damaged(out / stage, {k: files[k] for k in files if k.endswith(".jsonl")}):
            warn(f"{said}; the page shows what is there")
    if now := progress(out):
        write_atomic(out / "report.html", page(out, so_far(out)))
        print(f"not finished  {states(now)}")
    else:
        write(out, summarise(out))
    print(f"wrote  {out / 'report.html'}")


def watch(out: Path, seconds: float = 5) -> None:
    """Draws DIR/report.html after each step of a stage, until the run is finished.

    Ctrl-C ends it earlier. Raises InputError where there is no such folder.
    """
    if not out.is_dir():
        raise InputError(f"{out}: no such folder")
    seen = {}
    print(f"watching {out}, Ctrl-C to end; look at  {out / 'report.html'}", flush=True)
    try:
        while now := progress(out):
            began = time.monotonic()
            if now != seen and {*now.values()} != {"not begun"}:
                write_atomic(out / "report.html", page(out, so_far(out), seconds))
                print(f"{time.strftime('%H:%M:%S')}  {states(now)}", flush=True)
                seen = now
            # Drawing takes at most a sixth of the time of a core from the training.
            time.sleep(max(seconds, 5 * (time.monotonic() - began)))
    except KeyboardInterrupt:
        if not seen:
            return
    draw(out)
