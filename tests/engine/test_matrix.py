"""Models of many architectures through the three scripts; what cannot be used is refused by name.

They are tiny, made from their config classes. The tokenizers differ too: with and without a chat
template, a BOS token, a pad token of their own.
"""

import copy
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
from minicai.engine import config, load, packing, parallel
from minicai.engine.attention import context_length
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import encode
from minicai.engine.models import response_logprobs, sequence_scores
from minicai.engine.sampler import Sampling, generate
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
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
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
    "MambaForCausalLM: its layers of the kind linear_attention mix tokens outside attention": (
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
    "Lfm2ForCausalLM: its layers of the kind conv mix tokens outside attention": (
        "Lfm2Config",
        FEW | {"layer_types": ["conv", "full_attention"]},
    ),
    "CohereForCausalLM: it does more with its logits than apply its output layer": (
        "CohereConfig",
        FEW,
    ),
    "BertLMHeadModel: the numbers of a row change with the rows beside it": ("BertConfig", SIZES),
    "DogeForCausalLM: its keep_window_size (20) is not kept where rows are packed": (
        "DogeConfig",
        FEW | {"keep_window_size": 20},
    ),
    "PhimoeForCausalLM: its sliding_window (20) is not kept where rows are packed": (
        "PhimoeConfig",
        FEW | EXPERTS | {"sliding_window": 20},
    ),
    "NemotronForCausalLM: its layers do not hand on to attention what a pass is given": (
        "NemotronConfig",
        FEW | {"head_dim": 8},
    ),
    "Llama4ForCausalLM: its attention_chunk_size (24) is not kept where rows are packed": (
        "Llama4TextConfig",
        FEW | EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 64, "attention_chunk_size": 24},
    ),
    "DeepseekV32ForCausalLM: attention with indices is not supported": (
        "DeepseekV32Config",
        LATENT | {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2},
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
    assert str(tmp_path) in str(refused.value) and said in str(refused.value)


# --- rows longer than every window and every switch -----------------------------------------------

WINDOW = FEW | {"sliding_window": 20}
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | settings}


LONG = rope(
    "longrope",
    original_max_position_embeddings=32,
    short_factor=[1.0, 1.1, 1.3, 1.6],
    long_factor=[2.0, 3.0, 5.0, 8.0],
    factor=8.0,
)
SCALED = {"factor": 4.0, "original_max_position_embeddings": 32}
BENT = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {  # that are right: config and settings
    "Qwen2Moe": WINDOW
    | BOTH
    | MOE
    | {"use_sliding_window": True, "shared_expert_intermediate_size": 32},
    "Mistral": WINDOW,
    "Gemma3Text": WINDOW | BOTH | {"query_pre_attn_scalar": 8},
    "Phi3": FEW | LONG | {"original_max_position_embeddings": 32},
    "Llama/dynamic": FEW | rope("dynamic", factor=2.0) | {"max_position_embeddings": 96},
    "DiffLlama": FEW,
    "DeepseekV3": LATENT,
    "Olmo3": WINDOW | BOTH | rope("yarn", **SCALED),
}
MORE = {
    "Afmoe": WINDOW | BOTH | MOE | {"num_dense_layers": 1},
    "Arcee": FEW,
    "Cohere2": WINDOW | BOTH | {"logit_scale": 1.0},
    "Ernie4_5": FEW,
    "Exaone4": WINDOW | BOTH,
    "FlexOlmo": FEW | {"num_experts": 4, "num_experts_per_tok": 2},
    "Gemma": FEW | {"head_dim": 16},
    "Glm4": FEW | {"head_dim": 8},
    "GPT2": GPT2,
    "GPTBigCode": GPT2,
    "GPTJ": GPT2 | {"rotary_dim": 8},
    "GPTNeoX": SIZES,
    "Granite": FEW | {"residual_multiplier": 0.5},
    "Helium": FEW | {"head_dim": 8},
    "Llama": FEW,
    "Llama/linear": FEW | rope("linear", factor=3.0),
    "Llama/yarn": FEW | rope("yarn", **SCALED),
    "Llama/llama3": FEW | rope("llama3", **SCALED, **BENT),
    "Llama/longrope": FEW | LONG,
    "MiniCPM3": LATENT | LONG | {"scale_emb": 1, "dim_model_base": 32},
    "Ministral": WINDOW | BOTH,
    "Mixtral": WINDOW | EXPERTS,
    "Olmo2": FEW,
    "Phi": SIZES,
    "Phi3": WINDOW,
    "Phimoe": FEW | EXPERTS | {"sliding_window": 1024},  # no row is longer
    "Qwen2": WINDOW | BOTH | {"use_sliding_window": True},
    "Qwen3": WINDOW | BOTH | {"use_sliding_window": True},
    "Qwen3Moe": WINDOW | MOE | {"head_dim": 8, "use_sliding_window": True},
    "SmolLM3": FEW | {"no_rope_layers": [1, 0]},
    "Starcoder2": WINDOW,
}
KINDS |= {f"{name} ": settings for name, settings in MORE.items()}


