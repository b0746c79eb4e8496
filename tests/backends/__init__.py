"""The rim that talks HTTP, tested against recorded replies, a mocked wire and real loopback servers."""
