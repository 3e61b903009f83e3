"""Graphs that leave Python: torch.jit.trace and torch.export of adapted models, any batch size."""

import io

import pytest
import torch
import transformers
from support import disturb
from torch import nn

import aurora

pytestmark = pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns of shapes
OPTIONS = {
    "paper": {},
    "recommended": {"spline": "per-channel", "grid_range": (-4.0, 4.0), "init": "identity"},
    "static": {"mode": "static"},
    "splines alone": {"fixed": False},
    "fixed part alone": {"learnable": False},
}


def mlp(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    aurora.inject(model, "0|2", **options)
    disturb(model)
    return model


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(vocab_size=32, num_attention_heads=2, **sizes)
        self.model = transformers.LlamaForCausalLM(config).eval()

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def logits():
    model = Logits()
    aurora.inject(model, r"_proj$", aurora.recommended(rank=2))
    disturb(model)
    return model


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [4, 3000])
def test_a_trace_computes_and_trains_what_the_model_does(name, rows):
    """Also for another number of rows, which the layers would compute in another way."""
    model = mlp(**OPTIONS[name])
    traced = torch.jit.trace(model, torch.randn(rows, 8))
    for n in (5, 3000):
        x = torch.randn(n, 8)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-6)
    wanted = gradients(model, x)
    assert len(wanted) > 3
    for found, grad in zip(gradients(traced, x), wanted, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-4)


def test_a_trace_is_saved_and_loaded_without_us():
    model, buffer = mlp(), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.randn(4, 8)), buffer)
    buffer.seek(0)
    x = torch.randn(7, 8)
    torch.testing.assert_close(torch.jit.load(buffer)(x), model(x))


def test_a_trace_of_a_language_model():
    model = logits()
    traced = torch.jit.trace(model, torch.arange(12).reshape(2, 6))
    ids = torch.arange(24).reshape(3, 8)
    torch.testing.assert_close(traced(ids[:, :6]), model(ids[:, :6]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_export_for_any_number_of_rows(name):
    model = mlp(**OPTIONS[name])
    rows = torch.export.Dim("rows")
    program = torch.export.export(model, (torch.randn(4, 8),), dynamic_shapes=({0: rows},))
    for n in (2, 3000):
        x = torch.randn(n, 8)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)
    assert {"0.A", "0.B", "0.weight"} <= program.state_dict.keys()


def test_an_export_is_saved_and_loaded_without_us(tmp_path):
    model, ids = logits(), torch.arange(12).reshape(2, 6)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (ids,)), path)
    torch.testing.assert_close(torch.export.load(path).module()(ids), model(ids))
