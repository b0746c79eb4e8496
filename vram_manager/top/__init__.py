"""`vram-manager top`: the GPUs as they are now, drawn again and again in a terminal.

    seen       what the daemon has said: JSON, and the memory taken over the last minutes      pure
    keys       what a key does: the state of the screen before and after it                    pure
    look       colours, letters and glyphs; text from outside made harmless                    pure
    gpus       bars, marks and charts                                                          pure
    tenants    who has it: tenants, models, ComfyUI, leases, nodes                             pure
    happened   events, decisions, one free with the numbers behind it                          pure
    layout     who gets how many rows                                                          pure
    frame      all of it on so many columns and rows                                           pure
    watch      asks the daemon, in threads
    terminal   the real terminal, and how it was before
    live       the loop between them

`run` is the verb; `picture` draws the same frame as SVG.
"""

from vram_manager.top.live import run
from vram_manager.top.picture import picture

__all__ = ["picture", "run"]
