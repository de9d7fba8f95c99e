"""Decoding steps that are recorded once and replayed: CUDA graphs, for the steps that bring one token of each row.

A GPU runs such a step faster than Python launches its few hundred kernels one by one. A recording launches them all at once, each time with the same
addresses and shapes. So inputs come in fixed buffers; rows are filled up to S, S/2, S/4 ... of the S slots, and the slots are read as far as a
multiple of WIDTH; there is a recording for each such pair, made when it is first needed.

Legend: B rows that are being decoded, S slots, D hidden size.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minicai import terminal
from minicai.attention import Slots, step_hidden

WIDTH = 128  # tokens
Step = Callable[[], tuple[Tensor, ...]]
Recording = tuple[Callable[[], None], tuple[Tensor, ...]]  # what replays a step, and the tensors in which its results then stand
warn_once = cache(terminal.warn)  # of every phase the first says it


def repeated(step: Step) -> Recording:
    """A step that is simply taken again, where it cannot be recorded."""
    results = step()

    def again() -> None:
        for old, new in zip(results, step()):
            old.copy_(new)

    return again, results


def graph(step: Step, pool: tuple[int, int]) -> Recording:
    """A step as a CUDA graph. The first time is a real one: libraries get their workspaces in it. What it saves has no figure, for want of a GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording, pool=pool, capture_error_mode="thread_local"):
        results = step()
    return recording.replay, results


def graphs() -> Callable[[Step], Recording]:
    """Records steps in one pool of memory: they are replayed one after the other, and none reads what another left. Some models ask the host within
    a step (mixtures of experts: how many tokens go to each): their steps are repeated instead."""
    pool, failed = torch.cuda.graph_pool_handle(), []

    def record(step: Step) -> Recording:
        try:
            return repeated(step) if failed else graph(step, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failed.append(error)
            warn_once(f"decoding steps cannot be recorded, and are launched one by one: {next(iter(str(error).splitlines()), '')}")
            return repeated(step)

    return record


RECORDERS = {"cuda": graphs}  # by the type of device; on a CPU there is nothing to gain


class Recorder:
    """Steps of a model over rows in slots; `decide` makes of their hidden states [B, D] and uniform numbers [B] what a step gives."""

    def __init__(self, model: PreTrainedModel, slots: Slots, decide: Callable[[Tensor, Tensor], tuple[Tensor, ...]]):
        self.model, self.slots, self.decide = model, slots, decide
        self.inputs = torch.zeros(2, slots.count, dtype=torch.long, device=model.device)  # token ids and their positions
        self.points = torch.zeros(slots.count, dtype=torch.float64, device=model.device)
        self.record = RECORDERS[model.device.type]()
        self.recordings: dict[tuple[int, int], Recording] = {}

    def __call__(self, ids: Sequence[int], positions: Sequence[int], points: Sequence[float]) -> list[Tensor]:
        """Feeds ids[b] to row b, to stand at positions[b] of slot b: -> what `decide` gives, of B rows."""
        rows, capacity = self.slots.count, self.slots.capacity
        while rows // 2 >= len(ids):
            rows //= 2
        width = min(-(-(max(positions) + 1) // WIDTH) * WIDTH, capacity)
        # The rows that only fill up write to the last place of their slots, where no other does: the last token of a row is drawn, not fed.
        idle = rows - len(ids)
        self.inputs[:, :rows].copy_(torch.tensor([[*ids, *[0] * idle], [*positions, *[capacity - 1] * idle]]))
        self.points[:rows].copy_(torch.tensor([*points, *[0.0] * idle], dtype=torch.float64))
        if (rows, width) not in self.recordings:
            self.recordings[rows, width] = self.record(partial(self._step, rows, width))
        replay, results = self.recordings[rows, width]
        replay()
        return [result[: len(ids)] for result in results]

    def _step(self, rows: int, width: int) -> tuple[Tensor, ...]:
        ids, positions = self.inputs[:, :rows]
        self.slots.place_one_each(positions, width)
        return self.decide(step_hidden(self.model, self.slots, ids), self.points[:rows])
