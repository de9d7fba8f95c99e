"""Attention over rows of different lengths, without padding between them.

Embeddings, projections, norms and MLPs work token by token. So a batch is [1, N] here, row after
row. Only attention has to know where a row begins and ends. Each layer of a `prepared` model calls
`attend` with the `rows` that its forward pass was given:

    Packed    whole rows, as in training; what several of them begin with is computed once
    Slots     rows that grow, as in decoding; it keeps their keys and values

Legend: N tokens that go through the layers, B rows, T tokens of the longest, U keys, H heads (fewer
for keys and values where queries share them), D head size, S slots, C capacity of a slot in tokens.
"""

import math
from collections.abc import Sequence
from itertools import takewhile
from operator import eq

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minicai import InputError

NAME = "minicai"
KNOWN = {"scaling", "sliding_window", "dropout", "position_ids", "use_cache"}  # by attend


def attend(module, query, key, value, attention_mask, rows=None, **settings):
    """Attention of one layer, as transformers calls it. Without `rows` it is ordinary attention.

    query, key, value [1, H, N, D]; rows: Packed or Slots -> ([1, N, H, D], None).
    Raises ValueError where the layer asks for what is not done here.
    """
    if rows is None:
        if attention_mask is not None and attention_mask.dtype == torch.long:  # made in `through`
            raise ValueError("its layers do not hand on to attention what a pass is given")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    for name in settings.keys() - KNOWN:
        if settings[name] is not None and settings[name] is not False:
            raise ValueError(f"attention with {name} is not supported")
    qkv = [x[0].transpose(0, 1) for x in (query, key, value)]
    # Qwen2-MoE has its window in the mask only.
    window = settings.get("sliding_window", getattr(module, "sliding_window", None))
    return rows.attend(qkv, settings.get("scaling"), window)[None], None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which uses this attention from now on. Raises ValueError where it cannot."""
    if model.config._attn_implementation != NAME:
        if not model._supports_attention_backend:
            raise ValueError("it does not let its attention be exchanged")
        model.set_attn_implementation(NAME)
    return model


def _sdpa(qkv: Sequence[Tensor], scale: float | None, mask: Tensor | None) -> Tensor:
    """Queries [B, T, H, D], keys [B, U, H, D], values [B, U, H, E] -> [B, T, H, E].

    mask [B, 1, T, U] is added to the attention scores. Without one, attention is causal.
    """
    q, k, v = (x.transpose(1, 2) for x in qkv)
    shape, groups = q.shape, q.shape[1] // k.shape[1]
    if groups > 1 and shape[2] == 1:  # the queries of one key side by side: no key is repeated
        q = q.reshape(len(q), k.shape[1], groups, -1)
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    return out.reshape(*shape[:3], -1).transpose(1, 2)


def _mask(positions: Tensor, width: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Positions of queries [B, T] -> [B, 1, T, U]: 0 at keys that they see, -inf at the others.

    width: U, the first keys of the row. window: how many keys a query sees, itself included.
    The mask is made of numbers. PyTorch would turn truth values into numbers in every layer: 3.5 %
    of a decoding step of 64 rows (profile, tiny model).
    """
    back = positions[:, None, :, None] - torch.arange(width, device=positions.device)
    hidden = (back < 0) | (back >= window) if window else back < 0
    return torch.where(hidden, -torch.inf, 0.0).to(dtype)


# --- whole rows -----------------------------------------------------------------------------------


