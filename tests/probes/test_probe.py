import json

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from planted import PLANTED, PLANTED_LAYER, planted_mask, planted_model, planted_texts

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, FunctionalNetworkTemplate, discover_networks, lesion
from fnsft_trl.evaluation import EvaluationConfig, EvaluationData
from fnsft_trl.evaluation.metrics import score_tokens
from fnsft_trl.evaluation.share import ALONE, Share
from fnsft_trl.interventions import Zero
from fnsft_trl.probes import ProbeConfig, ProbeData, probe_networks
from fnsft_trl.probes.condition import Condition
from fnsft_trl.probes.controls import Controls
from fnsft_trl.probes.found import Found
from fnsft_trl.probes.passes import _CHECKED, ProbePasses, Work
from fnsft_trl.probes.plan import networks_of, plan
from fnsft_trl.probes.prefix import SharedPrefix
from fnsft_trl.probes.records import INTACT, Records
from fnsft_trl.probes.statistics import compare
from fnsft_trl.template.description import Component


FOUND = FunctionalNetworkConfig(ica_components=4, ica_rank=24, ica_percentile=97, ica_skip_tokens=0)


def data_of(rows, tokenizer, name="text", tokens=2000, **more):
    return ProbeData.read(
        EvaluationData(name, rows), tokenizer, EvaluationConfig(), max_tokens=tokens, max_length=64, **more
    )


def random_template(model, seed, components=2, rule=None):
    """Networks without structure."""
    random = torch.Generator().manual_seed(seed)
    widths = {layer: block.mlp.down_proj.in_features for layer, block in enumerate(model.model.layers)}
    draw = {layer: torch.randn(components, width, generator=random) for layer, width in widths.items()}
    return FunctionalNetworkTemplate(
        base_model="toy",
        revision=None,
        architecture=type(model).__name__,
        site="mlp_intermediate",
        settings={},
        calibration={"sources": [], "tokens": 0, "sha256": None},
        threshold=FunctionalNetworkConfig(ica_percentile=90).threshold_rule(),
        null=None,
        components=[Component(None, None, None, None) for _ in range(components)],
        loadings=draw,
        mean={layer: torch.zeros(width) for layer, width in widths.items()},
        rms={layer: torch.rand(width, generator=random) + 0.1 for layer, width in widths.items()},
    )


@pytest.fixture(scope="module")
def planted():
    model, tokenizer = planted_model(), tiny_tokenizer()
    template = discover_networks(model, tokenizer, planted_texts(60), FOUND)
    return model, tokenizer, template


@pytest.mark.slow
def test_a_planted_network_is_found_and_singled_out(planted, tmp_path):
    model, tokenizer, template = planted
    sets = [template.members(number) for number in range(len(template.components))]
    hits = [int(members[PLANTED_LAYER][list(PLANTED)].sum()) for members in sets]
    number = max(range(len(hits)), key=hits.__getitem__)
    assert hits[number] == len(PLANTED)  # discovery finds them all in one network
    data = data_of(planted_texts(12, seed=9), tokenizer)
    config = ProbeConfig(curves=["lesion"], batch_size=12, neurons=len(PLANTED))
    probe = probe_networks(model, tokenizer, template, [data], config, output_dir=tmp_path)
    verdicts = probe.found.verdicts("text")
    told = [verdict.words.startswith("stronger than random neurons and than") for verdict in verdicts]
    assert told == [each == number for each in range(len(told))]
    assert verdicts[number].share > 0.9
    planted_neurons = {(PLANTED_LAYER, neuron) for neuron in PLANTED}
    assert {(each.layer, each.neuron) for each in probe.singles} == planted_neurons  # by their first-order effect
    assert probe.shares_prefix
    assert probe.found.records.cost()["layers"] < 1


def test_the_planted_neurons_are_the_function(planted, tmp_path):
    """The probe's scores are those of a lesion, and of a model that never had the neurons."""
    model, tokenizer, template = planted
    data = data_of(planted_texts(4, seed=9), tokenizer)
    probe = probe_networks(
        model, tokenizer, template, [data], ProbeConfig(curves=["lesion"], draws=3), output_dir=tmp_path
    )
    sequences = [item.ids for item in data.items]
    (condition,) = probe.found.of("lesion", selector="networks", network="0")
    for key, mask in ((INTACT, None), (condition.key, condition.mask)):
        handle = None if mask is None else lesion(model, mask)
        nll = sum(float(s.nll.sum()) for s in score_tokens(model, sequences, [1] * len(sequences)))
        if handle is not None:
            handle.remove()
        assert probe.found.measures("text", key)["cross_entropy"].mean == pytest.approx(nll / data.tokens, rel=1e-5)
    assert probe.found.measures("text", INTACT)["kl"].mean == pytest.approx(0, abs=1e-5)
    assert probe.found.effect("text", probe.found.of("full")[0].key) > 0.5


