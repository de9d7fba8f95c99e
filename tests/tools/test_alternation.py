"""The demo in several rounds: each begins with the policy of the round before."""

from types import SimpleNamespace

import train_ppo
import train_rm
import train_sl
from minicai.report import summary
from minicai.tools import demo


def test_the_demo_alternates_from_the_last_policy(tmp_path, monkeypatch, capsys):
    ran = []
    for module in (train_sl, train_rm, train_ppo):
        name = module.__name__
        monkeypatch.setattr(module, "main", lambda cfg, name=name: ran.append((name, cfg)))
    evaluate = SimpleNamespace(evaluate=lambda cfg, made_by: ran.append(("eval", cfg)))
    monkeypatch.setattr(demo, "judging", evaluate)
    for module in ("page", "summary"):
        functions = dict.fromkeys(("provenance", "summarise", "write"), lambda *_, **how: {})
        kept = {"STAGES": summary.STAGES, "RECORDED": summary.RECORDED}
        monkeypatch.setattr(demo, module, SimpleNamespace(**functions, **kept))
    monkeypatch.setattr(demo, "closing", lambda out, found: "")
    demo.main([f"--out={tmp_path / 'o'}", "--alternate=3"])
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("stage 1 of 10: SL-CAI; about ")
    assert said[-1].startswith("stage 10 of 10: evaluation; about ")

    outs = [str(tmp_path / "o" / "round1"), str(tmp_path / "o" / "round2"), str(tmp_path / "o")]
    stages = [(name, out) for out in outs for name in ("train_sl", "train_rm", "train_ppo")]
    assert [(name, cfg.out) for name, cfg in ran] == [*stages, ("eval", outs[-1])]
    policies = {name: [cfg.policy for n, cfg in ran if n == name] for name, _ in stages}
    assert policies["train_sl"] == ["", f"{outs[0]}/ppo", f"{outs[1]}/ppo"]
    assert policies["train_rm"] == policies["train_ppo"] == [""] * 3
    written = [f"{out}/rm/comparisons.jsonl" for out in outs]
    earlier = [cfg.earlier for name, cfg in ran if name == "train_rm"]
    assert earlier == [(), tuple(written[:1]), tuple(written[1:2])]
    assert len({cfg.model for _, cfg in ran}) == 1
