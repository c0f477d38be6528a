"""Derivatives of recurrent layers."""
