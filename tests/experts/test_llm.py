"""Plans by a language model: real tiny transformers models, and a real HTTP server."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrecipes.errors import UserError
from entrecipes.experts.llm import LanguageModel, conversation, parse
from entrecipes.recipe.base import build, choice
from entrecipes.recipe.experts import LanguageModelProposer

LEVELS = (1.0, 0.75, 0.5, 0.25)
PLAN = (0.5, 0.75, 1.0)
GOOD = '{"plans": [[0.5, 0.75, 1.0]]}'


def task() -> SimpleNamespace:
    """Three units, a budget of half."""
    unit = [
        ("down.0", "widths", 8, 50.0, None),
        ("mid", "blocks", 1, 200.0, None),
        ("mid.ff", "feed_forward", 4, 25.0, 1),
    ]
    fields = ("path", "kind", "atoms", "flops", "parent")
    units = SimpleNamespace(
        units=tuple(SimpleNamespace(**dict(zip(fields, one, strict=True))) for one in unit), base_flops=1000.0
    )
    group = SimpleNamespace(number=1, log_sigma=(-math.log(10), math.log(10)))
    return SimpleNamespace(
        group=group, units=units, importance=(0.9, 0.3, 0.25), target=500.0, base_loss=0.0625, levels=LEVELS
    )


def trial(number: int, loss: float, kept: tuple[int, ...] = (4, 1, 3)) -> SimpleNamespace:
    return SimpleNamespace(round=number, number=0, kept=kept, flops=505.0, loss=loss)


SHOWN = [trial(1, 0.1), trial(0, 0.08, (8, 0, 1)), trial(2, math.nan)]


def ask(proposer: LanguageModel, shown: list = SHOWN, count: int = 1, seed: int = 0) -> list[tuple[float, ...]]:
    return proposer.propose(task(), 3, shown, count, np.random.default_rng(seed))


def test_the_question_says_all_that_the_search_knows():
    system, question = conversation(task(), SHOWN, 2)
    assert (system["role"], question["role"]) == ("system", "user") and "pruning" in system["content"]
    lines = question["content"].splitlines()
    assert "between -20.0 dB and 20.0 dB" in lines[0] and "500 FLOPs" in lines[0] and "50.0%" in lines[0]
    assert "0.0625" in lines[0]
    assert lines[3:6] == [
        "0: down.0, widths, 8, 40.00%, 0.9",
        "1: mid, blocks, 1, 20.00%, 0.3",
        "2: mid.ff, feed_forward, 4, 10.00%, 0.25, inside unit 1",
    ]
    assert "Allowed shares: 1.0, 0.75, 0.5, 0.25" in lines
    assert "[0.5, 1.0, 0.75]: 1.010 of the budget, loss 0.1, 0.02 above the best" in lines
    assert "[1.0, 0.0, 0.25]: 1.010 of the budget, loss 0.08, 0 above the best" in lines
    assert "exactly 2 lists of exactly 3 shares" in lines[-1]
    assert "No plan has been measured so far." in conversation(task(), [], 2)[1]["content"]


@pytest.mark.parametrize(
    ("answer", "plans", "wrong"),
    [
        (GOOD, [PLAN], ""),
        (f"Sure!\n```json\n{GOOD}\n```\nIt keeps {{more}}.", [PLAN], ""),
        (f'Not {{"plans": [[1, 1]]}} but {GOOD}', [PLAN], ""),
        ('<think>{"plans": [[1, 1, 1]]}</think>' + GOOD, [PLAN], ""),
        ('{"answer": ' + GOOD + "}", [PLAN], ""),
        ('{"plans": [[7, -0.3, 1' + 400 * "0" + "]]}", [(1.0, 0.25, 1.0)], ""),
        ('{"plans": [[0.5, 0.75]]}', [], "plan 0 has 2 shares in place of 3"),
        ('{"plans": [[0.5, 0.75, 1], [1, 1, 1]]}', [PLAN], "2 plans in place of 1"),
        ('{"plans": []}', [], "0 plans in place of 1"),
        ('{"plans": [[0.5, NaN, 1]]}', [], "no finite number"),
        ('{"plans": [[0.5, Infinity, 1]]}', [], "no finite number"),
        ('{"plans": [[0.5, "0.75", 1]]}', [], "no finite number"),
        ('{"plans": [[0.5, true, 1]]}', [], "no finite number"),
        ('{"plans": [0.5, 0.75, 1]}', [], "plan 0 is not a list"),
        ('{"plans": {"a": [1]}}', [], "is not a list"),
        ("[[0.5, 0.75, 1]]", [], "no JSON object"),
        (GOOD[:-1], [], "no JSON object"),
        (2_000 * '{"plans":[', [], "no JSON object"),
        ("", [], "no JSON object"),
    ],
)
def test_answers_are_read_strictly_whatever_stands_around_them(answer, plans, wrong):
    found, problem = parse(answer, 1, 3, LEVELS)
    assert found == plans
    assert wrong in problem and bool(wrong) == bool(problem)


# A server that speaks chat completions


class Server:
    """Answers each question by the next of `answers` (the last one for ever), and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[str | Callable[[BaseHTTPRequestHandler], None]] = []
        self.asked: list[dict[str, Any]] = []
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append({"path": self.path, "authorization": self.headers["Authorization"], **body})
                answer = outer.answers[min(len(outer.asked), len(outer.answers)) - 1]
                if callable(answer):
                    answer(self)
                else:
                    reply(completion(answer))(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def proposer(self, *answers: str | Callable, **keys: Any) -> LanguageModel:
        self.answers = list(answers)
        return LanguageModel(LanguageModelProposer(model="some-model", endpoint=self.url, **keys))


def completion(text: str | None, finish: str = "stop", **message: Any) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


def reply(body: bytes, status: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return send


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def test_a_valid_answer_gives_its_plans(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    proposer = server.proposer(GOOD, temperature=0.5, max_new_tokens=99)
    assert ask(proposer) == [PLAN]
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions" and asked["authorization"] == "Bearer sk-secret"
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("some-model", 0.5, 99)
    best_last = [SHOWN[0], SHOWN[2], SHOWN[1]]
    assert asked["messages"] == conversation(task(), best_last, 1)
    assert proposer.last_exchange == [*asked["messages"], {"role": "assistant", "content": GOOD}]
    assert proposer.last_note == ""


def test_no_key_is_sent_where_none_is_set(server):
    assert ask(server.proposer(f"Here:\n```json\n{GOOD}\n```\nGood luck!")) == [PLAN]
    assert server.asked[0]["authorization"] is None


def test_a_bad_answer_is_sent_back_with_what_is_wrong(server, caplog):
    bad = '{"plans": [[0.5, 0.75]]}'
    proposer = server.proposer(bad, GOOD)
    assert ask(proposer) == [PLAN] and proposer.last_note == ""
    first, second = (asked["messages"] for asked in server.asked)
    assert second[:2] == first and second[2] == {"role": "assistant", "content": bad}
    assert second[3]["role"] == "user" and "plan 0 has 2 shares in place of 3" in second[3]["content"]
    assert [part["role"] for part in proposer.last_exchange] == ["system", "user", "assistant", "user", "assistant"]
    # the next round starts anew
    ask(proposer)
    assert server.asked[2]["messages"] == first and not caplog.records


def test_after_the_repairs_the_valid_plans_are_taken(server):
    three = '{"plans": [[0.5, 0.75, 1.0], [1, 1], [1, 0.5, 0.25]]}'
    proposer = server.proposer(three, '{"plans": [[1, 1, 1]]}', repairs=1)
    assert ask(proposer, count=3) == [PLAN, (1.0, 0.5, 0.25)] and len(server.asked) == 2
    assert proposer.last_note == "2 of 3 plans after 1 repairs: 1 plans in place of 3"


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help with that.",
        "",
        reply(completion(None, refusal="I can't help with that.")),
        reply(completion(None)),
    ],
)
def test_never_a_valid_answer(server, caplog, answer):
    proposer = server.proposer(answer)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):  # it answers, so it is asked again
            assert ask(proposer) == []
            assert proposer.last_note == 'no plan after 2 repairs: it holds no JSON object with the key "plans"'
    assert len(server.asked) == 12 and len(caplog.records) == 1


