"""What the tests of this wing must notice."""

from tests.mutation import Mutation

COMPILED = "tests/transforms/test_compiled.py"
LIFTING = "tests/transforms/test_lifting.py"
ONE_OP = "tests/transforms/test_one_op.py"
PAIRS = "tests/algebra/test_pairs.py"

MUTATIONS: dict[str, Mutation] = {
    "a Function hides its second derivative": Mutation(
        "transforms/one_op.py", 'hasattr(node, "_forward_cls") or', "False or", (ONE_OP,)
    ),
    "a backward that is not linear": Mutation(
        "transforms/one_op.py", "if due(sizes not in self.verified) and len(losses):", "if False:", (ONE_OP,)
    ),
    "a zero times NaN": Mutation(
        "transforms/one_op.py", "if not all(bool(row.isfinite().all())", "if not all(True", (ONE_OP,)
    ),
    "factors of other sizes are trusted": Mutation(
        "transforms/steps.py",
        "self.due(not checked.factored.knows(outcome.sizes))",
        "self.due(not checked.factored)",
        (PAIRS, "-k", "verified_once"),
    ),
    "what the losses read is not guarded": Mutation(
        "transforms/reading.py",
        'local["losses"].call_function(tx, [local["params"], local["batch"]], {})',
        "pass",
        (COMPILED, "-k", "vmapped_loss or mode_of"),
    ),
    "one graph for all steps": Mutation(
        "transforms/compiling.py",
        "return FunctionType(code,",
        "return FunctionType(function.__code__,",
        (COMPILED, "-k", "graphs_of_its_own"),
    ),
    "numbers of another call": Mutation(
        "transforms/reading.py",
        "not step.prepare(*whole)",
        "False",
        (COMPILED, "-k", "name_the_rows or one_size"),
    ),
    "directions and members swapped": Mutation(
        "transforms/lifting.py",
        "found.unflatten(1, (info.batch_size, k)), 1",
        "found.unflatten(1, (k, info.batch_size)).mT, 1",
        (LIFTING, "-k", "directions"),
    ),
    "other draws for a derivative": Mutation(
        "transforms/lifting.py",
        """            with untouched(self.problem.devices()), replaying(self.drawn):
                losses""",
        """            with untouched(self.problem.devices()):
                losses""",
        (LIFTING, "-k", "dropout"),
    ),
    "derivatives of unweighted losses": Mutation(
        "transforms/lifting.py",
        "column = column.to(losses.dtype)",
        "column = torch.ones_like(losses)",
        (LIFTING, "-k", "transforms"),
    ),
}
