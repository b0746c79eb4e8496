"""Pure rules: (values, now) -> value. No I/O, no clock, no log, no configuration.

`decide` is the public door and repeats the numbered tree; the other files are its words: `accounting` (who
holds what), `demands` (who needs what), `pressure`, `plan` and `evict` (what could be had), `guards` (why not now),
`settle` (has it come back?), `conclude` (what that taught), `repair` (models that fell to the CPU), `manual` (what a
person asks for), `cadence` (when to look again). Beside the tree stand the rules of the desk: `admission` (may I?),
`rooms` (what could be had where), `line` (whose turn is it?), `leases` (what is promised and not yet visible), `frozen`
(what Ollama believes), `limits` and `leaks` of workers, `estimate` and `workflow` (how much will it need?). `Rules` is
all they know of the settings.
"""

from vram_manager.policy.cadence import beat_seconds
from vram_manager.policy.decide import decide
from vram_manager.policy.manual import decide_manual
from vram_manager.policy.rules import Rules
from vram_manager.policy.settle import asked, refused, reposted

__all__ = ["Rules", "asked", "beat_seconds", "decide", "decide_manual", "refused", "reposted"]
