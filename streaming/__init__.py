"""Many live conversations: engine, server, clients."""

from streaming.client import Client, SyncClient

__all__ = ["Client", "SyncClient"]
