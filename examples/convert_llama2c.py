"""A small pretrained model in the format of llama2.c becomes a Hugging Face folder.

    python examples/convert_llama2c.py stories260K.bin tok512.bin out/stories260K

The tinyllamas collection (TinyStories) has such models, from 260 thousand parameters on, which
train on a laptop. docs/your-model.md takes one through the three stages. Prints how the model
continues "Once upon a time", most likely token first: where that is no story, the weights or the
vocabulary are not read right.

What the two formats do differently: rotary positions turn neighbouring rows of the query and key
weights there, and rows half a head apart in transformers. The vocabulary there is a list of pieces
with scores, as of SentencePiece; byte pair encoding needs merges, which are made from it. A story
begins with token 1, `<s>`, and the next one ends it. So `<s>` is the end of sequence, too.
"""

import struct
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from minicai import InputError
from minicai.engine.disk import disk_guard
from minicai.engine.terminal import run

logging.disable_progress_bar()
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>"}
BYTES = 3  # the number of the first of 256 pieces for single bytes


def read(path: str) -> bytes:
    """The bytes of a file. Raises InputError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def load_model(path: str) -> LlamaForCausalLM:
    """The model of a .bin file: 7 whole numbers, then float32 weights. Raises InputError."""
    raw = read(path)
    numbers = struct.unpack("7i", raw[:28]) if len(raw) > 28 else (0,) * 7
    width, inner, layers, heads, kv_heads, vocabulary, context = numbers
    shared, vocabulary = vocabulary > 0, abs(vocabulary)  # a negative size: the head is its own
    if min(width, inner, layers, heads, kv_heads, vocabulary, context) < 1 or width % heads:
        raise InputError(f"{path}: its header {numbers} is not that of llama2.c's first format")
    size, kv = width // heads, width // heads * kv_heads
    shapes = {
        "embed_tokens": (vocabulary, width),
        "input_layernorm": (layers, width),
        "self_attn.q_proj": (layers, width, width),
        "self_attn.k_proj": (layers, kv, width),
        "self_attn.v_proj": (layers, kv, width),
        "self_attn.o_proj": (layers, width, width),
        "post_attention_layernorm": (layers, width),
        "mlp.gate_proj": (layers, inner, width),
        "mlp.down_proj": (layers, width, inner),
        "mlp.up_proj": (layers, inner, width),
        "norm": (width,),
        "rotary": (2, context, size // 2),  # tables, which transformers computes
        "lm_head": (0 if shared else vocabulary, width),
    }
    ends = list(accumulate(int(np.prod(shape)) for shape in shapes.values()))
    if len(raw) != 28 + 4 * ends[-1]:
        raise InputError(f"{path}: has {len(raw):,} bytes, and by its header {28 + 4 * ends[-1]:,}")
    parts = np.split(np.frombuffer(raw[28:], dtype="<f4"), ends[:-1])
    weights = {}
    for (name, shape), part in zip(shapes.items(), parts):
        weights[name] = torch.tensor(part).view(shape)

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=shared,
        bos_token_id=1,
        eos_token_id=1,
    )
    state = {"lm_head.weight": weights["embed_tokens" if shared else "lm_head"]}
    for name in ("embed_tokens", "norm"):
        state[f"model.{name}.weight"] = weights[name]
    for name in [name for name in shapes if name.startswith(("self_attn", "mlp", "input", "post"))]:
        for layer, weight in enumerate(weights[name]):
            if name.endswith(("q_proj", "k_proj")):
                pairs = weight.view(-1, size // 2, 2, width)
                weight = pairs.transpose(1, 2).reshape(-1, width)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def load_tokenizer(path: str, count: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a .bin file: a whole number, then (score, length, piece) for each token.

    count: rows of the model's embedding. Raises InputError where the file has others.
    """
    raw, place, pieces, scores = read(path), 4, [], []
    while place + 8 <= len(raw):
        score, length = struct.unpack("fi", raw[place : place + 8])
        if length < 0:
            break
        pieces.append(raw[place + 8 : place + 8 + length].decode(errors="replace"))
        scores.append(score)
        place += 8 + length
    if len(pieces) != count:
        raise InputError(f"{path}: has {len(pieces)} pieces, and the model {count}")
    names = [piece.replace(" ", "▁") for piece in pieces]
    for k in range(256):
        names[BYTES + k] = f"<0x{k:02X}>"
    for k, name in SPECIAL.items():
        names[k] = name
    known = {name: k for k, name in enumerate(names)}

    # A piece comes from any two pieces that make it up. The highest score is merged first.
    merges = []
    for k, piece in enumerate(names[BYTES + 256 :], BYTES + 256):
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if all(part in known for part in pair):
                merges.append((-scores[k], k, pair))
    merges = [pair for *_, pair in sorted(merges)]
    made = Tokenizer(models.BPE(known, merges, unk_token="<unk>", byte_fallback=True))
    blank = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence(list(blank))
    text = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    made.decoder = decoders.Sequence([*text, decoders.Strip(" ", 1, 0)])
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.post_processor = begin  # without <s> in front the model does not begin a story
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **ends)


def main(arguments: list[str]) -> None:
    """Writes the folder. Raises InputError where a file is not in this format."""
    if len(arguments) != 3:
        raise InputError("expected MODEL.bin TOKENIZER.bin FOLDER; see --help")
    file, vocabulary, folder = arguments
    model = load_model(file)
    tokenizer = load_tokenizer(vocabulary, model.config.vocab_size)
    with disk_guard(Path(folder)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    begun = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    story = model.generate(begun, max_new_tokens=40, do_sample=False)[0]
    print(tokenizer.decode(story, skip_special_tokens=True))
    print(f"wrote  {folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    run(main, __doc__)
