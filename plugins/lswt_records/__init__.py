"""JSON Lines (documents, conversations) and Parquet files as data sources."""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_records.chat import Chat
from lswt_records.jsonl import JsonLines
from lswt_records.parquet import Parquet


@hookimpl
def lswt_components() -> list[type]:
    """Offer the formats."""
    return [JsonLines, Chat, Parquet]
