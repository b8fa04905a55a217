import copy

import pytest
import torch
from helpers import tiny_model

from fnsft_trl import FNSFTError, find_neuron_sites
from fnsft_trl.data.sequences import TokenSequence, text_token_ids, token_sequences
from fnsft_trl.discovery.activations import ActivationReader


def read_all(
    model, sequences, *, kind="mlp_intermediate", special=(), skip=1, max_tokens=1000, batch_size=2, length=16
):
    reader = ActivationReader(
        model,
        find_neuron_sites(model, kind=kind),
        batch_size=2,
        max_length=16,
        skip_tokens=1,
        special_ids=special,
    )
    blocks = [(block.rows.clone(), block.parts) for block in reader.read([sequences], max_tokens=max_tokens)]
    return torch.cat([rows for rows, _ in blocks]), torch.cat([half for _, half in blocks]), reader


def reference(model, ids, kind):
    """Activations of one unpadded sequence, all layers side by side."""
    parts = []
    hooks = []
    for site in find_neuron_sites(model, kind=kind):
        if kind == "mlp_output":
            hooks.append(site.down.register_forward_hook(lambda m, a, o: parts.append(o.flatten(0, -2))))
        else:
            hooks.append(site.down.register_forward_pre_hook(lambda m, a: parts.append(a[0].flatten(0, -2))))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", ["mlp_intermediate", "mlp_output"])
def test_rows_are_the_activations_of_kept_tokens(family, kind):
    model = tiny_model(family)
    sequences = [TokenSequence([5, 6, 7, 8, 9], 0), TokenSequence([10, 11, 12], 1)]
    sequences[1].ids.insert(1, 2)  # a special token
    rows, half, _ = read_all(model, sequences, kind=kind, special=[2])
    for sequence in sequences:
        kept = [i for i, token in enumerate(sequence.ids) if i >= 1 and token != 2]
        expected = reference(model, sequence.ids, kind)[kept]
        assert torch.allclose(rows[half == sequence.half], expected, atol=1e-5)


def test_reading_stops_at_exactly_max_tokens_and_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    sequences = [TokenSequence(list(range(5, 15)), i % 2) for i in range(6)]
    rows, half, _ = read_all(model, sequences, max_tokens=23)
    assert len(rows) == len(half) == 23
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_digest_follows_the_tokens():
    model = tiny_model("llama")
    one, two = ([TokenSequence([5, 6, 7, last], 0)] for last in (8, 9))
    digests = [read_all(model, sequences)[2].digests[0].hexdigest() for sequences in (one, one, two)]
    assert digests[0] == digests[1] != digests[2]


def test_texts_of_every_form_give_tokens(tokenizer):
    plain = tokenizer("Say bako: okab.")["input_ids"]
    messages = [{"role": "user", "content": "bako"}, {"role": "assistant", "content": "okab"}]
    chat = tokenizer("user: bako<eos>assistant: okab<eos>")["input_ids"]
    assert text_token_ids("Say bako: okab.", tokenizer) == plain
    assert text_token_ids({"text": "Say bako: okab."}, tokenizer) == plain
    assert text_token_ids({"prompt": "Say bako:", "completion": " okab."}, tokenizer) == plain
    assert text_token_ids({"input_ids": plain}, tokenizer) == plain
    assert text_token_ids(messages, tokenizer) == chat
    assert text_token_ids({"messages": messages}, tokenizer) == chat
    assert text_token_ids({"prompt": messages[:1], "completion": messages[1:]}, tokenizer) == chat
    with pytest.raises(FNSFTError, match="'question'"):
        text_token_ids({"question": "bako"}, tokenizer)
    with pytest.raises(FNSFTError, match="type int"):
        text_token_ids(3, tokenizer)


def test_long_texts_are_cut_into_sequences_that_lose_nothing(tokenizer):
    text = "Say bakoritensumo: " * 5
    ids = tokenizer(text)["input_ids"]
    sequences = list(token_sequences([text], tokenizer, max_length=7))
    assert [token for s in sequences for token in s.ids] == ids
    assert max(len(s.ids) for s in sequences) == 7


