"""The messages of a chat, and what can be done to them."""

import json
from pathlib import Path
from typing import Any

_ROLES = ("system", "user", "assistant")


class Conversation:
    """A system prompt perhaps, then questions and answers in turn."""

    def __init__(self, system: str | None) -> None:
        self.messages: list[dict[str, str]] = []
        self.set_system(system or "")

    def set_system(self, text: str) -> None:
        """Put another system prompt in the place of the one that is there; an empty text leaves none."""
        system = [{"role": "system", "content": text}] if text else []
        self.messages[: self._num_system()] = system

    def add(self, question: str, answer: str) -> None:
        """Append a question and what was answered."""
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def with_question(self, question: str) -> list[dict[str, str]]:
        """The prompt that asks it."""
        return [*self.messages, {"role": "user", "content": question}]

    def reset(self) -> None:
        """Forget all but the system prompt."""
        del self.messages[self._num_system() :]

    def undo(self) -> str | None:
        """Forget the last question and what follows it; returns the question, None where there is none."""
        for index in reversed(range(len(self.messages))):
            if self.messages[index]["role"] == "user":
                question = self.messages[index]["content"]
                del self.messages[index:]
                return question
        return None

    def save(self, path: Path) -> None:
        """Write the messages as a JSON list. Raises: OSError."""
        path.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Take the messages of a file instead. Raises: OSError, ValueError; the messages stay as they are then."""
        messages = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError(f"{path} holds no list of messages")
        self.messages = messages

    def _num_system(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] == "system")


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in _ROLES
        and isinstance(value["content"], str)
    )
