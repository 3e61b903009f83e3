"""diffusers' class of SDXL's UNet, small: adapters on its attention, in half precision too."""

import diffusers
import pytest
import torch
from support import disturb

import aurora

# SDXL's options with few and narrow blocks.
SDXL = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 16,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
    "norm_num_groups": 8,
}
TARGET = r"\.attn[12]\.to_(q|k|v|out\.0)$"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unet(dtype):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**SDXL).to(dtype)


def batch(dtype):
    random = torch.Generator().manual_seed(1)
    sizes = ((2, 4, 8, 8), (2, 5, 16), (2, 16), (2, 6))
    latents, text, pooled, ids = (torch.randn(s, generator=random).to(dtype) for s in sizes)
    return {
        "sample": latents,
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids},
    }


@torch.no_grad()
def answer(model, dtype):
    return model.eval()(**batch(dtype)).sample


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_a_file_and_a_merge(dtype, tmp_path):
    # Frozen as `inject` leaves it: PyTorch may round otherwise where a weight requires a gradient.
    model, given = unet(dtype).requires_grad_(False), batch(dtype)
    plain = answer(model, dtype)
    done = aurora.inject(model, TARGET, aurora.recommended(rank=2))
    assert len(done.layers) == 8 * 8  # eight transformer blocks, two attentions of four layers
    assert torch.equal(answer(model, dtype), plain)
    assert aurora.check(model, given) == {}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(aurora.parameter_groups(model, lr=2e-3))
    model.train()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(**given).sample.float() - noise).square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in aurora.parameters(model))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in aurora.parameters(model))
    trained = answer(model, dtype)
    aurora.save(model, tmp_path / "adapter.safetensors")
    fresh = unet(dtype)
    aurora.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(answer(fresh, dtype), trained)
    report = aurora.merge(fresh, "calibrated", [given])
    assert len(report.merged) == len(done.layers)
    merged = answer(fresh, dtype)
    assert merged.dtype == dtype
    gap, moved = (merged - trained).float().norm(), (trained - plain).float().norm()
    assert gap < 0.2 * moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_is_as_exact_as_the_dtype(dtype):
    model = unet(dtype)
    aurora.inject(model, TARGET, mode="static")
    disturb(model, scale=0.05)
    wanted = answer(model, dtype).float()
    aurora.merge(model)
    error = (answer(model, dtype).float() - wanted).norm() / wanted.norm()
    assert error < 8 * torch.finfo(dtype).eps
    assert not torch.allclose(answer(unet(dtype), dtype).float(), wanted, rtol=1e-2, atol=1e-2)
