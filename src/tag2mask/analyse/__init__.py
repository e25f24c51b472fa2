"""Figures and diagnostics of the papers, made from what a finished run left in its work folder."""
