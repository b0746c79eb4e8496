"""What one prompt tells the world: messages to its client, progress, and its entry in the history."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from vram_manager.simulator.comfyui_queue import QueueItem


class Run:
    """One prompt while it runs (execution.py:add_message, comfy_execution/progress.py)."""

    def __init__(
        self,
        item: QueueItem,
        send: Callable[[str, dict[str, Any], str | None], None],
        utcnow: Callable[[], datetime],
    ) -> None:
        self.item = item
        self.done: list[str] = []
        self.client_id: str | None = item.extra_data.get("client_id")
        self._send = send
        self._utcnow = utcnow
        self._messages: list[list[Any]] = []
        self._shown: dict[str, Any] = {}
        self._states: dict[str, dict[str, Any]] = {}

    def message(self, event: str, **data: Any) -> None:
        """Kept in the history and told to the prompt's client; without a client_id to nobody."""
        data |= {"prompt_id": self.item.prompt_id, "timestamp": int(self._utcnow().timestamp() * 1000)}
        self._messages.append([event, data])
        self._tell(event, data)

    def failed(self, event: str, node_id: str, **data: Any) -> None:
        kind = self.item.prompt[node_id]["class_type"]
        self.message(event, node_id=node_id, node_type=kind, executed=list(self.done), **data)

    def raised(self, node_id: str, kind: str, why: str) -> None:
        """A node raised. The real entry also carries its traceback and inputs."""
        self.failed(
            "execution_error",
            node_id,
            exception_message=why,
            exception_type=kind,
            traceback=[],
            current_inputs={},
            current_outputs=list(self.done),
        )

    def begin(self, node_id: str) -> None:
        self._state(node_id, "running", 0.0, 1.0)
        self._tell("executing", {"node": node_id, "display_node": node_id, "prompt_id": self.item.prompt_id})

    def progress(self, node_id: str, value: int, maximum: int) -> None:
        data = {"value": value, "max": maximum, "prompt_id": self.item.prompt_id, "node": node_id}
        self._tell("progress", data)
        self._state(node_id, "running", float(value), float(maximum))

    def finish(self, node_id: str) -> None:
        self._state(node_id, "finished", 1.0, 1.0)

    def executed(self, node_id: str, shown: dict[str, Any]) -> None:
        self._shown[node_id] = shown
        data = {"node": node_id, "display_node": node_id, "output": shown, "prompt_id": self.item.prompt_id}
        self._tell("executed", data)

    def history_entry(self) -> dict[str, Any]:
        completed = self._messages[-1][0] == "execution_success"
        meta = {
            node_id: {
                "node_id": node_id,
                "display_node": node_id,
                "parent_node": None,
                "real_node_id": node_id,
            }
            for node_id in self._shown
        }
        status = {"status_str": "success" if completed else "error", "completed": completed}
        return {"outputs": self._shown, "status": status | {"messages": self._messages}, "meta": meta}

    def _tell(self, event: str, data: dict[str, Any]) -> None:
        if self.client_id is not None:
            self._send(event, data, self.client_id)

    def _state(self, node_id: str, state: str, value: float, maximum: float) -> None:
        """progress_state goes to every socket when the prompt has no client."""
        self._states[node_id] = {
            "value": value,
            "max": maximum,
            "state": state,
            "node_id": node_id,
            "prompt_id": self.item.prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
        data = {"prompt_id": self.item.prompt_id, "nodes": dict(self._states)}
        self._send("progress_state", data, self.client_id)
