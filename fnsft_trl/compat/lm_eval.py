"""What is patched of lm-evaluation-harness. Seen in lm-eval 0.4.13. Imports it when it is called: it is an extra."""

__all__ = ["replace_own_model", "sandbox_templates"]

_OWN = ("hf", "hf-auto", "huggingface")  # the names of the class HFLM


def sandbox_templates() -> None:
    """Let the templates of tasks reach nothing but their rows: jinja2's own environment runs any code that they name.

    https://github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/lm_eval/utils.py
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        sandboxed = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
        sandboxed.filters.update(utils.env.filters)
        utils.env = sandboxed


def replace_own_model(model: type) -> None:
    """Let the names of lm-eval's own class of models stand for a subclass: its registry takes no name twice.

    https://github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/lm_eval/api/registry.py
    """
    from lm_eval.api.registry import model_registry
    from lm_eval.models import huggingface  # noqa: F401, which takes the names itself when it is imported

    model_registry._objs.update(dict.fromkeys(_OWN, model))
