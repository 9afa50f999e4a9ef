"""The simulator: a trace through the residency core, without bytes.

`config` says what is simulated and what comes out; `instant` serves accesses whose copies end at once; `clock` puts a
virtual clock behind the same core; `run.simulate` chooses between them; `sweep`, `report` and `mattson` are for many.
"""
