"""How NVML is asked, and what becomes of its errors.

Units and struct versions are those of nvml.h (NVML API 13) as nvidia-ml-py 13 binds them. Two traps of that binding
are avoided throughout: an NVMLError has no hash and compares by `other.value`, and its str() calls into the driver
for codes it does not know. Hence only `error.value` is ever looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from vram_manager.domain.reading import Missing
from vram_manager.gpus._nvml_codes import RENEWING, Code, load, meaning

T = TypeVar("T")


class Asks:
    """The open library. `renew` is set when an answer can only be helped by a new init."""

    def __init__(self) -> None:
        self.nvml: Any = None
        self.is_open = False
        self.renew = False
        self._absent: set[tuple[object, ...]] = set()

    def load(self) -> None:
        """Raises SensorError without a usable binding."""
        if self.nvml is None:
            self.nvml = load()

    def init(self) -> None:
        """Raises the binding's NVMLError when NVML refuses."""
        self.nvml.nvmlInit()
        self.is_open = True
        self._absent.clear()

    def shutdown(self) -> None:
        """Lets the driver go. What nvmlShutdown answers changes nothing, so it is not looked at."""
        if self.is_open:
            self.is_open = False
            with suppress(self.nvml.NVMLError):
                self.nvml.nvmlShutdown()

    def lacks(self, *call: object) -> bool:
        """Whether the driver was found not to have this call."""
        return call in self._absent

    def newest(self, handle: Any, *calls: tuple[Any, ...]) -> Any:
        """The answer of the first call that the driver has; what it lacks is not tried until a new init."""
        for call in calls:
            if call not in self._absent:
                try:
                    return getattr(self.nvml, call[0])(handle, *call[1:])
                except self.nvml.NVMLError as error:
                    if error.value != Code.FUNCTION_NOT_FOUND:
                        raise
                    self._absent.add(call)
        raise self.nvml.NVMLError(int(Code.FUNCTION_NOT_FOUND))

    def field(self, ask: Callable[[], T]) -> T | Missing:
        """The value, or why there is none: every field fails alone."""
        try:
            return ask()
        except self.nvml.NVMLError as error:
            return self.said(error.value)

    def text(self, call: str, *arguments: Any) -> str | None:
        """What the call answers, None where it fails or answers with something that is no text."""
        try:
            return str(getattr(self.nvml, call)(*arguments))
        except UnicodeDecodeError:  # the driver's buffer held no text: a name is not worth a crash
            return None
        except self.nvml.NVMLError as error:
            self.said(error.value)
            return None

    def said(self, code: int) -> Missing:
        """The code in words; remembers whether only a new init can help."""
        self.renew = self.renew or code in RENEWING
        return meaning(code)
