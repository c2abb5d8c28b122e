"""A small language model and how it is trained, for the programs on PyTorch."""

import torch
import torch.nn.functional as functional
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        each = self.queries_keys_values(self.before_attention(x)).view(batch, length, 3, self.heads, -1)
        queries, keys, values = each.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.output(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """With `recompute`, activations are not kept for the backward pass."""

    def __init__(self, vocabulary=4096, width=512, heads=8, layers=6, length=128, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def batches(steps, size=16, length=128, vocabulary=4096, device="cuda", seed=7):
    """Token sequences, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (steps, size, length + 1), generator=generator)
    return [batch.to(device) for batch in tokens]


def loss_of(model, batch):
    """How badly the model tells each next token."""
    logits = model(batch[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(model, optimizer, data):
    """A step for each batch. Returns the losses, on the CPU."""
    losses = []
    for batch in data:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def parameters(model):
    """All parameters in one tensor, on the CPU."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).cpu()
