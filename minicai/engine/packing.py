"""Whether a model computes each row by itself; asked once, when it is loaded.

Rows in company, packed and decoded, are compared with each row by itself in the attention and with
the masks of the model's own code, twice:

    the model itself, on two short rows
    a tiny copy with random weights, on rows longer than each length that the config names: sizes
    are small in the copy, and other whole numbers (windows, chunks, limits) are at most FEW

The copy is made on the CPU, in float32, from the config only. No random state changes.
"""

import json
from functools import cache

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from minicai import InputError
from minicai.engine import parallel
from minicai.engine.attention import Packed, Slots, context_length, last_hidden, through
from minicai.engine.models import apply_head

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # between numbers that should be equal, relative
FEW, MANY = 8, 64
SHORT, LONG = (4, 7), (5, 19, 26)  # tokens of the rows
NEIGHBOURS = "the numbers of a row change with the rows beside it"
SIZES = {  # of the copy, by a part of the setting's name; the first that fits
    "token_id": 0,
    "heads": 4,
    "n_head": 4,
    "qk_head_dim": 16,
    "head_dim": 8,
    "n_embd": 32,
    "hidden_size": 32,
    "intermediate": 32,
    "experts": 16,  # at least as many as a token may choose
    "vocab_size": MANY,
    "original_max": FEW,
    "max_position": MANY,
    "n_positions": MANY,
    "group": 1,
}
MIXING = {"linear_attention", "conv", "hybrid", "recurrent"}  # kinds of layers


def check(model: PreTrainedModel, path: str) -> None:
    """Puts our attention into the model. Raises InputError with the reason if that is wrong.

    A model without weights (on the "meta" device) is known by its tiny copy alone.
    """
    config, head = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    try:
        with parallel.computing_in(parallel.weight_precision()), parallel.autocast():
            if model.device.type != "meta" and not _equal(model, SHORT, head):
                if head and _equal(model, SHORT):
                    raise ValueError("it does more with its logits than apply its output layer")
                raise ValueError(NEIGHBOURS)
        with parallel.computing_in("fp32"), torch.autocast("cpu", enabled=False):
            _check_copy(json.dumps(config.to_dict()))
    except Exception as error:  # a model's own code may raise anything
        if isinstance(error, torch.OutOfMemoryError) or parallel.lost_peer(error):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if not isinstance(error, ValueError):
            reason = f"its code fails on packed rows: {reason}"
        for kind in MIXING.intersection(getattr(config, "layer_types", None) or ()):
            reason = f"its layers of the kind {kind} mix tokens outside attention"
        raise InputError(
            f"{path}: {type(model).__name__} is a kind of model that cannot be packed: {reason}"
        ) from error


@cache
def _check_copy(config: str) -> None:
    """Compares rows in the tiny copy. Raises ValueError with the lengths that it shortened."""
    copy, lengths = _copy(config)
    if not _equal(copy, SHORT):  # no length of the config is shorter
        raise ValueError(NEIGHBOURS)
    if not _equal(copy, LONG):
        guilty = [f"{name} ({tokens})" for name, tokens in lengths.items()]
        raise ValueError(f"its {' or '.join(guilty)} is not kept where rows are packed")


@torch.no_grad()
def _copy(config: str) -> tuple[PreTrainedModel, dict[str, int]]:
    """The tiny copy, and {setting: tokens} of what became FEW in it."""
    data, lengths = json.loads(config), {}
    context = context_length(AutoConfig.for_model(**data))

    def small(name, value):
        if isinstance(value, dict):
            return {key: small(key, item) for key, item in value.items()}
        if isinstance(value, list):  # factors: one for each dimension of a head
            return None if name.endswith("_factor") else [small(name, item) for item in value]
        if value == "longrope":  # no row reaches its switch (attention.context_length)
            return "default"
        if type(value) is not int:
            return value
        sizes = [size for part, size in SIZES.items() if part in name]
        if sizes or "layer" in name:
            return [*sizes, value][0]
        if value <= 2 * FEW:
            return value
        if value >= context:
            return MANY
        lengths[name] = value
        return FEW

    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        shape = AutoConfig.for_model(**small("", data))
        copy = AutoModel.from_config(shape, attn_implementation="eager", dtype=torch.float32)
        for parameter in copy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return copy.eval(), lengths


@torch.no_grad()
def _equal(model: PreTrainedModel, sizes: tuple[int, ...], head=None) -> bool:
    """Whether logits (without a head, hidden states) of rows are the same alone and in company."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(sum(sizes), device=model.device) % vocabulary
    rows = ids.split(sizes)

    @parallel.forward_pass
    def alone(model, row):
        if head:
            return model(input_ids=row[None]).logits[0]
        return model.base_model(input_ids=row[None]).last_hidden_state[0]

    @parallel.forward_pass
    def together(model):
        # In the order of ids: the rows are in alphabetical order, and none begins like another.
        places = Packed([row.tolist() for row in rows], model.device)
        packed = through(model, places.ids, places)
        slots = Slots(len(rows), max(sizes))
        last_hidden(model, slots, [0] * len(rows), [row[:-1].tolist() for row in rows])
        before = [n - 1 for n in sizes]
        decoded = last_hidden(model, slots, before, [row[-1:].tolist() for row in rows])
        hidden = torch.cat([packed, decoded])
        return apply_head(head, hidden) if head else hidden

    theirs = [alone(model, row) for row in rows]
    theirs = torch.cat(theirs + [row[-1:] for row in theirs])
    most = TOLERANCE[parallel.precision()] * max(1.0, theirs.abs().max().item())
    return (together(model) - theirs).abs().max().item() <= most
