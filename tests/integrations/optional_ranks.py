"""What each of two processes runs for `test_ranks.py` of libraries that need not be installed: Lightning and TRL.

torchrun --nproc-per-node 2 tests/integrations/optional_ranks.py FOLDER [lightning] [trl]
"""

import gc
import os
import sys
import warnings
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

import funcghost as fg
from funcghost import store
from funcghost.integrations.sharded import is_sharded
from tests.integrations.sharded_ranks import devices_with_fsdp
from tests.versions import SHARDS


def lightning(folder: Path) -> None:
    """Seven samples of each process, of which the last batch has one; the test holds the record to one process."""
    tests: Any = import_module("tests.integrations.test_lightning")
    rows, validation = tests.rows_of_ranks()
    # Lightning shuffles what each process has of a loader, also with shuffle=False.
    own = range(int(os.environ["RANK"]), len(rows), 2)
    how: dict[str, Any] = {"strategy": "ddp", "devices": 2, "sampler": own, "use_distributed_sampler": False}
    kept, valued, plain = tests.ours.Record(folder / "values", validation, rule="simpson"), tests.Mine(), tests.Plain()
    for module in (valued, plain):
        module.net[1] = nn.Identity()  # no dropout, which is another one in each process
    tests.fit(valued, rows, kept, **how)
    tests.fit(plain, rows, accumulate_grad_batches=2, gradient_clip_val=0.1, **how)
    for mine, theirs in zip(valued.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert len(kept.accounts) == 4
    for values, rest, change in kept.accounts:
        assert abs(values + rest - change) < 1e-4 * (abs(values) + abs(rest))
    other = [{**batch, "x": batch["x"] + distributed.get_rank()} for batch in validation]
    with pytest.raises(fg.InputError, match="other validation batches"):
        tests.fit(tests.Mine(), rows, tests.ours.Record(folder / "other", other), **how)


def trl(folder: Path) -> None:
    """Packed documents and pairs."""
    tests: Any = import_module("tests.integrations.test_trl")
    gc.freeze()
    for kind, settings in (("sft", {"packing": True, "max_length": 12}), ("dpo", {})):
        torch.manual_seed(1)
        data, steps = tests.rows(kind), {"per_device_train_batch_size": 1, **settings}
        _, wanted = tests.train(kind, False, folder / f"{kind}-plain", data, **steps)
        valued, found = tests.train(kind, True, folder / kind, data, {"rule": "simpson"}, **steps)
        torch.testing.assert_close(found.gradients[0], wanted.gradients[0], rtol=1e-4, atol=1e-6)
        assert_adds_up(valued)
        distributed.barrier()
        table = store.open_record(folder / kind / "values").table()
        once = list(zip(table["step"].to_pylist(), table["sample_id"].to_pylist(), strict=True))
        assert len(set(once)) == len(once)
        assert {sample for _, sample in once} == set(range(5))


def trl_sharded(folder: Path) -> None:
    """Under FSDP2, by accelerate's plugin."""
    tests: Any = import_module("tests.integrations.test_trl")
    made, *others = tests.TRAINERS["sft"]
    with ExitStack() as until_the_end:

        def with_fsdp(*args: Any, **kwargs: Any) -> Any:
            until_the_end.enter_context(devices_with_fsdp())
            return made(*args, **kwargs)

        tests.TRAINERS["sharded"] = (with_fsdp, *others)
        how = {"fsdp": True, "fsdp_config": {}, "gradient_checkpointing": False, "per_device_train_batch_size": 1}
        valued, _ = tests.train("sharded", True, folder, tests.rows("sft"), {"rule": "simpson"}, **how)
        assert is_sharded(valued.model)
        assert_adds_up(valued)


def assert_adds_up(valued: Any) -> None:
    for step in valued.accounts:
        missing = step.change - step.values - step.rest
        assert abs(missing) < 1e-2 * (abs(step.values) + abs(step.rest)) + 2e-6, step


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    if "trl" in sys.argv:
        trl(folder / "trl")
        if SHARDS:
            trl_sharded(folder / "sharded")
    if "lightning" in sys.argv:
        lightning(folder / "lightning")
    assert distributed.get_world_size() == 2
    sys.stdout.write(f"rank {distributed.get_rank()} agrees\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
