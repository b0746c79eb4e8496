"""An Ollama and a ComfyUI that share one simulated GPU: a stand-in for anything that arbitrates VRAM.

Both really listen, answer in the shapes of the real servers, and disagree with each other about one ledger of
bytes. Point your own arbiter at them, run your story, then compare what it believed with what is true:

    from vram_manager.simulator.serve import serving
    from vram_manager.simulator.world import World, txt2img

    async with World(gpu_gib=24, mode="dynamic") as world:
        async with serving(world.ollama.app) as ollama_url, serving(world.comfyui.app) as comfyui_url:
            ...                                   # chat, render, free; your arbiter in between
        assert world.ollama.counters.loads_with_cpu_layers == 0
        assert world.comfyui.counters.out_of_memory == 0

Time is the event loop's and the day is an injectable `utcnow`, so under a virtual clock (looptime) with
`httpx.ASGITransport` hours pass in milliseconds. Production code never imports this package.

Quirks of Ollama it has (v0.30 and later; `version=` moves the seams):
the CPU/GPU split is decided at load and never again; 1 GiB of margin or a layer spills; a second model is
admitted by the free memory of the moment the first was loaded; a model is in `/api/ps` only once loaded;
`size_vram` leaves out the CUDA context, the projector and, for sliding-window models, most of the cache;
`keep_alive: 0` answers before anything is free; `/api/ps` waits for unloads; `expires_at` may be past;
a new num_ctx or num_gpu reloads; a lost GPU means CPU without a word; a queue that hangs (`scheduler.hang`);
tags over the same weights share one runner, listed under the tag that loaded first; a foreign Origin is a 403,
and with `loopback` a foreign Host too. The clients of Ollama, OpenAI and Anthropic work with it unchanged.
`ollama.asked` and `ollama.served` record every request and on what it ran.

Quirks of ComfyUI it has: `/free` answers before anything is done, acts between prompts and can be lost;
`{"unload_models": false, "free_memory": true}` is the hardest body; every reply stalls during the garbage
collection that follows; torch's cache stays up to 10 s after a prompt; `vram_free` counts it as free;
DynamicVRAM weights are in no torch number and an idle ComfyUI never gives way; under `--highvram` unloading
frees no diffusion weights; memory held by custom nodes; a dead worker behind a healthy HTTP server; pictures
of each step over the websocket. `comfyui.accepted` records every prompt.
"""
