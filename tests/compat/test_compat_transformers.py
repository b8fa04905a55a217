"""The parts of transformers that have no public name are there, and do what is relied on."""

import torch
from helpers import medium_experts
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME

from fnsft_trl.compat import transformers as compat


def experts():
    return medium_experts().model.layers[0].mlp.experts


class Zero3:
    """As `HfDeepSpeedConfig` of a run under ZeRO-3, which needs DeepSpeed to be made."""

    def is_zero3(self) -> bool:
        return True


def test_transformers_is_deepspeed_zero3_enabled_says_whether_weights_are_sharded():
    assert compat.is_deepspeed_zero3_enabled() is False
    config = Zero3()
    set_hf_deepspeed_config(config)
    assert compat.is_deepspeed_zero3_enabled() is True
    unset_hf_deepspeed_config()
    assert compat.is_deepspeed_zero3_enabled() is False


def test_transformers_loads_whole_in_a_block():
    config = Zero3()
    set_hf_deepspeed_config(config)
    with compat.loads_whole():
        assert compat.is_deepspeed_zero3_enabled() is False
    assert compat.is_deepspeed_zero3_enabled() is True
    unset_hf_deepspeed_config()


def test_transformers_is_fsdp_enabled_says_whether_one_process_alone_has_the_weights(monkeypatch):
    assert compat.is_fsdp_enabled() is False
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert compat.is_fsdp_enabled() is True


def test_transformers_experts_describe_their_form():
    assert set(compat.EXPERTS_FORM) <= vars(experts()).keys()
    assert all(isinstance(getattr(experts(), flag), bool) for flag in compat.EXPERTS_FORM)


def test_transformers_apply_gate_makes_units_of_gate_and_up_projection():
    module = experts()
    values = torch.randn(3, 2 * module.down_proj.shape[2])
    gate, up = values.chunk(2, -1)
    assert torch.equal(compat.apply_gate(module, values), module.act_fn(gate) * up)


def test_transformers_is_expert_parallel_is_marked_on_the_module():
    module = experts()
    assert vars(module)["_is_expert_parallel"] is False
    assert not compat.is_expert_parallel(module)
    module._is_expert_parallel = True
    assert compat.is_expert_parallel(module)


def test_transformers_trainer_state_file_has_this_name():
    assert compat.TRAINER_STATE_FILE == TRAINER_STATE_NAME


def test_transformers_tracker_names_are_those_of_report_to():
    assert {"tensorboard", "wandb", "flyte"} <= set(compat.tracker_names())


def test_transformers_installed_trackers_are_some_of_them():
    assert "tensorboard" in compat.installed_trackers()
    assert set(compat.installed_trackers()) < set(compat.tracker_names())


def test_transformers_align_special_tokens_adds_the_tokenizers_eos_to_those_of_a_model(tokenizer):
    model = medium_experts()
    model.config.eos_token_id, model.generation_config.eos_token_id = 5, [5, 6]
    compat.align_special_tokens(model, tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 5, 6]
