"""What many processes add: gradients and directions that are of the samples of all ranks.

May import: all wings up to `corpus`. Read `data_parallel.py` first, then `tensor_parallel.py` (DTensors), `sharded.py`
(models under `fully_shard`), `together.py` (how ranks keep in step), `directions.py` (what is gathered next to the
parameters), `fsdp.py` (all that is known of FSDP2), `compiled_blocks.py` (blocks under `torch.compile`), `plans.py` (a
plan for all) and `faults.py` (who is missing when a rank fails).
`torch.distributed` does the work; nothing here is needed for a single process, and everything runs in one as well.
"""
