"""The parts of torch that have no public name are there, and do what is relied on."""

import copy

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.modules import module as modules

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


HOOKS = {
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *args: None),
    "forward": lambda module: module.register_forward_hook(lambda *args: None),
    "full backward pre": lambda module: module.register_full_backward_pre_hook(lambda *args: None),
    "full backward": lambda module: module.register_full_backward_hook(lambda *args: None),
    "global forward pre": lambda module: modules.register_module_forward_pre_hook(lambda *args: None),
    "global forward": lambda module: modules.register_module_forward_hook(lambda *args: None),
    "global full backward pre": lambda module: modules.register_module_full_backward_pre_hook(lambda *args: None),
    "global full backward": lambda module: modules.register_module_full_backward_hook(lambda *args: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_torch_says_which_modules_have_hooks_as_has_hooks_reads_it(kind):
    module = nn.Linear(2, 2)
    assert not compat.has_hooks(module)
    handle = HOOKS[kind](module)
    try:
        assert compat.has_hooks(module)
        assert compat.has_hooks(nn.Linear(2, 2)) == kind.startswith("global")
    finally:
        handle.remove()
    assert not compat.has_hooks(module)


def test_torch_says_within_a_transform_that_it_is_transformed():
    seen = []

    def function(x):
        seen.append(compat.is_transformed())
        return x.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    function(torch.ones(2))
    assert seen == [False, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torch_multiplies_exactly_in_float32_and_more_outside_of_autocast(dtype):
    x = torch.ones(2, dtype=dtype)
    assert compat.multiplies_exactly(x) == (dtype in (torch.float64, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert not compat.multiplies_exactly(x)
        with torch.autocast("cpu", enabled=False):
            assert compat.multiplies_exactly(x) == (dtype in (torch.float64, torch.float32))


@pytest.fixture
def precision():
    """The precision of products, put back afterwards: by the older way to ask too, which notes what it was told."""
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("value", ["high", "medium"])
def test_torch_says_that_products_are_rounded(value, precision):
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert compat.multiplies_exactly(single)
    torch.set_float32_matmul_precision(value)
    assert not compat.multiplies_exactly(single)
    assert compat.multiplies_exactly(double)
    torch.set_float32_matmul_precision("highest")
    assert compat.multiplies_exactly(single)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="the newer way to ask")
@pytest.mark.parametrize("value", ["tf32", "bf16"])
def test_torch_says_it_in_the_newer_way_too(value, precision):
    """`TrainingArguments(tf32=True)` sets it there; the older question is then an error."""
    torch.backends.fp32_precision = "tf32"
    assert not compat.multiplies_exactly(torch.ones(2))
    torch.backends.fp32_precision = "none"
    assert compat.multiplies_exactly(torch.ones(2))
    torch.backends.mkldnn.matmul.fp32_precision = value
    assert not compat.multiplies_exactly(torch.ones(2))


def test_torch_counts_writes_to_a_tensor():
    tensor = torch.zeros(2)
    first = compat.version_counter(tensor)
    tensor.add_(1)
    assert compat.version_counter(tensor) == first + 1
    with torch.inference_mode():
        assert compat.version_counter(torch.zeros(2)) == -1


def test_torch_takes_all_bits_of_float32_in_a_block_and_goes_back(precision):
    torch.set_float32_matmul_precision("medium")
    x = torch.ones(2)
    assert not compat.multiplies_exactly(x)
    with compat.full_products():
        assert compat.multiplies_exactly(x)
        assert not torch.is_grad_enabled()
    assert not compat.multiplies_exactly(x)
    assert torch.get_float32_matmul_precision() == "medium"


def test_torch_exact_is_float64_where_there_is_some_else_on_the_cpu():
    values = torch.rand(3)
    assert torch.equal(compat.exact(values), values.double())
    assert compat.exact(values.to("meta")).device.type == "meta"

    class OfApple:
        """A tensor of a device without float64."""

        device = torch.device("mps")

        def cpu(self):
            return values

    assert torch.equal(compat.exact(OfApple()), values.double())
