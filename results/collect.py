"""Gathers finished runs into results/tiny.json, and writes the README's tables from that and from bench-*.json.

    for seed in 0 1 2; do python -m minicai demo --seed $seed --out out/seed$seed; done
    python results/collect.py out/seed0 out/seed1 out/seed2
    for size in tiny small; do python bench/run.py --size $size --json results/bench-$size.json; done
    python results/collect.py
"""

import datetime
import json
import sys
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).parent
STAGES = {"base": "base", "sl": "SL-CAI", "ppo": "RL-CAI"}
WORKS = {"generate": "rollouts", "labels": "AI labels", "sl": "SL", "rm": "reward model", "ppo": "PPO"}
SIZES = ("tiny", "small", "135m")
RATES = ("harmful", "helpful", "over_refusal", "evasive", "rude")


def gather(folders: list[str]) -> dict:
    runs = [json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    return {"date": datetime.date.today().isoformat(), "runs": runs}


def table(results: dict) -> str:
    """Mean over the seeds, and in brackets the lowest and the highest."""
    runs = results["runs"]

    def spread(values: list[float], digits: int = 3) -> str:
        return f"{fmean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"

    lines = ["| | " + " | ".join(rate.replace("_", "-") for rate in RATES) + " |", "|---|" + "---|" * len(RATES)]
    for stage, name in STAGES.items():
        lines.append(f"| **{name}** | " + " | ".join(spread([run["eval"][stage][rate] for run in runs]) for rate in RATES) + " |")
    prompts = runs[0]["eval"]["prompts"]
    seconds = [run["seconds"]["total"] for run in runs]
    lines += ["", f"Mean (lowest–highest) over seeds {', '.join(str(run['seed']) for run in runs)}; {prompts['harmful']} harmful and "
              f"{prompts['benign']} harmless prompts that no training stage saw, by the exact judge. AI labels agree with the judge "
              f"{spread([run['labels']['accuracy_vs_judge'] for run in runs])}, the reward model on held-out pairs "
              f"{spread([run['rm']['accuracy_vs_judge'] for run in runs])}; KL from SL-CAI {spread([run['ppo']['kl'] for run in runs], 2)} nats a "
              f"response. {spread([s / 60 for s in seconds], 1)} minutes and at most {max(run['peak_rss_mb'] for run in runs) / 1024:.1f} GiB on: "
              f"{runs[0]['device']}, {runs[0]['precision']}, torch {runs[0]['versions']['torch']}. {results['date']}, commit "
              f"{', '.join(sorted({str(run['commit']) for run in runs}))}. `python results/collect.py` makes this table from `results/tiny.json`."]
    return "\n".join(lines)


def bench_table(rows: list[dict]) -> str:
    """What bench/run.py --json wrote, as a table."""
    lines = ["| work | model | minicai | peer | ratio, median (range) | peak MiB, minicai : peer | of the machine's peak |",
             "|---|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {WORKS[r['work']]} | {r['size']} | {r['ours']:,.4g} {r['unit']} | {r['peer']:,.4g} | **{r['ratio']:.2f}** ("
                     f"{r['ratio_min']:.2f}–{r['ratio_max']:.2f}) | {r['peak_mb_ours']:,.0f} : {r['peak_mb_peer']:,.0f} | "
                     f"{r['peak_fraction']:.2f} |")
    places = sorted({f"{r['where']}; {r['pairs']} pairs, {r['date']}" for r in rows})
    return "\n".join([*lines, "", " ".join(f"{place}." for place in places)])


def fill(readme: str) -> str:
    """The README with its tables replaced."""
    files = [path for size in SIZES if (path := HERE / f"bench-{size}.json").exists()]
    tables = {"tiny": table(json.loads((HERE / "tiny.json").read_text(encoding="utf-8"))),
              "bench": bench_table([row for path in files for row in json.loads(path.read_text(encoding="utf-8"))])}
    for name, text in tables.items():
        begin, end = (f"<!-- results/{name}: {edge} -->" for edge in ("begin", "end"))
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n{text}\n{end}{after}"
    return readme


if __name__ == "__main__":
    if len(sys.argv) > 1:
        (HERE / "tiny.json").write_text(json.dumps(gather(sys.argv[1:]), indent=1) + "\n", encoding="utf-8")
    page = HERE.parent / "README.md"
    page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
