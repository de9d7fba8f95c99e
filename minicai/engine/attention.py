"""Attention over rows of different lengths that lie one behind the other, with no padding between them.

Embeddings, projections, norms and MLPs work token by token, so here a batch is [1, N]: the N tokens of all rows, and no others. Attention
alone has to know where a row begins and ends. A `prepared` model calls `attend` in each layer, with the `rows` that its forward pass was
given: `Packed` for whole rows, as in training (`Shared`: with common beginnings once), or `Slots` for rows that grow, whose keys and values
it keeps.

Legend: N tokens of all rows, B rows, T tokens of the longest, H heads (fewer of keys and values where queries share them), D head size,
S slots, C capacity of a slot.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minicai import InputError

NAME = "minicai"


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: "Packed | Slots | None" = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query, key, value [1, H, N, D] -> [1, N, H, D]. Without `rows` it is ordinary attention."""
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise InputError(f"{type(module).__name__}: attention with {name} is not supported")
    if rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return rows.attend(module.layer_idx, q, k, v, scaling, sliding_window)[None], None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """The model, using this attention from now on. Raises InputError where its attention cannot be exchanged."""
    if model.config._attn_implementation != NAME:
        if not model._supports_attention_backend:
            raise InputError(
                f"{type(model).__name__}: this kind of model does not let its attention be exchanged, which packing needs"
            )
        model.set_attn_implementation(NAME)
    return model


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None
) -> Tensor:
    """[B, T, H, D] queries over [B, U, H, D] keys and values -> [B, T, H, D]; causal where no mask [B, 1, T, U] says otherwise."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups, queries = q.shape[1] // k.shape[1], q.shape
    if (
        groups > 1 and queries[2] == 1
    ):  # the queries that share a key stand side by side: nothing need be repeated
        q = q.reshape(len(q), k.shape[1], groups, -1)
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out.reshape(queries).transpose(1, 2)


class _Spread(torch.autograd.Function):
    """x [N, ...] -> x[source], the tokens at their places in padded batches; whatever stands in the padding, no token looks at it.

    Backward: the gradient of a token is that at its place `kept`, and where it stands at several (`again`), their sum.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, source: Tensor, kept: Tensor, again: tuple[Tensor, Tensor]
    ) -> Tensor:
        ctx.save_for_backward(kept, *again)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad: Tensor):
        kept, places, numbers = ctx.saved_tensors
        total = grad.index_select(0, kept)
        return (
            (total.index_add_(0, numbers, grad.index_select(0, places)) if len(places) else total),
            None,
            None,
            None,
        )


