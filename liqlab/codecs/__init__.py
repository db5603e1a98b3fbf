"""Event table <-> bytes."""
