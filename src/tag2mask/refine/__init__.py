"""Refinement of maps and masks: dense CRF, random walk, affinity networks."""