class _Gather(torch.autograd.Function):
    """x [size, ...] -> x[places] [N, ...]; the places are all different, so the gradient is copied back, with zeros elsewhere."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(
            0, *ctx.saved_tensors, grad
        ), None


class Packed:
    """Whole rows, each attending to itself alone; the shorter rows stand first. Attention itself, a small part of the arithmetic, runs on
    padded batches of rows of about the same length."""

    def __init__(self, lengths: Tensor | Sequence[int], device: torch.device):
        lengths = torch.as_tensor(lengths, dtype=torch.long, device=device)
        self.shape = len(lengths), int(lengths.max()) if len(lengths) else 1
        self.order = lengths.argsort(stable=True)
        sizes = lengths[self.order].tolist()
        column = torch.arange(self.shape[1], device=device)
        self.places = (self.order[:, None] * self.shape[1] + column)[
            column < lengths[self.order, None]
        ]  # [N] of the tokens in [B * T]
        self.positions = self.places % self.shape[1]  # [N] of the tokens in their rows
        self.last = torch.empty_like(self.order).index_copy_(
            0, self.order, lengths[self.order].cumsum(0) - 1
        )  # [B] each row's last token in [N]
        self._shapes = _about_one_length(sizes)  # of the padded batches
        width = torch.tensor(
            [T for B, T in self._shapes for _ in range(B)], dtype=torch.long, device=device
        )  # [B] of each row's padded batch
        begins = (width.cumsum(0) - width).repeat_interleave(lengths[self.order])
        self._kept = (
            begins + self.positions
        )  # [N] places of the tokens in all padded batches, one behind the other
        self._source = self._kept.new_zeros(int(width.sum())).index_copy_(
            0, self._kept, torch.arange(len(self._kept), device=device)
        )
        self._again = self._kept[:0], self._kept[:0]

    def pick(self, padded: Tensor) -> Tensor:
        """[B, T or more] -> [N]: the tokens alone."""
        return padded[:, : self.shape[1]].flatten()[self.places]

    def put(self, values: Tensor, chosen: Tensor, shape: tuple[int, int]) -> Tensor:
        """Values of the chosen of the N tokens, back to their places in [B, T or more], zero elsewhere."""
        places = self.places[chosen]
        return values.new_zeros(shape).index_put(
            (places // self.shape[1], places % self.shape[1]), values
        )

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """[N, H, D] each -> [N, H, D]."""
        if padded := len(self._source) > len(self._kept):
            q, k, v = (_Spread.apply(x, self._source, self._kept, self._again) for x in (q, k, v))
        parts = zip(self._shapes, *(x.split([B * T for B, T in self._shapes]) for x in (q, k, v)))
        out = torch.cat(
            [
                _whole_rows(shape, [x.unflatten(0, shape) for x in qkv], scale, window).flatten(
                    0, 1
                )
                for shape, *qkv in parts
            ]
        )
        return _Gather.apply(out, self._kept) if padded else out


def _about_one_length(sizes: list[int]) -> list[tuple[int, int]]:
    """Rows by their lengths, in ascending order -> the padded batches [B, T] in which attention runs: one more where a row would be longer than the
    first of its batch by more than a quarter and eight tokens.

    With one batch of all rows attention took 31 % of an SL step (64 rows of 26 to 264 tokens), with these 12 %.
    """
    shapes, first = [], 0
    for row in range(1, len(sizes) + 1):
        if row == len(sizes) or sizes[row] > 1.25 * sizes[first] + 8:
            shapes.append((row - first, sizes[row - 1]))
            first = row
    return shapes


def _whole_rows(
    shape: tuple[int, int], qkv: list[Tensor], scale: float | None, window: int | None
) -> Tensor:
    """Causal attention of rows of about one length: q, k, v [B, T, H, D] -> [B, T, H, D]."""
    T, mask = shape[1], None
    if window and window < T:
        t = torch.arange(T, device=qkv[0].device)
        mask = ((t[:, None] >= t) & (t[:, None] - t < window))[None, None]
    return _sdpa(*qkv, scale, mask)


class Shared(Packed):
    """Whole rows again, but what several begin with stands there once: the N tokens are those of a prefix tree, `ids`. A row sees all of its own.

    A token's keys and values depend on what stands before it alone, so they are the same for all rows that begin with it. AI labels are made 1.44
    times as fast as with one beginning shared in a family of neighbours (tiny model, one thread; small model: 1.21).
    """

    def __init__(self, texts: Sequence[Sequence[int]], device: torch.device):
        super().__init__([len(text) for text in texts], device)
        tree: dict[
            tuple[int, int], int
        ] = {}  # (number of the token before, token) -> number, in the order of appearance
        numbers, new = [], []  # of each token of all rows; which of them appear for the first time
        for row in self.order.tolist():
            number = -1
            for token in texts[row]:
                known = len(tree)
                number = tree.setdefault((number, token), known)
                numbers.append(number)
                new.append(number == known)
        number, first = (
            torch.tensor(numbers, dtype=torch.long, device=device),
            torch.tensor(new, dtype=torch.bool, device=device),
        )
        self.ids = torch.tensor([token for _, token in tree], dtype=torch.long, device=device)
        self._number, self._ends = number, self.last
        self.positions, self.last = self.positions[first], number[self.last]
        self._source, self._again, self._kept = (
            number[self._source],
            (self._kept[~first], number[~first]),
            self._kept[first],
        )

    def tails(self, count: int) -> Tensor:
        """[B, count]: each row's last tokens in [N]."""
        return self._number[
            self._ends[:, None] - torch.arange(count - 1, -1, -1, device=self._ends.device)
        ]


