"""The judge, with a server of our own behind the real client."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.analysis.examine import Inquiry, Task
from megatron_r1z.analysis.judge import ask, find_proxy, key_of, make_sender, make_text, parse, read_key
from megatron_r1z.config import JudgeConfig
from megatron_r1z.errors import ConfigError, JudgeError
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.record.metrics import SilentLog

INQUIRIES: list[Inquiry] = [(task, f"{index}?", f"response {index}") for index in range(5) for task in Task]


class Server(ThreadingHTTPServer):
    """Says 1 on answering and 2 on reflection; keeps what it was asked; answers with `statuses` first, while there are some."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.statuses: list[int] = []
        self.refuses = ""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, **body})
        self.server.keys.add(self.headers["Authorization"])
        text = body["messages"][0]["content"]
        status = self.server.statuses.pop() if self.server.statuses else 200
        if self.server.refuses and self.server.refuses in text:
            status = 400
        if status != 200:
            self.answer(status, {"error": {"message": "as the test wants it", "type": "test"}})
            return
        reply = "1: it does." if "Begin your reply" in text else "It checks its work again. 2"
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
        self.answer(200, {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [message]})

    def answer(self, status: int, tree: dict[str, Any]) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def config_of(server: Server, **fields: Any) -> JudgeConfig:
    return JudgeConfig(url=f"http://127.0.0.1:{server.server_port}/v1", model="judge", concurrency=2, **fields)


def ask_all(config: JudgeConfig, path: Path, stop_after: int = 1000) -> dict[Inquiry, int | None] | None:
    flag, send = StopFlag(), make_sender(config)
    sent = itertools.count(1)

    def send_and_stop(text: str) -> str | None:
        flag.requested = next(sent) >= stop_after
        return send(text)

    return ask(INQUIRIES, config, path, send_and_stop, flag, SilentLog())


@pytest.mark.parametrize(
    ("task", "reply", "verdict"),
    [
        (Task.ANSWERING, "1", 1),
        (Task.ANSWERING, " **0**: it goes on with the question.", 0),
        (Task.ANSWERING, "10", None),
        (Task.ANSWERING, "2", None),
        (Task.ANSWERING, "The text answers: 1", None),
        (Task.ANSWERING, "", None),
        (Task.REFLECTION, "It checks its work again.\n\nCategory: **2**.\n", 2),
        (Task.REFLECTION, "3", 3),
        (Task.REFLECTION, "It has 12", None),
        (Task.REFLECTION, "2 because it looks back", None),
        (Task.REFLECTION, "Category 4", None),
        (Task.REFLECTION, "", None),
    ],
)
def test_a_reply_has_its_verdict_in_one_place(task: Task, reply: str, verdict: int | None) -> None:
    assert parse(task, reply) == verdict


def test_the_judge_reads_question_and_response_as_they_are() -> None:
    text = make_text((Task.ANSWERING, "What is {response}?", "{question} \\boxed{7}"))
    assert "[Question]\nWhat is {response}?\n\n[Text]\n{question} \\boxed{7}\n" in text


def test_a_key_has_all_that_decides_the_reply() -> None:
    keys = {key_of(inquiry, model, tokens) for inquiry in INQUIRIES for model in ("a", "b") for tokens in (100, 300)}
    assert len(keys) == 4 * len(INQUIRIES)


def test_every_inquiry_gets_its_verdict_and_is_asked_once(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "judge.jsonl"
    verdicts = ask_all(config_of(server), path)
    assert verdicts == {inquiry: 1 if inquiry[0] is Task.ANSWERING else 2 for inquiry in INQUIRIES}
    assert len(server.requests) == len(INQUIRIES)
    (common,) = {(row["path"], row["model"], row["temperature"], row["max_tokens"]) for row in server.requests}
    assert common == ("/v1/chat/completions", "judge", 0.0, 300)
    assert server.keys == {"Bearer none"}
    assert ask_all(config_of(server), path) == verdicts
    assert len(server.requests) == len(INQUIRIES)


def test_a_stopped_judge_goes_on_to_the_same_file(server: Server, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    config = config_of(server)
    verdicts = ask_all(config, whole)
    server.requests.clear()
    assert ask_all(config, broken, stop_after=1) is None
    assert 0 < len(server.requests) < len(INQUIRIES)
    broken.write_bytes(broken.read_bytes()[:-10])  # as a kill would leave it
    assert ask_all(config, broken) == verdicts
    assert len(server.requests) == len(INQUIRIES) + 1
    assert broken.read_bytes() == whole.read_bytes()


def test_another_judge_is_asked_anew(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    ask_all(config_of(server), path)
    ask_all(replace(config_of(server), model="other"), path)
    assert [row["model"] for row in server.requests].count("other") == len(INQUIRIES)


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [429, 503]
    verdicts = ask_all(config_of(server, retries=2), tmp_path / "judge.jsonl")
    assert verdicts is not None
    assert None not in verdicts.values()
    assert len(server.requests) == len(INQUIRIES) + 2


def test_a_refused_text_has_no_verdict_and_does_not_end_the_run(server: Server, tmp_path: Path) -> None:
    server.refuses = "response 3"
    path = tmp_path / "judge.jsonl"
    verdicts = ask_all(config_of(server), path)
    assert verdicts is not None
    assert [inquiry for inquiry, verdict in verdicts.items() if verdict is None] == [item for item in INQUIRIES if item[2] == "response 3"]
    assert [json.loads(line)["reply"] for line in path.read_text().splitlines()].count(None) == 2


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, r"refuses all of the first 8 requests with status 400; see what it logs"),
        (401, r"it answers with status 401 \(.*as the test wants it.*\); check analysis.judge.url, model and api_key_env\."),
        (404, r"it answers with status 404"),
        (500, r"it answers with status 500"),
    ],
)
def test_a_server_that_gives_no_verdicts_is_told_in_one_sentence(server: Server, tmp_path: Path, status: int, message: str) -> None:
    server.statuses = [status] * 100
    with pytest.raises(JudgeError, match=message) as caught:
        ask_all(config_of(server, retries=1), tmp_path / "judge.jsonl")
    assert str(caught.value).startswith(f"the judge judge at http://127.0.0.1:{server.server_port}/v1 gives no verdicts: ")
    assert not (tmp_path / "judge.jsonl").exists()


