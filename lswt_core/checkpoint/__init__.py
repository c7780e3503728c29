"""All of a run's state on disk, all or nothing: safetensors and JSON, published by one rename,
verified before use.
"""

from lswt_core.checkpoint.files import Files, Written
from lswt_core.checkpoint.lock import RunLock
from lswt_core.checkpoint.saved import FORMAT, MANIFEST, Saved, verify
from lswt_core.checkpoint.store import Store

__all__ = ["FORMAT", "MANIFEST", "Files", "RunLock", "Saved", "Store", "Written", "verify"]