class Slots:
    """A key-value cache of S slots, in which rows of different lengths grow side by side: row b lives in slot b.

    A forward pass takes any number of tokens of each row: one where it decodes, many where its prompt comes in, in the same batch.
    Decoding is bound by the keys and values that it reads. So where the last quarter of the rows, where the sampler keeps the long ones, is
    longer than the others by a third, it is read apart, and each part only as far as its longest row (64 rows of the benchmark: 0.23 ms
    instead of 0.38).
    """

    def __init__(self, count: int, capacity: int):
        self.count, self.capacity = count, capacity
        self.layers: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # keys and values [S, C, H, D], made when their size and type are known

    def place(self, starts: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        """Says that the next forward pass brings counts[b] tokens of row b, to stand at starts[b] and after."""
        ends, cut = [start + count for start, count in zip(starts, counts)], len(starts) * 3 // 4
        apart = cut and 4 * max(ends[:cut]) < 3 * max(ends[cut:])
        self._parts = [slice(0, cut), slice(cut, len(ends))] if apart else [slice(0, len(ends))]
        self._widths = [max(ends[part]) for part in self._parts]  # how far each part is read
        start, count = torch.tensor(starts, device=device), torch.tensor(counts, device=device)
        self._row = torch.arange(len(counts), device=device).repeat_interleave(count)
        within = torch.arange(len(self._row), device=device) - (count.cumsum(0) - count)[self._row]
        self.positions = start[self._row] + within  # [N]
        self.last = count.cumsum(0) - 1  # [B] each row's last token in [N]
        self._ends = start + count
        self._masks: dict[int | None, tuple[list[Tensor], Tensor | None]] = {}
        # Rows that bring more than one token: a padded batch of their own.
        self._long = [b for b, n in enumerate(counts) if n > 1]
        if self._long:
            among = torch.full((len(counts),), -1)
            among[self._long] = torch.arange(len(self._long))
            among = among.to(device)[self._row]
            self._tokens = (among >= 0).nonzero()[:, 0]
            self._shape, self._reach = (
                (len(self._long), max(counts)),
                max(ends[b] for b in self._long),
            )
            self._places = (among * self._shape[1] + within)[self._tokens]
            self._source = (
                torch.zeros(self._shape, dtype=torch.long, device=device)
                .flatten()
                .index_copy_(0, self._places, self._tokens)
            )
            self._queries = self.positions[self._source].unflatten(0, self._shape)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """[N, H, D] each -> [N, H, D]: writes keys and values into the slots, reads each row's slot up to the query's own position."""
        if (
            layer not in self.layers
        ):  # in memory a head's keys follow one another: they are read head by head
            self.layers[layer] = tuple(
                x.new_zeros(self.count, x.shape[1], self.capacity, x.shape[2]).transpose(1, 2)
                for x in (k, v)
            )
        keys, values = self.layers[layer]
        keys.index_put_((self._row, self.positions), k)
        values.index_put_((self._row, self.positions), v)
        if window not in self._masks:  # the same in every layer of the step
            many = (
                self._visible(self._queries, self._reach, window, v.dtype) if self._long else None
            )
            one = [
                self._visible(self._ends[part, None] - 1, width, window, v.dtype)
                for part, width in zip(self._parts, self._widths)
            ]
            self._masks[window] = one, many
        one, many = self._masks[window]
        last = q[self.last] if self._long else q
        short = torch.cat(
            [
                _sdpa(
                    last[part, None],
                    keys[part, : mask.shape[-1]],
                    values[part, : mask.shape[-1]],
                    scale,
                    mask,
                )[:, 0]
                for part, mask in zip(self._parts, one)
            ]
        )
        if not self._long:
            return short
        keys, values = (
            x[self._long if len(self._long) < len(short) else slice(len(short)), : many.shape[-1]]
            for x in (keys, values)
        )
        padded = q[self._source].unflatten(0, self._shape)
        out = short.new_empty(
            q.shape
        )  # under autocast attention is bfloat16 where a rotated query is float32
        out[self.last] = short
        out[self._tokens] = _sdpa(padded, keys, values, scale, many).flatten(0, 1)[self._places]
        return out

    def _visible(
        self, positions: Tensor, width: int, window: int | None, dtype: torch.dtype
    ) -> Tensor:
        """Positions of queries [B, T] -> [B, 1, T, U], 0 at the keys that they may see and -inf at others, of the first U = `width`. In numbers,
        for truth values would be made numbers in every layer: 3.5 % of a step of 64 rows (profile, tiny model)."""
        back = positions[:, None, :, None] - torch.arange(width, device=positions.device)
        hidden = (back < 0) | (back >= window) if window else back < 0
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
            hidden, -torch.inf
        )

    def copy(self, source: int | list[int], target: int | slice, start: int, end: int) -> None:
        """Keys and values of the positions start ... end - 1, from slots to others."""
        for kept in (x for layer in self.layers.values() for x in layer):
            kept[target, start:end] = kept[source, start:end].clone()


def through(model: PreTrainedModel, ids: Tensor, rows: Packed | Slots) -> Tensor:
    """Last hidden states [N, hidden size] of tokens [N] that stand where `rows` says.

    Where there is no row (parallel.level), one token that nobody reads goes through the layers, where the other ranks wait.
    """
    if not len(ids):
        return through(model, ids.new_zeros(1), Packed([1], ids.device))[:0]
    # Given a mask of four dimensions, which `attend` does not look at, transformers makes none: it would look in the positions for where rows begin,
    # and wait for a GPU's answer in every pass.
    mask = ids.new_ones(1, 1, 1, 1)
    return (
        prepared(model)
        .base_model(
            input_ids=ids[None],
            position_ids=rows.positions[None],
            attention_mask=mask,
            use_cache=False,
            rows=rows,
        )
        .last_hidden_state[0]
    )


def last_hidden(
    model: PreTrainedModel,
    slots: Slots,
    starts: Sequence[int],
    feeds: Sequence[Sequence[int]],
    tail: int = 1,
) -> Tensor:
    """Feeds tokens to the rows in the slots; hidden states of each row's last `tail` tokens, [B, tail, hidden size]."""
    slots.place(starts, [len(feed) for feed in feeds], model.device)
    hidden = through(
        model, torch.tensor([token for feed in feeds for token in feed], device=model.device), slots
    )
    return hidden[slots.last[:, None] - torch.arange(tail - 1, -1, -1, device=model.device)]
