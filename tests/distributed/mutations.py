"""What the tests of this wing must notice."""

from tests.mutation import Mutation

BLOCKS = "tests/distributed/test_compiled_blocks.py"

MUTATIONS: dict[str, Mutation] = {
    "directions in a compiled forward": Mutation(
        "engine/regions.py",
        "_in_the_backward",
        "meta['partitioner_tag'] = 'must_be_in_backward'",
        "meta['partitioner_tag'] = kept",
        (BLOCKS,),
    ),
    "tangents stay in a compiled block": Mutation(
        "engine/regions.py", "walk_through", "own is not before", "False", (BLOCKS,)
    ),
    "ops of a compiled block untold": Mutation(
        "engine/regions.py", "Walked.passed", "tell(capture.digest, now)", "tell", (BLOCKS,)
    ),
}