@pytest.mark.slow
def test_a_probe_goes_on_where_it_was_and_refuses_another_one(planted, tmp_path, monkeypatch):
    model, tokenizer, template = planted
    data = data_of(planted_texts(4, seed=9), tokenizer)
    config = ProbeConfig(curves=["lesion"], draws=3, batch_size=2)
    whole = probe_networks(model, tokenizer, template, [data], config, output_dir=tmp_path / "whole")
    calls = []
    run_from = SharedPrefix.run_from

    def counted(self, layer, inputs):
        calls.append(layer)
        if len(calls) == 30 and not tmp_path.joinpath("again").exists():
            raise KeyboardInterrupt
        return run_from(self, layer, inputs)

    monkeypatch.setattr(SharedPrefix, "run_from", counted)
    monkeypatch.setattr("fnsft_trl.probes.records._EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        probe_networks(model, tokenizer, template, [data], config, output_dir=tmp_path / "broken")
    before = len(calls)
    tmp_path.joinpath("again").touch()
    resumed = probe_networks(model, tokenizer, template, [data], config, output_dir=tmp_path / "broken")
    lines = (tmp_path / "whole" / "passes-0.jsonl").read_text().splitlines()
    passes = sum('"nll"' in line for line in lines)  # of the intact model too
    assert before < len(calls) <= passes + 4 * _CHECKED + 1
    done = len(calls)
    again = probe_networks(model, tokenizer, template, [data], config, output_dir=tmp_path / "broken")
    assert len(calls) == done  # nothing is computed twice
    for other in (resumed, again):
        assert [v.to_dict() for v in other.found.verdicts("text")] == [
            v.to_dict() for v in whole.found.verdicts("text")
        ]
    other = ProbeConfig(ablation="mean", batch_size=2)
    with pytest.raises(FNSFTError, match="holds the passes of another probe: ablation was"):
        probe_networks(model, tokenizer, template, [data], other, output_dir=tmp_path / "broken")


@pytest.mark.parametrize("share", [(0, 2), (1, 2)])
def test_each_process_does_its_batches_alone(planted, tmp_path, share):
    """What two processes do is what one does, each half of it."""
    model, tokenizer, _ = planted
    data = data_of(planted_texts(6, seed=9), tokenizer)
    condition = Condition("lesion", "networks", "0", 0.0, 0, planted_mask())
    records = Records(tmp_path, {}, index=share[0])
    work = Work("mlp_intermediate", {None: Zero()}, False, 2, Share(*share))
    ProbePasses(model, tokenizer, [data], work, records).run([condition])
    lines = [json.loads(line) for line in (tmp_path / f"passes-{share[0]}.jsonl").read_text().splitlines()]
    assert {line["batch"] for line in lines if "nll" in line} == set(range(3)[share[0] :: 2])


@pytest.mark.slow
def test_networks_without_structure_matter_no_more_often_than_is_stated(tmp_path):
    """Over 100 seeds: random networks of a random model, which are one more draw of their controls."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    random = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 100, (16,), generator=random).tolist()} for _ in range(4)]
    data = data_of(rows, tokenizer)
    work = Work("mlp_intermediate", {None: Zero()}, False, 4, ALONE)
    wrong = 0
    for seed in range(100):
        networks = networks_of(Controls(model, random_template(model, seed)), [0, 1])
        conditions = [
            condition
            for condition in plan(networks, curves=["lesion"], seed=1000 * seed)
            if condition.selector in ("networks", "random")
        ]
        records = Records(tmp_path / str(seed), {})
        ProbePasses(model, tokenizer, [data], work, records).run(conditions)
        found = Found([data], conditions, records, 4)
        sums = {c: found.measures("text", c.key)["cross_entropy"] for c in conditions if c.curve == "lesion"}
        own = {c.network: sums[c] for c in sums if c.selector == "networks"}
        drawn = {label: [sums[c] for c in sums if (c.network, c.selector) == (label, "random")] for label in own}
        assert [len(each) for each in drawn.values()] == [20, 20]
        wrong += any(each.is_stronger for each in compare(own, drawn, "random", draws=10).values())
    assert wrong <= 10  # 5% of 100, and two standard errors


def test_what_has_no_effect_is_refused(planted, tmp_path):
    model, tokenizer, template = planted
    data = data_of(planted_texts(2), tokenizer)
    with pytest.raises(FNSFTError, match="text, without answers to change neurons at"):
        probe_networks(model, tokenizer, template, [data], ProbeConfig(tokens="answer"), output_dir=tmp_path)
    with pytest.raises(FNSFTError, match="of different names"):
        probe_networks(model, tokenizer, template, [data, data], output_dir=tmp_path)
    with pytest.raises(FNSFTError, match="give data of the same names"):
        probe_networks(model, tokenizer, template, [data], domains={"code": template}, output_dir=tmp_path)
    kept = ProbeConfig(curves=["kept"])
    with pytest.raises(FNSFTError, match="one of lesions; curves holds kept: add lesion"):
        probe_networks(model, tokenizer, template, [data], kept, domains={"code": template}, output_dir=tmp_path)
    with pytest.raises(FNSFTError, match="curves holds 'dosis'"):
        ProbeConfig(curves=["dosis"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", ["intact", "under full of networks"])
def test_a_model_that_predicts_no_numbers_is_refused(state, tokenizer, rows, tmp_path, monkeypatch):
    model = tiny_model("llama")
    if state == "intact":
        model.lm_head.weight.data[5] = torch.nan
    else:
        monkeypatch.setattr(Zero, "of", lambda *args: torch.nan)
    with pytest.raises(FNSFTError, match=rf"batch 0 of text: the model, {state}, predicts nothing .*float32"):
        probe_networks(
            model,
            tokenizer,
            random_template(model, 0),
            [data_of(rows[:4], tokenizer)],
            ProbeConfig(curves=["lesion"], draws=3),
            output_dir=tmp_path,
        )
    assert not list(tmp_path.glob("report*"))
