"""Your own training loop over a cache: `python examples/own_loop.py CACHE`. See docs/tutorials/your-own-loop.md."""

from __future__ import annotations

import sys

import timm
import torch
from torch.utils.data import DataLoader

from stillroom import CachedDataset, losses


def main(cache_url: str, *, epochs: int = 10, global_batch_size: int = 256, temperature: float = 4.0) -> None:
    dataset = CachedDataset(cache_url, global_batch_size=global_batch_size, temperatures=(temperature,))
    model = timm.create_model("resnet18", num_classes=dataset.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        for batch in DataLoader(dataset, batch_size=None, num_workers=2):
            loss = losses.kd(
                model(batch.images()), batch.teacher_logits(temperature=temperature), temperature=temperature
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss {loss.item():.4f}")
    dataset.close()


if __name__ == "__main__":
    main(sys.argv[1])
