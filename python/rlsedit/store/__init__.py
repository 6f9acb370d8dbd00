"""Edits that are never lost: ledger, journal of batches, snapshots, removal (docs/ledger.md)."""
