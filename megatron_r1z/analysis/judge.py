"""A language model as judge of the responses, behind any server of OpenAI's chat completions; every reply is kept on disk.

The questions, the categories and where a reply has its verdict are those of arXiv 2503.20783; the wording is ours.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from megatron_r1z.analysis.examine import Inquiry, Task
from megatron_r1z.config import JudgeConfig
from megatron_r1z.errors import ConfigError, JudgeError
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.record.metrics import Console
from megatron_r1z.record.result_files import append_rows

INSTRUCTIONS = {
    Task.ANSWERING: """\
Below are a question and the text that a language model wrote after it. Does the text try to answer the question? Whether the answer is \
right does not matter.

1: it tries to answer the question.
0: it does not: it goes on with the question, writes other questions, drifts to another subject or makes no sense.

Begin your reply with the digit.

[Question]
{question}

[Text]
{response}
""",
    Task.REFLECTION: """\
Below are a question and a language model's response to it. Put the response into one of four categories:

0: off-topic, incoherent or repetitive text.
1: it answers the question without any self-reflection.
2: it shows self-reflection: explicitly or implicitly it looks back at its own work, doubts it, checks it again, corrects it or starts \
anew. Whether the answer is right does not matter.
3: it consists of Python code and nothing else.

Explain your choice in one or two sentences and end your reply with the digit of the category.

[Question]
{question}

[Response]
{response}
""",
}

_PLACES = {Task.ANSWERING: re.compile(r"\W*([01])\b"), Task.REFLECTION: re.compile(r"(?:.*\D)?([0-3])\W*", re.DOTALL)}
"""Where a reply has its verdict: the first word, or the whole of it up to the last digit."""
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
"""What a reasoning model says before its reply."""
BATCHES_PER_WRITE = 4
"""Rounds of `concurrency` requests after which replies are on disk."""

Send = Callable[[str], str | None]
"""Puts a text to the judge and returns its reply, None where the server refuses this text, such as one that is too long for the judge."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A row of the file of replies."""

    key: str
    """See `key_of`."""
    task: str
    reply: str | None
    """None where the server refused the request."""

    @property
    def verdict(self) -> int | None:
        """The digit that it gives; None where it gives none."""
        return None if self.reply is None else parse(Task(self.task), self.reply)


def parse(task: Task, reply: str) -> int | None:
    """The verdict in a reply: at its beginning for `ANSWERING`, at its end for `REFLECTION`; None where there is none.

    >>> parse(Task.ANSWERING, "1, it computes the sum."), parse(Task.REFLECTION, "It checks its result. Category: 2.")
    (1, 2)
    >>> parse(Task.ANSWERING, "<think>Is it 0?</think> 1")
    1
    >>> parse(Task.ANSWERING, "It does."), parse(Task.REFLECTION, "Between 1 and 2, I think")
    (None, None)
    """
    reply = _THOUGHTS.sub("", reply)
    match = _PLACES[task].match(reply) if task is Task.ANSWERING else _PLACES[task].fullmatch(reply)
    return None if match is None else int(match[1])


def make_text(inquiry: Inquiry) -> str:
    """What the judge reads; halves of characters, which no request can hold, as question marks."""
    task, question, response = inquiry
    before, _, rest = INSTRUCTIONS[task].partition("{question}")
    between, _, after = rest.partition("{response}")
    return f"{before}{question}{between}{response}{after}".encode(errors="replace").decode()


