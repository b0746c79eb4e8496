"""`vram-manager record`: how much GPU memory is taken while a command runs.

run         the command, its recording, and what is told at the end
recorder    looks again and again, on a thread of its own
sources     who can be asked: the drivers, ComfyUI, the daemon
timeline    looks, and what follows from all of them: pure
output      CSV, sentences, JSON          plot    a picture, with the extra `plot`
"""
