"""RLHF's first stage: fine-tune the base model on answers that people preferred.

    python examples/demonstrations.py configs/tiny-rlhf.toml
    python train_rm.py configs/tiny-rlhf.toml
    python train_ppo.py configs/tiny-rlhf.toml
    minicai eval configs/tiny-rlhf.toml

Replaces the data of train_sl.py, not its loss. [sl] helpful_prompts is a file of preference pairs
(docs/data.md). Their better answers take the place of answers that the model would have sampled,
in OUT/sl/helpful.jsonl. Then train_sl.py trains on that file. No answer is sampled or revised.

Why that is legal: stages meet only through files, and train_sl.py makes no row that is there. Why
it is needed: RL changes how often a policy says what it can already say. The tiny base model
refuses in about one answer of 20,000, so RL from it would never see a refusal to reward. Ouyang et
al. 2022 (arXiv 2203.02155, section 3.1) begin RLHF with demonstrations, too. Here they are the
preferred answers of the comparisons that train the reward model, wrong labels included.

What to look at: `sl` beside `ppo` in eval: the harm that the wrong labels leave, and what RL takes
away of it.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where train_sl.py is
import train_sl
from minicai import InputError
from minicai.engine.disk import write_atomic
from minicai.engine.rows import read_preferences
from minicai.engine.stage import script


def main(cfg: train_sl.SLConfig) -> dict:
    """Runs or resumes the stage. Returns its record, which is also in OUT/sl/stage.json."""
    if cfg.prompts or cfg.helpful_samples != 1:
        raise InputError('[sl]: examples/demonstrations.py needs prompts = "", helpful_samples = 1')
    if cfg.overwrite:  # it would remove the answers as well
        raise InputError(f"--overwrite: remove {cfg.out}/sl instead, or choose another --out")
    pairs = read_preferences(cfg.helpful_prompts, cfg.helpful_limit)
    folder, rows = Path(cfg.out) / "sl", []
    for k, pair in enumerate(pairs):
        rows.append({"id": k, "prompt": pair["prompt"], "response": pair["first"], "ended": True})
    if not (folder / "helpful.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "revisions.jsonl", "")  # none; eval reads it
        write_atomic(folder / "helpful.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return train_sl.main(cfg)


if __name__ == "__main__":
    script(main, train_sl.SLConfig, "sl", __doc__)