class Packed:
    """Whole rows without padding. What several of them begin with is there once: a prefix tree.

        texts       a b c d      ids        a b c d e f g      N tokens of the tree
                    f g          positions  0 1 2 3 2 0 1      in their rows
                    a b e        number     0 1 2 3            of each token of each row
                                            5 6 * *            * padding: the row's last number
                                            0 1 4 *
    Attention:      f g          source     5 6 | 0 1 4 * | 0 1 2 3
    e.g. batches    a b e *      shapes     (1, 2), (2, 4)
    of 1 and 2      a b c d      kept       2 3 8 9 4 0 1      the first place of each number

    A token's keys and values depend only on it and on what comes before it, so they are the same in
    all rows that begin so. This is exact, gradients included. Attention reads whole rows, in padded
    batches of rows of about the same length. Their places are numbered one batch after the other.

    texts: at least one token id of each row. A process may have no rows (parallel.even_out).
    """

    def __init__(self, texts: Sequence[Sequence[int]], device: torch.device):
        ids, positions, numbers = [], [], [[]] * len(texts)
        before, path = (), []  # the text before, and the numbers of its tokens
        for row in sorted(range(len(texts)), key=texts.__getitem__):  # neighbours begin alike
            text = texts[row]
            shared = sum(takewhile(bool, map(eq, before, text)))  # tokens
            path = [*path[:shared], *range(len(ids), len(ids) + len(text) - shared)]
            numbers[row], before = path, text
            ids += text[shared:]
            positions += range(shared, len(text))

        # Made on the host and copied without waiting for a GPU.
        lengths = torch.tensor(list(map(len, texts)), dtype=torch.long)
        self.longest = max(map(len, texts), default=0)
        padded = [row + row[-1:] * (self.longest - len(row)) for row in numbers]
        number = torch.tensor(padded, dtype=torch.long).view(len(texts), self.longest)
        order = lengths.argsort(stable=True)
        self.shapes = _about_one_length(lengths[order].tolist())
        batches = number[order].split([B for B, _ in self.shapes])
        source = [part[:, :T].flatten() for part, (_, T) in zip(batches, self.shapes)]
        source = torch.cat([number.new_zeros(0), *source])
        kept = torch.from_numpy(np.unique(source.numpy(), return_index=True)[1])
        made = *map(torch.tensor, (ids, positions)), lengths, number, source, kept
        made = [x.long().to(device, non_blocking=True) for x in made]
        self.ids, self.positions, self.lengths, self.number, self.source, self.kept = made

    def tails(self, count: int) -> Tensor:
        """[B, count]: the numbers of each row's last `count` tokens."""
        back = torch.arange(-count, 0, device=self.number.device)
        return self.number.gather(1, self.lengths[:, None] + back)

    def attend(self, qkv: list, scale: float | None, window: int | None) -> Tensor:
        """Causal attention of each row: queries, keys, values [N, H, D] -> [N, H, D]."""
        places, found = [B * T for B, T in self.shapes], []
        batches = [x.index_select(0, self.source).split(places) for x in qkv]
        for shape, *part in zip(self.shapes, *batches):
            mask = None
            if window and window < shape[1]:
                positions = torch.arange(shape[1], device=part[0].device)
                mask = _mask(positions[None], shape[1], window, part[2].dtype)
            batch = [x.unflatten(0, shape) for x in part]
            found.append(_sdpa(batch, scale, mask).flatten(0, 1))
        return torch.cat(found).index_select(0, self.kept)


def _about_one_length(sizes: list[int]) -> list[tuple[int, int]]:
    """Ascending lengths of rows -> shapes (B, T) of the padded batches in which attention runs.

    A row begins a new batch where it is longer than the first row of the batch by more than a
    quarter and eight tokens. With one batch of all rows attention took 31 % of an SL step (64 rows
    of 26 to 264 tokens), with these 12 %.
    """
    shapes, first = [], 0
    for row in range(1, len(sizes) + 1):
        if row == len(sizes) or sizes[row] > 1.25 * sizes[first] + 8:
            shapes.append((row - first, sizes[row - 1]))
            first = row
    return shapes


# --- rows that grow -------------------------------------------------------------------------------


