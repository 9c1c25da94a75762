import pytest
import torch

from metadist.core.compiled import Compiled, is_traced, written_down
from metadist.core.rewrites import take_numbers_out
from metadist.errors import ModelError


def test_it_is_compiled_anew_for_other_sizes_and_takes_arguments_of_any_structure_and_layout():
    calls = []

    def function(arguments, x):
        calls.append(is_traced())
        return {"sum": arguments["a"].sum() + x[0], "product": arguments["a"] @ arguments["b"]}

    compiled = Compiled(function)
    for size in (3, 5, 3):
        a, b, x = torch.randn(4, size), torch.randn(4, size).t(), torch.randn(2)
        found, expected = compiled({"a": a, "b": b}, x), function({"a": a, "b": b}, x)
        torch.testing.assert_close(found, expected)
    assert calls == [True, False, True, False, False]  # Traced for 3 and for 5; run as it is three times.
    assert not is_traced()


def test_what_depends_on_values_is_refused_with_the_remedy():
    with pytest.raises(ModelError, match=r"cannot be compiled: .* use training\.compile: false"):
        Compiled(lambda x: x * 2 if x.sum() > 0 else x)(torch.randn(3))


def test_a_small_factor_is_kept_and_values_stay_the_same():
    def function(x, scale):
        factor = torch.rsqrt(scale + 1)
        return x * factor.view(1, -1), factor + 1

    arguments = torch.randn(40, 3), torch.rand(3)
    graph = written_down(function, arguments)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    # The factor is broadcast into x, by way of a view; nothing else is small beside what it goes into.
    assert targets.count(torch.ops.aten.as_strided.default) == 1
    torch.testing.assert_close(graph(*arguments), list(function(*arguments)), rtol=0, atol=0)


def test_a_sum_of_products_is_one_product_where_that_moves_less():
    def function(a, b, c, d):
        return a @ b + c @ d, a.t() @ c + b @ d.t()

    torch.manual_seed(0)
    a, c = torch.randn(2, 30, 4, dtype=torch.float64)
    b, d = torch.randn(2, 4, 20, dtype=torch.float64)
    graph = written_down(function, (a, b, c, d))
    # The first result has 600 numbers and its factors 400; the second has 16.
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.mm.default) == 3
    torch.testing.assert_close(graph(a, b, c, d), list(function(a, b, c, d)))


@pytest.mark.parametrize("batch", [(), (5,)])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(3, 1, 4), (3, 6, 1), (1, 6, 4), (1, 1, 4), (1, 6, 1), (3, 6, 4)]
)
def test_products_with_a_single_row_or_column_are_multiplied_out(batch, rows, inner, columns):
    torch.manual_seed(0)
    a, b = torch.randn(*batch, rows, inner).double(), torch.randn(*batch, columns, inner).double().mT
    graph = written_down(lambda a, b: (a @ b) + 1, (a, b))
    targets = {node.target for node in graph.graph.nodes}
    is_product = bool(targets & {torch.ops.aten.mm.default, torch.ops.aten.bmm.default})
    assert is_product == (min(rows, inner, columns) > 1)
    torch.testing.assert_close(graph(a, b), a @ b + 1)


def test_numbers_that_tensors_are_multiplied_by_become_inputs_and_the_bits_stay():
    def at(rate):
        return lambda x: (x - rate * x.sin(), x.double() * rate, x * 0.5 - rate * x.cos(), x.bfloat16() * 0.7)

    x, codes = torch.randn(1000), []
    for rate in (0.1, 0.3):
        graph = written_down(at(rate), (x,))
        numbers = take_numbers_out(graph.graph)
        # One for each dtype, used wherever it is; what has fewer bits keeps its own.
        assert [(n.dtype, n.item()) for n in numbers] == [
            (torch.float32, torch.tensor(rate).item()),
            (torch.float64, rate),
            (torch.float32, 0.5),
        ]
        graph.recompile()
        codes.append(graph.code)
        for found, expected in zip(graph(x, *numbers), at(rate)(x), strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(Compiled(at(rate))(x), at(rate)(x), strict=True):
            torch.testing.assert_close(found, expected)
    assert codes[0] == codes[1]
    assert "0.7" in codes[0]


def test_what_is_compiled_is_the_same_for_all_rates(monkeypatch):
    def at(rate):
        return lambda x: x - rate * x.sin()

    def kept(graph, inputs, options):
        codes.append(graph.code)
        return graph

    codes, x = [], torch.randn(5)
    monkeypatch.setattr(torch._inductor, "compile", kept)
    for rate in (0.1, 0.3):
        assert torch.equal(Compiled(at(rate))(x), at(rate)(x))
    assert codes[0] == codes[1]
