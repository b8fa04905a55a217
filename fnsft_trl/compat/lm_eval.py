"""What is patched of lm-evaluation-harness. Seen in lm-eval 0.4.13. Imports it when it is called: it is an extra."""

__all__ = ["sandbox_templates"]


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
