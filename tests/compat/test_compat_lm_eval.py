"""The templates of tasks of lm-eval are rendered where this package can put a sandbox."""

import pytest
from jinja2.exceptions import SecurityError

from fnsft_trl.compat.lm_eval import sandbox_templates


def test_sandbox_templates_render_rows_and_run_no_code():
    utils = pytest.importorskip("lm_eval.utils")
    sandbox_templates()
    row = {"question": "Sky? ", "choices": ["a", "b"]}
    assert utils.apply_template("{{question|trim}}: {{choices[1]}}\n", row) == "Sky?: b\n"
    assert utils.apply_template("{{question|regex_replace('S', 's')}}", row) == "sky? "
    for code in ("question.__class__.__name__", "cycler.__init__.__globals__", "question|attr('__class__')"):
        with pytest.raises(SecurityError):
            utils.apply_template(f"{{{{ ({code}).x }}}}", row)
