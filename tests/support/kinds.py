"""Kinds of databases that a test chooses."""

from __future__ import annotations

import pytest

on_both = pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)
"""For a test whose fixture `url` is of one kind otherwise."""
