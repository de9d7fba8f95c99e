"""Decoding steps that are recorded once and replayed: CUDA graphs, for the steps that bring one token of each row. An experiment, of which there are
no figures yet: it is done where the environment has MINICAI_CUDA_GRAPHS=1, in one process.

A GPU runs such a step faster than Python launches its few hundred kernels one by one. A recording launches them all at once, each time with the same
addresses and shapes. So inputs come in fixed buffers; rows are filled up to S, S/2, S/4 ... of the S slots, and all slots are read as far as a
multiple of WIDTH; there is a recording for each such pair, made when it is needed for the third time.

Legend: B rows that are being decoded, S slots, D hidden size.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minicai import InputError
from minicai.engine.attention import Slots, through

WIDTH = 128  # tokens
Results = tuple[Tensor, ...]
Recording = tuple[
    Callable[[], None], Results
]  # what replays a step, and the tensors in which its results then stand


def graphs() -> Callable[[Callable[[], Results]], Recording]:
    """Records steps as CUDA graphs, in one pool of memory: they are replayed one after the other, and none reads what another left."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(step: Callable[[], Results]) -> Recording:
        """Takes the step once and records it. Raises InputError where it asks the host for anything."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # libraries get the workspaces of this stream
        torch.cuda.current_stream().wait_stream(stream)
        recording = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(recording, pool=pool, stream=stream):
                results = step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # mixtures of experts ask the host how many tokens go to each
            raise InputError(
                f"decoding steps of this model cannot be recorded ({next(iter(str(error).splitlines()), '')}): leave out "
                "MINICAI_CUDA_GRAPHS"
            ) from error
        return recording.replay, results

    return record


RECORDERS = (
    {"cuda": graphs} if os.environ.get("MINICAI_CUDA_GRAPHS") == "1" else {}
)  # by the type of device


class Recorder:
    """Steps of a model over rows in slots; `decide` makes of their hidden states [B, D] and uniform numbers [B] what a step gives."""

    def __init__(
        self, model: PreTrainedModel, slots: Slots, decide: Callable[[Tensor, Tensor], Results]
    ):
        self.model, self.slots, self.decide = model, slots, decide
        self.inputs = torch.zeros(
            3, slots.count, dtype=torch.long, device=model.device
        )  # token ids, their positions, their places in the slots
        self.points = torch.zeros(slots.count, dtype=torch.float64, device=model.device)
        self.record = RECORDERS[model.device.type]()
        self.uses: Counter[tuple[int, int]] = Counter()
        self.recordings: dict[tuple[int, int], Recording] = {}

    def __call__(
        self, ids: Sequence[int], positions: Sequence[int], points: Sequence[float]
    ) -> list[Tensor]:
        """Feeds ids[b] to row b, to stand at positions[b] of slot b: -> what `decide` gives, of B rows."""
        rows, capacity = self.slots.count, self.slots.capacity
        while rows // 2 >= len(ids):
            rows //= 2
        width = min(-(-(max(positions) + 1) // WIDTH) * WIDTH, capacity)
        # The rows that only fill up write to the last place of their slots, where no other does: the last token of a row is drawn, not fed.
        idle = rows - len(ids)
        filled = (
            [*ids, *[0] * idle],
            [*positions, *[0] * idle],
            [*positions, *[capacity - 1] * idle],
        )
        self.inputs[:, :rows].copy_(torch.tensor(filled))
        self.points[:rows].copy_(torch.tensor([*points, *[0.0] * idle], dtype=torch.float64))
        self.uses[rows, width] += 1
        if self.uses[rows, width] < 3:
            return [result[: len(ids)] for result in self._step(rows, width)]
        if (rows, width) not in self.recordings:
            self.recordings[rows, width] = self.record(partial(self._step, rows, width))
        replay, results = self.recordings[rows, width]
        replay()
        return [result[: len(ids)] for result in results]

    def _step(self, rows: int, width: int) -> Results:
        ids, positions, places = self.inputs[:, :rows]
        self.slots.place_one_each(positions, places, width)
        return self.decide(through(self.model, ids, self.slots), self.points[:rows])
