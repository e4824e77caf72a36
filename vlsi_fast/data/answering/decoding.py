"""How answers are drawn: greedily, or by one random number a token that follows from the row alone.

Letters: B rows of a batch, V vocabulary, T tokens of the answers.

Stock sampling draws a batch's tokens from one stream, so a row's answer would change with its neighbours. Here the
number behind token t of an answer follows from (seed, question's number, sample, turn, t), and the token is the one at
which the cumulated probability passes it (sampling by inverse transform: exactly the distribution that temperature,
top-k and top-p leave). What other rows a batch holds then shows in the last bits of the logits alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...config import ConfigError


@dataclass(frozen=True)
class Decoding:
    """How the teacher answers. Option names are those of transformers."""

    temperature: float = 0.0
    """0: greedy, the likeliest token each time."""
    top_p: float = 1.0
    """Sampling keeps the likeliest tokens up to this probability; 1: all."""
    top_k: int = 0
    """Sampling keeps so many of the likeliest tokens; 0: all."""
    samples: int = 1
    """Answers to each question."""
    max_new_tokens: int = 128
    """Tokens after which an answer is cut."""
    batch_size: int = 64
    """Questions that are answered at once."""
    seed: int = 0
    """Of the samples, and of the questions that are drawn."""

    def __post_init__(self):
        for name, least in (("samples", 1), ("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0), ("temperature", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{_option(name)} is {getattr(self, name)}; use {least} or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}; it is a probability above 0, at most 1")
        if self.temperature == 0:
            for name, neutral in (("samples", 1), ("top_p", 1.0), ("top_k", 0)):
                if getattr(self, name) != neutral:
                    raise ConfigError(
                        f"{_option(name)} {getattr(self, name)} is for sampling, but --temperature is 0 (greedy: "
                        f"always the same answer); set --temperature, e.g. 1, or remove {_option(name)}"
                    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def numbers_of(seed: int, question: int, sample: int, turn: int, count: int) -> list[float]:
    """`count` random numbers in [0, 1), a longer list starting as a shorter one does."""
    draw = random.Random(f"{seed}/{question}/{sample}/{turn}")  # seeded by sha512 of the text, on every machine alike
    return [draw.random() for _ in range(count)]


class Chooser(LogitsProcessor):
    """Chooses the next token of every row in stock `generate`, and keeps its log-probability.

    Args:
        decoding: temperature, top_p, top_k.
        numbers: random numbers [B, at least T] float64 for sampling; None: greedy.

    Attributes:
        logprobs: of each step's tokens [B] float32, under the model itself (before temperature, top-k and top-p).
    """

    def __init__(self, decoding: Decoding, numbers: Tensor | None):
        self.numbers, self.logprobs = numbers, []
        self.warp = LogitsProcessorList()
        if numbers is not None:
            self.warp.append(TemperatureLogitsWarper(float(decoding.temperature)))
            if decoding.top_k:
                self.warp.append(TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1:
                self.warp.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] in which only the chosen token can be taken; greedily the scores as they are."""
        if self.numbers is None:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            step = len(self.logprobs)
            chosen = choose(self.warp(input_ids, scores), self.numbers[:, step : step + 1])
        self.logprobs.append((scores.gather(1, chosen)[:, 0] - scores.logsumexp(-1)).float())
        if self.numbers is None:
            return scores
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def choose(scores: Tensor, numbers: Tensor) -> Tensor:
    """Tokens [B, 1] at which the cumulated probabilities of `scores` [B, V] pass `numbers` [B, 1] in [0, 1)."""
    cumulated = scores.double().softmax(-1).cumsum(-1)
    # a little below 1, so that rounding cannot reach the end; a token of probability 0 is never passed at
    target = numbers.to(scores.device, torch.float64) * (1 - 2.0**-40) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)
