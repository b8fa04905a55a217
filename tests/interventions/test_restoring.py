"""Changes of linear maps, taken back along directions: exactly, in the form that they have."""

import pytest
import torch

from fnsft_trl.interventions.restoring import ColumnsChange, LoraChange, Positions, Restoration, RowsChange


IN, OUT, RANK = 40, 24, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def basis():
    return torch.linalg.qr(draw(IN, 6, seed=1).double())[0]


@pytest.fixture
def mean():
    return draw(IN, seed=2).double()


def whole(change):
    """D, shape (out, in)."""
    if isinstance(change, LoraChange):
        return change.b.double() @ change.a.double()
    if isinstance(change, RowsChange):
        found = torch.zeros(OUT, IN, dtype=torch.float64)
        found[torch.arange(OUT) if change.positions is None else change.positions] = change.rows.double()
        return found
    found = torch.zeros(OUT, IN, dtype=torch.float64)
    found[:, change.positions] = change.columns.double().T
    return found


def changes():
    return [
        LoraChange(draw(RANK, IN), draw(OUT, RANK, seed=3), draw(OUT, seed=4)),
        RowsChange(draw(OUT, IN), draw(OUT, seed=4)),
        ColumnsChange(draw(11, OUT), torch.arange(3, 36, 3)),
    ]


@pytest.mark.parametrize("change", changes(), ids=lambda change: type(change).__name__)
def test_what_is_left_does_not_answer_along_the_directions_and_keeps_its_form(change, basis, mean):
    left = change.restored(basis, mean, Restoration(6))
    along, norm = left.left_in(basis)
    assert along <= 1e-6 * norm
    assert norm > 0
    assert along == pytest.approx(float((whole(left) @ basis).norm()), abs=1e-6)
    assert norm == pytest.approx(float(whole(left).norm()), rel=1e-6)
    as_it_was = change.restored(basis[:, :0], mean, Restoration())
    along, norm = as_it_was.left_in(basis)
    assert along > 0.1 * norm  # the control: without the projection, it does answer
    for one, other in zip(vars(left).values(), vars(change).values(), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.shape, one.dtype) == (other.shape, other.dtype)


def test_rows_and_lora_lose_nothing_outside_the_directions(basis, mean):
    outside = draw(IN, 3, seed=7).double()
    outside -= basis @ (basis.T @ outside)
    for change in changes()[:2]:
        left = change.restored(basis, mean, Restoration(6))
        assert torch.allclose(whole(left) @ outside, whole(change) @ outside, atol=1e-5)


def test_of_columns_the_nearest_change_is_left(basis, mean):
    """Any other change of these columns without an answer along the directions is farther from what was trained."""
    change = changes()[2]
    left = change.restored(basis, mean, Restoration(6))
    distance = (whole(left) - whole(change)).norm()
    for seed in range(5):
        other = ColumnsChange(change.columns + draw(11, OUT, seed=seed), change.positions)
        assert (whole(other.restored(basis, mean, Restoration(6))) - whole(change)).norm() > distance


def test_as_many_directions_as_columns_leave_nothing(basis, mean):
    few = ColumnsChange(draw(4, OUT), torch.tensor([1, 5, 9, 30]))
    along, norm = few.restored(basis, mean, Restoration(6)).left_in(basis)
    assert norm < 1e-6 * few.left_in(basis)[1]
    assert along < 1e-6


def test_a_scale_multiplies_what_is_left_and_a_bias_goes_with_the_mean(basis, mean):
    for change in changes():
        scaled = change.restored(basis[:, :0], mean, Restoration(scale=0.5))
        assert torch.allclose(whole(scaled), whole(change) / 2, atol=1e-6)
    lora = changes()[0]
    assert torch.equal(lora.restored(basis[:, :1], mean, Restoration(1)).bias, lora.bias)
    assert torch.allclose(lora.restored(basis[:, :0], mean, Restoration(scale=0.5)).bias, lora.bias / 2)
    assert not lora.restored(basis[:, :2], mean, Restoration(2)).bias.any()


def test_scaling_neurons_multiplies_their_rows_or_columns_of_the_change_and_nothing_else():
    some = RowsChange(draw(4, IN), draw(4, seed=4), torch.tensor([1, 5, 6, 20]))
    numbers = torch.tensor([5, 6, 7, 21])
    for change in (*changes()[:2], some):
        left = change.scaled(0.5, Positions(numbers, "output"))
        expected = whole(change)
        expected[numbers] /= 2
        assert torch.allclose(whole(left), expected, atol=1e-6)
        at = torch.arange(len(change.bias)) if getattr(change, "positions", None) is None else change.positions
        assert torch.equal(left.bias, change.bias * torch.where(torch.isin(at, numbers), 0.5, 1.0))
    for change in (*changes(), some):
        expected = whole(change)
        expected[:, numbers] = 0
        assert torch.allclose(whole(change.scaled(0.0, Positions(numbers, "input"))), expected, atol=1e-6)


def test_a_centred_change_adds_nothing_to_the_mean_input_and_is_otherwise_the_same(basis, mean):
    change = LoraChange(draw(RANK, IN), draw(OUT, RANK, seed=3))
    left = change.restored(basis[:, :1], mean, Restoration(1, is_centred=True))
    assert torch.allclose(whole(left) @ mean + left.bias.double(), torch.zeros(OUT).double(), atol=1e-5)
    assert torch.allclose(whole(left), whole(change.restored(basis[:, :1], mean, Restoration(1))))


def test_a_way_says_what_it_is():
    names = [Restoration(), Restoration(scale=0.5), Restoration(1), Restoration(2), Restoration(10, 0.7)]
    names += [Restoration(1, is_centred=True), Restoration(2, networks="0-3"), Restoration(0, 0.5, neurons="0-3")]
    assert [way.name for way in names] == [
        *("as trained", "scaled by 0.5", "off position 0", "off position 0, mean"),
        *("off position 0, mean, 8 leading; scaled by 0.7", "off position 0, centred"),
        *("off position 0, mean, networks 0-3", "neurons of networks 0-3 scaled by 0.5"),
    ]
