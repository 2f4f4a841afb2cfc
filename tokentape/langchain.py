"""What a LangChain program asks its models, on the tape: a callback handler, for models that no gateway stands before.

with tokentape.connect(".tokentape") as tape:
    chain.invoke(…, config={"callbacks": [TapeHandler(tape)]})
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from ingest.retelling import Answered
from ingest.telling import OwnSession, Telling
from schemas.events import ToolCallContent
from schemas.requests.jsontext import dump
from tokentape.connection import Connection

try:
    from langchain_core.callbacks import BaseCallbackHandler
    from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages
    from langchain_core.outputs import ChatGeneration, Generation, LLMResult
    from langchain_core.version import VERSION
except ImportError as error:
    raise ImportError(f"tokentape.langchain needs langchain-core (pip install 'tokentape[langchain]'): {error}") from error

CONVERSATIONS = ("thread_id", "session_id", "conversation_id")
"""Under which names a run's metadata tell which conversation it belongs to."""
_INNER = ("model", "model_name", "_type")
"""Names of invocation parameters that are LangChain's or said otherwise."""


class TapeHandler(BaseCallbackHandler):
    """Records each call of a model as a generation: messages, parameters, tokens as they stream, tool calls, usage, failures.

    Runs with the same `thread_id`, `session_id` or `conversation_id` in their metadata are one session; all others of a handler are
    one together. A run goes on if something cannot be recorded: LangChain logs what a handler raises.
    """

    run_inline = True  # in the order in which things happen, also in an event loop; recording takes microseconds

    def __init__(self, tape: Connection, *, user: str | None = None, workflow: str | None = None, tags: Sequence[str] = ()) -> None:
        """Raises `UsageError` for a connection over REST."""
        super().__init__()
        tape.recorder  # noqa: B018  over REST it cannot be, which is said now and not in LangChain's log
        self._tape = tape
        self._labels: dict[str, Any] = {"user": user, "workflow": workflow, "tags": list(tags)}
        self._lock = threading.Lock()
        self._sessions: dict[str, OwnSession] = {}
        self._runs: dict[UUID, Telling] = {}

    @property
    def sessions(self) -> list[str]:
        """The ids of the sessions that it has begun."""
        return [session.id for session in self._sessions.values()]

    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[BaseMessage]], *, run_id: UUID, metadata: Any = None, **kwargs: Any
    ) -> None:
        """A chat model is asked."""
        said = convert_to_openai_messages(messages[0])
        self._begin(run_id, said if isinstance(said, list) else [said], metadata, kwargs)

    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, metadata: Any = None, **kwargs: Any) -> None:
        """A model without roles is asked: its prompt is what a user said."""
        self._begin(run_id, [{"role": "user", "content": prompts[0]}], metadata, kwargs)

    def on_llm_new_token(self, token: str | list[str | dict[str, Any]], *, run_id: UUID, **kwargs: Any) -> None:
        """A piece of an answer."""
        if telling := self._runs.get(run_id):
            for part in [token] if isinstance(token, str) else token:
                telling.token(part if isinstance(part, str) else str(part.get("text") or ""))

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """The answers are complete."""
        telling = self._runs.pop(run_id, None)
        if telling is None:
            return
        several = response.generations[0] if response.generations else []
        first = next((each.message for each in several if isinstance(each, ChatGeneration)), None)
        told: dict[str, Any] = getattr(first, "response_metadata", None) or response.llm_output or {}
        usage: Any = getattr(first, "usage_metadata", None) or {}
        telling.finish(
            *(_answer(index, each) for index, each in enumerate(several)),
            model=told.get("model_name"),
            response_id=told.get("id") or getattr(first, "id", None),
            prompt_tokens=usage.get("input_tokens"),
            completion_tokens=usage.get("output_tokens"),
        )

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """There is no answer, or no more of it: the model failed, or the program let go of it."""
        telling = self._runs.pop(run_id, None)
        if telling is None:
            return
        if isinstance(error, Exception):
            telling.fail(f"{type(error).__name__}: {error}")
        else:
            telling.fail(type(error).__name__, error_type="client_disconnected", origin="client")

    def _begin(self, run_id: UUID, messages: list[dict[str, Any]], metadata: Any, facts: dict[str, Any]) -> None:
        given = dict(facts.get("invocation_params") or {})
        model = given.get("model") or given.get("model_name")
        parameters = {name: _plain(value) for name, value in given.items() if name not in _INNER and value is not None}
        about = {name: str(value) for name, value in (metadata or {}).items() if not name.startswith("ls_")}
        if about:
            parameters["metadata"] = about
        self._runs[run_id] = self._session(metadata or {}).ask(messages, **({"model": model} if model else {}), **parameters)

    def _session(self, metadata: dict[str, Any]) -> OwnSession:
        name = next((str(metadata[key]) for key in CONVERSATIONS if metadata.get(key)), "")
        with self._lock:
            if name not in self._sessions:
                labels = {**self._labels, **({"title": name} if name else {})}
                self._sessions[name] = self._tape.begin(client=f"langchain-core/{VERSION}", **labels)
            return self._sessions[name]


def _answer(index: int, generation: Generation) -> Answered:
    message = generation.message if isinstance(generation, ChatGeneration) else None
    calls, told = [], generation.generation_info or {}
    if isinstance(message, AIMessage):
        calls = [
            ToolCallContent(call_id=call.get("id"), name=call["name"], arguments=dump(call["args"]).decode()) for call in message.tool_calls
        ]
        told = {**told, **message.response_metadata}
    said = {"content": generation.text} if generation.text or not calls else {}
    reason = told.get("finish_reason") or told.get("stop_reason") or told.get("done_reason")
    return Answered(index, said, calls, str(reason) if reason else None)


def _plain(value: Any) -> Any:
    """A parameter as JSON has it; what JSON has no words for as Python shows it."""
    try:
        dump(value)
    except (TypeError, ValueError):
        return repr(value)
    return value