def test_replies_beside_a_failure_are_kept_and_not_asked_for_again(tmp_path: Path) -> None:
    inquiries: list[Inquiry] = [(Task.ANSWERING, "1 + 1?", str(number)) for number in range(20)]
    asked: list[str] = []

    def send(text: str) -> str:
        asked.append(text)
        if text == make_text(inquiries[3]):
            raise JudgeError("the judge gives no verdicts.")
        return "1"

    config = JudgeConfig(url="http://localhost", concurrency=2)
    for _ in range(2):
        with pytest.raises(JudgeError):
            ask(inquiries, config, tmp_path / "judge.jsonl", send, StopFlag(), SilentLog())
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 14  # of two rounds of 8
    assert asked.count(make_text(inquiries[3])) == 2
    assert all(asked.count(make_text(item)) == 1 for item in inquiries[:3] + inquiries[4:8])


def test_a_server_that_is_not_there_is_told_in_one_sentence(server: Server, tmp_path: Path) -> None:
    config = config_of(server, retries=0)
    server.server_close()
    with pytest.raises(JudgeError, match=r"Connection error after 0 repetitions; see whether the server runs"):
        ask_all(config, tmp_path / "judge.jsonl")


class Proxy(ThreadingHTTPServer):
    """Takes nothing further; keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.asked: list[str] = []


class ProxyHandler(BaseHTTPRequestHandler):
    server: Proxy

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        self.send_error(403, "not through me")

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy that the environment names for everything."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Proxy() as made:
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{made.server_port}")
        monkeypatch.setenv("all_proxy", f"http://127.0.0.1:{made.server_port}")
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_judge_on_this_machine_is_asked_past_the_proxy(server: Server, proxy: Proxy, tmp_path: Path, host: str) -> None:
    config = replace(config_of(server, retries=0), url=f"http://{host}:{server.server_port}/v1")
    assert ask_all(config, tmp_path / "judge.jsonl") is not None
    assert proxy.asked == []


def test_a_judge_elsewhere_is_asked_through_the_proxy_which_is_named(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    config = replace(config_of(server, retries=0), url="http://judge.example/v1")
    with pytest.raises(JudgeError) as caught:
        ask_all(config, tmp_path / "judge.jsonl")
    assert f"it answers through the proxy http://127.0.0.1:{proxy.server_port} with status 403" in str(caught.value)
    assert "no_proxy=judge.example in the environment goes past the proxy." in str(caught.value)
    assert "secret" not in str(caught.value)
    assert set(proxy.asked) == {"http://judge.example/v1/chat/completions"}


def test_a_proxy_that_is_not_there_is_named(server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "127.0.0.1:1")
    config = replace(config_of(server, retries=0), url="http://judge.example/v1")
    with pytest.raises(
        JudgeError, match=r"through the proxy http://127\.0\.0\.1:1 after 0 repetitions; .*; no_proxy=judge\.example in the"
    ):
        ask_all(config, tmp_path / "judge.jsonl")


@pytest.mark.parametrize(
    ("url", "no_proxy", "is_used"),
    [
        *((f"http://{host}:8000/v1", "", False) for host in ("localhost", "LOCALHOST", "a.localhost", "127.8.9.1", "[::1]", "[::]")),
        *((f"http://{host}:8000/v1", "", True) for host in ("localhost.example", "128.0.0.1", "[::2]", "judge")),
        ("http://judge.example/v1", "judge.example", False),
        ("http://judge.example/v1", "other.example", True),
        ("https://judge.example/v1", "", True),
    ],
)
def test_which_way_a_request_goes(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, url: str, no_proxy: str, is_used: bool) -> None:
    monkeypatch.setenv("no_proxy", no_proxy)
    assert find_proxy(url) == (f"http://127.0.0.1:{proxy.server_port}" if is_used else None)


def test_a_proxy_that_cannot_be_used_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "gopher://127.0.0.1:1")
    make_sender(config_of(server))
    config = replace(config_of(server), url="http://judge.example/v1")
    with pytest.raises(
        ConfigError, match=r"^the judge at http://judge\.example/v1 cannot be asked \(.*gopher.*\); check analysis\.judge\.url"
    ):
        make_sender(config)


def test_half_a_character_in_a_response_goes_as_a_question_mark(server: Server, tmp_path: Path) -> None:
    inquiry: Inquiry = (Task.ANSWERING, "1 + 1?", "2 \ud83d")
    config = config_of(server)
    assert ask([inquiry], config, tmp_path / "judge.jsonl", make_sender(config), StopFlag(), SilentLog()) == {inquiry: 1}
    assert "2 ?" in server.requests[0]["messages"][0]["content"]


def test_a_key_comes_from_the_environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    ask_all(config_of(server, api_key_env="SOME_KEY"), path := tmp_path / "judge.jsonl")
    assert server.keys == {"Bearer secret"}
    assert "secret" not in path.read_text()
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(
        ConfigError, match=r"analysis.judge.api_key_env is SOME_KEY, which is not set in the environment; export it first\."
    ):
        read_key("SOME_KEY")
