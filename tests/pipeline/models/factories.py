"""Networks as a user would define them, for ``python:tests.pipeline.models.factories:…``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stillroom import multi_head


class Plain(nn.Module):
    """Ends in a linear head over ``width`` pooled features."""

    def __init__(self, num_classes: int, width: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x).mean((2, 3)))


class SelfDescribed(Plain):
    """Defines its embedding: twice the input of the head."""

    def forward_embedding(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features_BD = self.stem(x).mean((2, 3))
        return self.fc(features_BD), 2 * features_BD


class ProjectorRegisteredLast(Plain):
    """The last nn.Linear is not the head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.projector = nn.Linear(5, 3)


class Headless(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, num_classes, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x).mean((2, 3))


class SharedHead(Plain):
    """Runs its head twice, so there are two candidates for the embedding."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(3))


class Transposed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).T


class Tokens(nn.Module):
    """Classifies every position and averages, which by linearity is the head of the mean embedding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 4, stride=4)
        self.fc = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x).flatten(2).transpose(1, 2)).mean(1)


def fails(num_classes: int) -> nn.Module:
    raise RuntimeError(f"no network for {num_classes} classes today\nand a second line")


def not_a_network(num_classes: int) -> Tensor:
    return torch.zeros(num_classes)


not_callable = 3


class NanLogits(Plain):
    """Like weights of a run that diverged."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        nn.init.constant_(self.fc.weight, float("nan"))


class NanEmbedding(SelfDescribed):
    """Finite logits, and an embedding that is not finite."""

    def forward_embedding(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK, embedding_BD = super().forward_embedding(x)
        return logits_BK, embedding_BD / 0


class ImageTower(nn.Module):
    """Returns an embedding of width 6 if it is built without classes, as the factory of a teacher with a text head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        assert num_classes == 0
        self.stem = nn.Conv2d(3, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x).relu().mean((2, 3))


class Tower(nn.Module):
    """Has no classifier and knows nothing of classes: an embedding of width 6, or another."""

    def __init__(self, width: int = 6, *, pooled: bool = True) -> None:
        super().__init__()
        self.stem, self.pooled = nn.Conv2d(3, width, 3, stride=2), pooled

    def forward(self, x: Tensor) -> Tensor:
        maps_BDHW = self.stem(x).relu()
        return maps_BDHW.mean((2, 3)) if self.pooled else maps_BDHW


class TwoHeads(nn.Module):
    """Several heads, the way a user would write them."""

    def __init__(self, num_classes: Mapping[str, int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.heads = nn.ModuleDict({head: nn.Linear(5, width) for head, width in num_classes.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features_BD = self.stem(x).mean((2, 3))
        return {name: head(features_BD) for name, head in self.heads.items()}


class TwoHeadsSelfDescribed(TwoHeads):
    """Defines its embedding: twice the input of the heads. Its heads have other names than the default."""

    def __init__(self, num_classes: Mapping[str, int]) -> None:
        super().__init__(num_classes)
        self.classifiers = self.heads
        del self.heads

    def forward_embedding(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        features_BD = self.stem(x).mean((2, 3))
        return {name: head(features_BD) for name, head in self.classifiers.items()}, 2 * features_BD


class UnnamedHeads(TwoHeads):
    """Has its heads under other names."""

    def __init__(self, num_classes: Mapping[str, int]) -> None:
        super().__init__(num_classes)
        self.classifiers = self.heads
        del self.heads


class OneHeadIsMissing(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: value for name, value in super().forward(x).items() if name != "even"} | {"other": x.mean((2, 3))}


class OneTensor(TwoHeads):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat(list(super().forward(x).values()), 1)


class OtherHeadsInTraining(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(x)
        return {f"{name}_train" if self.training else name: value for name, value in outputs.items()}


@multi_head
def decorated(num_classes: int, width: int = 5) -> nn.Module:
    return Plain(num_classes, width)
