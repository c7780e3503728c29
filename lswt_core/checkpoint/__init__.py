"""Checkpoints: safetensors and JSON files in a directory that appears atomically and is verified
against its manifest before use.
"""

from lswt_core.checkpoint.files import Files, Written
from lswt_core.checkpoint.lock import RunLock
from lswt_core.checkpoint.saved import FORMAT, MANIFEST, Saved, verify
from lswt_core.checkpoint.store import Store

__all__ = ["FORMAT", "MANIFEST", "Files", "RunLock", "Saved", "Store", "Written", "verify"]
