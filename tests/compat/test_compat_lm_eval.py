"""What lm-eval renders templates of tasks with can be replaced, and so can its own class of models."""

import pytest
from jinja2.exceptions import SecurityError

from fnsft_trl.compat.lm_eval import replace_own_model, sandbox_templates


def test_sandbox_templates_render_rows_and_run_no_code():
    utils = pytest.importorskip("lm_eval.utils")
    sandbox_templates()
    row = {"question": "Sky? ", "choices": ["a", "b"]}
    assert utils.apply_template("{{question|trim}}: {{choices[1]}}\n", row) == "Sky?: b\n"
    assert utils.apply_template("{{question|regex_replace('S', 's')}}", row) == "sky? "
    for code in ("question.__class__.__name__", "cycler.__init__.__globals__", "question|attr('__class__')"):
        with pytest.raises(SecurityError):
            utils.apply_template(f"{{{{ ({code}).x }}}}", row)


def test_replace_own_model_is_found_by_each_of_its_names(monkeypatch):
    registry = pytest.importorskip("lm_eval.api.registry")
    own = registry.get_model("hf")
    monkeypatch.setattr(registry.model_registry, "_objs", dict(registry.model_registry._objs))
    with pytest.raises(ValueError, match="already registered"):  # or no private name would be needed
        registry.register_model("hf")(type("Other", (own,), {}))
    replace_own_model(mine := type("Mine", (own,), {}))
    assert registry.get_model("hf") is mine
    assert not [name for name, model in registry.model_registry.items() if model is own]
