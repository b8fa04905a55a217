"""The parts of torch that have no public name are there, and do what is relied on."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from fnsft_trl.compat import torch as compat


@pytest.fixture
def group():
    """This process, alone in a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def renamed(monkeypatch):
    """A torch whose FSDP sets another mark."""

    def other_fully_shard(module, **kwargs):
        for managed in module.modules():
            managed._is_managed_by_fsdp = True

    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", other_fully_shard)
    compat._fsdp_marks_modules.cache_clear()
    yield
    compat._fsdp_marks_modules.cache_clear()


def test_torch_says_where_a_shard_of_a_tensor_lies(group):
    whole = distribute_tensor(torch.arange(6.0).view(3, 2), group, [Shard(0)])
    shape, offset = compat.compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
    assert (tuple(shape), tuple(offset)) == ((3, 2), (0, 0))


def test_torch_marks_every_module_that_fsdp2_manages(group):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert not any(map(compat.is_fsdp_managed, model.modules()))
    fully_shard(model, mesh=group)
    assert all(map(compat.is_fsdp_managed, model.modules()))


def test_torch_marks_every_module_that_fsdp1_manages(group):
    fsdp1 = pytest.importorskip("torch.distributed.fsdp").FullyShardedDataParallel
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    fsdp1(model, device_id=torch.device("cpu"), use_orig_params=True)
    assert all(map(compat.is_fsdp_managed, model.modules()))


def test_torch_whose_mark_is_renamed_counts_as_sharding_everything_that_processes_share(renamed, group, caplog):
    module = nn.Linear(2, 2)
    assert compat.is_fsdp_managed(module)
    assert compat.is_fsdp_managed(module)
    assert caplog.text.count("does not say which modules FSDP shards") == 1


def test_torch_whose_mark_is_renamed_is_as_before_in_one_process(renamed):
    assert not compat.is_fsdp_managed(nn.Linear(2, 2))


def test_torch_counts_writes_to_a_tensor():
    tensor = torch.zeros(2)
    first = compat.version_counter(tensor)
    tensor.add_(1)
    assert compat.version_counter(tensor) == first + 1
    with torch.inference_mode():
        assert compat.version_counter(torch.zeros(2)) == -1
