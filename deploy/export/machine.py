"""Kept for importers of old; see `deploy.machine`."""

from deploy.machine import available_memory_bytes, cpu_name, machine, usable_cpus

__all__ = ["available_memory_bytes", "cpu_name", "machine", "usable_cpus"]
