"""What one rank of two does, in this process: the group is a fake one, which exchanges nothing.

What two real processes make together: test_parallel.py.
"""

import atexit
import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from minicai import InputError
from minicai.engine import parallel, terminal
from tests.conftest import tiny_model


@pytest.fixture
def second():
    """This process is rank 1 of 2."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()
    parallel._mesh.cache_clear()


def test_only_the_first_rank_prints(second, monkeypatch, capsys):
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **settings: None)
    monkeypatch.setattr(atexit, "register", lambda function: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(terminal, "QUIET", False)
    parallel._join("fake", 1)
    print("from every rank")
    terminal.warn("from every rank")
    assert tuple(capsys.readouterr()) == ("", "")


# --- lists and numbers ----------------------------------------------------------------------------


def test_a_rank_has_every_other_item_and_every_other_group(second):
    assert (parallel.rank(), parallel.world()) == (1, 2)
    assert parallel.rank_slice([5, 6, 7, 8, 9]) == [6, 8]
    assert list(parallel.turns(0, 10, 2)) == [(2, 4), (6, 8), (10, 10)]
    parallel.require(2, "rows")
    with pytest.raises(InputError, match="rows: 1 cannot be split over 2 processes"):
        parallel.require(1, "rows")


def test_what_all_ranks_made_comes_in_the_order_of_the_list_or_of_the_ranks(second, monkeypatch):
    monkeypatch.setattr(parallel, "_of_all", lambda items: [["a", "c", "e"], ["b", "d"]])
    assert parallel.gather([]) == ["a", "b", "c", "d", "e"]
    assert parallel.joined([]) == ["a", "c", "e", "b", "d"]
    monkeypatch.setattr(parallel, "_of_all", lambda items: [[3], items])
    assert parallel.even_out([[7]]) == [[7], [], []]


def test_the_first_rank_calls_and_the_others_are_told(second, monkeypatch):
    said = []

    def told(found):
        found[:] = said.pop()

    monkeypatch.setattr(dist, "broadcast_object_list", told)
    said.append(["it", None])
    assert parallel.once(pytest.fail) == "it"
    said.append([None, InputError("no")])
    with pytest.raises(InputError, match="no"):
        parallel.once(pytest.fail)

    sent = []
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda found: sent.append(list(found)))
    assert parallel.once(max, 2, 5) == 5 and sent == [[5, None]]
    with pytest.raises(InputError, match="rows: 1 cannot"):
        parallel.once(parallel.require, 1, "rows")
    assert isinstance(sent[1][1], InputError)


def test_totals_are_sums_over_the_ranks_and_change_no_argument(second, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(2))  # as if the other had the same
    mine = torch.tensor([1.0, 2.0])
    assert parallel.total(1.5) == 3.0 and parallel.total([1.0, 2.0]) == [2.0, 4.0]
    assert parallel.total(mine).tolist() == [2.0, 4.0] and mine.tolist() == [1.0, 2.0]
    assert parallel.anywhere(True) and not parallel.anywhere(False)


def test_gradients_are_scaled_for_the_mean_that_fsdp_takes(second):
    weight = torch.ones(2, requires_grad=True)
    parallel.backward(3 * weight.sum())
    assert weight.grad.tolist() == [6.0, 6.0]


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("Connection closed by peer"), True),
        (RuntimeError("Timed out waiting 5000ms"), True),
        (RuntimeError("NCCL error"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("connection"), False),
    ],
)
def test_only_an_error_of_the_group_means_that_another_rank_is_lost(second, error, lost):
    assert parallel.lost_peer(error) == lost


def test_one_process_has_no_other_to_lose():
    assert not parallel.lost_peer(RuntimeError("connection"))


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_keeps_its_part_of_each_parameter_and_has_all_inside_gathered(
    second, precision, monkeypatch
):
    monkeypatch.setattr(parallel, "set_model_state_dict", lambda *_, **__: None)  # nobody sends it
    with parallel.computing_in(precision):
        whole = dict(tiny_model().named_parameters())
        model = parallel.shard(tiny_model().to("meta"))
        assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 3  # 2 layers
        for name, parameter in model.named_parameters():
            local = parameter.to_local()
            assert local.dtype == torch.float32 and local.device.type == "cpu"
            assert len(local) == len(whole[name]) // 2 and local.shape[1:] == whole[name].shape[1:]
        with parallel.gathered(model):
            for name, parameter in model.named_parameters():
                assert parameter.shape == whole[name].shape
                layer = ".layers." in name and precision == "bf16"
                assert parameter.dtype == (torch.bfloat16 if layer else torch.float32)
        parameter = next(model.parameters())
        assert len(parameter.to_local()) == 32  # of 64: in parts again
        assert parallel.weight_precision() == precision
        parameter.grad = torch.ones_like(parameter)
        assert type(parallel.clip_grad_norm(model, 1.0)) is float


def test_a_model_that_does_not_name_its_layers_is_refused(second):
    model = torch.nn.Linear(2, 2)
    model._no_split_modules = ["Layer"]
    with pytest.raises(InputError, match="Linear: several processes cannot share this kind"):
        parallel.shard(model)


# --- the process ----------------------------------------------------------------------------------


@pytest.fixture
def one_gpu(monkeypatch):
    """torch says that there is one. Gives the numbers of the devices that were chosen."""
    chosen, before = [], dict(parallel._process)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    yield chosen
    parallel._process.update(before)


def test_one_process_takes_the_gpu_where_there_is_one(one_gpu, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    parallel.setup()
    assert (parallel.device(), parallel.precision()) == (torch.device("cuda"), "bf16")
    parallel.setup("cpu")
    assert (parallel.device(), parallel.precision()) == (torch.device("cpu"), "fp32")
    assert not one_gpu


def test_each_process_takes_a_gpu_of_its_own(second, one_gpu, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    parallel.setup("cuda", "fp32")
    assert parallel.device() == torch.device("cuda:0") and one_gpu == [0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="process 2 on a host with 1 CUDA devices: too many"):
        parallel.setup("cuda", "fp32")


def test_the_c_library_is_told_to_keep_freed_memory(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *words: calls.append(words))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(parallel.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv(parallel.MALLOC, raising=False)
    parallel._keep_freed_memory()
    assert calls == [
        (-3, 2**30),
        (-1, 2**31 - 1),
        (-2, 2**26),
    ]  # in bytes
    monkeypatch.setenv(parallel.MALLOC, "1")
    parallel._keep_freed_memory()
    assert len(calls) == 3
