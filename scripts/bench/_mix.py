"""Requests of every kind, with known answers, for the soak.

A pool of questions is asked once, one at a time, of the idle server; those answers are the known
ones. Under load the same questions come at random, streamed or not, some hung up on midway. An
answer to a greedy question must be the known one, whatever else runs, and the beginning of it where
the client hung up. Drawn answers are counted.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from _server import HOST, Server

# How often a kind comes, relative to the others.
WEIGHTS = {
    "completion": 4,
    "long prompt": 1,
    "prefix hit": 3,
    "chat": 3,
    "tool call": 1,
    "guided JSON": 1,
    "several answers": 1,
    "drawn": 2,
}
OF_EACH = 6
LONG, SHARED = (1200, 1700), 640
WORDS = (
    "Beautiful is better than",
    "Explicit",
    "In the face of ambiguity,",
    "Now is better than",
    "Errors should never",
    "There should be one",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}},
    },
}
CALL = r'<tool_call>\n\{"name": "look_up", "arguments": \{"number": 1?[1-9]\}\}\n</tool_call>'
SCHEMA = {
    "type": "object",
    "properties": {"rule": {"type": "integer", "minimum": 1, "maximum": 19}},
    "required": ["rule"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """A request of one kind; ``greedy`` ones have one answer."""

    kind: str
    path: str
    body: dict[str, Any]
    greedy: bool


class WrongAnswerError(Exception):
    """An answer that is not the known one."""


def questions(vocab: int, seed: int) -> list[Question]:
    """The pool, the same for a seed."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(rng.randint(least, most))]

    beginning = tokens(SHARED, SHARED)
    pool: list[Question] = []

    def add(kind: str, path: str, greedy: bool = True, **body: Any) -> None:
        settled = {"model": "demo", "temperature": 0 if greedy else 0.8} | body
        pool.append(Question(kind, path, settled, greedy))

    for number in range(OF_EACH):
        text = WORDS[number % len(WORDS)]
        length = {"max_tokens": rng.randint(8, 96), "ignore_eos": True}
        completions, chat = "/v1/completions", "/v1/chat/completions"
        said = {"messages": [{"role": "user", "content": text}]}
        add("completion", completions, prompt=tokens(8, 300), **length)
        add("long prompt", completions, prompt=tokens(*LONG), **length)
        add("prefix hit", completions, prompt=beginning + tokens(4, 64), **length)
        add("chat", chat, **said, **length)
        call = {"tools": [TOOL], "structured_outputs": {"regex": CALL}, "max_tokens": 200}
        add("tool call", chat, **said, **call)
        form = {"type": "json_schema", "json_schema": {"name": "rule", "schema": SCHEMA}}
        add("guided JSON", chat, **said, response_format=form, max_tokens=100)
        drawn = {"greedy": False, "prompt": text, "top_p": 0.9, **length}
        add("several answers", completions, n=rng.randint(2, 4), seed=number, **drawn)
        add("drawn", completions, **drawn)
    return pool


def known_answers(server: Server, pool: list[Question]) -> dict[int, str]:
    """The answers of the idle server to the greedy questions, by their place in the pool."""
    return {n: whole(server, q) for n, q in enumerate(pool) if q.greedy}


def ask(
    server: Server,
    pool: list[Question],
    known: dict[int, str],
    rng: random.Random,
    aborts: float,
) -> tuple[str, float, float, list[float], bool]:
    """Ask one random question.

    Returns:
        Its kind; seconds to the first and to the last word, and between words; whether it was
        hung up on.

    Raises:
        WrongAnswerError: the answer is not the known one, or a choice is missing.
        OSError, http.client.HTTPException: the server refused, or broke off.
    """
    weights = [WEIGHTS[question.kind] for question in pool]
    (number,) = rng.choices(range(len(pool)), weights)
    question = pool[number]
    streams = question.kind not in ("tool call", "guided JSON", "several answers")
    began = time.monotonic()
    if not streams or rng.random() < 0.3:
        text = whole(server, question)
        check(question, text, known.get(number), whole_answer=True)
        took = time.monotonic() - began
        return question.kind, took, took, [], False
    hang_up = rng.random() < aborts
    most = rng.randint(1, question.body["max_tokens"]) if hang_up else None
    pieces, gaps, previous = [], [], began
    for piece in streamed(server, question):
        now = time.monotonic()
        gaps.append(now - previous)
        previous = now
        pieces.append(piece)
        if most is not None and len(pieces) >= most:
            break
    check(question, "".join(pieces), known.get(number), whole_answer=most is None)
    return question.kind, gaps[0], previous - began, gaps[1:], most is not None


def check(question: Question, text: str, known: str | None, *, whole_answer: bool) -> None:
    """Compare a greedy answer with the known one."""
    if known is None:
        return
    good = text == known if whole_answer else known.startswith(text)
    if not good:
        raise WrongAnswerError(f"{question.kind}: {text[:80]!r} instead of {known[:80]!r}")


def whole(server: Server, question: Question) -> str:
    """The answer in one piece: its texts, and its tool calls."""
    with _Posted(server, question, question.body) as answer:
        choices = json.loads(answer.read())["choices"]
    if len(choices) != question.body.get("n", 1):
        raise WrongAnswerError(f"{question.kind}: {len(choices)} answers")
    said = []
    for choice in choices:
        message = choice.get("message", {})
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        said.append(json.dumps(calls) if calls else choice.get("text") or message.get("content"))
    return "".join(said)


def streamed(server: Server, question: Question) -> Iterator[str]:
    """The pieces of the answer as they come."""
    with _Posted(server, question, question.body | {"stream": True}) as answer:
        for line in answer:
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                chunk = json.loads(line[6:])
                if "choices" not in chunk:
                    raise http.client.HTTPException(f"the stream has {line[:300]!r}")
                (choice,) = chunk["choices"]
                yield choice.get("text") or choice.get("delta", {}).get("content") or ""
    raise http.client.HTTPException("the stream broke off")


class _Posted:
    """A POST and its answer; the connection closes with the block."""

    def __init__(self, server: Server, question: Question, body: dict[str, Any]) -> None:
        self.connection = http.client.HTTPConnection(HOST, server.port, timeout=300)
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", question.path, json.dumps(body), headers)

    def __enter__(self) -> http.client.HTTPResponse:
        answer = self.connection.getresponse()
        if answer.status != 200:
            raise http.client.HTTPException(f"status {answer.status}: {answer.read()[:300]!r}")
        return answer

    def __exit__(self, *_: object) -> None:
        self.connection.close()
