"""Models of many architectures through the three scripts; what cannot be used is refused by name.

They are tiny, made from their config classes. The tokenizers differ too: with and without a chat
template, a BOS token, a pad token of their own.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import train_ppo
import train_rm
import train_sl
from minicai import InputError, constitution
from minicai.engine import config, load
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import encode
from minicai.engine.models import response_logprobs, sequence_scores
from minicai.rollout import check_ratio, collate
from tests.conftest import CPU, ROOT, SHORT_RULES, assert_close, byte_tokenizer
from tests.engine.test_templates import chat_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
FEW = SIZES | {"num_key_value_heads": 2}  # keys and values shared by queries
MIXED = {
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
ARCHITECTURES = {  # name: config, its settings, chat template
    "gpt2": ("GPT2Config", GPT2, None),  # learned positions; pad = eos, no token to spare
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
        None,
    ),
    "neox": ("GPTNeoXConfig", SIZES | {"tie_word_embeddings": False}, None),
    "llama": ("LlamaConfig", FEW, "llama3"),
    "mistral": ("MistralConfig", FEW | {"sliding_window": 24}, "mistral"),
    "qwen2": ("Qwen2Config", FEW | {"tie_word_embeddings": True}, "chatml"),
    "qwen3": ("Qwen3Config", FEW | {"head_dim": 16}, "qwen3"),
    "gemma3": ("Gemma3TextConfig", FEW | MIXED, "gemma"),
    "phi3": ("Phi3Config", FEW, None),
    "olmo2": ("Olmo2Config", FEW, None),
    "starcoder2": ("Starcoder2Config", FEW, None),
    "mixtral": ("MixtralConfig", FEW | EXPERTS, None),
}
REFUSED = {
    "FalconForCausalLM: it does not let its attention be": (
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "BloomForCausalLM: it does not let its attention be": (
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "MambaForCausalLM: it does not let its attention be": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "Gemma2ForCausalLM: attention with softcap is not supported": (
        "Gemma2Config",
        FEW | {"head_dim": 16},
    ),
    "GptOssForCausalLM: attention with s_aux is not supported": (
        "GptOssConfig",
        FEW | MIXED | EXPERTS,
    ),
    "Lfm2ForCausalLM: ": (
        "Lfm2Config",
        FEW | {"layer_types": ["conv", "full_attention"]},
    ),
    "CohereForCausalLM: ": ("CohereConfig", FEW),
    "DeepseekV3ForCausalLM: ": (
        "DeepseekV3Config",
        SIZES
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}


def tiny(name, settings, folder, tokenizer):
    """A model of the class of that config, with the tokenizer's special tokens, in a folder."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    shape = getattr(transformers, name)(
        vocab_size=len(tokenizer), initializer_range=0.25, **ids, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenizer_of(architecture):
    template = ARCHITECTURES[architecture][2]
    tokenizer = chat_tokenizer(template) if template else byte_tokenizer()
    if architecture == "gpt2":
        tokenizer = byte_tokenizer(pad="<eos>")
    return tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(architecture) -> a folder in which the three scripts have run from such a model."""
    return cache(lambda architecture: train(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.fixture(params=ARCHITECTURES)
def run(request, trained):
    return trained(request.param)


def strictly(logprobs, sampled_logprobs, tolerance):
    """The check of the first ratio, a hundred times as strict."""
    check_ratio(logprobs, sampled_logprobs, 1e-4)


def train(architecture, folder):
    name, settings, _ = ARCHITECTURES[architecture]
    tiny(name, settings, folder / "base", tokenizer_of(architecture))
    (folder / "rules.toml").write_text(SHORT_RULES)
    (folder / "prompts.txt").write_text("Why?\nHow do I boil an egg?\n")
    (folder / "human.jsonl").write_text(
        '{"prompt": "Tell me.", "chosen": "yes", "rejected": "no, never"}\n'
    )
    (folder / "config.toml").write_text("""
        model = "base"
        constitution = "rules.toml"
        device = "cpu"
        [sl]
        prompts = "prompts.txt"
        helpful_prompts = "prompts.txt"
        helpful_samples = 1
        rounds = 1
        drop = []
        max_new_tokens = 4
        warmup = 0
        lr = 1e-3
        [rm]
        prompts = "prompts.txt"
        preferences = "human.jsonl"
        max_new_tokens = 4
        heldout = 0.0
        warmup = 0
        lr = 1e-3
        [ppo]
        prompts = "prompts.txt"
        helpful_prompts = ""
        max_new_tokens = 6
        iterations = 1
        episodes = 4
        epochs = 1
        minibatches = 2
        lr = 1e-3
        value_lr = 1e-3
    """)
    for stage, script in (("sl", train_sl), ("rm", train_rm), ("ppo", train_ppo)):
        kind = getattr(script, f"{stage.upper()}Config")
        with patch.object(train_ppo, "check_ratio", strictly):
            script.main(config.load(kind, stage, [str(folder / "config.toml"), f"--out={folder}"]))
    return folder


def loaded(auto, folder):
    """As anybody else would load it, and with attention that knows nothing of ours."""
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def rows(tokenizer):
    said = [("Why?", "Because."), ("How do I boil an egg, please?", "So."), ("No", "")]
    return [encode(tokenizer, prompt, answer) for prompt, answer in said]


@torch.no_grad()
def test_what_the_scripts_export_gives_others_the_same_logprobs(run):
    """Padded, packed, or each text by itself."""
    files = {"sl/revisions.jsonl": 2, "ppo/episodes.jsonl": 4, "ppo/metrics.jsonl": 1}
    assert {file: len(read_jsonl(run / file)) for file in files} == files
    assert (run / "rm" / "comparisons.jsonl").exists()
    policy, theirs = load.load_policy(str(run / "ppo")), loaded(AutoModelForCausalLM, run / "ppo")
    encoded = rows(policy.tokenizer)
    batch = collate(*zip(*encoded), CPU)
    ours, seen = response_logprobs(policy, batch), attended(batch)
    padded = theirs(input_ids=batch.ids, attention_mask=seen).logits.log_softmax(-1)
    for row, (prompt, answer) in enumerate(encoded):
        alone = theirs(input_ids=tensor([prompt + answer])).logits[0].log_softmax(-1)
        for t, token in enumerate(answer, len(prompt)):
            assert_close(ours[row, t], alone[t - 1, token], 2e-4)
            assert_close(padded[row, t - 1, token], alone[t - 1, token], 2e-4)
    assert (ours[~batch.mask] == 0).all() and batch.mask[torch.arange(3), batch.lengths - 1].all()


def attended(batch):
    """The attention mask of a padded batch, as transformers takes it."""
    return (torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]).long()


@torch.no_grad()
def test_the_exported_reward_model_scores_a_padded_batch_as_ours_does_each_text(run):
    reward, theirs = load.load_scorer(str(run / "rm")), run / "rm"
    theirs, tokenizer = loaded(AutoModelForSequenceClassification, theirs), reward.tokenizer
    batch = collate(*zip(*rows(tokenizer)), CPU)
    batch.ids[~attended(batch).bool()] = tokenizer.pad_token_id
    ours = sequence_scores(reward, batch)
    found = theirs(input_ids=batch.ids, attention_mask=attended(batch)).logits[:, 0]
    assert_close(found, ours, 2e-4)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert theirs.config.pad_token_id == tokenizer.pad_token_id
    assert (ours[0] - ours[1]).abs() > 1e-3


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_packed_is_refused_by_its_name(message, tmp_path):
    tiny(*REFUSED[message], tmp_path, byte_tokenizer())
    with pytest.raises(InputError) as refused:
        load.load_policy(str(tmp_path))
    said = message.replace(": ", " is a kind of model that cannot be packed: ")
    assert str(refused.value).startswith(f"{tmp_path}: {said}")


PIPELINES = """
import json, sys
from transformers import pipeline
found = []
for folder, texts in json.loads(sys.argv[1]):
    how = {"device": "cpu", "batch_size": len(texts), "function_to_apply": "none"}
    score = pipeline("text-classification", model=f"{folder}/rm", tokenizer_kwargs={}, **how)
    write = pipeline("text-generation", model=f"{folder}/ppo", device="cpu")
    scores = [one["score"] for one in score(texts, add_special_tokens=False)]
    said = write(texts[0], max_new_tokens=8, do_sample=False, return_full_text=False)
    found.append([scores, said[0]["generated_text"]])
