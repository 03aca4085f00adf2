"""Asking a language model: one run here by transformers, or one behind the chat-completions API."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from functools import cached_property
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrecipes.errors import UserError
from entrecipes.recipe.experts import LanguageModelProposer

Message = dict[str, str]
"""`{"role": ..., "content": ...}`."""

KEY = "experts.search.proposer"
"""Where mistakes stand in a recipe."""


class NoAnswer(Exception):
    """The model could not be asked, or what came back is no answer of a model."""


class Local:
    """A text-generation model run by transformers, on the accelerator where there is one."""

    def __init__(self, section: LanguageModelProposer) -> None:
        self._section, name = section, section.model
        self._source = str(Path(name).expanduser())
        looks_local = (
            name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" in name and Path(name).parent.is_dir()
        )
        if looks_local and not Path(self._source).is_dir():
            raise UserError(f"{KEY}.model: there is no folder {name}; give a folder or a Hub id of a language model")

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        try:
            with torch.random.fork_rng(devices=[]):
                tokenizer = AutoTokenizer.from_pretrained(self._source)
                model = AutoModelForCausalLM.from_pretrained(self._source, dtype="auto")
            return tokenizer, model.to(device).eval()
        except Exception as error:  # the tokenizers library raises bare Exceptions
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{KEY}.model: {self._section.model} can't be loaded as a language model ({first_line}); give a "
                "folder or Hub id that transformers' AutoModelForCausalLM loads, or set endpoint"
            ) from error

    def fits(self, messages: list[Message]) -> bool:
        """Whether the context holds these messages and the longest answer."""
        context = getattr(self._loaded[1].config.get_text_config(), "max_position_embeddings", None)
        return not context or self._tokens(messages).shape[1] + self._section.max_new_tokens <= context

    def answer(self, messages: list[Message], rng: np.random.Generator) -> tuple[str, bool]:
        """The model's answer, and whether it was cut off. Raises NoAnswer where the device fails."""
        tokenizer, model = self._loaded
        tokens = self._tokens(messages).to(model.device)
        cuda = [model.device] if model.device.type == "cuda" else []
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        try:
            with torch.random.fork_rng(devices=cuda), torch.inference_mode():
                if self._section.temperature > 0:
                    torch.manual_seed(int(rng.integers(2**63)))
                    sampling = {"do_sample": True, "temperature": self._section.temperature}
                out = model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=self._section.max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id
                    if tokenizer.pad_token_id is not None
                    else tokenizer.eos_token_id,
                    **sampling,
                )[0, tokens.shape[1] :]
        except (RuntimeError, IndexError, ValueError) as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from error
        return tokenizer.decode(out, skip_special_tokens=True), len(out) >= self._section.max_new_tokens

    def _tokens(self, messages: list[Message]) -> torch.Tensor:
        tokenizer = self._loaded[0]
        if not tokenizer.chat_template:
            return tokenizer("\n\n".join(part["content"] for part in messages) + "\n\n", return_tensors="pt").input_ids
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:  # of models that know no system role
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            text = tokenizer.apply_chat_template([first, *messages[2:]], tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


class Endpoint:
    """A server that speaks the chat-completions API."""

    def __init__(self, section: LanguageModelProposer) -> None:
        self._section = section
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        try:
            address = urlsplit(section.endpoint)
            usable = address.scheme in ("http", "https") and address.hostname and (address.port or 1)
        except ValueError:  # of a port that is no number
            usable = False
        if not usable:
            raise UserError(
                f"{KEY}.endpoint: {section.endpoint} is no http address; give one, as http://localhost:8000/v1"
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError("OPENAI_API_KEY: holds characters that no key has; set it anew")

    def fits(self, messages: list[Message]) -> bool:
        """Always: how long a context the server's model has is not known here."""
        return True

    def answer(self, messages: list[Message], rng: np.random.Generator) -> tuple[str, bool]:
        """The model's answer, and whether it was cut off. Raises NoAnswer, and UserError for a refused key."""
        try:
            choice = json.loads(self._post(messages))["choices"][0]
            text = choice["message"]["content"] or choice["message"].get("refusal") or ""
            return str(text), choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise NoAnswer(f"{self._section.endpoint} sent no chat completion ({type(error).__name__})") from error

    def _post(self, messages: list[Message]) -> bytes:
        section, url = self._section, f"{self._section.endpoint.rstrip('/')}/chat/completions"
        body = {"model": section.model, "messages": messages, "temperature": section.temperature}
        data = json.dumps(body | {"max_tokens": section.max_new_tokens}).encode()
        request = Request(url, data, {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")  # for that server only
        try:
            deadline = time.monotonic() + section.timeout
            with urlopen(request, timeout=section.timeout) as response:
                return _read(response, deadline)
        except HTTPError as error:
            if error.code == 401:
                had = "refuses this key" if self._key else "asks for a key"
                raise UserError(f"{section.endpoint} {had} (HTTP 401); set OPENAI_API_KEY to a valid one") from None
            detail = b""
            with error, suppress(OSError, HTTPException):
                detail = error.read(300)
            text = " ".join(detail.decode(errors="replace").split())
            raise NoAnswer(
                f"HTTP {error.code} of {url}: {text.replace(self._key, '***') if self._key else text}"
            ) from None
        except (OSError, HTTPException, UnicodeError) as error:  # URLError and time-outs are OSErrors
            raise NoAnswer(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}") from error


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """The body; urlopen's own limit starts anew with each packet, and some servers send blanks while they think."""
    parts = []
    while part := response.read1():
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return b"".join(parts)