def key_of(inquiry: Inquiry, model: str, max_tokens: int) -> str:
    """A digest of all that decides the reply; 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps([model, max_tokens, make_text(inquiry)]).encode()).hexdigest()[:32]


def ask(
    inquiries: Sequence[Inquiry], config: JudgeConfig, path: Path, send: Send, stop_flag: StopFlag, log: Console
) -> dict[Inquiry, int | None] | None:
    """The verdict on every inquiry, those in `path` first and the others asked for and appended to it; None where a stop was asked for.

    Replies are written in the order of the inquiries, so an interrupted file ends up as an uninterrupted one; where a request failed,
    those beside it come before it.

    Raises:
        JudgeError: the server cannot be reached, or refuses everything.
    """
    keys = {inquiry: key_of(inquiry, config.model, config.max_tokens) for inquiry in inquiries}
    replies = _read(path)
    missing = [inquiry for inquiry in inquiries if keys[inquiry] not in replies]
    log.say(f"judge {config.model}: {len(inquiries) - len(missing)} of {len(inquiries)} replies are in {path}")
    size = config.concurrency * BATCHES_PER_WRITE
    with ThreadPoolExecutor(config.concurrency) as threads:
        for start in range(0, len(missing), size):
            if stop_flag.requested:
                return None
            log.phase(f"judge: reply {len(inquiries) - len(missing) + start + 1} of {len(inquiries)}")
            chunk = missing[start : start + size]
            sent = [threads.submit(send, make_text(item)) for item in chunk]
            failures = [error for future in sent if (error := future.exception()) is not None]
            found = [
                Reply(keys[item], item[0].value, future.result())
                for item, future in zip(chunk, sent, strict=True)
                if future.exception() is None
            ]
            if not failures:
                _refuse_silence(found, replies, config)
            if found:
                append_rows(path, map(asdict, found))  # also those beside a failure, or the same ones would be asked for again
            if failures:
                raise failures[0]
            replies |= {reply.key: reply for reply in found}
    return {inquiry: replies[key].verdict for inquiry, key in keys.items()}


def make_sender(config: JudgeConfig) -> Send:
    """The way to the server that `config` names: never through a proxy to this machine, and through that of the environment elsewhere.

    Raises:
        ConfigError: the environment has no key, or names a proxy that cannot be used.
    """
    from openai import APIConnectionError, APIStatusError, BadRequestError, DefaultHttpxClient, OpenAI

    url, key = config.url or "", read_key(config.api_key_env)
    try:
        proxy = find_proxy(url)
        http = DefaultHttpxClient(trust_env=not is_this_machine(urlsplit(url).hostname or ""))
    except (ValueError, ImportError) as error:
        reason = _first_line(str(error)).rstrip(".")
        raise ConfigError(
            f"the judge at {url} cannot be asked ({reason}); check analysis.judge.url and the environment's proxies."
        ) from error
    client = OpenAI(base_url=url, api_key=key, timeout=config.timeout_s, max_retries=config.retries, http_client=http)
    through = "" if proxy is None else f" through the proxy {proxy}"
    past = "" if proxy is None else f"; no_proxy={urlsplit(url).hostname} in the environment goes past the proxy"

    def send(text: str) -> str | None:
        try:
            answer = client.chat.completions.create(
                model=config.model, messages=[{"role": "user", "content": text}], temperature=0.0, max_tokens=config.max_tokens
            )
        except BadRequestError:
            return None
        except APIStatusError as error:
            reason = f"it answers{through} with status {error.status_code} ({_first_line(error.message)})"
            raise JudgeError(_sentence(config, reason, "check analysis.judge.url, model and api_key_env" + past)) from error
        except APIConnectionError as error:
            reason = f"{_first_line(str(error)).rstrip('.')}{through} after {config.retries} repetitions"
            advice = "see whether the server runs, and whether analysis.judge.timeout_s is enough" + past
            raise JudgeError(_sentence(config, reason, advice)) from error
        return (answer.choices[0].message.content or "") if answer.choices else ""

    return send


def is_this_machine(host: str) -> bool:
    """Whether a name or an address is that of the machine itself.

    >>> [is_this_machine(host) for host in ("localhost", "127.1.2.3", "::1", "10.0.0.1", "localhost.example.org")]
    [True, True, True, False, False]
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")  # RFC 6761
    return address.is_loopback or address.is_unspecified


def find_proxy(url: str) -> str | None:
    """The proxy of the environment that requests to `url` go through, without its password; None where they go straight."""
    parts = urlsplit(url)
    host, proxies = parts.hostname or "", getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or is_this_machine(host) or proxy_bypass(host):
        return None
    scheme, _, rest = address.rpartition("://")
    return f"{scheme or 'http'}://{rest.rpartition('@')[2]}"


def read_key(variable: str | None) -> str:
    """The key in that environment variable; a server that asks for none gets a word in its place.

    Raises:
        ConfigError: the variable is not set.
    """
    if variable is None:
        return "none"
    if not os.environ.get(variable):
        raise ConfigError(f"analysis.judge.api_key_env is {variable}, which is not set in the environment; export it first.")
    return os.environ[variable]


def _refuse_silence(found: Sequence[Reply], earlier: Mapping[str, Reply], config: JudgeConfig) -> None:
    """One text in a while may be too long for the judge; when all are refused something else is wrong."""
    if all(reply.reply is None for reply in found) and all(reply.reply is None for reply in earlier.values()):
        reason = f"it refuses all of the first {len(found)} requests with status 400"
        raise JudgeError(_sentence(config, reason, "see what it logs; the model must take chat messages, temperature and max_tokens"))


def _sentence(config: JudgeConfig, reason: str, advice: str) -> str:
    return f"the judge {config.model} at {config.url} gives no verdicts: {reason}; {advice}. The same command goes on with what is missing."


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no reason given")


def _read(path: Path) -> dict[str, Reply]:
    """The replies on disk; the last line, which a killed run may have left incomplete, is then cut off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(complete))
    rows = [Reply(**json.loads(line)) for line in complete.splitlines()]
    return {row.key: row for row in rows}
