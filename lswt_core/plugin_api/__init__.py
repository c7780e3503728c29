"""Everything plugins may import besides ``interfaces``, ``hooks`` and ``errors``."""
