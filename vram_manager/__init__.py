"""vram_manager: the arbiter between Ollama and ComfyUI on a GPU that they share.

The map of this tree. One value flows: a `Snapshot` (what was seen) becomes a `Decision` (what follows, and
why), which may carry an `Action` (what to ask), which becomes an `Event` (what happened, proven by a later
snapshot).

    __main__ -> cli        the verbs; most only speak to the daemon's socket
    daemon                 wiring and lifetime: builds the parts, one task group, signals, orderly stop
    cycle                  one turn: look, decide, act, tell            <- read this first
    observer               one task per sensor, each with its deadline and cadence; gives a Snapshot
    actuator               the only door out: looks again, asks, says what was asked
    gateway                streaming proxies in front of Ollama and ComfyUI that hold a call until there is room
    admissions, workers    the desk: leases, the line; limits, generations   estimates  how much it will need
    runs                   what ComfyUI runs, and what that needs
    journal, store         the only place that records: ring, SQLite, log line   lease_records, floor_records  two parts
    tenants, history       who has how much of each GPU, and who had   sample_rows, retention  as rows, and for how long
    floors                 what each tenant keeps when nothing of it is wanted, and whether that grows
    nodes, measure         further Ollama servers: where they run their models; how fast, when somebody asks
    metrics, api, webhook  what people and machines read and are told: Prometheus, JSON, the page, events
    domain                 values only          policy    pure rules: values and `now` in, value out
    gpus, backends         the rim: one file per outside system
    config, clock, errors  settings, the two times, everything that is expected to go wrong
    processes, child       who is there, who descends from whom, who ends; a command that is run for somebody
    client                 the standard-library door to the socket, for the CLI and for workers
    report, top, record    what people read: now, live, while a command runs   summary, words  in numbers, in words
    doctor, demo           what is wrong and how to mend it; the story
    simulator              an Ollama and a ComfyUI on one pretended GPU; production never imports it

From `__main__` to a free: cli -> daemon -> cycle -> actuator -> backends/comfyui. For *why*, step aside into
policy/decide; for the proof, into policy/settle.
"""

__version__ = "0.4.0"
