"""Patch tokens of teachers in trainings: checks of their keys, and what online teachers compute."""

from __future__ import annotations

from pipeline.core.errors import ConfigError
from pipeline.student.losses import CompositeLoss
from pipeline.tasks import TOKENS
from pipeline.teacher.tokens import TokenRequest
from schemas.config import Config, TokenLossSection


def token_requests(config: Config, loss: CompositeLoss) -> dict[str, TokenRequest]:
    """Of the online teachers by the names of their sections; empty if the loss compares no tokens."""
    if TOKENS not in loss.teacher_outputs or config.teacher.mode != "online":
        return {}
    return {
        name: TokenRequest(section.tokens_layer, section.tokens_grid, f"{name}.tokens_layer", f"{name}.tokens_grid")
        for name, section in config.teacher.models.items()
    }


def check_token_keys(config: Config) -> None:
    """Checks what the config alone shows.

    Raises:
        ConfigError: the student has other views, in which a position is another part of the image; or a key of tokens
            has no effect.
    """
    terms = [term.name for term in config.loss if isinstance(term, TokenLossSection)]
    if terms and config.student is not None and config.student.views is not None:
        raise ConfigError(
            f"{terms[0]} compares position by position, and the student's views are not those of the teacher",
            code="config.tokens-views",
            where="student.views",
            got=f"with {', '.join(terms)}",
            expected="the views of the teacher",
            next_step="remove student.views, or the loss",
        )
    mode = config.teacher.mode
    for name, section in config.teacher.models.items():
        if mode != "online" and section.tokens_grid is not None:
            raise _unused(f"{name}.tokens_grid", f"{section.tokens_grid}, with teacher.mode={mode}")
        if mode == "online" and not terms and (section.tokens_grid, section.tokens_layer) != (None, None):
            key = "tokens_layer" if section.tokens_grid is None else "tokens_grid"
            raise _unused(f"{name}.{key}", f"{getattr(section, key)}, and no loss on tokens")


def _unused(where: str, got: str) -> ConfigError:
    return ConfigError(
        "this key is for losses on the patch tokens of an online teacher, and would have no effect",
        code="config.tokens-unused",
        where=where,
        got=got,
        next_step="remove it (a cache has its own grid, cache.tokens_grid), or set teacher.mode=online and add "
        "token_cosine or token_mse to the loss section",
    )
