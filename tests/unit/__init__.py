"""Tests of everything that needs no engine."""