def test_a_cut_off_answer_names_the_limit(server):
    proposer = server.proposer(reply(completion(GOOD[:-3], "length")), repairs=0, max_new_tokens=16)
    assert ask(proposer) == [] and "cut off after max_new_tokens=16 tokens" in proposer.last_note


def hang(handler: BaseHTTPRequestHandler) -> None:
    handler.server.outer.released.wait(5)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """Blanks, as some servers send while their model thinks."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while not handler.server.outer.released.wait(0.05):
            handler.wfile.write(b" ")
    except OSError:
        pass


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        (reply(b'{"choices": []}'), "no chat completion"),
        (reply(b'{"error": "model overloaded"}'), "no chat completion"),
        (reply(b'{"choices": [{"message": "hi"}]}'), "no chat completion"),
        (reply(b'{"choices": [{"mess'), "no chat completion"),
        (reply(b"\xff\xfe\x00<html>"), "no chat completion"),
        (reply(b"[" * 100_000), "no chat completion"),
        (reply(b"Internal\n error, key sk-secret", 500), "HTTP 500 of {url}/chat/completions: Internal error, key ***"),
        (reply(b"", 307), "HTTP 307"),
        (lambda handler: handler.wfile.write(b"this is not HTTP\n"), "{url}"),
        (lambda handler: None, "{url}"),
        (hang, "timed out"),
        (trickle, "timed out"),
    ],
)
def test_a_broken_endpoint_is_noted_and_left_alone_after_three_rounds(server, caplog, monkeypatch, answer, note):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.http.outer = server
    proposer = server.proposer(answer, timeout=0.3)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert ask(proposer) == []
            assert proposer.last_note.startswith("no answer: ")
            assert note.format(url=server.url) in proposer.last_note
        assert time.monotonic() - start < 3
        assert ask(proposer) == [] and "not asked" in proposer.last_note
    assert len(server.asked) == 3 and len(caplog.records) == 1 and "sk-secret" not in caplog.text


def test_three_failures_must_follow_each_other(server):
    down = reply(b"", 503)
    proposer = server.proposer(down, down, GOOD, down, down, GOOD, down)
    assert [len(ask(proposer)) for _ in range(6)] == [0, 0, 1, 0, 0, 1]


def test_a_server_that_fails_during_repairs_keeps_what_was_answered(server):
    proposer = server.proposer('{"plans": [[0.5, 0.75, 1.0]]}', reply(b"", 500))
    assert ask(proposer, count=2) == [PLAN]
    assert proposer.last_note.startswith("1 of 2 plans after 0 repairs: 1 plans in place of 2; then HTTP 500")


def test_nobody_listens(server):
    server.http.server_close()
    proposer = server.proposer(GOOD)
    for _ in range(3):
        assert ask(proposer) == [] and "refused" in proposer.last_note
    assert ask(proposer) == [] and "not asked" in proposer.last_note


@pytest.mark.parametrize(("key", "says"), [("", "asks for a key"), ("sk-secret", "refuses this key")])
def test_a_refused_key_is_the_users_mistake(server, monkeypatch, key, says):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=f"{says}.*OPENAI_API_KEY") as caught:
        ask(server.proposer(reply(b"sk-secret is wrong", 401)))
    assert "sk-secret" not in str(caught.value)


def test_an_impossible_key_is_refused_without_showing_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        server.proposer(GOOD)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint", ["localhost:8000/v1", "file:///etc/hostname", "http://", "http://host:port/v1", ""]
)
def test_an_endpoint_must_be_an_address(endpoint):
    with pytest.raises(UserError, match="experts.search.proposer.endpoint"):
        LanguageModel(LanguageModelProposer(model="m", endpoint=endpoint))


# Models run here

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
PIECES = ['{"plans": [[', "0.5, 0.75, ", "1.0]]}"]


def tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Bytes, and the answer in three pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_tokens(PIECES)
    bytewise.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>", chat_template=template)


def llama(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About ten thousand random weights."""
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def saved(folder: Path, words: PreTrainedTokenizerFast, model: torch.nn.Module) -> str:
    words.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def local(model: str, **keys: Any) -> LanguageModel:
    section = LanguageModelProposer(model=model, **({"max_new_tokens": 24, "repairs": 1} | keys))
    return build("proposer", section)


