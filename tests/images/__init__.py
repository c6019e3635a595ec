"""Tests of dockerfiles/."""
