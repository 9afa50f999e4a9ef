"""The simulator: a trace through the residency core, without bytes.

`config` says what is simulated and what comes out; `instant` serves accesses whose copies end at once; `clock` puts a
virtual clock behind the core itself, with the mover of `links`; `run.simulate` chooses between them, `witness` compares
them. `mattson` has LRU at every size; `sweep` runs many configurations, and the rest tells people what came out.
"""
