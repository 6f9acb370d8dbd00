"""Shared by the tests: problems built with a given spectrum, hostile views, tolerances with their reasons."""
