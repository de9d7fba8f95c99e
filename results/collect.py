"""Gathers finished runs into results/tiny.json and writes the README's result table from it.

    for seed in 0 1 2; do python -m minicai demo --seed $seed --out out/seed$seed; done
    python results/collect.py out/seed0 out/seed1 out/seed2
"""

import datetime
import json
import sys
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).parent
BEGIN, END = "<!-- results/tiny.json: begin -->", "<!-- results/tiny.json: end -->"
STAGES = {"base": "base", "sl": "SL-CAI", "ppo": "RL-CAI"}
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


def fill(readme: str, results: dict) -> str:
    """The README with its table replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        (HERE / "tiny.json").write_text(json.dumps(gather(sys.argv[1:]), indent=1) + "\n", encoding="utf-8")
    page = HERE.parent / "README.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), json.loads((HERE / "tiny.json").read_text(encoding="utf-8"))), encoding="utf-8")