def pair(name, settings):
    """A model that packs, and one of the same weights that transformers runs by itself."""
    kind = getattr(transformers, f"{name.strip().partition('/')[0]}Config")
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    shape = kind(vocab_size=64, initializer_range=0.25, **special, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = AutoModelForCausalLM.from_config(shape, attn_implementation="eager").eval()
    ours = AutoModelForCausalLM.from_config(copy.deepcopy(shape)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n.endswith(" ") else []) for n in KINDS],
)
def test_a_row_longer_than_every_window_is_the_same_alone_and_in_company(name):
    """Packed, decoded and sampled, and the same seed gives the same tokens."""
    model, theirs = pair(name, KINDS[name])
    packing.check(model, name)
    most, new = min(context_length(model.config), 89), 12
    ids = torch.randint(2, 64, (3, most), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [ids[0][: most - new], ids[1][:20], ids[2][: most // 2]]
    seeds, how = [(7, 1), (7, 2), (7, 3)], Sampling(new, rows=2)
    found = generate(model, prompts, seeds, how, ends={1})
    ours = response_logprobs(model, collate(prompts, [done.ids for done in found], CPU))
    for row, (prompt, done) in enumerate(zip(prompts, found, strict=True)):
        logits = theirs(input_ids=tensor([prompt + done.ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, tensor(done.ids)[:, None])[:, 0]
        assert_close(done.logprobs, expected, 1e-3)
        assert_close(ours[row, len(prompt) : len(prompt) + len(done.ids)], expected, 1e-3)
        [single] = generate(model, [prompt], [seeds[row]], how, ends={1})
        assert single.ids == done.ids


def test_no_row_reaches_the_length_at_which_rotary_frequencies_change():
    model, _ = pair("Phi3", KINDS["Phi3"])
    assert context_length(model.config) == 32
    with pytest.raises(InputError, match="exceeds the model's context of 32"):
        generate(model, [[2] * 30], [(0,)], Sampling(8), ends={1})
    for call in (response_logprobs, sequence_scores):
        model.score = model.get_output_embeddings()
        with pytest.raises(InputError, match="a row has 40 tokens; the model's context is 32"):
            call(model, collate([[2] * 20, [2] * 5], [[3] * 20, [3] * 5], CPU))


class SpannedConfig(transformers.LlamaConfig):
    model_type = "spanned"
    span: int = 300
    by: str = "mask"


class Spanned(transformers.LlamaModel):
    """What it does depends on a length under a name that nobody knows."""

    config_class = SpannedConfig

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **settings):
        tokens = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(tokens)[None]
        if self.config.by == "longest row" and position_ids.max() >= self.config.span:
            position_ids = position_ids * 2
        if self.config.by == "mask" and attention_mask is None:
            back = torch.arange(tokens)[:, None] - torch.arange(tokens)
            seen = (back >= 0) & (back < self.config.span)
            attention_mask = torch.where(seen, 0.0, -torch.inf)[None, None]
        rest = {"position_ids": position_ids, "attention_mask": attention_mask}
        return super().forward(input_ids=input_ids, **rest, **settings)


class SpannedForCausalLM(transformers.LlamaForCausalLM):
    config_class = SpannedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Spanned(config)


@pytest.mark.parametrize("by", ["mask", "longest row", "nothing"])
def test_a_length_under_an_unknown_name_is_found_and_named(by):
    transformers.AutoConfig.register("spanned", SpannedConfig, exist_ok=True)
    transformers.AutoModel.register(SpannedConfig, Spanned, exist_ok=True)
    model = SpannedForCausalLM(SpannedConfig(vocab_size=64, span=300, by=by, **FEW)).eval()
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        if by == "nothing":
            packing.check(model, "here")
        else:
            with pytest.raises(InputError) as refused:
                packing.check(model, "here")
            said = "cannot be packed: its span (300) is not kept where rows are packed"
            assert str(refused.value).endswith(said)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_copy_is_compared_in_every_precision(precision):
    good, _ = pair("Mistral", KINDS["Mistral"])
    wrong, _ = pair("Phimoe", FEW | EXPERTS | {"sliding_window": 30})
    with parallel.computing_in(precision):
        packing.check(good, "here")
        with pytest.raises(InputError, match=r"its sliding_window \(30\) is not kept"):
            packing.check(wrong, "here")


def test_the_copy_of_a_large_model_is_small():
    """Llama of 70 billion parameters, and an expert model with large vocabularies."""
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    large |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    moe = {"num_experts": 512, "moe_intermediate_size": 2048, "num_hidden_layers": 4}
    for shape in (transformers.LlamaConfig(**large), transformers.Qwen3MoeConfig(**moe)):
        copied, _ = packing._copy(json.dumps(shape.to_dict()))
        assert sum(p.numel() for p in copied.parameters()) < 1e6
        assert len(copied.layers) == shape.num_hidden_layers


def test_a_copy_shows_differences_however_small_the_weights_of_the_config_are():
    model, _ = pair("Phimoe", FEW | EXPERTS | {"sliding_window": 20})
    model.config.initializer_range = 1e-6
    with pytest.raises(InputError, match=r"its sliding_window \(20\) is not kept"):
        packing.check(model, "here")
    copied, _ = packing._copy(json.dumps(model.config.to_dict()))
    weights = torch.cat([p.flatten() for p in copied.parameters() if p.ndim > 1])
    assert 0.1 < weights.std() < 0.5  # a query sees more than one key


@torch.no_grad()
def test_large_logits_may_differ_by_more():
    model, _ = pair("Llama", FEW)
    head = model.get_output_embeddings()
    head.weight *= 1e6
    assert packing._equal(model, packing.SHORT, head)


# --- others' pipelines ----------------------------------------------------------------------------

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
        texts = [step[name] for name in ("principle", "critique", "revision")]
        assert all(isinstance(text, str) for text in texts)
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