@pytest.mark.parametrize(
    "texts", [["Say bako ri:"] * 9, ["Say bako ri:", ""] * 9, ["Say bakoriten: " * 60], ["ba", "Say ri: " * 9] * 4]
)
def test_halves_are_equally_large_however_the_text_is_cut(tokenizer, texts):
    sequences = list(token_sequences(texts, tokenizer, max_length=7))
    sizes = [sum(len(s.ids) for s in sequences if s.half == half) for half in (0, 1)]
    assert abs(sizes[0] - sizes[1]) <= 4 * 7


def test_short_texts_stay_whole_in_one_half(tokenizer):
    texts = ["Say bako ri:", "Say tensu mo ri:", "Say ba:"]
    sequences = list(token_sequences(texts, tokenizer, max_length=4))
    joined, start = [s.ids for s in sequences], 0
    for text in texts:
        ids, halves = tokenizer(text)["input_ids"], set()
        while ids:
            assert joined[start] == ids[:4]
            halves.add(sequences[start].half)
            ids, start = ids[4:], start + 1
        assert len(halves) == 1


def test_conversations_without_a_chat_template_say_so(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(FNSFTError, match="no chat template"):
        text_token_ids([{"role": "user", "content": "ba"}], plain)


def test_conversations_in_from_and_value_form(tokenizer):
    row = {"conversations": [{"from": "user", "value": "bako"}, {"from": "assistant", "value": "okab"}]}
    assert text_token_ids(row, tokenizer) == tokenizer("user: bako<eos>assistant: okab<eos>")["input_ids"]


def test_sources_take_turns_and_have_the_same_limit():
    model = tiny_model("llama")
    sources = [[TokenSequence(list(range(5, 15)), i % 2) for i in range(n)] for n in (8, 2)]
    reader = ActivationReader(
        model, find_neuron_sites(model), batch_size=2, max_length=16, skip_tokens=1, special_ids=()
    )
    parts = [block.parts for block in reader.read(sources, max_tokens=30)]
    assert [int(part[0]) // 2 for part in parts] == [0, 1, 0]
    assert reader.tokens == [30, 18]
    assert torch.cat(parts).bincount().tolist() == [18, 12, 9, 9]


def test_shares_of_processes_are_the_whole_and_what_was_read_before_is_left_out():
    model = tiny_model("llama")
    sequences = [TokenSequence(list(range(5, 10 + i)), i % 2) for i in range(6)]

    def rows(**settings):
        reader = ActivationReader(
            model, find_neuron_sites(model), batch_size=1, max_length=16, skip_tokens=1, special_ids=()
        )
        blocks = [block.rows.clone() for block in reader.read([sequences], max_tokens=1000, **settings)]
        return blocks, reader.digests[0].hexdigest(), reader.tokens

    whole, digest, tokens = rows()
    for settings in ({"share": (0, 2)}, {"share": (1, 2)}, {"first_batch": 4}):
        blocks, other, count = rows(**settings)
        assert (other, count) == (digest, tokens)
        for number, (block, expected) in enumerate(zip(blocks, whole, strict=True)):
            index, processes = settings.get("share", (0, 1))
            is_read = number % processes == index and number >= settings.get("first_batch", 0)
            assert torch.equal(block, expected if is_read else expected[:0])


def test_activations_that_are_not_finite_name_batch_layer_and_neuron():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[17] = float("nan")
        model.model.layers[2].mlp.up_proj.weight[30] = float("inf")
    sequences = [TokenSequence([5], 0), TokenSequence([5, 6, 7], 0), TokenSequence([5, 6, 7, 8], 0)]
    with pytest.raises(FNSFTError, match=r"^batch 0: the activation of neuron 17 in layer 2 is NaN or infinite"):
        read_all(model, sequences)
