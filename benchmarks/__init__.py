"""Measurements and models of this repository; run from a checkout, never installed."""
