"""The world model's training: its own optimiser against torch's, and the teacher-forcing attention against a mask."""

import torch
import torch.nn.functional as F
from sparse_forcing_pack.sparse_attn.training.common import BatchedMuon
from sparse_forcing_pack.sparse_attn.training.world_dit import teacher_forcing_attention


def test_batched_muon_is_torchs_muon():
    torch.manual_seed(0)
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    a = BatchedMuon(ours, lr=0.01)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        # bfloat16 iterations, rounded in another order
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
        assert (p - 1).abs().max() > 0.01


def test_teacher_forcing_attention_is_the_masked_attention():
    torch.manual_seed(0)
    chunks, size = 3, 4
    q, k, v = torch.randn(3, 2, 2 * chunks * size, 2, 8)
    index = torch.arange(2 * chunks * size) // size
    noised, chunk = index >= chunks, index % chunks
    sees_past = ~noised[None] & (chunk[None] < chunk[:, None])
    own = (noised[None] == noised[:, None]) & (chunk[None] == chunk[:, None])
    want = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=sees_past | own
    ).transpose(1, 2)
    torch.testing.assert_close(teacher_forcing_attention(chunks)(0, q, k, v), want)
