import pytest
import torch

from metadist.core.params import Layout

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "rate": torch.tensor(10.0),
    "nothing": torch.zeros(0, 4),
    "bias": torch.tensor([20.0, 21.0]),
}


def test_the_vector_holds_the_tensors_row_by_row_in_the_layouts_order():
    # 2 * 3 values of the matrix, the scalar, none of the empty tensor, 2 of the bias.
    layout = Layout.of(TENSORS)
    assert layout.size == 6 + 1 + 0 + 2
    assert layout.flatten(TENSORS).tolist() == [0, 1, 2, 3, 4, 5, 10, 20, 21]


def test_the_order_is_the_layouts_not_the_given_dicts():
    layout = Layout.of(TENSORS)
    assert layout.flatten(dict(reversed(TENSORS.items()))).tolist() == layout.flatten(TENSORS).tolist()


def test_unflatten_undoes_flatten():
    layout = Layout.of(TENSORS)
    back = layout.unflatten(layout.flatten(TENSORS))
    assert list(back) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor)


def test_gradients_flow_through_the_parts_into_the_vector():
    # d/dv of sum(weight^2) + 3 rate  =  2 weight there, 3 at the rate, 0 elsewhere.
    layout = Layout.of(TENSORS)
    vector = layout.flatten(TENSORS).requires_grad_()
    parts = layout.unflatten(vector)
    (parts["weight"].square().sum() + 3 * parts["rate"]).backward()
    assert vector.grad.tolist() == [0, 2, 4, 6, 8, 10, 3, 0, 0]


def test_parts_have_the_vectors_own_type_and_no_storage_of_their_own():
    layout = Layout.of(TENSORS)
    vector = layout.flatten(TENSORS).double()
    parts = layout.unflatten(vector)
    assert {part.dtype for part in parts.values()} == {torch.float64}
    assert parts["bias"].data_ptr() == vector[7:].data_ptr()


def test_nothing_is_an_empty_vector():
    layout = Layout.of({})
    assert layout.size == 0
    assert layout.flatten({}).shape == (0,)
    assert layout.unflatten(torch.zeros(0)) == {}


@pytest.mark.parametrize("size", [8, 10])
def test_a_vector_of_another_size_is_refused(size):
    with pytest.raises(RuntimeError, match="split"):
        Layout.of(TENSORS).unflatten(torch.zeros(size))
