"""The parts of DeepSpeed that have no public name are there. Its source is read: imported, it would change others."""

import sys
from pathlib import Path

import pytest
import torch

from fnsft_trl.compat import deepspeed as compat


SOURCE = Path(sys.prefix) / "deepspeed" / "deepspeed" / "runtime" / "zero"
is_here = pytest.mark.skipif(not SOURCE.is_dir(), reason=f"DeepSpeed is not in {SOURCE}; make install puts it there")


def test_deepspeed_is_partitioned_and_own_part_read_what_it_sets_on_a_parameter():
    parameter = torch.nn.Parameter(torch.empty(0))
    assert not compat.is_partitioned(parameter)
    parameter.ds_id, parameter.ds_tensor, parameter.ds_numel = 0, torch.ones(4), 7
    assert compat.is_partitioned(parameter)
    for rank, count in enumerate((4, 3, 0)):
        parameter.ds_zero_partition_rank = rank
        assert len(compat.own_part(parameter)) == count


@is_here
def test_deepspeed_sets_what_is_partitioned_and_own_part_read():
    source = (SOURCE / "partition_parameters.py").read_text()
    for name in ("ds_id", "ds_tensor", "ds_numel", "ds_zero_partition_rank"):
        assert f"param.{name} = " in source


@is_here
def test_deepspeed_gathered_parameters_are_public():
    assert "GatheredParameters" in (SOURCE / "__init__.py").read_text()
    assert "GatheredParameters" in compat.gathered.__code__.co_names
