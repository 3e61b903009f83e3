"""ViT-base's and -large's blocks in transformers: wiring, counts, a step, files and merge."""

import pytest
import torch
import transformers
from support import disturb

import aurora
from aurora import core

# The real widths of the paper's models; what is repeated is there once or twice.
WIDTHS = {"base": (768, 12, 2), "large": (1024, 16, 1)}
QUERY_VALUE = r"attention\.(self|attention)\.(query|value)$|attention\.[qv]_proj$"


def vit(size, seed=0):
    width, heads, depth = WIDTHS[size]
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
        num_hidden_layers=depth, image_size=64, num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([1, 2, 3, 4])


@torch.no_grad()
def answer(model):
    return model(pixel_values=IMAGES).logits


@pytest.mark.parametrize("size", WIDTHS)
def test_vit_from_wiring_to_merge(size, tmp_path):
    width, _, depth = WIDTHS[size]
    model = vit(size)
    plain = answer(model)
    done = aurora.inject(model, QUERY_VALUE, rank=2, train=r"^classifier\.")
    assert len(done.layers) == 2 * depth
    head = sum(p.numel() for p in model.classifier.parameters())
    assert done.trainable - head == 2 * depth * (2 * 2 * width + 20)  # A, B; H, spline weights
    assert torch.equal(answer(model), plain)
    assert aurora.check(model, {"pixel_values": IMAGES}) == {}
    optimizer = torch.optim.AdamW(aurora.parameter_groups(model, lr=1e-3))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(pixel_values=IMAGES, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = answer(model)
    aurora.save(model, tmp_path / "adapter.safetensors")
    assert (tmp_path / "adapter.safetensors").stat().st_size < 6 * done.trainable + 8000
    fresh = vit(size)
    aurora.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(answer(fresh), trained)
    for layer in core.layers(fresh).values():  # as far as a longer training would take them
        torch.nn.init.normal_(layer.B, std=0.01)
    wanted = answer(fresh)
    report = aurora.merge(fresh, "calibrated", [{"pixel_values": IMAGES}])
    assert len(report.merged) == 2 * depth
    error, moved = (answer(fresh) - wanted).norm(), (answer(vit(size)) - wanted).norm()
    assert error < 0.2 * moved
    assert not any(isinstance(m, core.AuroraLinear) for m in fresh.modules())


def test_the_static_mode_merges_exactly():
    model = vit("base").double()
    aurora.inject(model, QUERY_VALUE, rank=2, mode="static")
    disturb(model, scale=0.02)
    images = IMAGES.double()
    with torch.no_grad():
        wanted = model(pixel_values=images).logits
        aurora.merge(model)
        torch.testing.assert_close(model(pixel_values=images).logits, wanted)
