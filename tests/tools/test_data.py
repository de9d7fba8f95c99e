"""`python -m minicai data`: what it prints, how it ends, and that it is quick."""

import json
import subprocess
import sys
import time

import pytest

from minicai import InputError
from minicai.engine import dialogue
from minicai.tools import data
from tests.engine.test_templates import chat_tokenizer

ROWS = [
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."},
    {"prompt": "x" * 600, "chosen": "a", "rejected": "b"},
    {"prompt": "Hi", "chosen": "Hello."},
    {"system": "Be kind.", "prompt": "Why?", "chosen": "So.", "rejected": "No."},
]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_file_is_described_without_a_model_and_refused_as_a_stage_would(pairs, capsys):
    with pytest.raises(InputError, match=r"mend them, or set skip_bad = true$"):
        data.main([], str(pairs))
    said = capsys.readouterr().out
    assert f"{pairs}: preference pairs\n3 rows can be used\n" in said
    assert 'line 3: needs "chosen" and "rejected"' in said and "1 of 4 rows cannot be used" in said
    assert "\n\nHuman: Hi\n\nAssistant:[ Hello.]\n" in said
    assert "\n\nHuman: Hi\n\nAssistant:[ Go.]\n" in said
    lengths = next(line.split() for line in said.splitlines() if line.startswith("chosen "))
    assert lengths == ["chosen", "2", "2", "4", "7", "7"]
    data.main(["--skip_bad=true"], str(pairs))


def test_pairs_of_two_equal_responses_are_left_out_as_in_a_stage(pairs, capsys):
    pairs.write_text(json.dumps({"prompt": "Hi", "chosen": "a", "rejected": "a"}) + "\n")
    with pytest.raises(InputError, match="both responses of each pair are equal"):
        data.main([], str(pairs))
    pairs.write_text(pairs.read_text() + json.dumps(ROWS[1]) + "\n")
    data.main([], str(pairs))
    said = capsys.readouterr().out
    assert "1 rows can be used" in said and "left out: 1 pairs of two equal responses" in said


def test_with_a_model_it_counts_tokens_and_what_does_not_fit(
    pairs, models, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(dialogue, "_raw", set())
    model = tmp_path / "model"
    model.mkdir()
    for file in (models / "whole").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = chat_tokenizer("chatml")
    tokenizer.save_pretrained(model)
    settings = json.loads((model / "config.json").read_text()) | {"vocab_size": len(tokenizer)}
    (model / "config.json").write_text(json.dumps(settings))
    flags = [f"--model={model}", "--skip_bad=true"]
    with pytest.raises(InputError, match=r"mend them, or set skip_long = true$"):
        data.main(flags, str(pairs))
    said = capsys.readouterr().out
    assert "pair pairs.jsonl:2: with its response it has 6" in said and "2 rows can be used" in said
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello.<|im_end|>]\n" in said
    data.main([*flags, "--skip_long=true"], str(pairs))
    capsys.readouterr()
    data.main([*flags, "--skip_long=true", "--form=raw"], str(pairs))
    assert "\nHi[Hello.<|endoftext|>]\n" in capsys.readouterr().out
    (tmp_path / "p.txt").write_text("Hi\n" + "x" * 400 + "\n")
    capsys.readouterr()
    with pytest.raises(InputError, match="skip_long"):
        data.main([f"--model={model}"], str(tmp_path / "p.txt"))
    assert "p.txt: prompt 2: it has 4" in capsys.readouterr().out
    data.main([f"--model={model}", "--max_new_tokens=9"], str(tmp_path / "p.txt"))
    assert "user\nHi<|im_end|>\n<|im_start|>assistant\n[ ...]\n" in capsys.readouterr().out


def test_it_answers_without_torch_and_in_time(pairs):
    began = time.monotonic()
    code = f"""
import runpy, sys
sys.argv = ["minicai", "data", {str(pairs)!r}]
try:
    runpy.run_module("minicai", run_name="__main__")
finally:
    assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "some rows cannot be used" in done.stderr and seconds < 30  # 0.7 on a quiet core


@pytest.mark.parametrize("name", ["rules.toml", "none.jsonl", "empty.jsonl", "other.jsonl"])
def test_what_it_cannot_read_is_one_sentence(tmp_path, name):
    (tmp_path / "rules.toml").write_text('name = "x"')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text('{"story": "Once"}\n' * 3)
    said = {"rules": "constitution check", "none": "no such file", "empty": "holds no row"}
    said = said.get(name.partition(".")[0], "it has story; 3 of 3 rows cannot be used")
    with pytest.raises(InputError, match=said):
        data.main([], str(tmp_path / name))
