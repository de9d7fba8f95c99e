"""docs/your-model.md: a real pretrained model, from its files to a report and a chat.

The model is not in the repository: where it is absent, what needs it is skipped.
"""

import json
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples import convert_llama2c
from minicai import InputError
from minicai.engine.data import read_jsonl
from tests.conftest import ROOT

STORIES = ROOT.parent / "shared" / "data" / "stories260K"
FILES = [STORIES / "stories260K.bin", STORIES / "tok512.bin"]
PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
BLOCKS = {"": []}  # of the page, by language
for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S):
    BLOCKS.setdefault(language, []).append(text)
SHOWN = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.M | re.S))
real = pytest.mark.skipif(not FILES[0].exists(), reason="the public model is not in the repository")


# --- the converter --------------------------------------------------------------------------------


def write_model(model, path, shared):
    """The inverse of convert_llama2c.load_model."""
    c, weights = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    heads, kv, size = c.num_attention_heads, c.num_key_value_heads, c.vocab_size
    numbers = c.hidden_size, c.intermediate_size, c.num_hidden_layers, heads, kv
    raw = struct.pack("7i", *numbers, size if shared else -size, c.max_position_embeddings)
    raw += weights["model.embed_tokens.weight"].tobytes()
    names = ["input_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo")]
    names += ["post_attention_layernorm", *(f"mlp.{x}_proj" for x in ("gate", "down", "up"))]
    for name in names:
        for layer in range(c.num_hidden_layers):
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            if name.endswith(("q_proj", "k_proj")):
                halves = weight.reshape(-1, 2, c.hidden_size // heads // 2, c.hidden_size)
                weight = halves.transpose(0, 2, 1, 3)
            raw += weight.tobytes()
    raw += weights["model.norm.weight"].tobytes()
    raw += bytes(4 * c.max_position_embeddings * c.hidden_size // heads)
    path.write_bytes(raw if shared else raw + weights["lm_head.weight"].tobytes())


@pytest.mark.parametrize("shared", [True, False])
def test_a_model_in_the_other_format_is_read_weight_by_weight(tmp_path, shared):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        tie_word_embeddings=shared,
    )
    model = LlamaForCausalLM(config)
    write_model(model, tmp_path / "model.bin", shared)
    found = convert_llama2c.load_model(str(tmp_path / "model.bin"))
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    (tmp_path / "model.bin").write_bytes((tmp_path / "model.bin").read_bytes()[:-4])
    with pytest.raises(InputError, match=r"model.bin: has [\d,]+ bytes, and by its header"):
        convert_llama2c.load_model(str(tmp_path / "model.bin"))


def test_pieces_are_merged_by_their_scores_and_blanks_begin_words(tmp_path):
    pieces = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    pieces += [(f"<0x{k:02X}>", 0.0) for k in range(256)]
    pieces += [(" a", -1.0), ("ab", -2.0), (" ab", -3.0), (" ", -4.0), ("a", -5.0), ("b", -6.0)]
    raw = struct.pack("i", 8)
    for piece, score in pieces:
        raw += struct.pack("fi", score, len(piece.encode())) + piece.encode()
    (tmp_path / "pieces.bin").write_bytes(raw)
    tokenizer = convert_llama2c.load_tokenizer(str(tmp_path / "pieces.bin"), len(pieces))
    ids = tokenizer("ab bé")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁ab", "▁", "b", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab bé"
    with pytest.raises(InputError, match=r"pieces.bin: has 265 pieces, and the model 512"):
        convert_llama2c.load_tokenizer(str(tmp_path / "pieces.bin"), 512)


@pytest.mark.parametrize("content", [b"", b"short", bytes(100)])
def test_what_is_no_model_of_that_format_is_refused(tmp_path, content):
    (tmp_path / "model.bin").write_bytes(content)
    for path in (tmp_path / "model.bin", tmp_path / "absent.bin"):
        with pytest.raises(InputError, match=f"^{path}: (its header|cannot be read)"):
            convert_llama2c.load_model(str(path))


@real
@torch.no_grad()
def test_the_real_model_tells_a_story(tmp_path, capsys):
    convert_llama2c.main([*map(str, FILES), str(tmp_path)])
    assert "Once upon a time, there was a little girl named Lily. She loved to play outside in the"
    assert capsys.readouterr().out.startswith(
        "Once upon a time, there was a little girl named Lily"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = "One day, a little girl named Lily found a needle in her room."
    ids = AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1 and model(ids, labels=ids).loss < 2  # nats per token; log 512 is 6.2


# --- the page -------------------------------------------------------------------------------------


def test_the_page_shows_every_file_that_its_commands_read():
    assert SHOWN.keys() == {"prompts.txt", "rules.toml", "mine.toml", "words.py"}


@real
@pytest.mark.slow
def test_every_command_of_the_page_runs_in_an_empty_folder(tmp_path):
    (tmp_path / "minicai").symlink_to(ROOT)
    for file in FILES:
        (tmp_path / file.name).symlink_to(file)
    for name, text in SHOWN.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    lines = "".join(BLOCKS[""]).replace("\nminicai ", "\npython -m minicai ").splitlines()
    commands = [line for line in lines if line.startswith("python ")]
    assert len(commands) >= 13
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    for line in commands:
        done = subprocess.run(
            [sys.executable, *shlex.split(line.partition("  #")[0])[1:]],
            cwd=tmp_path,
            env=environment,
            input="Once upon a time there was a boy named\n",
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, (line, done.stderr[-2000:])
        assert "WARNING" not in done.stderr and "Traceback" not in done.stderr, line

    # What was trained continues the prompt: each response begins with its own blank, if with any.
    rows = read_jsonl(tmp_path / "out" / "sl" / "revisions.jsonl")
    assert sum(row["initial"].startswith(" ") for row in rows) > len(rows) / 2
    assert {row["constitution"]["name"] for row in rows} == {"stories"}
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    rewards = [row["reward"] for row in read_jsonl(tmp_path / "words" / "ppo" / "metrics.jsonl")]
    assert rewards[-1] > 2 * rewards[0], rewards
    template = json.loads((tmp_path / "out/ppo/tokenizer_config.json").read_text())
    saved = (
        template.get("chat_template") or Path(tmp_path / "out/ppo/chat_template.jinja").read_text()
    )
    assert "messages" in saved  # the raw form, which other programs know too
