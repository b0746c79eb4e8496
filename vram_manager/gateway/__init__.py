"""The gateways: a streaming reverse proxy in front of Ollama or ComfyUI that can hold a call until there is room.

    proxy                  listening, who is connected, an orderly end; the names that the rest of the rib uses
    head                   heads of messages: values, what belongs to one connection only, how heads are written
    exchange               one request and its answer: what of it may go on, and the gate's part in it
    client_side            the connection that a client made: its requests, one after the other
    upstream_side          the connection to the server behind it: answers on their way back
    peek, calls            what a request's body says as it flows past; which calls load a model
    ollama, comfyui        the gates: they decide when a call may pass        waiting  what they have in common
    gateways               both of one daemon: built, fed, opened and closed

The proxy knows nothing of models. A gate that fails leaves a plain proxy.
"""