assert not [name for name in sys.modules if name.partition(".")[0] == "minicai"]
print(json.dumps(found))
"""


def test_both_folders_work_in_the_pipelines_of_transformers(trained):
    asked, ours = [], []
    for architecture in ("gpt2", "qwen2"):  # without and with a chat template
        run = trained(architecture)
        reward = load.load_scorer(str(run / "rm"))
        encoded = rows(reward.tokenizer)
        texts = [reward.tokenizer.decode(prompt + answer) for prompt, answer in encoded]
        asked.append((str(run), texts))
        ours.append(sequence_scores(reward, collate(*zip(*encoded), CPU)).detach())
    words = [sys.executable, "-c", PIPELINES, json.dumps(asked)]
    done = subprocess.run(words, cwd=Path("/"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for (scores, said), expected in zip(found, ours, strict=True):
        assert_close(scores, expected, 2e-4)
        assert isinstance(said, str)


# --- real data ------------------------------------------------------------------------------------

DATA = ROOT.parent / "shared" / "data"
DATA = DATA if DATA.is_dir() else Path("/work/shared/data")
RULES = [
    ROOT / "configs/constitutions/general.toml",
    DATA / "cai-paper/CritiqueRevisionInstructions.json",
]
REVISED = {"id", "prompt", "initial", "ended", "rounds", "final", "kept"}
REVISED |= {"model", "constitution", "seed", "models"}
COMPARED = {"id", "prompt", "first", "second", "p_first", "votes", "source", "clamped", "models"}
VOTE = {"principle", "judge", "logp_first", "logp_second", "order", "rationale"}


def assert_revisions(found, rules):
    for row in found:
        [step] = row["rounds"]
        assert row.keys() == REVISED and row["constitution"]["sha256"]
        assert isinstance(row["initial"], str) and row["final"] == step["revision"]
        prompt = row["prompt"]
        assert prompt and (isinstance(prompt, str) or prompt[-1]["role"] == "user")
        assert step.keys() == {"principle", "critique", "revision", "ended"}
        assert all(isinstance(text, str) for text in step.values())
    known = {p.name for p in rules.usable("critique", "revision")}
    assert {row["rounds"][0]["principle"] for row in found} <= known


def assert_comparisons(pairs, found, rules):
    for row in pairs:
        assert row.keys() >= COMPARED and 0 < row["p_first"] < 1
        assert row["prompt"] == found[row["id"]]["prompt"] and row["first"] != row["second"]
        assert isinstance(row["first"], str) and isinstance(row["second"], str)
        assert [vote["order"] for vote in row["votes"]] == ["first,second", "second,first"]
        assert all(vote.keys() == VOTE for vote in row["votes"])
    known = {p.name for p in rules.usable("comparison")}
    assert {vote["principle"] for row in pairs for vote in row["votes"]} <= known


@pytest.mark.skipif(not DATA.is_dir(), reason="real data is not in the repository")
@pytest.mark.parametrize("rules", RULES, ids=lambda path: path.stem)
def test_real_prompts_go_through_the_first_stage_and_to_the_second(rules, tmp_path):
    tiny("GPT2Config", GPT2 | {"n_positions": 8192}, tmp_path / "base", byte_tokenizer(pad="<eos>"))
    (tmp_path / "config.toml").write_text(f"""
        model = "base"
        constitution = {json.dumps(str(rules))}
        device = "cpu"
        out = {json.dumps(str(tmp_path))}
        [sl]
        prompts = {json.dumps(str(DATA / "hh-rlhf/harmless-base-400.jsonl.gz"))}
        limit = 12
        helpful_samples = 0
        rounds = 1
        max_new_tokens = 8
        [rm]
        prompts = {json.dumps(str(DATA / "hh-rlhf/harmless-base-400.jsonl.gz"))}
        limit = 12
        preferences = ""
        max_new_tokens = 4
    """)
    record = train_sl.main(config.load(train_sl.SLConfig, "sl", [str(tmp_path / "config.toml")]))
    found, known = read_jsonl(tmp_path / "sl" / "revisions.jsonl"), constitution.load(rules)
    assert len(found) == record["hygiene"]["revisions"] == 12 and record["not_kept"] < 12
    assert_revisions(found, known)
    assert load.load_policy(str(tmp_path / "sl"))
    if not any(p.comparison for p in known.principles):
        return  # the paper's comparisons are in a file of their own
    record = train_rm.main(config.load(train_rm.RMConfig, "rm", [str(tmp_path / "config.toml")]))
    pairs = read_jsonl(tmp_path / "rm" / "comparisons.jsonl")
    assert len(pairs) == record["train_pairs"] + record["heldout_pairs"] > 8
    assert record["train_sources"].keys() == {"ai"}
    assert_comparisons(pairs, found, known)