def test_the_registry_leads_here(tmp_path):
    assert choice("proposer", "llm").load() is LanguageModel
    assert local(str(tmp_path)).name == "llm"


@pytest.mark.parametrize("template", [CHAT, None, NO_SYSTEM])
def test_gibberish_gives_no_plan(tmp_path, caplog, template):
    words = tokenizer(template)
    proposer = local(saved(tmp_path, words, llama(words)))
    state = torch.random.get_rng_state()
    assert ask(proposer) == []
    assert proposer.last_note.startswith("no plan after 1 repairs: ") and "max_new_tokens=24" in proposer.last_note
    assert len(proposer.last_exchange) == 5 and proposer.last_exchange[2]["content"]
    assert torch.equal(torch.random.get_rng_state(), state)
    first = proposer.last_exchange
    assert ask(proposer, seed=1) == [] and proposer.last_exchange == first  # greedy


def test_sampling_follows_the_generator(tmp_path):
    words = tokenizer()
    proposer = local(saved(tmp_path, words, llama(words)), temperature=1.0, repairs=0)
    state = torch.random.get_rng_state()
    answers = []
    for seed in (0, 0, 1):
        ask(proposer, seed=seed)
        answers.append(proposer.last_exchange[-1]["content"])
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_learned_to_answer_gives_its_plan(tmp_path):
    words = tokenizer()
    model = llama(words)
    text = words.apply_chat_template(conversation(task(), SHOWN, 1), tokenize=False, add_generation_prompt=True)
    prompt = words(text, add_special_tokens=False).input_ids
    answer = words("".join(PIECES) + "<|end|>", add_special_tokens=False).input_ids
    assert len(answer) == 4
    tokens = torch.tensor([prompt + answer])
    labels = torch.where(torch.arange(tokens.shape[1]) < len(prompt), -100, tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(30):
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    proposer = local(saved(tmp_path, words, model))
    assert ask(proposer) == [PLAN]
    assert proposer.last_exchange[-1] == {"role": "assistant", "content": GOOD} and proposer.last_note == ""


def gpt2(words: PreTrainedTokenizerFast, context: int) -> GPT2LMHeadModel:
    end = words.eos_token_id
    config = GPT2Config(
        vocab_size=len(words), n_positions=context, n_embd=16, n_layer=1, n_head=2, bos_token_id=end, eos_token_id=end
    )
    return GPT2LMHeadModel(config)


def test_a_long_table_loses_its_oldest_trials_but_the_best(tmp_path):
    words = tokenizer(None)
    # 0 is the best; 1 is the oldest of the others
    shown = [trial(number, 0.1 + number / 100, (4 + number, 1, 3)) for number in range(4)]
    kept = conversation(task(), [shown[2], shown[3], shown[0]], 1)
    length = len(words("\n\n".join(part["content"] for part in kept) + "\n\n").input_ids)
    proposer = local(saved(tmp_path, words, gpt2(words, length + 24)), repairs=0)
    assert ask(proposer, shown) == [] and proposer.last_exchange[:2] == kept
    assert proposer.last_note.endswith("; 1 of 4 trials left out to fit the model's context")
    assert ask(proposer, shown[2:]) == [] and "left out" not in proposer.last_note


def test_a_question_longer_than_the_context_is_not_asked(tmp_path):
    words = tokenizer(None)
    proposer = local(saved(tmp_path, words, gpt2(words, 100)))
    assert ask(proposer) == [] and "longer than the model's context" in proposer.last_note


@pytest.mark.parametrize("name", ["{tmp}/missing", "./missing", "~/missing/model", "{tmp}/a/b/c"])
def test_a_missing_folder_is_the_users_mistake(tmp_path, name):
    with pytest.raises(UserError, match="experts.search.proposer.model: there is no folder .*missing|a/b/c"):
        local(name.format(tmp=tmp_path))


@pytest.mark.parametrize("broken", ["empty", "tokenizer.json", "config.json", "model.safetensors"])
def test_a_folder_that_does_not_load_is_the_users_mistake(tmp_path, broken):
    if broken != "empty":
        words = tokenizer()
        saved(tmp_path, words, llama(words))
        (tmp_path / broken).write_text('{"model_type": "no such model"}')
    proposer = local(str(tmp_path))
    with pytest.raises(UserError, match="experts.search.proposer.model: .*can't be loaded as a language model"):
        ask(proposer)
