"""Plans by a language model behind a real HTTP server that speaks chat completions."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from analytic import Problem
from llm_case import GOOD, PLAN, SHOWN, ask, task

from entrecipes.errors import UserError
from entrecipes.experts.llm import LanguageModel, conversation
from entrecipes.experts.memory import MemoryBank
from entrecipes.experts.proxy_pruning import search
from entrecipes.recipe.experts import LanguageModelProposer, Search


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
        assert time.monotonic() - start < 5
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


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    proposer = LanguageModel(LanguageModelProposer(model="m", endpoint=f"http://127.0.0.1:{port}/v1"))
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


def test_a_search_goes_on_without_the_model(server, tmp_path):
    problem = Problem(0, units=3)
    new = replace(problem.task(), group=SimpleNamespace(number=0, log_sigma=(-1.0, 1.0)))
    proposer = server.proposer('{"plans": [[1, 0.5, 0.25], [0.25, 1, 0.5]]}', "No.", reply(b"", 500), repairs=0)
    bank = MemoryBank(tmp_path / "memory.jsonl")
    search(Search(rounds=3, candidates=3), new, problem.evaluate, bank, proposer)
    trials = bank.trials(0)
    assert [trial.proposer for trial in trials] == ["uniform", "llm", "llm"] + 6 * ["evolution"]
    assert trials[1].shares == (1, 0.5, 0.25) and trials[1].note == ""
    assert trials[3].note.startswith("in place of llm: no plan after 0 repairs: it holds no JSON object")
    assert trials[6].note.startswith("in place of llm: no answer: HTTP 500")
    # the second question shows what the first round gave
    assert all(f"loss {trial.loss:.5g}" in server.asked[1]["messages"][1]["content"] for trial in trials[:3])
    lines = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    said = [line["dialogue"] for line in lines if line["kind"] == "round"]
    assert [message["role"] for message in said[0]] == ["system", "user", "assistant"]
    assert said[1][-1] == {"role": "assistant", "content": "No."}