class Slots:
    """A key-value cache of S slots of C tokens. Row b lives in slot b, and rows grow side by side.

    A forward pass takes any number of tokens of each row: one where it decodes, many where its
    prompt comes in, in the same batch. All rows are read as far as the longest. Reading long rows
    apart from short ones changed nothing (tiny model, 64 rows: LOG.md).
    """

    def __init__(self, count: int, capacity: int):
        self.count, self.capacity = count, capacity
        # [keys, values] of each call of attention in a pass, [S, C, H, D] each. They are made
        # when their sizes and type are known.
        self.layers = []

    def place(self, starts: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        """Prepares a forward pass of counts[b] tokens of row b, at positions starts[b] and after.

        positions: [N] of the tokens in their rows. last: [B] number of each row's last token.
        """
        # Made on the host and copied without waiting for a GPU.
        starts, counts = torch.tensor([starts, counts])
        ends, firsts = starts + counts, counts.cumsum(0) - counts  # firsts: a row's first token
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        positions = torch.arange(len(rows)) + (starts - firsts)[rows]
        long = (counts > 1).nonzero()[:, 0]  # rows that bring several tokens
        steps = torch.arange(counts.max())
        queries = firsts[long, None] + steps * (steps < counts[long, None])  # padding: the first
        made = rows, positions, firsts + counts - 1, long, queries
        made = [x.to(device, non_blocking=True) for x in made]
        self._row, self.positions, self.last, slots, queries = made
        self._masks = {}  # {window: masks of the parts}
        self._calls = 0  # of attention in this pass

        # Each part is read at once: (queries [B, T], their slots, keys read).
        # First the last token of every row, then all tokens of the rows that bring several.
        self.longest = int(ends.max())
        self._parts = [(self.last[:, None], slice(len(ends)), self.longest)]
        if len(long):
            self._parts.append((queries, slots, int(ends[long].max())))

    def attend(self, qkv: list, scale: float | None, window: int | None) -> Tensor:
        """Writes keys and values into the slots, and reads each row up to the query's position.

        Queries, keys, values [N, H, D] -> [N, H, D].
        """
        q, k, v = qkv
        k = k.to(v.dtype)  # rotation makes keys float32; under bf16 attention would round them
        if self._calls == len(self.layers):
            # The heads are outside the positions in memory, since keys are read head by head.
            sizes = self.count, k.shape[1], self.capacity
            self.layers.append([x.new_zeros(*sizes, x.shape[2]).transpose(1, 2) for x in (k, v)])
        layer = self.layers[self._calls]
        self._calls += 1
        for kept, x in zip(layer, (k, v)):
            kept.index_put_((self._row, self.positions), x)
        if window not in self._masks:  # the same in every layer of the step
            self._masks[window] = [
                _mask(self.positions[queries], width, window, v.dtype)
                for queries, _, width in self._parts
            ]
        out = v.new_empty(*q.shape[:2], v.shape[2])
        for (queries, slots, width), mask in zip(self._parts, self._masks[window]):
            read = [kept[slots, :width] for kept in layer]
            out[queries] = _sdpa([q[queries], *read], scale, mask)
        return out

    def copy(self, source: int, target: int | slice, tokens: int) -> None:
        """Copies the first keys and values from a slot to others."""
        for layer in self.layers:
            for kept in layer:
                kept[target, :tokens] = kept[source, :tokens]


# --- forward passes -------------------------------------------------------------------------------


def context_length(config: PretrainedConfig) -> float:
    """Tokens that a row may have; infinite where the config names no number.

    Beyond its original length, "longrope" takes other frequencies for all rows of a pass, by the
    longest. A row that grows would keep keys of both, so this length is the limit.
    """
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    switched = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    limits = [kind["original_max_position_embeddings"] for kind in switched]
    return min([getattr(text, "max_position_embeddings", None) or math.inf, *limits])


def through(model: PreTrainedModel, ids: Tensor, rows: Packed | Slots) -> Tensor:
    """Last hidden states [N, hidden size] of token ids [N], whose places `rows` knows.

    Where there is no token (parallel.even_out), one goes through the layers and is dropped, since
    the other processes wait there.
    """
    context = context_length(model.config)
    if rows.longest > context:
        raise InputError(f"a row has {rows.longest} tokens; the model's context is {context}")
    if not len(ids):
        return through(model, ids.new_zeros(1), Packed([[0]], ids.device))[:0]
    # With a mask of four dimensions, which `attend` does not read, transformers makes none. It
    # would look for the beginnings of rows in the positions, and wait for a GPU in every pass.
    found = prepared(model).base_model(
        input_ids=ids[None],
        position_ids=rows.positions[None],
        attention_mask=ids.new_ones(1, 1, 1, 1),
        use_cache=False,
        rows=rows,
    )
    return found.last_hidden_state[0]


def last_hidden(
    model: PreTrainedModel, slots: Slots, starts: Sequence[int], feeds: Sequence[Sequence[int]]
) -> Tensor:
    """Feeds token ids feeds[b] to row b, at positions starts[b] and after.

    Returns the hidden state of each row's last token, [B, hidden size].
    """
    slots.place(starts, [len(feed) for feed in feeds], model.device)
    ids = torch.tensor([token for feed in feeds for token in feed])
    return through(model, ids.to(model.device, non_blocking=True), slots)[slots.last]
