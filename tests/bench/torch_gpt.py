"""The GPT of `compat/programs/gpt_nnx.py` in PyTorch: same sizes, dtypes, optimizer, data and lines of output.

Needs PyTorch only. `--compile` runs the step's forward and backward through `torch.compile`.
"""

import argparse
import sys
import time
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "compat" / "programs"))
import stdlib_text  # pyright: ignore[reportMissingImports]

VOCABULARY = 256


class Linear(nn.Linear):
    """As flax's: float32 parameters, computed in the dtype of its input."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-6)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x):
        batch, sequence, width = x.shape
        h = self.norm1(x)
        q, k, v = (
            part(h).view(batch, sequence, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, sequence, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, layers, width, heads, sequence, dtype):
        super().__init__()
        self.dtype = dtype
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(sequence, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = LayerNorm(width), Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens, labels):
        x = (self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]).to(self.dtype)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.view(-1, VOCABULARY), labels.reshape(-1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in {"layers": 6, "width": 768, "heads": 12, "sequence": 2048, "batch": 1, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = GPT(options.layers, options.width, options.heads, options.sequence, getattr(torch, options.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    loss_fn = torch.compile(model) if options.compile else model
    batches = stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed)
    for step in range(options.steps):
        start = time.perf_counter()
        batch = torch.as_tensor(next(batches), dtype=torch.int64)
        loss = loss_fn(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step} loss {loss.item():.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
