"""Runs of the real loop over simulated members in virtual time, with faults: see `rlhf-dist bench chaos`."""
