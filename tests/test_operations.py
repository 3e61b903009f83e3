"""The faster ways must give PyTorch's numbers, on every kind of processor."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from aurora import _operations, core

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=[False, True], ids=["Intel", "AMD"])
def processor(request, monkeypatch):
    """Both ways are right on any processor, and faster on one."""
    monkeypatch.setattr(_operations, "AMD", request.param)


def test_they_are_in_core():
    assert core.narrow_product is _operations.narrow_product
    assert core.transposed is _operations.transposed
    expected = _operations.tanh if _operations.AMD else torch.tanh
    assert core._ACTIVATIONS["tanh"] is expected


# ---- Narrow products ----


@pytest.mark.parametrize("rank", [1, 2, 7, 16, 80])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 40, 1500, 6000])
def test_narrow_products(processor, rank, rows):
    A, x = torch.randn(rank, 96, dtype=torch.float64), torch.randn(rows, 96, dtype=torch.float64)
    found = _operations.narrow_product(A, x)
    torch.testing.assert_close(found, A @ x.t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("amd", "layout"), [(False, (6000, 1)), (True, (1, 2))])
def test_each_processor_has_its_layout(monkeypatch, amd, layout):
    """Rows of two numbers on AMD's, whose transpose is the product."""
    monkeypatch.setattr(_operations, "AMD", amd)
    assert _operations.narrow_product(torch.randn(2, 96), torch.randn(6000, 96)).stride() == layout


def test_few_rows_have_the_layout_in_which_products_are_fast():
    for rows in (0, 1, 2, 7, 8, 20):
        y = torch.randn(3, rows)
        found = _operations.transposed(y)
        assert torch.equal(found, y.t())
        assert found.is_contiguous() == (rows < 8)


@pytest.mark.parametrize("rank", [2, 16])
def test_products_of_an_unknown_size_share_a_graph(processor, rank):
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def run(A, x):
        return _operations.transposed(_operations.narrow_product(A, x))

    A = torch.randn(rank, 96)
    for rows in (3, 40, 6000):
        x = torch.randn(rows, 96)
        torch.testing.assert_close(run(A, x), x @ A.t(), rtol=0, atol=1e-4)
    assert counter.frame_count == 1


# ---- tanh ----


def test_tanh_is_right_to_two_units_in_the_last_place():
    for dtype in DTYPES:
        sizes = 10.0 ** torch.linspace(-30, 2, 2 * _operations.MANY, dtype=dtype)
        z = torch.cat([sizes, -sizes])
        with torch.no_grad():
            found = _operations.tanh(z)
        assert not torch.equal(found, torch.tanh(z))  # it is another way
        error = (found.double() - z.double().tanh()).abs() / z.double().tanh().abs()
        assert error.max() <= 2 * torch.finfo(dtype).eps
        assert found.abs().max() <= 1


def test_tanh_of_what_is_no_ordinary_number():
    for dtype in DTYPES:
        z = torch.zeros(_operations.MANY, dtype=dtype)
        z[:5] = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max, -0.0])
        with torch.no_grad():
            found = _operations.tanh(z)
        torch.testing.assert_close(found, torch.tanh(z), rtol=0, atol=0, equal_nan=True)


def test_tanh_leaves_derivatives_to_pytorch():
    z = torch.randn(2 * _operations.MANY, requires_grad=True)
    assert torch.equal(_operations.tanh(z), torch.tanh(z))
    with torch.no_grad():
        _, tangent = torch.func.jvp(_operations.tanh, (z,), (torch.ones_like(z),))
    torch.testing.assert_close(tangent, 1 - torch.tanh(z).square())


# ---- Dropout's mask ----


def test_the_mask_does_not_depend_on_the_default_dtype():
    """bfloat16 has no random number between 0 and 1 / 256."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        mask = _operations.dropout_mask(torch.empty(1000, 400, dtype=torch.float32), 0.001)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mask.dtype == torch.float32
    assert 300 <= (mask == 0).sum() <= 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_the_mask_leaves_out_a_share(p, dtype):
    torch.manual_seed(0)
    mask = _operations.dropout_mask(torch.empty(300, 400, dtype=dtype), p)
    assert mask.shape == (300, 400)
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(mask.double().mean() - (1 - p)) <= 5 * deviation
