"""A pipeline from a text, given frames or both to an animated sticker.

The file imports torch, diffusers, transformers and PIL only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def encode_captions(
    captions: Sequence[str],
    encoders: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    tokens: Sequence[int],
) -> Tensor:
    """Last hidden states of frozen text encoders, one encoder's tokens after the other's: float16 [n, T, D].

    T is the sum of `tokens`, D the widest encoder's hidden size; narrower states are followed by zeros. Padding is
    zeros, and an empty caption nothing but zeros: that is how a model is told that there is no text (RDTF).
    """
    wide, there = max(encoder.config.hidden_size for encoder in encoders), [bool(text.strip()) for text in captions]
    parts = []
    for encoder, tokenizer, length in zip(encoders, tokenizers, tokens, strict=True):
        words = tokenizer(list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt")
        words = words.to(encoder.device)
        mask = words["attention_mask"]
        states = encoder(input_ids=words["input_ids"], attention_mask=mask).last_hidden_state
        kept = mask.bool() & torch.tensor(there, device=mask.device)[:, None]
        states = states.to(torch.float16).masked_fill(~kept[:, :, None], 0)
        parts.append(nn.functional.pad(states, (0, wide - states.shape[-1], 0, length - states.shape[1])))
    return torch.cat(parts, dim=1)
