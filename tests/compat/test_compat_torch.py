"""The parts of torch that have no public name are there, and do what is relied on."""

import copy

import pytest
import torch
import torch._dynamo
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


def test_torch_guard_hooks_makes_compiled_code_notice_them():
    """Without it, this is what goes wrong: the hook of the second module, and one that comes later, are ignored."""

    def found():
        torch.compiler.reset()
        modules = [nn.Sequential(nn.Linear(2, 2)).eval() for _ in range(2)]
        modules[1][0].register_forward_hook(lambda module, args, output: output * 0)
        first, second = (torch.compile(module, backend="eager") for module in modules)
        results = [first(torch.ones(2)), second(torch.ones(2))]
        modules[0][0].register_forward_hook(lambda module, args, output: output * 0)
        return [bool(result.any()) for result in (*results, first(torch.ones(2)))]

    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        assert found() == [True, True, True]
        compat.guard_hooks()
        assert found() == [True, False, False]
    torch.compiler.reset()


def test_torch_guard_hooks_drops_what_was_compiled_without():
    module = nn.Sequential(nn.Linear(2, 2)).eval()
    compiled = torch.compile(module, backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        assert compiled(torch.ones(2)).any()
        module[0].register_forward_hook(lambda module, args, output: output * 0)
        assert compiled(torch.ones(2)).any()
        compat.guard_hooks()
        assert not compiled(torch.ones(2)).any()
    torch.compiler.reset()


def test_torch_forward_hooks_are_listed_and_remove_forward_hooks_takes_a_copy_s_away():
    class Hook:
        def __call__(self, *args):
            return None

    def other(*args):
        return None

    module = nn.Linear(2, 2)
    hooks = [Hook(), other, Hook()]
    for register, hook in zip(
        (module.register_forward_pre_hook, module.register_forward_pre_hook, module.register_forward_hook), hooks,
        strict=True,
    ):  # fmt: skip
        register(hook)
    assert compat.forward_hooks(module) == hooks
    copied = copy.deepcopy(module)
    compat.remove_forward_hooks(copied, Hook)
    assert compat.forward_hooks(copied) == [other]
    assert compat.forward_hooks(module) == hooks


def test_torch_counts_writes_to_a_tensor():
    tensor = torch.zeros(2)
    first = compat.version_counter(tensor)
    tensor.add_(1)
    assert compat.version_counter(tensor) == first + 1
    with torch.inference_mode():
        assert compat.version_counter(torch.zeros(2)) == -1
